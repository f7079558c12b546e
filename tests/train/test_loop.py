import dataclasses
import re
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasternet.models.checkpoint import load_checkpoint
from fasternet.records import load_records
from fasternet.train import loop
from fasternet.train import run as run_folder
from fasternet.train.classification import Classification, train
from fasternet.train.loop import Hooks, Progress
from fasternet.train.recipe import Recipe, load_recipe
from fasternet.train.state import load_state

TINY_MODEL = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16}


@pytest.fixture
def run(pictures, recipe):
    """Train the tiny network; arguments of ``train`` and fields of the recipe can be given."""

    def start(output: Path, *, data: Path = pictures, model: str = "fasternet_t0", **options) -> Path:
        names = {field.name for field in dataclasses.fields(recipe)}
        fields = {name: options.pop(name) for name in names & set(options)}
        hooks = Hooks(
            **{name: options.pop(name) for name in {f.name for f in dataclasses.fields(Hooks)} & set(options)}
        )
        arguments = {"recipe": dataclasses.replace(recipe, **fields), "model_options": TINY_MODEL, "device": "cpu"}
        arguments["hooks"] = hooks
        return train(model, str(data), output, **{**arguments, **options})

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    """Hold a run that was never stopped; the first test that needs it makes it."""
    return {"output": tmp_path_factory.mktemp("runs") / "finished"}


@pytest.fixture
def uninterrupted(finished, run) -> Path:
    output = finished["output"]
    return output if output.exists() else run(output)


def stop_at(epoch: int, step: int):
    """Return a progress callback that presses Ctrl-C; step 0 is the end of the epoch."""

    def progress(state: Progress) -> None:
        if state.epoch == epoch and (state.values is not None if step == 0 else state.step == step):
            raise KeyboardInterrupt

    return progress


def assert_same_run(one: Path, other: Path) -> None:
    states = [load_state(folder / "last" / "state.pt") for folder in (one, other)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)
    best = [load_checkpoint(folder / "best").model.state_dict() for folder in (one, other)]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=0)
    timings = ("seconds", "images_per_second")
    logs = [
        [
            (r.kind, r.subject, dict(r.condition), {k: v for k, v in r.values.items() if k not in timings})
            for r in load_records(folder / "log.jsonl")
        ]
        for folder in (one, other)
    ]
    assert logs[0] == logs[1]


def test_train_fills_the_run_folder(uninterrupted: Path, recipe) -> None:
    records = load_records(uninterrupted / "log.jsonl")
    num_mistakes = round(4 - 4 * records[4].values["top1"] / 100)
    kinds = ["run", "epoch", "epoch", "epoch", "evaluation"] + (num_mistakes + 4) * ["prediction"]
    assert [r.kind for r in records] == kinds
    assert {r.suite for r in records} == {"train"}
    assert records[0].subject == "fasternet_t0"
    assert records[0].condition["data"] == "brightness"
    assert records[0].values["num_train"] == 20
    assert records[0].values["num_validation"] == 4
    assert load_recipe(uninterrupted / "recipe.yaml", Recipe) == recipe
    epochs = [r.values for r in records if r.kind == "epoch"]
    assert set(epochs[0]) == {
        "train_loss", "validation_loss", "top1", "top5", "lr", "images_per_second", "seconds",
    }  # fmt: skip
    assert records[4].values["top1"] == max(values["top1"] for values in epochs)
    assert load_state(uninterrupted / "last" / "state.pt")["epoch"] == 3
    for name in ("best", "last"):
        checkpoint = load_checkpoint(uninterrupted / name)
        assert checkpoint.class_names == ("bright", "dark")
        assert checkpoint.preprocessing.input_size == recipe.input_size


def test_train_ends_with_sheets_of_predictions(uninterrupted: Path) -> None:
    records = [r for r in load_records(uninterrupted / "log.jsonl") if r.kind == "prediction"]
    lot = [r for r in records if r.values["role"] == "lot"]
    assert len({r.subject for r in lot}) == len(lot) == 4
    mistakes = [r for r in records if r.values["role"] == "mistake"]
    assert {r.subject for r in mistakes} == {r.subject for r in lot if r.values["label"] != r.values["truth"]}
    assert [r.values["loss"] for r in mistakes] == sorted((r.values["loss"] for r in mistakes), reverse=True)
    for record in records:
        assert record.subject.split("/")[0] == record.values["truth"]
        assert record.values["top"][0] == [record.values["label"], record.values["probability"]]
        assert sum(probability for _, probability in record.values["top"]) == pytest.approx(1, abs=1e-5)
        with Image.open(uninterrupted / record.attachments["picture"]) as picture:
            assert picture.size == (48, 40)


