"""``fasternet detect``: Mask R-CNN and Faster R-CNN from training to the deployed file (Section 4.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fasternet.cli._common import is_main_process, note, print_json, print_table, shorten_spinning, track
from fasternet.cli._training import choose_output, list_changes, list_options, run_training

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fasternet.data.coco import CocoData
    from fasternet.detection.detector import Detector
    from fasternet.detection.export import OnnxDetector
    from fasternet.train.detection_recipe import DetectionRecipe
    from fasternet.train.loop import Hooks

detect = typer.Typer(help="Detection and instance segmentation.", no_args_is_help=True)

MAX_CLASSES = 40  # that are printed one by one

MMDET_SUFFIXES = (".pth", ".pt", ".safetensors")  # of published detectors
CHECKPOINT_HELP = "Run folder, model folder, published detector (.pth), or exported FILE.onnx."

Data = Annotated[str, typer.Option(help="COCO annotation file, or a folder with one.")]
Checkpoint = Annotated[Path, typer.Option(help=CHECKPOINT_HELP)]
Engine = Annotated[
    str, typer.Option(help="What runs the backbone: eager, compile, onnxruntime, openvino, cpu or auto.")
]
Precision = Annotated[str, typer.Option(help="Of the backbone: fp32 or bf16.")]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Pictures at once in each process; larger batches pad them and may move the AP a little."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@detect.command("train")
def train(
    backbone: Annotated[str, typer.Argument(help="fasternet_t0 ..., or a rival of Table 4: ResNet50, PVT-Small ...")],
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder. [default: outputs/NAME-DATA-TIME]")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="paper (S, M and L) or small. [default: small]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    boxes_only: Annotated[bool, typer.Option("--boxes-only", help="Faster R-CNN, without masks.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=...")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set batch_size=...")] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set lr=...")] = None,
    min_size: Annotated[int | None, typer.Option(help="Short for --set min_size=...")] = None,
    max_size: Annotated[int | None, typer.Option(help="Short for --set max_size=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="Short for --set precision=auto, or fp32.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to start from, the backbone's or a whole detector's: a folder or file.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from published ImageNet weights.")] = False,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, of a FasterNet.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output, with its recipe.")] = False,
    save_minutes: Annotated[float, typer.Option(min=0, help="Time between two states within an epoch.")] = 10.0,
    watchers: Annotated[
        list[str] | None, typer.Option("--watch", help="tensorboard or wandb; repeatable. log.csv comes always.")
    ] = None,
) -> None:
    """Train a detector on pictures with COCO annotations; the last line printed is the run folder.

    Masks are learned where the annotations have them. Under torchrun all its processes train. Pictures without a
    validation file of their own are split by the seed.

    Example: fasternet detect train fasternet_t0 --data fruits_nuts --output outputs/fruits
    """
    shorten_spinning()
    from fasternet.detection.task import train_detector

    folder = choose_output(output, backbone, data, resume=resume)
    shortcuts = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    changes = list_changes(changes, {**shortcuts, "min_size": min_size, "max_size": max_size}, amp=amp)
    chosen = _choose_recipe(recipe, changes, backbone, folder if resume else None)

    def run(hooks: Hooks) -> None:
        train_detector(
            backbone,
            data,
            folder,
            recipe=chosen,
            kind="faster_rcnn" if boxes_only else None,
            resume=resume,
            checkpoint=checkpoint,
            pretrained=pretrained,
            backbone_options=None if width is None else {"width": width},
            device=device,
            hooks=hooks,
        )

    command = ["fasternet", "detect", "train", backbone, "--data", data, *(["--boxes-only"] if boxes_only else [])]
    command += list_options({"--width": width, "--device": device})
    run_training(run, command, folder, save_minutes=save_minutes, watchers=watchers)
    if is_main_process():
        _print_result(folder)


def _choose_recipe(name: str | None, changes: list[str], backbone: str, run: Path | None) -> DetectionRecipe:
    """Return the recipe of the run to resume, or the one that is named, with its changes."""
    from fasternet.train.detection_recipe import DetectionRecipe, find_detection_recipe
    from fasternet.train.recipe import load_recipe, parse_overrides

    if name is None and run is not None and (run / "recipe.yaml").is_file():
        recipe = load_recipe(run / "recipe.yaml", DetectionRecipe)
    else:
        recipe = find_detection_recipe(name or "small", backbone)
    return parse_overrides(recipe, changes)


def _print_result(folder: Path) -> None:
    from fasternet.records import load_records

    for record in load_records(folder / "log.jsonl"):
        if record.kind == "evaluation":
            values = record.values
            print(f"best checkpoint on {values['num_images']} {values['split']} pictures: {_describe(values)}")
    print(folder)


def _describe(values: Mapping[str, Any]) -> str:
    parts = [
        f"{kind} AP {_show(values[f'{kind}_ap'])}, AP50 {_show(values[f'{kind}_ap50'])}, "
        f"AP75 {_show(values[f'{kind}_ap75'])}"
        for kind in ("box", "mask")
        if f"{kind}_ap" in values
    ]
    return "; ".join(parts)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@detect.command("eval")
def evaluate(
    data: Data,
    checkpoint: Annotated[Path | None, typer.Option(help=CHECKPOINT_HELP)] = None,
    results: Annotated[
        Path | None, typer.Option(help="Score a file in COCO's result format instead, of whatever program.")
    ] = None,
    split: Annotated[str, typer.Option(help="validation, training or all.")] = "validation",
    engine: Engine = "eager",
    precision: Precision = "fp32",
    batch_size: BatchSize = 1,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 2,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write what was found in COCO's result format.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure the AP of boxes and masks as COCO does.

    Data without a validation file of their own are split as in the run of the checkpoint. Under torchrun the processes
    share the pictures out.

    Example: fasternet detect eval --data fruits_nuts --checkpoint outputs/fruits
    """
    shorten_spinning()
    from fasternet.detection.evaluate import evaluate_detector, score_results
    from fasternet.detection.results import load_results, save_results
    from fasternet.detection.task import select_pictures
    from fasternet.train.device import select_device
    from fasternet.train.distributed import join_world

    if (checkpoint is None) == (results is None):
        raise ValueError("give either checkpoint, a detector, or results, a file to score")
    if results is not None and (engine, precision, device) != ("eager", "fp32", None):
        raise ValueError(f"engine, precision and device are for a checkpoint, and {results} is only scored")
    target = select_device(device)
    with join_world(target) as world:
        if results is not None:
            pictures = select_pictures(data, split)
            found = load_results(results, pictures)
            masks = pictures.has_masks and all("segmentation" in result for result in found)
            evaluation = score_results(pictures, found, masks=masks)
        else:
            loaded = _load(cast(Path, checkpoint), engine, precision, device)
            has_masks = loaded.detector.config.kind == "mask_rcnn"
            pictures = select_pictures(data, split, loaded.recipe, masks=has_masks)
            _check_classes(loaded, pictures)
            evaluation = evaluate_detector(
                loaded.predict,
                pictures,
                masks=has_masks and pictures.has_masks,
                batch_size=batch_size,
                num_workers=num_workers,
                world=world,
                track=track,
            )
        if world.is_main:
            if output is not None:
                save_results(output, evaluation.results)
            values = {**evaluation.values(), "split": split}
            print_json(values) if json else _print_evaluation(values)


