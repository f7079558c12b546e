import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from fasternet.cli import app
from fasternet.cli._training import print_progress, run_training
from fasternet.models.checkpoint import Preprocessing, load_checkpoint, save_checkpoint
from fasternet.models.registry import create_model
from fasternet.records import load_records
from fasternet.train.loop import Progress
from fasternet.train.recipe import Recipe, load_recipe
from fasternet.train.recipes import RECIPES

QUICK = ("--device", "cpu", "--set", "precision=fp32", "--batch-size", "8", "--input-size", "32")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("runs") / "run"
    return output, run("train", "fasternet_t0", "--data", pictures, "--output", output, "--epochs", 1, *QUICK)


@pytest.fixture(scope="module")
def small(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model folder of a small network for dark and bright pictures, its weights random."""
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    model = create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16, num_classes=2)
    preprocessing = Preprocessing(input_size=32)
    save_checkpoint(folder, model, name="fasternet_t0", class_names=("bright", "dark"), preprocessing=preprocessing)
    return folder


def test_train_prints_the_run_folder_last(trained: tuple[Path, Result]) -> None:
    output, result = trained
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(output)
    assert "top-1" in result.stdout.splitlines()[-2]
    assert "epoch 1/1  loss" in result.stderr
    assert [r.kind for r in load_records(output / "log.jsonl")][:3] == ["run", "epoch", "evaluation"]


def test_train_takes_the_small_recipe_and_what_was_changed_of_it(trained: tuple[Path, Result]) -> None:
    recipe = load_recipe(trained[0] / "recipe.yaml", Recipe)
    assert (recipe.epochs, recipe.batch_size, recipe.input_size, recipe.precision) == (1, 8, 32, "fp32")
    assert (recipe.lr, recipe.clip_grad) == (4e-4, 1.0)


def test_train_resumes_without_repeating_the_recipe(trained: tuple[Path, Result], pictures: Path) -> None:
    result = run("train", "fasternet_t0", "--data", pictures, "--output", trained[0], "--resume", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout == trained[1].stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "batchsize=3"), "did you mean batch_size"),
        (("--recipe", "large"), "'large' is not one of paper, small, finetune, digits"),
        (("--epochs", "0"), "epochs=0 must be at least 1"),
        (("--device", "tpu"), "device 'tpu' must be cpu, cuda"),
        (("--resume",), "no run to resume"),
        (("--recipe", "paper", "--set", "accumulate=3"), "batch_size=4096 must be a multiple of the 3 parts"),
        (("--watch", "aim"), "watcher 'aim' is not one of tensorboard, wandb"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--input-size", "7"), "recipe field input_size=7: fasternet_t0 cannot take pictures of 7 pixels: the input"),
        (("--epochs", "1", "--set", "epochs=3"), "recipe field epochs is given twice, as 3 and as 1: leave one out"),
    ],
)
def test_train_refuses_wrong_options(pictures: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("train", "fasternet_t0", "--data", pictures, "--output", tmp_path / "run", *arguments)
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_train_resume_needs_an_output(pictures: Path) -> None:
    result = run("train", "fasternet_t0", "--data", pictures, "--resume")
    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_train_from_weights_takes_the_recipe_for_it(small: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ("--checkpoint", small, "--epochs", 1, *QUICK)
    result = run("train", "fasternet_t0", "--data", pictures, "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert load_recipe(output / "recipe.yaml", Recipe).layer_decay == RECIPES["finetune"].layer_decay
    assert load_checkpoint(output).model.config.width == 8


def test_train_needs_a_shared_output_under_torchrun(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    result = run("train", "fasternet_t0", "--data", pictures)
    assert result.exit_code == 2
    assert "--output" in result.stderr


@pytest.mark.parametrize("begun", [False, True])
def test_train_stopped_by_ctrl_c_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    output = tmp_path / "a run"

    def stop(*arguments: object, **options: object) -> None:
        if begun:
            output.mkdir()
            (output / "recipe.yaml").write_text("epochs: 3")
        raise KeyboardInterrupt

    monkeypatch.setattr("fasternet.train.classification.train", stop)
    result = run("train", "fasternet_t0", "--data", "digits", "--output", output)
    assert isinstance(result.exception, OSError)
    if begun:
        command = f"fasternet train fasternet_t0 --data digits --output '{output}' --resume"
        assert str(result.exception) == f"stopped at once; go on with: {command}"
    else:
        assert str(result.exception) == "stopped before the first epoch began"


@pytest.mark.parametrize(
    ("save_minutes", "watchers", "words"),
    [
        (10.0, None, ""),
        (2.5, ["tensorboard", "wandb"], "--save-minutes 2.5 --watch tensorboard --watch wandb "),
    ],
)
def test_command_that_goes_on_has_what_follows_the_run(
    tmp_path: Path, save_minutes: float, watchers: list[str] | None, words: str
) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 3")

    def stop(_: object) -> None:
        raise InterruptedError("stopped")

    with pytest.raises(InterruptedError) as error:
        run_training(stop, ["fasternet", "train"], tmp_path, save_minutes=save_minutes, watchers=watchers)
    assert str(error.value) == f"stopped; go on with: fasternet train {words}--output {tmp_path} --resume"


def test_progress_without_a_terminal_is_a_line_a_minute_and_a_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    update = print_progress(lambda: now)
    for step in range(100, 1300, 100):  # as after a resume, 25 seconds each
        update(Progress(1, 2, step, 1300, 6.9, 800.0))
        now += 25
    now -= 20
    update(Progress(1, 2, 1300, 1300, 6.5, 800.0, {"train_loss": 6.5, "seconds": 320.0, "images_per_second": 800.0}))
    now += 55
    update(Progress(2, 2, 100, 1300, 6.4, 800.0))
    assert capsys.readouterr().err.splitlines() == [
        *(
            f"epoch 1/2  step {step}/1300  loss 6.900  800 images/s  {left} min left"
            for step, left in ((400, 9), (700, 8), (1000, 7))
        ),
        "epoch 1/2  loss 6.500  800 images/s  5 min left",
    ]


@pytest.mark.slow
def test_train_in_a_process_is_stopped_and_resumed(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "a run"
    command = [sys.executable, "-m", "fasternet", "train", "fasternet_t0", "--data", str(pictures)]
    command += ["--output", str(output), "--epochs", "30", "--set", "num_workers=2", *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (output / "last" / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader's processes get it too
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: stopped in epoch ")
    assert "the state is saved; go on with: fasternet train" in stderr.splitlines()[-1]
    words = shlex.split(stderr.splitlines()[-1].partition("with: fasternet ")[2])
    resumed = subprocess.run([*command[:3], *words, "--device", "cpu"], **pipes, env=environment, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    epochs = [r.condition["epoch"] for r in load_records(output / "log.jsonl") if r.kind == "epoch"]
    assert epochs == list(range(1, 31))


def test_eval_prints_one_json_document(small: Path, pictures: Path) -> None:
    result = run("eval", "--data", pictures, "--checkpoint", small, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["model"], document["input_size"], document["crop_ratio"]) == ("fasternet_t0", 32, 0.9)
    assert document["num_images"] == 4
    assert document["top5"] == 100
    assert [row["name"] for row in document["per_class"]] == ["bright", "dark"]
    assert document["top1"] == sum(row["top1"] for row in document["per_class"]) / 2


def test_eval_prints_each_class_and_the_whole(small: Path, pictures: Path) -> None:
    result = run("eval", "fasternet_t0", "--data", pictures, "--checkpoint", small, "--device", "cpu")
    assert result.exit_code == 0, result.output
    for word in ("bright", "dark", "top-1 %", "fasternet_t0"):
        assert word in result.stdout


def test_eval_of_the_optimised_network_agrees(small: Path, pictures: Path) -> None:
    arguments = ("eval", "--data", pictures, "--checkpoint", small, "--json", "--device", "cpu", "--num-workers", 0)
    plain, optimised = (json.loads(run(*arguments, *more).stdout) for more in ((), ("--engine", "eager")))
    assert optimised.pop("engine") == "eager"
    assert plain.pop("engine") is None
    assert optimised.pop("loss") == pytest.approx(plain.pop("loss"), rel=1e-4)
    assert optimised == plain


def test_eval_agrees_with_the_end_of_the_training(trained: tuple[Path, Result], pictures: Path) -> None:
    result = run("eval", "--data", pictures, "--checkpoint", trained[0], "--json", "--device", "cpu")
    document = json.loads(result.stdout)
    values = next(r.values for r in load_records(trained[0] / "log.jsonl") if r.kind == "evaluation")
    assert document["per_class"] == values["per_class"]
    assert document["loss"] == pytest.approx(values["loss"], rel=1e-4)


def test_eval_refuses_other_classes(small: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("bright", "dusk"):
        (tmp_path / "two" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "two" / name / f"{number}.png")
    result = run("eval", "--data", tmp_path / "two", "--checkpoint", small)
    assert isinstance(result.exception, ValueError)
    assert "class 1 is 'dark' there and 'dusk' here" in str(result.exception)
    result = run("eval", "--data", "digits", "--checkpoint", small)
    assert "the checkpoint has 2 classes, data digits has 10" in str(result.exception)


def test_eval_refuses_a_checkpoint_that_is_not_there(pictures: Path, tmp_path: Path) -> None:
    result = run("eval", "fasternet_t0", "--data", pictures, "--checkpoint", tmp_path / "none")
    assert isinstance(result.exception, FileNotFoundError)
