import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from fasternet.data import images
from fasternet.data.images import ImageError, find_images, load_image

RED, HALF_RED, WHITE = (255, 0, 0), (255, 127, 127), (255, 255, 255)


def save_tiff_white_is_zero(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path, "TIFF", tiffinfo={PHOTOMETRIC_INTERPRETATION: 0})
    content = path.read_bytes()  # Pillow writes "black is zero", whatever it is told
    black, white = (struct.pack("<HHIHH", PHOTOMETRIC_INTERPRETATION, 3, 1, value, 0) for value in (1, 0))
    assert (content.count(black), content.count(white)) in {(1, 0), (0, 1)}
    path.write_bytes(content.replace(black, white))
    return path


def save_png_16_bits(path: Path, values: np.ndarray, *extra_chunks: tuple[bytes, bytes]) -> Path:
    """Write a 16-bit PNG, grey (H, W) or RGB (H, W, 3); Pillow itself cannot write the latter."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), *extra_chunks, (b"IDAT", pixels), (b"IEND", b""))
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in chunks:
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))
    return path


def save_tiff_16_bits_rgb(path: Path, values: np.ndarray) -> Path:
    """Write an uncompressed 16-bit RGB TIFF (H, W, 3)."""
    height, width, _ = values.shape
    pixels = values.astype("<u2").tobytes()
    tags = ((256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2))
    tags += ((273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    bits = struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(b"II*\0" + struct.pack("<I", 14 + len(pixels)) + bits + pixels + directory + bytes(4))
    return path


def load_pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.linspace(0, 65535, 12 * 8).astype(np.uint16).reshape(12, 8)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.pgm", "int32.tif"])
def test_grey_picture_of_16_bits_is_rescaled(tmp_path: Path, name: str) -> None:
    values = RAMP.astype(np.int32) if name == "int32.tif" else RAMP
    Image.fromarray(values).save(tmp_path / name)
    pixels = load_pixels(tmp_path / name)
    assert np.array_equal(pixels, np.repeat(RAMP[..., None] >> 8, 3, axis=2))
    assert len(np.unique(pixels)) == RAMP.size


@pytest.mark.parametrize("save", [save_png_16_bits, save_tiff_16_bits_rgb])
def test_rgb_picture_of_16_bits_is_rescaled(tmp_path: Path, save) -> None:
    values = np.stack([RAMP, RAMP[::-1], RAMP // 2], axis=2)
    assert np.array_equal(load_pixels(save(tmp_path / "picture", values)), values >> 8)


def test_rgb_picture_of_16_bits_with_a_transparent_colour_loads(tmp_path: Path) -> None:
    values = np.stack([RAMP, RAMP, RAMP], axis=2)
    path = save_png_16_bits(tmp_path / "a.png", values, (b"tRNS", struct.pack(">HHH", 0, 0, 0)))
    assert np.array_equal(load_pixels(path)[1:], values[1:] >> 8)


@pytest.mark.parametrize("values", [RAMP, np.float32([[0, 0.2, 1]])])
def test_picture_where_white_is_zero_is_inverted(tmp_path: Path, values: np.ndarray) -> None:
    pixels = load_pixels(save_tiff_white_is_zero(tmp_path / "a.tif", values))[..., 0]
    expected = (65535 - values) >> 8 if values.dtype == np.uint16 else np.uint8([[255, 204, 0]])
    assert np.array_equal(pixels, expected)


def test_grey_picture_of_16_bits_puts_its_transparent_value_on_white(tmp_path: Path) -> None:
    values = np.uint16([[0, 1000, 1001, 65535]])  # the two in the middle have the same high byte
    path = save_png_16_bits(tmp_path / "a.png", values, (b"tRNS", struct.pack(">H", 1000)))
    assert load_pixels(path)[0, :, 0].tolist() == [0, 255, 3, 255]


def test_tall_transparent_picture_is_laid_on_white_as_a_whole(tmp_path: Path) -> None:
    height = 2 * images.STRIP_ROWS + 7
    values = np.random.default_rng(0).integers(0, 256, (height, 5, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    image.save(tmp_path / "a.png")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(load_pixels(tmp_path / "a.png"), np.asarray(whole))


@pytest.mark.parametrize("suffix", ["avif", "jp2", "jfif"])
def test_picture_of_a_rarer_suffix_is_found_and_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (16, 16), RED).save(tmp_path / f"a.{suffix}")
    (path,) = find_images([tmp_path])
    assert np.abs(load_pixels(path).astype(int) - RED).max() <= 3


def test_float_picture_from_0_to_1_is_rescaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert load_pixels(tmp_path / "f.tif")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [np.float32([[0, 2]]), np.float32([[np.nan]]), np.int32([[0, 1 << 20]])])
def test_grey_values_of_unknown_scale_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match=r"f\.tif: its grey values run from .* beyond 0 to (1|65535)$"):
        load_image(tmp_path / "f.tif")


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 128), (127, 127, 127)),
        ("RGBA", (255, 0, 0, 128), HALF_RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGB", RED, RED),
    ],
)
def test_picture_of_each_mode_becomes_rgb_on_white(tmp_path: Path, mode: str, colour, expected) -> None:
    Image.new(mode, (5, 3), colour).save(tmp_path / "a.png")
    assert np.unique(load_pixels(tmp_path / "a.png").reshape(-1, 3), axis=0).tolist() == [list(expected)]


def test_cmyk_picture_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(load_pixels(tmp_path / "a.jpg").astype(int) - RED).max() <= 3


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_picture_keeps_colours_and_puts_transparency_on_white(tmp_path: Path, transparency) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.png", transparency=transparency)
    assert load_pixels(tmp_path / "opaque.png").tolist() == [[list(RED), [0, 0, 255]]]
    assert load_pixels(tmp_path / "transparent.png").tolist() == [[list(RED), list(WHITE)]]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, axis=1).repeat(8, axis=0)).save(tmp_path / "a.jpg", exif=exif)
    pixels = load_pixels(tmp_path / "a.jpg")
    assert pixels.shape == (16, 8, 3)
    assert pixels[:6].max() < 20
    assert pixels[-6:].min() > 235


BROKEN_EXIF = {
    "header": b"Exif\0\0II*\0\xff\xff\xff\xff junk",
    # Orientation 6, and a resolution unit of a type that Pillow reads and then fails to write.
    "tag": b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x28\0\x09\0\0\0\x01\0\x02\0\0\0\0\0\0",
}


@pytest.mark.parametrize(("damage", "size"), [("header", (9, 4)), ("tag", (4, 9))])
def test_broken_exif_data_does_no_harm(tmp_path: Path, damage: str, size: tuple[int, int]) -> None:
    Image.new("RGB", (9, 4), RED).save(tmp_path / "a.jpg", exif=BROKEN_EXIF[damage])
    assert load_image(tmp_path / "a.jpg").size == size


def test_loaded_picture_outlives_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert image.getpixel((3, 3)) == RED


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "bmp"])
def test_truncated_picture_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    assert "\n" not in str(caught.value)


def test_file_that_is_no_picture_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    for name, reason in {
        "text.jpg": "it is no picture of a known format",
        "empty.jpg": "the file is empty",
        "absent.jpg": "there is no such file",
        "": "it is a folder",
    }.items():
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        assert str(caught.value) == f"cannot read {tmp_path / name}: {reason}"


def create_blank(path: Path, width: int, height: int) -> Path:
    Image.new("1", (width, height)).save(path, compression="group4")
    return path


def test_picture_beyond_179_megapixels_is_refused_before_decoding(tmp_path: Path, monkeypatch) -> None:
    path = create_blank(tmp_path / "huge.tif", 15_000, 12_000)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"huge\.tif: it has more than 179 megapixels$"):
        load_image(path)


def test_limit_does_not_depend_on_pillows_setting(tmp_path: Path, monkeypatch) -> None:
    path = create_blank(tmp_path / "large.png", 100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    with pytest.raises(ImageError, match="megapixels"):
        load_image(path)


def test_picture_that_pillow_warns_of_loads_in_silence(tmp_path: Path, monkeypatch) -> None:
    path = create_blank(tmp_path / "large.png", 100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert load_image(path).size == (100, 100)
    assert not seen


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), suffix=st.sampled_from(["jpeg", "png", "tiff", "webp", "gif", "bmp", "ppm"]))
def test_damaged_picture_loads_or_is_one_sentence(tmp_path: Path, data, suffix: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).save(buffer, suffix)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content)
    try:
        assert load_image(path).mode == "RGB"
    except ImageError as error:
        assert str(error).startswith(f"cannot read {path}: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


def test_find_images_sorts_folders_and_keeps_files(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpg", "a.webp", ".hidden.png", ".git/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    odd = tmp_path / "notes.txt"
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([odd, tmp_path])]
    assert found == ["notes.txt", "a.webp", "b/10.jpg", "b/2.PNG"]


def test_find_images_names_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no pictures in folder {tmp_path}"):
        find_images([tmp_path])


def test_pipes_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "a.png").touch()
    (tmp_path / "lost.png").symlink_to("absent")  # named as unreadable later, not passed over
    assert [path.name for path in find_images([tmp_path])] == ["a.png", "lost.png"]


@pytest.mark.parametrize(("content", "reason"), [(None, None), (b"text", "it is no picture of a known format$")])
def test_pipe_that_is_named_is_read(tmp_path: Path, content: bytes | None, reason: str | None) -> None:
    Image.new("RGB", (4, 3), RED).save(tmp_path / "a.png")
    ending, beginning = os.pipe()
    os.write(beginning, content or (tmp_path / "a.png").read_bytes())
    os.close(beginning)
    (path,) = find_images([Path(f"/dev/fd/{ending}")])
    if reason:
        with pytest.raises(ImageError, match=reason):
            load_image(path)
    else:
        assert load_image(path).getpixel((3, 2)) == RED
    os.close(ending)


def test_device_is_refused() -> None:
    with pytest.raises(ImageError, match=r"/dev/zero: it is no regular file$"):
        load_image(Path("/dev/zero"))


def test_links_that_go_round_end_and_other_links_to_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "twice").symlink_to("a")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a/b/1.png", "self.png", "twice/b/1.png"]


def test_shards_are_named_where_pictures_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").touch()
    with pytest.raises(ValueError, match=r"train-0\.tar is a shard, no picture: name the folder of the shards"):
        find_images([tmp_path / "train-0.tar"])
    with pytest.raises(FileNotFoundError, match=r"; shards, which it holds, need an output$"):
        find_images([tmp_path])
