import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fasternet.train.state import load_state, save_state, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_seed_everything_decides_all_generators() -> None:
    seed_everything(0, 3)
    first = draw()
    seed_everything(0, 3)
    assert draw() == first
    for key in ((0, 4), (1, 3), (3, 0), (0, 3, 1), (0,)):
        seed_everything(*key)
        assert not set(draw()) & set(first)


def test_state_returns_bitwise(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.randn(5), "count": torch.tensor(3)}, "epoch": 2, "best": -float("inf")}
    save_state(tmp_path / "state.pt", state)
    torch.testing.assert_close(load_state(tmp_path / "state.pt"), state, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_state_that_does_not_reach_the_disk_leaves_both_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    for number in (1, 2):
        save_state(path, {"number": number})

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save_state(path, {"number": 3})
    assert {file.name: load_state(file)["number"] for file in tmp_path.iterdir()} == {
        "state.pt": 2,
        "state-before.pt": 1,
    }


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_load_state_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is damaged") as error:
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "harmed").exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 200, 2000])
def test_load_state_says_when_the_file_is_truncated(tmp_path: Path, size: int) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"model": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="is damaged") as error:
        load_state(path)
    assert "\n" not in str(error.value)
