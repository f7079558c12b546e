import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.benchmark import training
from fasternet.benchmark.plain_loop import PlainLoop
from fasternet.benchmark.training import find_obstacle, measure_training
from fasternet.data.datasets import create_dataset
from fasternet.models.checkpoint import Preprocessing
from fasternet.records import Record
from fasternet.report.speed import tell_limit
from fasternet.timing import Measurement, measure
from fasternet.train.classification import create_classification
from fasternet.train.recipe import Recipe, parse_overrides
from fasternet.train.recipes import RECIPES, find_recipe

# timm leaves the files that it reads to be closed by the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

RECIPE = Recipe(
    epochs=3,
    batch_size=4,
    lr=1e-3,
    warmup_epochs=1,
    weight_decay=0.05,
    ema_decay=0.9,
    input_size=32,
    random_resized_crop=(0.5, 1.0),
    flip=True,
    precision="fp32",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten noisy pictures of each of two classes, so that sixteen are for training."""
    root = tmp_path_factory.mktemp("data") / "brightness"
    generator = np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 190)):
        (root / name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.normal(level, 20, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NUM_QUICK_BLOCKS", 2)


def run(pictures: Path, **options: Any) -> list[Record]:
    return list(measure_training("fasternet_t0", str(pictures), **{"recipe": RECIPE, "quick": True, **options}))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script that prints its arguments and the lines that timm's prints."""
    path = tmp_path_factory.mktemp("timm") / "train.py"
    path.write_text(
        "import sys\nprint(' '.join(sys.argv[1:]))\n"
        "line = 'Train: 0 [   {}/3 (  0%)]  Loss: 1.6 (1.6)  Time: 0.5s,  {}/s  (0.3s,  {}/s)  LR: 1.0e-3'\n"
        "for step, speed in enumerate((50.0, 80.0, 96.5)):\n"
        "    print(line.format(step, 2 * speed, speed), file=sys.stderr)\n"
    )
    return path


def test_all_parts_stand_beside_the_plain_loop(pictures: Path, stub: Path) -> None:
    records = run(pictures, timm_script=stub)
    *latencies, control, ratio, script = records
    subjects = [f"fasternet_t0:{part}" for part in ("data", "step", "both")]
    assert [r.subject for r in latencies] == [*subjects, "plain:fasternet_t0:both"]
    assert {r.suite for r in records} == {"training-speed"}
    for record in latencies:
        assert record.condition["num_steps"] == 4
        assert record.values["images_per_second"] == pytest.approx(4e3 / record.values["latency_ms"])
        assert len(record.samples["latency_ms"]) == 2
    assert (control.subject, ratio.subject) == ("plain:fasternet_t0:both", "fasternet_t0:both")
    assert control.condition["baseline"] == ratio.condition["baseline"] == "plain:fasternet_t0:both"
    speeds = {r.subject: r.values["latency_ms"] for r in latencies}
    assert ratio.values["ratio"] == pytest.approx(speeds[ratio.subject] / speeds[control.subject])
    assert "limits" in (tell_limit(latencies) or "")
    assert script.values["images_per_second"] == 96.5
    assert script.condition["interleaved"] is False


def test_what_is_timed_is_the_training_loop_over_a_stretch(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call trains as many steps as the stretch has, in copies of the network that do not meet."""
    steps: list[int] = []
    original = training.train_epoch

    def train_epoch(run: Any, hooks: Any) -> dict[str, Any]:
        before = [parameter.detach().clone() for parameter in run.task.model.parameters()]
        values = original(run, hooks)
        steps.append(run.step)
        assert not all(map(torch.equal, before, run.task.model.parameters()))
        return values

    seen: dict[str, Measurement] = {}

    def measure_once(calls: dict[str, Any], **options: Any) -> Measurement:
        steps.clear()
        for call in calls.values():
            call()
        seen["done"] = measure({name: lambda: None for name in calls}, num_blocks=2, min_block_s=0, warmup_s=0)
        return dataclasses.replace(seen["done"], baseline=options["baseline"])

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    monkeypatch.setattr(training, "measure", measure_once)
    run(pictures)
    assert steps == [4, 4]  # the step alone, and both


def test_plain_loop_that_learns_something_else_is_not_timed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PlainLoop.__init__

    def init(self: PlainLoop, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.criterion.smoothing, self.criterion.confidence = 0.2, 0.8

    monkeypatch.setattr(PlainLoop, "__init__", init)
    records = run(pictures)
    assert records[0].subject == "plain:fasternet_t0:both"
    assert records[0].values["error"].startswith("wrong: loss ")
    assert [r.kind for r in records] == ["latency"] * 4 + ["ratio"]
    assert records[-1].subject == records[-1].condition["baseline"] == "fasternet_t0:both"


@pytest.mark.parametrize("change", [{"weight_decay": 0.5}, {"clip_grad": 1e-3}, {"lr": 5e-3}])
def test_second_loss_shows_another_step(
    pictures: Path, change: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With large rates, so that what a step does is seen at once."""
    recipe = dataclasses.replace(RECIPE, lr=2e-2, ema_decay=None)
    task = create_classification(
        "fasternet_t0", str(pictures), recipe=training._hold_rate(recipe), model_options={}, device=torch.device("cpu")
    )
    batch = next(iter(task.batches(0)))

    def compare(plain_recipe: Recipe) -> str | None:
        plain = PlainLoop(
            "fasternet_t0", pictures, plain_recipe, num_classes=2, preprocessing=Preprocessing(input_size=32),
            num_workers=0, device=torch.device("cpu"),
        )  # fmt: skip
        return training._find_difference(task, plain, batch)

    assert compare(recipe) is None
    assert "in step 2" in (compare(dataclasses.replace(recipe, **change)) or "")


def test_pictures_are_laid_out_in_the_order_of_their_classes(pictures: Path, tmp_path: Path) -> None:
    dataset = create_dataset(pictures)
    laid = create_dataset(training._lay_out(dataset, tmp_path / "laid"))
    assert laid.labels == dataset.labels
    assert [laid.read(i) for i in range(len(laid))] == [dataset.read(i) for i in range(len(dataset))]


def test_script_is_told_the_recipe_and_the_pictures(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys, pathlib\npathlib.Path(__file__).with_suffix('.txt').write_text(' '.join(sys.argv))")
    record = run(pictures, timm_script=script)[-1]
    assert record.values["error"] == "failed: it printed nothing"
    words = script.with_suffix(".txt").read_text()
    for part in (
        f"{pictures.parent} --train-split brightness --val-split brightness --model fasternet_t0",
        "--batch-size 4", "--input-size 3 32 32", "--lr 0.001", "--clip-grad 1.0", "--channels-last",
        "--model-ema-decay 0.9", "--smoothing 0.1",
    ):  # fmt: skip
        assert part in words
    assert "--amp" not in words


def test_script_that_fails_says_so(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('train.py: error: no such model')")
    assert run(pictures, timm_script=script)[-1].values["error"] == "failed: train.py: error: no such model"


def test_recipes_that_the_plain_loop_lacks_are_refused(pictures: Path) -> None:
    assert find_obstacle(RECIPE) is None
    with pytest.raises(ValueError, match=r"has no mixup=0\.2, teacher=t: .*, --set mixup=0\.0 --set teacher=none$"):
        run(pictures, recipe=dataclasses.replace(RECIPE, mixup=0.2, teacher="t"))


@pytest.mark.parametrize("name", ["paper", *RECIPES])
def test_every_recipe_is_measured_with_the_words_of_its_refusal(name: str) -> None:
    recipe = find_recipe(name, "fasternet_s")
    words = (find_obstacle(recipe) or "").partition("--set ")[2].split(" --set ")
    assert find_obstacle(parse_overrides(recipe, list(filter(None, words)))) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is not one"),
        ({"recipe": dataclasses.replace(RECIPE, batch_size=64)}, "batch_size=64 is more than the 16 training"),
        ({"timm_script": Path("nowhere.py")}, "timm_script nowhere.py is no file"),
    ],
)
def test_wrong_arguments_are_one_sentence(pictures: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(pictures, **options)


@pytest.mark.multiprocess
def test_loaders_processes_serve_every_stretch(pictures: Path) -> None:
    records = run(pictures, recipe=dataclasses.replace(RECIPE, num_workers=2))
    assert [r.kind for r in records] == ["latency"] * 4 + ["ratio"] * 2
    assert "error" not in records[3].values
