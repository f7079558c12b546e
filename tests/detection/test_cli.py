import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fasternet import cli
from fasternet.detection.checkpoint import load_detector, save_detector
from fasternet.detection.detector import create_mask_rcnn
from fasternet.train.detection_recipe import DetectionRecipe
from fasternet.train.recipe import load_recipe

SMALL = ["--width=8", "--epochs=1", "--min-size=64", "--max-size=96", "--device=cpu", "--no-amp"]
SMALL += ["--set=fpn_channels=8", "--set=box_head_width=16", "--set=mask_head_channels=8"]
SMALL += ["--set=regions_per_image=16", "--set=validation_share=0.34"]


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli.app, ["detect", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    printed = invoke("train", "fasternet_t0", "--data", shapes, "--output", output, *SMALL).splitlines()
    assert printed[-1] == str(output)
    assert printed[0].startswith("best checkpoint on 2 validation pictures: box AP ")
    assert "; mask AP " in printed[1]
    return output


def test_train_takes_shortcuts_and_changes(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml", DetectionRecipe)
    assert (recipe.epochs, recipe.min_size, recipe.precision, recipe.fpn_channels) == (1, 64, "fp32", 8)


def test_eval_takes_the_validation_pictures_of_the_run(run: Path, shapes: Path, tmp_path: Path) -> None:
    arguments = ("eval", "--data", shapes, "--checkpoint", run, "--num-workers", 0, "--device", "cpu")
    values = json.loads(invoke(*arguments, "--json", "--output", tmp_path / "results.json"))
    assert (values["num_images"], values["split"]) == (2, "validation")
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluation = next(record["values"] for record in logged if record["kind"] == "evaluation")
    assert values["mask_ap"] == pytest.approx(evaluation["mask_ap"], abs=1e-6)
    assert {result["category_id"] for result in json.loads((tmp_path / "results.json").read_text())} <= {1, 2}
    assert "AP50" in invoke(*arguments, "--split", "training")


def test_eval_scores_a_results_file(shapes: Path, tmp_path: Path) -> None:
    document = json.loads((shapes / "shapes.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    perfect = [{**{key: a[key] for key in keys}, "score": 0.9} for a in document["annotations"]]
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    printed = invoke("eval", "--data", shapes, "--results", tmp_path / "perfect.json", "--split", "all", "--json")
    values = json.loads(printed)
    assert values["box_ap"] == 1
    assert "mask_ap" not in values


def test_predict_draws_and_writes_coco_json(run: Path, shapes: Path, tmp_path: Path) -> None:
    printed = invoke(
        "predict", shapes / "images", "-o", tmp_path / "out", "--checkpoint", run, "--score-threshold", 0.0
    )
    assert printed.strip() == str(tmp_path / "out")
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(document["images"]) == 6
    assert [category["name"] for category in document["categories"]] == ["red", "blue"]
    for image in document["images"]:
        with Image.open(tmp_path / "out" / image["drawing"]) as drawing:
            assert drawing.size == (96, 64)


def test_unreadable_picture_is_named_and_the_others_are_predicted(run: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    words = ["detect", "predict", str(tmp_path / "broken.png"), str(shapes / "images" / "0.png")]
    words += ["-o", str(tmp_path / "out"), "--checkpoint", str(run), "--json"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1
    assert "broken.png" in result.stderr
    assert json.loads(result.stdout)["num_images"] == 1


@pytest.mark.parametrize("name", ["detector.pth", "folder"])
def test_export_writes_published_files_and_folders(run: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    assert invoke("export", "--checkpoint", run, "-o", output).strip() == str(output)
    if name == "folder":
        assert load_detector(output).class_names == ("red", "blue")
    else:
        assert output.stat().st_size > 1000


def test_export_writes_a_file_that_predict_takes(run: Path, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = CliRunner().invoke(
        cli.app, ["detect", "export", "--checkpoint", str(run), "-o", str(tmp_path / "detector.onnx")]
    )
    assert result.exit_code == 0, result.stderr
    assert "compared with PyTorch on " in result.stderr
    picture = shapes / "images" / "0.png"
    threshold = ("--score-threshold", 0.0)
    found = []
    for name, checkpoint in (("onnx", tmp_path / "detector.onnx"), ("torch", run)):
        invoke("predict", picture, "-o", tmp_path / name, "--checkpoint", checkpoint, *threshold)
        document = json.loads((tmp_path / name / "detections.json").read_text())
        found.append([a["score"] for a in document["annotations"]])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "fasternet_t9", "--data", "DATA", "-o", "NEW"], "fasternet_t9"),
        (["train", "fasternet_t0", "--data", "nowhere", "-o", "NEW"], "nowhere"),
        (["train", "fasternet_t0", "--data", "DATA", "-o", "RUN"], "exists already"),
        (["train", "fasternet_t0", "--data", "DATA", "-o", "NEW", "--recipe", "paper"], "recipe 'paper' of detection"),
        (["train", "fasternet_t0", "--data", "DATA", "-o", "NEW", "--set", "mixup=1"], "no field 'mixup'"),
        (["train", "ResNet50", "--data", "DATA", "-o", "NEW", "--set", "freeze=2"], "needs a FasterNet"),
        (["eval", "--data", "DATA"], "give either checkpoint"),
        (["eval", "--data", "DATA", "--checkpoint", "RUN", "--split", "test"], "split=test is not one of"),
        (["eval", "--data", "DATA", "--results", "RESULTS"], "take --split all"),
        (["eval", "--data", "DATA", "--results", "RESULTS", "--engine", "cpu"], "results.json is only scored"),
        (["eval", "--data", "DATA", "--results", "RESULTS", "--device", "cpu"], "results.json is only scored"),
        (["eval", "--data", "DATA", "--checkpoint", "a.onnx", "--device", "cpu"], "a.onnx runs on the CPU as it is"),
        (["train", "fasternet_t0", "--data", "DATA", "-o", "NEW", "--set", "compile=true"], "compile=true is not for"),
        (
            ["train", "fasternet_t0", "--data", "DATA", "-o", "NEW", "--checkpoint", "RUN", "--pretrained"],
            "checkpoint and pretrained are both",
        ),
        (["eval", "--data", "DATA", "--checkpoint", "OTHER", "--split", "all"], "2 categories, the detector 5 classes"),
        (["eval", "--data", "DATA", "--checkpoint", "RUN", "--engine", "fast"], "fast"),
        (["predict", "nowhere.jpg", "-o", "RUN", "--checkpoint", "RUN"], "RUN"),
        (["predict", "DATA", "-o", "NEW", "--checkpoint", "nowhere"], "nowhere"),
        (["predict", "DATA", "-o", "NEW", "--checkpoint", "RUN", "--score-threshold", "2"], "score_threshold=2.0"),
        (["export", "--checkpoint", "RUN", "-o", "detector.engine"], "must end in .onnx"),
        (["export", "--checkpoint", "RUN", "-o", "detector.pth", "--full-masks"], "are for FILE.onnx"),
    ],
)
def test_bad_input_is_one_sentence(words, message: str, run: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    other = tmp_path / "other"
    if "OTHER" in words:
        options = {"width": 8, "depths": (1, 1, 1, 1)}
        save_detector(
            other,
            create_mask_rcnn(
                "fasternet_t0", num_classes=5, fpn_channels=8, box_head_width=8, mask_head_channels=8,
                backbone_options=options,
            ),
        )  # fmt: skip
    places = {
        "DATA": shapes, "RUN": run, "NEW": tmp_path / "new", "OTHER": other, "RESULTS": tmp_path / "results.json",
    }  # fmt: skip
    places = {**places, "detector.pth": tmp_path / "detector.pth"}
    result = CliRunner().invoke(cli.app, ["detect", *(str(places.get(word, word)) for word in words)])
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError | OSError | SystemExit), result.exception
    text = f"{result.exception} {result.stderr}"
    assert message.replace("RUN", str(run)) in text
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "words", [["eval", "--data", "DATA"], ["predict", "DATA", "-o", "NEW"], ["export", "-o", "detector.pth"]]
)
def test_weights_that_are_not_finite_are_refused(words, run: Path, shapes: Path, tmp_path: Path) -> None:
    loaded = load_detector(run)
    loaded.model.backbone.body.embedding.norm.running_var[0] = float("inf")
    save_detector(tmp_path / "broken", loaded.model, class_names=loaded.class_names)
    places = {"DATA": shapes, "NEW": tmp_path / "new", "detector.pth": tmp_path / "detector.pth"}
    words = [*(str(places.get(word, word)) for word in words), "--checkpoint", str(tmp_path / "broken")]
    result = CliRunner().invoke(cli.app, ["detect", *words])
    assert isinstance(result.exception, ValueError)
    assert f"the weights of {tmp_path / 'broken'} are not finite" in str(result.exception)
    assert not any((tmp_path / name).exists() for name in ("new", "detector.pth"))
