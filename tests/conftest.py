"""What every test starts from."""

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads cost more than they give


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What is remembered of engines is the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Let the collections around each measurement pass over what is imported already: 0.2 s each time."""
    gc.freeze()
    yield
    gc.unfreeze()
