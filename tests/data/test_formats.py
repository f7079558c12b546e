"""Every mode in every format that this Pillow writes and reads, through file, data set and loader."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasternet.data.datasets import create_datasets
from fasternet.data.images import IMAGE_SUFFIXES, ImageError, find_images, load_image
from fasternet.data.loaders import create_loader
from fasternet.data.transforms import create_transform
from fasternet.models.checkpoint import Preprocessing

MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F",
    "I;16", "I;16B", "I;16L",
)  # fmt: skip
SIZE = (64, 64)
DARK, BRIGHT = 40, 210


def draw(mode: str) -> Image.Image:
    """Return a picture whose left half is dark and whose right half is bright, opaque."""
    values = np.full(SIZE[::-1], DARK, dtype=np.uint8)
    values[:, SIZE[0] // 2 :] = BRIGHT
    if mode.startswith("I"):
        wide = values.astype(np.int32 if mode == "I" else ">u2" if mode == "I;16B" else "<u2") * 257
        return Image.frombytes(mode, SIZE, wide.tobytes())
    if mode == "F":
        return Image.fromarray(values.astype(np.float32) / 255)
    grey = Image.fromarray(values)
    if mode in ("La", "RGBa"):
        return grey.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "PA":
        return grey.convert("P").convert(mode)
    if mode == "LAB":
        return Image.merge(mode, (grey, *[Image.new("L", SIZE, 128)] * 2))
    return grey.convert("RGB").convert(mode) if mode != "L" else grey


def write(mode: str, name: str) -> bytes | None:
    """Return the file that Pillow writes, or None where it does not, or does not read it again."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        try:
            draw(mode).save(file, name)
            with Image.open(io.BytesIO(file.getvalue())) as image:
                image.load()
        except Exception:
            return None
    return file.getvalue()


def list_cases() -> dict[tuple[str, str], bytes]:
    Image.init()
    names = sorted(set(Image.SAVE) & set(Image.OPEN))
    written = {(name, mode): write(mode, name) for name in names for mode in MODES}
    return {case: content for case, content in written.items() if content is not None}


CASES = list_cases()


def is_refused(name: str, mode: str) -> bool:
    """SPIDER holds floats of any scale; of a palette in an ICNS file Pillow keeps the indices alone."""
    return (name == "SPIDER" and mode != "F") or (name, mode) == ("ICNS", "P")


def is_clipped(name: str, mode: str) -> bool:
    """Pillow itself cuts 16 bits and floats off when it writes these formats of 8 bits."""
    return name in ("AVIF", "GIF", "WEBP") and mode.startswith(("I", "F"))


def test_sweep_finds_the_formats_of_pillow() -> None:
    """22 formats in 172 combinations with Pillow 13.0 and its usual libraries."""
    found = {name for name, _ in CASES}
    assert {"BMP", "DDS", "GIF", "ICO", "IM", "JPEG", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF"} <= found
    assert len(found) >= 18
    assert len(CASES) >= 100
    assert {mode for _, mode in CASES} >= set(MODES) - {"La"}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_picture_of_every_format_and_mode_is_read_or_refused(case: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(CASES[case])
    if is_refused(*case):
        with pytest.raises(ImageError, match=f"^cannot read {path}: [^\n]+$"):
            load_image(path)
        return
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size == SIZE or case[0] == "ICNS"  # an icon of 1024 pixels
    pixels = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(int)
    if not is_clipped(*case):
        assert abs(pixels[:, :3].mean() - DARK) < 6
        assert abs(pixels[:, 5:].mean() - BRIGHT) < 6


def test_loader_gives_every_picture_and_names_those_that_are_refused(tmp_path: Path) -> None:
    """The content decides, not the suffix."""
    for (name, mode), content in CASES.items():
        folder = tmp_path / ("wide" if mode.startswith(("I", "F")) else "narrow")
        folder.mkdir(exist_ok=True)
        (folder / f"{name} {mode.replace(';', ' ')}.png").write_bytes(content)
    datasets = create_datasets(tmp_path)
    num_read, refused = [0, 0], []
    for dataset in (datasets.train, datasets.validation):
        dataset.transform = create_transform(Preprocessing(input_size=32), training=False)
        for images, labels in create_loader(dataset, 16, on_error=refused.append):
            assert images.shape == (len(labels), 3, 32, 32)
            assert images.isfinite().all()
            num_read = [total + int((labels == label).sum()) for label, total in enumerate(num_read)]
    expected = [case for case in CASES if is_refused(*case)]
    assert len(refused) == len(expected)
    wide = [mode.startswith(("I", "F")) for _, mode in CASES if (_, mode) not in expected]
    assert num_read == [wide.count(False), wide.count(True)]


def test_folders_give_the_suffixes_that_are_documented(tmp_path: Path) -> None:
    suffixes = Image.registered_extensions()
    for (name, mode), content in CASES.items():
        for suffix in (suffix for suffix, owner in suffixes.items() if owner == name):
            (tmp_path / f"{mode.replace(';', ' ')}{suffix.upper()}").write_bytes(content)
    found = find_images([tmp_path])
    assert {path.suffix.lower() for path in found} == set(IMAGE_SUFFIXES)
    for path in found:
        assert load_image(path).mode == "RGB"
