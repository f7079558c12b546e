import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

COLORS = {1: (220, 60, 50), 2: (60, 90, 220)}
SIZE = (96, 64)  # width and height
NUM_PICTURES = 6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A second thread makes networks this small slower, on a busy machine ten times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of red and blue rectangles on noise, with polygons, in COCO's format."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    (root / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
    }
    for number in range(NUM_PICTURES):
        noise = random.integers(80, 160, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        name = f"{number}.png"
        document["images"].append({"id": number + 1, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for place in range(2):
            category = int(random.integers(1, 3))
            left, top = int(random.integers(2, 20)) + 45 * place, int(random.integers(2, 24))
            right, bottom = left + int(random.integers(16, 28)), top + int(random.integers(16, 36))
            ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=COLORS[category])
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number + 1,
                    "category_id": category,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
        image.save(root / "images" / name)
    (root / "shapes.json").write_text(json.dumps(document))
    return root
