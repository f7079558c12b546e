"""Trees of pictures, and the shards packed of them."""

from pathlib import Path

import pytest
from PIL import Image

from fasternet.data.packing import pack_shards


def _create_tree(root: Path, num_train: int = 40, num_validation: int = 6) -> Path:
    """Make train and val folders of two classes; each picture has a colour of its own."""
    for split, count in (("train", num_train), ("val", num_validation)):
        for index in range(count):
            path = root / split / "ab"[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 5), (index, split == "val", 0)).save(path)
    return root


@pytest.fixture
def create_tree():
    return _create_tree


@pytest.fixture
def shards(create_tree, tmp_path: Path) -> Path:
    """Return 40 training pictures in 7 shards (six of 6, one of 4), 6 validation pictures in 1."""
    pack_shards(create_tree(tmp_path / "tree"), tmp_path / "shards", images_per_shard=6)
    return tmp_path / "shards"