def test_train_learns_to_tell_dark_from_bright(run, tmp_path: Path) -> None:
    output = run(tmp_path / "run", epochs=8, mixup=0.0, cutmix=0.0, rand_augment=None, lr=5e-3)
    losses = [r.values["train_loss"] for r in load_records(output / "log.jsonl") if r.kind == "epoch"]
    evaluation = next(r for r in load_records(output / "log.jsonl") if r.kind == "evaluation")
    assert losses[-1] < 0.6 * losses[0]
    assert evaluation.values["top1"] == 100


@pytest.mark.parametrize(("accuracies", "best"), [((50, 75, 75), 3), ((50, 75, 50), 2), ((75, 50, 50), 1)])
def test_train_keeps_the_best_epoch_and_of_equal_ones_the_last(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracies: tuple[int, ...], best: int
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def judge(self, model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"validation_loss": 1.0, "top1": accuracies[len(seen) - 1], "top5": 100.0}

    monkeypatch.setattr(Classification, "evaluate", judge)
    output = run(tmp_path / "run")
    weights = load_checkpoint(output / "best").model.state_dict()
    torch.testing.assert_close(weights, seen[best - 1], rtol=0, atol=0)


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (2, 2), (3, 1), (2, 0), (3, 0)])
def test_train_stopped_and_resumed_equals_uninterrupted_bitwise(
    run, uninterrupted: Path, tmp_path: Path, epoch: int, step: int
) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(output, progress=stop_at(epoch, step))
    run(output, resume=True)
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize("name", ["append_records", "save_state"])
def test_train_stopped_while_it_saves_and_resumed_equals_uninterrupted(
    run, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    output, original, calls = tmp_path / "run", getattr(run_folder, name), []

    def stop_at_third_call(path: Path, content: object) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, name, stop_at_third_call)
        with pytest.raises(KeyboardInterrupt):
            run(output)
    run(output, resume=True)
    assert_same_run(output, uninterrupted)


