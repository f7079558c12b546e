import json
import os
from pathlib import Path

import pytest
from PIL import Image

from fasternet.data.coco_check import check_coco


def create_folder(folder: Path, split: str, *, first: int = 0, names: tuple[str, ...] = ("a", "b")) -> dict:
    """Write five pictures of 200x150 pixels: coloured, grey, unreadable, missing, of another size."""
    (folder / split).mkdir(parents=True)
    images = [{"id": first + i, "file_name": f"{first + i}.png", "width": 200, "height": 150} for i in range(5)]
    paths = [folder / split / entry["file_name"] for entry in images]
    Image.new("RGB", (200, 150), "red").save(paths[0])
    Image.new("RGB", (200, 150), "grey").save(paths[1])
    paths[2].write_text("text")
    Image.new("RGB", (100, 75), "red").save(paths[4])
    boxes = [[0, 0, 20, 20], [0, 0, 90, 90], [0, 0, 120, 120], [0, 0, 0, 5], [-9, 0, 20, 20], [250, 0, 5, 5]]
    annotations = [
        {"id": i, "image_id": first + i % 2, "category_id": 1 + i % 2, "bbox": box, "iscrowd": int(i == 1)}
        for i, box in enumerate(boxes)
    ]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / split / "_annotations.coco.json").write_text(json.dumps(document))
    return document


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_object_is_counted_and_every_picture_opened(num_workers: int, tmp_path: Path) -> None:
    create_folder(tmp_path, "train")
    seen = []

    def watch(results, total):
        for result in results:
            seen.append(total)
            yield result

    found = check_coco(tmp_path, num_workers=num_workers, watch=watch)
    folder = tmp_path / "train"
    unreadable = f"cannot read {folder}/2.png: it is no picture of a known format"
    wrong_size = f"picture {folder}/4.png has 100x75 pixels, its annotation says 200x150"
    assert json.loads(json.dumps(found.values())) == {
        "name": tmp_path.name,
        "splits": {
            "train": {
                "annotations": "_annotations.coco.json",
                "num_images": 5,
                "num_images_without_objects": 3,
                "num_objects": 3,
                "num_crowds": 1,
                "has_masks": False,
                "classes": {"a": 3, "b": 0},
                "sizes": {"small": 2, "medium": 0, "large": 1},
                "skipped": {
                    "boxes clipped: they cross the picture's border": 1,
                    "objects left out: box of zero area": 1,
                    "objects left out: box wholly outside the picture": 1,
                },
                "missing": ["3.png"],
                "unreadable": [unreadable],
                "wrong_size": [wrong_size],
                "grey": ["1.png"],
                "ambiguous": [],
            }
        },
        "errors": ["picture 3.png is missing", unreadable, wrong_size],
    }
    assert seen == [5] * 5


def test_splits_must_agree_on_categories_and_share_no_picture(tmp_path: Path) -> None:
    create_folder(tmp_path, "train")
    create_folder(tmp_path, "val", first=10, names=("a", "c"))
    errors = check_coco(tmp_path).errors
    assert len(errors) == 7
    assert errors[-1].endswith("must have the same categories, with the same ids")
    document = create_folder(tmp_path / "other", "train")
    (tmp_path / "other" / "val").symlink_to(tmp_path / "other" / "train")
    assert document["images"]
    assert (
        check_coco(tmp_path / "other")
        .errors[-1]
        .startswith("5 validation pictures are training pictures too, the first is ")
    )
    create_folder(tmp_path / "linked", "train")
    create_folder(tmp_path / "linked", "val", first=10)
    (tmp_path / "linked" / "val" / "11.png").unlink()
    (tmp_path / "linked" / "val" / "11.png").hardlink_to(tmp_path / "linked" / "train" / "1.png")
    shared = f"1 validation pictures are training pictures too, the first is {tmp_path}/linked/val/11.png"
    assert check_coco(tmp_path / "linked").errors[-1] == shared


def test_pictures_that_exif_data_turn_unseen_are_counted(tmp_path: Path) -> None:
    sizes = {1: (200, 150), 2: (200, 150), 3: (200, 150), 6: (200, 150), 7: (150, 150)}
    images = []
    for orientation, (width, height) in sizes.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (width, height), "grey").save(tmp_path / f"{orientation}.jpg", exif=exif)
        images.append({"id": orientation, "file_name": f"{orientation}.jpg", "width": width, "height": height})
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    found = check_coco(tmp_path)
    assert found.splits["train"].ambiguous == ("2.jpg", "3.jpg", "7.jpg")
    assert len(found.splits["train"].grey) == 5
    assert found.errors == ()


def test_a_refused_file_is_an_error_beside_what_can_be_read(tmp_path: Path) -> None:
    create_folder(tmp_path, "train")
    create_folder(tmp_path, "val", first=10)
    path = tmp_path / "train" / "_annotations.coco.json"
    path.write_text("{")
    found = check_coco(tmp_path)
    assert [*found.splits] == ["validation"]
    assert found.errors[0].startswith(f"annotation file {path}: it is no complete JSON")


def test_real_pictures_are_in_order() -> None:
    folder = os.environ.get("FASTERNET_DATA")
    if not folder:
        pytest.skip("FASTERNET_DATA does not name a folder of real pictures")
    found = check_coco(Path(folder) / "coco128")
    values = found.values()["splits"]["train"]
    assert found.errors == ()
    assert (values["num_objects"], values["num_crowds"], values["num_images_without_objects"]) == (929, 10, 2)
    assert values["sizes"] == {"small": 414, "medium": 290, "large": 225}
    assert {"000000000086.jpg", "000000000542.jpg"} <= {*values["grey"]}
