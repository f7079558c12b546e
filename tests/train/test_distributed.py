"""Several processes: the same losses as one, each picture evaluated once, restarts, two nodes."""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fasternet.models.checkpoint import load_checkpoint
from fasternet.records import load_records
from fasternet.train import distributed
from fasternet.train.distributed import World, broadcast, gather, join_world, sum_over

pytestmark = pytest.mark.multiprocess

# Trains the tiny network and writes the running mean of the loss after each step.
SCRIPT = """
import dataclasses, json, os, sys
from pathlib import Path
from fasternet.train.classification import train
from fasternet.train.loop import Hooks
from fasternet.train.recipe import Recipe, parse_overrides

data, output, norm, *changes = sys.argv[1:]
recipe = Recipe(epochs=3, batch_size=8, lr=2e-3, warmup_epochs=1, weight_decay=0.05, input_size=32,
                random_resized_crop=(0.5, 1.0), flip=True, rand_augment="rand-m3-mstd0.5-inc1", precision="fp32")
recipe = parse_overrides(recipe, changes)
options = {"width": 8, "depths": (1, 1, 1, 1), "head_width": 16, "norm": norm}
losses = []
hooks = Hooks(progress=lambda state: losses.append(state.train_loss))
if fatal := os.environ.get("FATAL_EPOCH"):
    def die(state):
        if state.epoch == int(fatal) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(9)
    hooks = Hooks(progress=die)
restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
train("fasternet_t0", data, Path(output), recipe=recipe, model_options=options, hooks=hooks, resume=restarted,
      device=os.environ.get("DEVICE", "cpu"))
if os.environ.get("RANK", "0") == "0":
    Path(output, "losses.json").write_text(json.dumps(losses))
"""


@pytest.fixture
def launch(tmp_path: Path, pictures: Path):
    """Start the script in one process or, with torchrun's options, in several; return its run folder."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(name: str, *changes: str, norm: str = "ln", torchrun: tuple[str, ...] = (), **environment: str):
        launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
        command = [sys.executable, *launcher, str(script), str(pictures), str(tmp_path / name), norm, *changes]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    def run(name: str, *changes: str, **options) -> Path:
        process = start(name, *changes, **options)
        text = process.communicate(timeout=240)[0]
        assert process.returncode == 0, text
        return tmp_path / name

    run.start = start
    return run


TWO = ("--standalone", "--nproc-per-node", "2")


def load_losses(output: Path) -> list[float]:
    return json.loads((output / "losses.json").read_text())


def load_result(output: Path):
    weights = load_checkpoint(output / "last").model.state_dict()
    values = [r.values for r in load_records(output / "log.jsonl") if r.kind == "epoch"]
    return weights, [{k: v for k, v in one.items() if k not in ("seconds", "images_per_second")} for one in values]


@pytest.mark.parametrize(("norm", "changes"), [("ln", ()), ("bn", ("batch_norm=frozen",)), ("ln", ("ema_decay=0.9",))])
def test_two_processes_give_the_losses_of_one(launch, norm: str, changes: tuple[str, ...]) -> None:
    one = launch("one", *changes, norm=norm)
    two = launch("two", *changes, norm=norm, torchrun=TWO)
    assert len(load_losses(one)) == 3 * 3
    torch.testing.assert_close(load_losses(two), load_losses(one), rtol=1e-5, atol=0)
    evaluations = [next(r for r in load_records(o / "log.jsonl") if r.kind == "evaluation") for o in (one, two)]
    assert [r.values["num_images"] for r in evaluations] == [4, 4]
    assert evaluations[0].values["per_class"] == evaluations[1].values["per_class"]
    assert evaluations[1].values["loss"] == pytest.approx(evaluations[0].values["loss"], rel=1e-5)
    subjects = [[r.subject for r in load_records(o / "log.jsonl") if r.kind == "prediction"] for o in (one, two)]
    assert subjects[0] == subjects[1]


def test_two_processes_take_the_parts_that_one_would_accumulate(launch) -> None:
    """With drop path and mixup on, and the statistics of BN apart, what is drawn for a part stays the same."""
    changes = ("mixup=0.2", "cutmix=1.0", "drop_path_rate=0.2")
    one = launch("one", "accumulate=2", *changes)
    two = launch("two", *changes, torchrun=TWO)
    torch.testing.assert_close(load_losses(two), load_losses(one), rtol=1e-6, atol=0)


def test_group_restarted_by_torchrun_ends_as_if_it_had_not_died(launch) -> None:
    plain = launch("plain", "ema_decay=0.9", norm="bn", torchrun=TWO)
    again = launch("again", "ema_decay=0.9", norm="bn", torchrun=(*TWO, "--max-restarts", "1"), FATAL_EPOCH="2")
    torch.testing.assert_close(load_result(again), load_result(plain), rtol=0, atol=0)


def test_two_nodes_give_the_losses_of_one_process(launch) -> None:
    one = launch("one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    nodes = [launch.start("two", torchrun=(*options, "--rdzv-id", "nodes")) for _ in range(2)]
    texts = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    torch.testing.assert_close(load_losses(one.with_name("two")), load_losses(one), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: SyncBatchNorm has no CPU form")
def test_two_gpus_with_shared_statistics_give_the_losses_of_one(launch) -> None:
    one = launch("one", norm="bn", DEVICE="cuda")
    two = launch("two", "batch_norm=sync", norm="bn", torchrun=TWO, DEVICE="cuda")
    torch.testing.assert_close(load_losses(two), load_losses(one), rtol=1e-4, atol=0)


def test_command_under_torchrun_speaks_once(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", *TWO, "-m", "fasternet", "train", "fasternet_t0"]
    command += ["--data", str(pictures), "--epochs", "1", "--batch-size", "8", "--input-size", "32", "--no-amp"]
    command += ["--width", "8", "--output", str(tmp_path / "run"), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.count("epoch 1/1  loss") == 1
    assert "batch 8 = 2 processes x 1 parts x 4, rate 0.0004" in result.stderr


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK"])
def test_incomplete_environment_is_one_sentence(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match="as torchrun does"), join_world():
        pass


@pytest.mark.parametrize(
    ("machines", "restarts", "keeps_store", "warns"),
    [("2", "3", "True", True), ("2", "3", "False", False), ("2", "0", "True", False), ("1", "3", "True", False)],
)
def test_restarts_on_several_machines_that_keep_their_store_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, machines: str, restarts: str, keeps_store: str, warns: bool
) -> None:
    environment = {"RANK": "0", "GROUP_WORLD_SIZE": machines, "TORCHELASTIC_USE_AGENT_STORE": keeps_store}
    environment |= {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 0, 1)]))
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") if warns else nullcontext():
        distributed._open_store()


def test_world_of_one_needs_no_other() -> None:
    with join_world() as world:
        assert world == World()
        assert broadcast(world, 3) == 3
        assert gather(world, 3) == [3]
        assert sum_over(world, torch.ones(2)).tolist() == [1, 1]
