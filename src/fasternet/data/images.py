"""Reads a picture, from a file or from bytes, as 8-bit RGB, whatever its mode; finds the pictures in folders.

Whatever is wrong with a picture ends in one ``ImageError`` that names it and the reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip
SHARD_SUFFIX = ".tar"

# Twice Pillow's MAX_IMAGE_PIXELS, from where on Pillow itself refuses: 179 megapixels.
MAX_PIXELS = 178_956_970

STRIP_ROWS = 256  # of a picture laid on white at once: 13370 x 13370 pixels took 2.8 GB whole, now 1.5
WHITE_IS_ZERO = 0  # the value of the tag of a TIFF file


class ImageError(ValueError):
    """A picture cannot be used; the message is one sentence with its path and the reason."""


def load_image(path: Path, *, upright: bool = True) -> Image.Image:
    """Read a picture.

    The orientation of its EXIF data is applied, transparency is laid on white, 16-bit values (and float
    values from 0 to 1) are rescaled to 8 bits, of an animation the first frame counts.

    Args:
        path: A file that Pillow can read, or a pipe that brings one, of at most 179 megapixels.
        upright: Apply the orientation; off leaves the pixels as they are stored.

    Returns:
        A decoded picture of mode ``RGB``.

    Raises:
        ImageError: The file is missing, empty, truncated, too large or no picture.
    """
    return _read(path, path, upright=upright)


def decode_image(content: bytes, name: Path | str) -> Image.Image:
    """Read a picture from the bytes of its file, as ``load_image`` does.

    Args:
        content: What the file holds.
        name: What errors call the picture.

    Returns:
        A decoded picture of mode ``RGB``.

    Raises:
        ImageError: The bytes are empty, truncated, too large a picture or none.
    """
    return _read(io.BytesIO(content), name)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of a picture in mode ``RGB``: transparency on white, 16-bit and float values in 8 bits.

    Raises:
        ValueError: Grey values are beyond 16 bits, or floats beyond 0 to 1.
    """
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        return _lay_on_white(image)
    return image.convert("RGB")  # a copy, of an RGB picture too


def find_images(paths: Iterable[Path]) -> list[Path]:
    """List pictures in the order of ``paths``, each folder replaced by the pictures in it and below it.

    Args:
        paths: Files, taken as they are, and folders, where hidden files and other suffixes are passed over.

    Returns:
        The files; those of one folder sorted by name, whatever the order of the file system.

    Raises:
        FileNotFoundError: A folder holds no picture.
        ValueError: A path is a packed shard.
    """
    return list(list_images(paths))


def list_images(paths: Iterable[Path | str]) -> Iterator[Path]:
    """Yield what ``find_images`` lists while the folders are read: one folder at a time is in memory.

    Raises:
        FileNotFoundError: A folder holds no picture.
        ValueError: A path is a packed shard.
    """
    for path in map(Path, paths):
        if path.suffix == SHARD_SUFFIX and path.is_file():
            raise ValueError(f"{path} is a shard, no picture: name the folder of the shards, and an output")
        found = _walk(path) if path.is_dir() else iter([path])
        if (first := next(found, None)) is None:
            remark = "; shards, which it holds, need an output" if any(path.glob(f"*{SHARD_SUFFIX}")) else ""
            raise FileNotFoundError(f"no pictures in folder {path}; looked for {', '.join(IMAGE_SUFFIXES)}{remark}")
        yield first
        yield from found


def holds_image(folder: Path) -> bool:
    """Whether there is a picture in a folder or below it."""
    return next(_walk(folder), None) is not None


def _read(source: Path | io.BytesIO, name: Path | str, *, upright: bool = True) -> Image.Image:
    try:
        if isinstance(source, Path) and source.is_fifo():
            source = io.BytesIO(source.read_bytes())
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise ValueError("it is a folder" if source.is_dir() else "it is no regular file")  # a device has no end
        # Pillow warns of large pictures, which are fine up to MAX_PIXELS, and of broken metadata.
        with warnings.catch_warnings(action="ignore"), Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            if upright:
                with contextlib.suppress(Exception):  # a picture with broken EXIF data is shown as it is
                    ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    # Decoders fail on damaged files with whatever comes up: struct.error, IndexError, SyntaxError ...
    except Exception as error:
        raise ImageError(f"cannot read {name}: {_explain(source, error)}") from error


def _walk(folder: Path, above: tuple[os.stat_result, ...] = ()) -> Iterator[Path]:
    """Yield the pictures below a folder.

    A link to a folder ``above`` it, which would never end, is passed over, and pipes, sockets and devices.
    """
    here = folder.stat()
    if any(os.path.samestat(here, other) for other in above):
        return
    with os.scandir(folder) as entries:
        names = sorted(
            (entry.name, Path(entry).is_dir() if entry.is_symlink() else entry.is_dir())
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or _is_usual(Path(entry)))
        )
    for name, is_folder in names:
        if is_folder:
            yield from _walk(folder / name, (*above, here))
        elif name.lower().endswith(IMAGE_SUFFIXES):
            yield folder / name


def _is_usual(path: Path) -> bool:
    """Whether a path is a file, a folder or a link to one; or to nowhere, which is named when it is read."""
    return path.is_file() or path.is_dir() or not path.exists()


def _lay_on_white(image: Image.Image) -> Image.Image:
    laid = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP_ROWS):
        box = (0, top, image.width, min(image.height, top + STRIP_ROWS))
        strip = image.crop(box).convert("RGBA")
        laid.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), box)
    return laid


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Rescale grey values of 16 bits (modes I;16, I) or from 0 to 1 (mode F): Pillow would clip them."""
    values = np.asarray(image)
    limit = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= limit):
        raise ValueError(f"its grey values run from {values.min()} to {values.max()}, beyond 0 to {limit}")
    # The high byte is also what Pillow keeps of a 16-bit RGB picture.
    scaled = (values * 255).round() if image.mode == "F" else values >> 8
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled.astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):  # of a PNG: a value of 16 bits
        grey.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return grey


def _explain(source: Path | io.BytesIO, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels"
    if isinstance(error, UnidentifiedImageError):
        num_bytes = source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
        return "it is no picture of a known format" if num_bytes else "the file is empty"
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join((reason or str(error) or type(error).__name__).split())