@detect.command("predict")
def predict(
    images: Annotated[list[str], typer.Argument(help="Picture files, and folders of pictures.")],
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for drawings and detections.json.")],
    score_threshold: Annotated[float, typer.Option(help="Weaker detections are left out.")] = 0.5,
    engine: Engine = "eager",
    precision: Precision = "fp32",
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run with this output stopped.")] = False,
    json: Json = False,
) -> None:
    """Find objects: draw boxes, masks, labels and scores, and write detections.json in COCO's format.

    A picture that cannot be read is named on standard error; the others are predicted, and the exit status is 1.

    Example: fasternet detect predict fruits_nuts/images -o outputs/found --checkpoint outputs/fruits
    """
    shorten_spinning()
    from fasternet.detection.files import predict_to_folder
    from fasternet.detection.predictor import DetectionPredictor

    loaded = _load(checkpoint, engine, precision, device)
    predictor = DetectionPredictor.from_detector(loaded.detector, loaded.class_names, loaded.category_ids)
    done = predict_to_folder(
        predictor,
        images,
        output,
        score_threshold=score_threshold,
        resume=resume,
        on_error=lambda error: note(f"error: {error}"),
        track=track,
    )
    if json:
        print_json({**dataclasses.asdict(done), "document": str(done.document)})
    else:
        note(f"{done.num_detections:,} objects found in {done.num_images:,} pictures")
        print(output)
    if done.errors:
        raise typer.Exit(1)