def test_train_resumed_after_a_torn_line_mends_the_log(run, uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(output, progress=stop_at(2, 1))
    with (output / "log.jsonl").open("a") as file:
        file.write('{"schema": 1, "suite": "tra')
    run(output, resume=True)
    assert_same_run(output, uninterrupted)


def test_train_resumed_after_its_end_changes_nothing(run, tmp_path: Path, uninterrupted: Path) -> None:
    output = run(tmp_path / "run")
    run(output, resume=True)
    assert_same_run(output, uninterrupted)


def test_train_depends_on_the_seed(run, tmp_path: Path, uninterrupted: Path) -> None:
    output = run(tmp_path / "run", seed=1)
    states = [load_state(folder / "last" / "state.pt")["model"] for folder in (output, uninterrupted)]
    assert not any(torch.equal(states[0][name], states[1][name]) for name in states[0] if name.endswith("weight"))


@pytest.mark.multiprocess
def test_train_does_not_depend_on_the_number_of_workers(run, tmp_path: Path, uninterrupted: Path) -> None:
    output = run(tmp_path / "run", num_workers=2)
    states = [load_state(folder / "last" / "state.pt")["model"] for folder in (output, uninterrupted)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("content", ["file", "folder"])
def test_train_leaves_an_existing_output_alone(run, tmp_path: Path, content: str) -> None:
    output = tmp_path / "run"
    if content == "folder":
        output.mkdir()
    kept = output / "notes.txt" if content == "folder" else output
    kept.write_text("precious")
    with pytest.raises(FileExistsError, match="run exists already"):
        run(output)
    assert kept.read_text() == "precious"
    assert len(list(tmp_path.rglob("*.txt"))) == (content == "folder")


def test_train_leaves_no_folder_behind_where_an_argument_is_wrong(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fasternet_t0"):
        run(tmp_path / "run", model="fasternet_to")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "run", data=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_train_resumes_only_what_exists(run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, "lr=0.002, not 0.1"),
        ({"model": "fasternet_t1"}, "model=fasternet_t0, not fasternet_t1"),
        ({"model_options": {**TINY_MODEL, "width": 12}}, "num_params"),
    ],
)
def test_train_resumes_only_as_it_was_started(
    run, uninterrupted: Path, change: dict[str, object], message: str
) -> None:
    before = (uninterrupted / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(uninterrupted, resume=True, **change)
    assert (uninterrupted / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_train_goes_on_from_the_state_before_a_damaged_one(
    run, uninterrupted: Path, tmp_path: Path, damage: str
) -> None:
    output, said = tmp_path / "run", []
    with pytest.raises(KeyboardInterrupt):
        run(output, progress=stop_at(3, 1))
    state = output / "last" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content[:5000] if damage == "truncated" else content)
    run(output, resume=True, say=said.append)
    assert sum("state.pt is damaged" in sentence for sentence in said) == 1
    assert_same_run(output, uninterrupted)


def test_train_says_when_both_states_are_damaged(run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(output, progress=stop_at(2, 1))
    for state in (output / "last").glob("*.pt"):
        state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"state-before\.pt is damaged"):
        run(output, resume=True)


def test_train_stops_at_a_loss_that_is_not_finite(
    run, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, original, calls = tmp_path / "run", Classification.loss, []

    def diverge_at_fourth_step(self, model, batch):
        calls.append(batch)
        return original(self, model, batch) * (float("nan") if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", diverge_at_fourth_step)
        with pytest.raises(ValueError, match=r"became nan in step 2 of epoch 2 at rate 0\.001.*, pictures ") as error:
            run(output)
    assert len(re.findall(r"(dark|bright)/\d\d\.png", str(error.value))) == 8
    assert "lr=0.0005" in str(error.value)
    assert "last checkpoint is that of epoch 1" in str(error.value)
    assert load_state(output / "last" / "state.pt")["epoch"] == 1
    run(output, resume=True)
    assert_same_run(output, uninterrupted)


def test_train_keeps_the_last_checkpoint_when_the_disk_is_full(run, uninterrupted: Path, tmp_path: Path) -> None:
    output, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = (uninterrupted / "last" / "model.safetensors").stat().st_size - 1
    assert largest > 2 * (uninterrupted / "log.jsonl").stat().st_size

    def fill_the_disk(state: Progress) -> None:
        if state.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))

    try:
        with pytest.raises(OSError, match="checkpoint of epoch 1 is intact") as error:
            run(output, progress=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    files = {"README.md", "config.json", "model.safetensors", "state.pt", "state-before.pt"}
    assert {path.name for path in (output / "last").iterdir()} == files
    load_checkpoint(output / "last")
    run(output, resume=True)
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_names_a_picture_that_cannot_be_read(run, tmp_path: Path, split: str) -> None:
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / folder / f"{number}.png")
    (tmp_path / "data" / split / "a" / "broken.png").write_bytes(b"no picture")
    said: list[str] = []
    if split == "val":  # nobody may believe that all pictures were evaluated
        with pytest.raises(ValueError, match=r"broken\.png"):
            run(tmp_path / "run", data=tmp_path / "data")
        return
    output = run(tmp_path / "run", data=tmp_path / "data", say=said.append)
    assert sum("broken.png" in sentence and "(1 of 10)" in sentence for sentence in said) == 1
    epochs = [r.values for r in load_records(output / "log.jsonl") if r.kind == "epoch"]
    assert all("broken.png" in values["unreadable"][0] for values in epochs)
    with pytest.raises(ValueError, match=r"more than max_unreadable=0; the last: .*broken"):
        run(tmp_path / "strict", data=tmp_path / "data", max_unreadable=0)


def test_train_takes_fewer_pictures_than_a_batch_and_an_odd_number(run, tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{number}.png")
    output = run(tmp_path / "run", data=tmp_path / "data", epochs=1)
    assert load_records(output / "log.jsonl")[0].values["num_train"] == 3


def test_train_reports_each_step_and_each_epoch(run, tmp_path: Path) -> None:
    states: list[Progress] = []
    run(tmp_path / "run", epochs=2, progress=states.append)
    assert [(s.epoch, s.step, s.values is not None) for s in states] == [
        (epoch, step, ended) for epoch in (1, 2) for step, ended in ((1, False), (2, False), (2, True))
    ]
    assert {(s.num_epochs, s.num_steps) for s in states} == {(2, 2)}


def test_train_in_bf16_runs_the_network_in_bf16(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []
    original = Classification.loss

    def watch(self, model, batch):
        dtypes.append(model(self.move(batch[0])).dtype)
        return original(self, model, batch)

    monkeypatch.setattr(Classification, "loss", watch)
    monkeypatch.setattr(loop, "select_precision", lambda precision, device: precision)
    output = run(tmp_path / "run", epochs=1, precision="bf16")
    assert set(dtypes) == {torch.bfloat16}
    assert {value.dtype for value in load_state(output / "last" / "state.pt")["model"].values()} == {
        torch.float32,
        torch.int64,
    }