@detect.command("export")
def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="FILE.onnx, FILE.pth in the published layout, or a model folder.")
    ],
    full_masks: Annotated[
        bool, typer.Option("--full-masks", help="Of ONNX: masks of the whole picture, not of the boxes.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Of ONNX: compare on this picture. [default: noise]")] = None,
    json: Json = False,
) -> None:
    """Write a detector into one file that runs elsewhere; an ONNX file is run and compared before it gets its name.

    Example: fasternet detect export --checkpoint outputs/fruits -o fruits.onnx
    """
    from torchvision.transforms.functional import to_tensor

    from fasternet.data.images import load_image
    from fasternet.detection.checkpoint import save_detector
    from fasternet.detection.detector import Detector
    from fasternet.detection.export import export_onnx
    from fasternet.detection.mmdet import save_mmdet

    loaded = _load(checkpoint, None)
    names: dict[str, Any] = {"class_names": loaded.class_names, "category_ids": loaded.category_ids}
    differences: dict[str, float] = {}
    if not isinstance(loaded.detector, Detector):
        raise ValueError(
            f"{checkpoint} is an exported file already: name the run or model folder that it was made from"
        )
    if output.suffix == ".onnx":
        example = None if picture is None else to_tensor(load_image(picture))
        differences = export_onnx(loaded.detector, output, full_masks=full_masks, example=example, **names)
    elif full_masks or picture is not None:
        raise ValueError(f"full_masks and picture are for FILE.onnx, and output is {output}")
    elif output.suffix in MMDET_SUFFIXES:
        save_mmdet(output, loaded.detector)
        config = loaded.detector.config
        note(
            "such a file keeps weights alone, and `eval` and `predict` run it at 800/1333 px: in Python it is "
            f"load_mmdet({str(output)!r}, min_size={config.min_size}, max_size={config.max_size}, "
            f"antialias={config.antialias})"
        )
    elif output.suffix:
        raise ValueError(
            f"output {output} must end in .onnx, {', '.join(MMDET_SUFFIXES)}, or be a folder without a dot"
        )
    else:
        save_detector(output, loaded.detector, facts=loaded.facts, **names)
    if json:
        print_json({"output": str(output), "differences": differences})
        return
    if differences:
        number = differences.pop("num_detections")
        largest = ", ".join(f"{name} differ by {value:.1g}" for name, value in differences.items())
        note(f"run in ONNX Runtime and compared with PyTorch on {number:.0f} detections: at most, {largest}")
    print(output)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A detector from a run or model folder, a published file or an ONNX file, ready for pictures on the CPU."""

    detector: Detector | OnnxDetector
    class_names: Sequence[str] | None
    category_ids: Sequence[int] | None
    facts: Mapping[str, Any]
    device: torch.device | None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it was trained with, where that is known."""
        return cast(Mapping[str, Any], self.facts.get("recipe", {}))

    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects; masks are not laid into the pictures."""
        if not hasattr(self.detector, "transform"):
            return self.detector(images)
        with self.detector.transform.keep_masks_small():
            return cast("list[dict[str, Tensor]]", self.detector([image.to(self.device) for image in images]))


def _load(checkpoint: Path, engine: str | None, precision: str = "fp32", device: str | None = None) -> Loaded:
    """Load a detector, optimised for an engine; None leaves it as it is."""
    from fasternet.detection.checkpoint import load_detector
    from fasternet.detection.evaluate import check_finite
    from fasternet.detection.export import load_onnx
    from fasternet.detection.mmdet import load_mmdet
    from fasternet.detection.optimize import optimize_detector
    from fasternet.train.device import select_device

    if checkpoint.suffix == ".onnx":
        if (engine or "eager", precision, device) != ("eager", "fp32", None):
            raise ValueError(f"engine, precision and device are not for ONNX: {checkpoint} runs on the CPU as it is")
        onnx = load_onnx(checkpoint)
        return Loaded(onnx, onnx.class_names, onnx.category_ids, {}, None)
    if checkpoint.suffix in MMDET_SUFFIXES and not checkpoint.is_dir():
        detector, names, numbers, facts = load_mmdet(checkpoint), None, None, {}
    else:
        loaded = load_detector(checkpoint)
        detector, names, numbers, facts = loaded.model, loaded.class_names, loaded.category_ids, dict(loaded.facts)
    check_finite(detector, checkpoint)
    target = None if engine is None else select_device(device)
    if engine is not None:
        optimized = optimize_detector(detector.to(target), engine=engine, precision=precision)
        if choice := optimized.reasons.get("choice"):
            note(f"engine auto: {choice}")
        detector = optimized
    return Loaded(detector, names, numbers, facts, target)


def _check_classes(loaded: Loaded, pictures: CocoData) -> None:
    """Refuse pictures of other classes than the detector's.

    Raises:
        ValueError: Names or their number differ.
    """
    wanted = loaded.detector.config.num_classes
    if len(pictures.class_names) != wanted:
        raise ValueError(f"{pictures.source} has {len(pictures.class_names)} categories, the detector {wanted} classes")
    if loaded.class_names is not None and tuple(loaded.class_names) != pictures.class_names:
        pairs = zip(loaded.class_names, pictures.class_names, strict=True)
        ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
        raise ValueError(f"{pictures.source} has the category {theirs!r} where the detector has the class {ours!r}")


def _print_evaluation(values: Mapping[str, Any]) -> None:
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in values]
    title = f"{values['num_images']} pictures ({values['split']})"
    sizes = ("", "50", "75", "_small", "_medium", "_large")
    rows = [(f"AP{size.replace('_', ' ')}", *(values[f"{kind}_ap{size}"] for kind in kinds)) for size in sizes]
    print_table(("", *kinds), rows, title=title)
    classes = sorted(values["per_class"], key=lambda row: -row["num_objects"])
    shown = [row for row in classes if row["num_objects"]][:MAX_CLASSES]
    columns = ("class", "objects", *(f"{kind} AP" for kind in kinds))
    print_table(columns, [(r["class_name"], r["num_objects"], *(r[f"{kind}_ap"] for kind in kinds)) for r in shown])
    if hidden := len(classes) - len(shown):
        note(f"{hidden} further classes, or classes without objects: --json lists all")
