"""Looks at every picture of a folder before a long run: what cannot be read, what is odd, what is there twice.

Processes decode the pictures; memory grows with the number of names, not with the pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fasternet.data.datasets import create_datasets, is_sharded
from fasternet.data.images import ImageError, decode_image, load_image
from fasternet.data.listing import list_files
from fasternet.data.loaders import explain_dead_worker
from fasternet.environment import create_record, describe_machine
from fasternet.records import append_records

MIN_SIDE = 32  # pixels: FasterNet's last stage sees a thirty-second of a side
MAX_ASPECT = 4
SIDE_BINS = (1, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ORIENTATION = 0x0112  # the tag in EXIF data

# What is found, and what it means; training trips over the first two.
KINDS = {
    "structure": "training refuses the folder",
    "unreadable": "cannot be read; training takes others instead, up to a limit, its evaluation stops at the first",
    "across classes": "one picture in several classes: a contradiction",
    "across splits": "one picture in several splits: the evaluation is no longer fair",
    "duplicate": "one picture several times in one class and split",
    "small": f"shorter side below {MIN_SIDE} pixels",
    "long": f"sides beyond {MAX_ASPECT}:1",
    "grey": "becomes RGB",
    "cmyk": "becomes RGB",
    "16 bits": "or float values; become 8 bits",
    "transparent": "is laid on white",
    "animated": "several frames; the first counts",
    "turned": "turned upright as its EXIF data says",
    "suffix": "the suffix differs from the content",
    "passed over": "of another suffix, beside the classes, no regular file, or a link to a folder above it",
}
ERRORS = ("structure", "unreadable")
GROUPS = ("across classes", "across splits", "duplicate")  # findings of several equal pictures

# On the page: pictures of a class and of a group, classes, and findings of a kind, less of what is merely odd.
NUM_EXAMPLES = 4
MAX_CLASSES = 100
MAX_FINDINGS = 200
MAX_ODD = 24
THUMBNAIL_SIZE = 160  # pixels


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know of a file, of several equal pictures, or of the whole folder.

    Attributes:
        kind: One of ``KINDS``.
        remark: The reason or the detail; it may be empty.
        paths: The files, relative to the folder.
    """

    kind: str
    remark: str
    paths: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Check:
    """What is in a folder of pictures.

    Attributes:
        name: Of the folder.
        counts: Pictures by split and class; a folder without splits has one, named ``all``.
        sides: How many pictures have a shorter side of so many pixels.
        formats: How many pictures have a format, as Pillow calls it.
        modes: How many pictures have a mode.
        findings: In the order of ``KINDS``, then of the paths.
        examples: Some pictures of each class.
    """

    name: str
    counts: Mapping[str, Mapping[str, int]]
    sides: Counter[int]
    formats: Counter[str]
    modes: Counter[str]
    findings: tuple[Finding, ...]
    examples: Mapping[str, tuple[str, ...]]

    @property
    def num_images(self) -> int:
        """How many pictures there are, readable or not."""
        return sum(sum(split.values()) for split in self.counts.values())

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What training would trip over."""
        return tuple(finding for finding in self.findings if finding.kind in ERRORS)

    def list_sides(self) -> list[tuple[str, int]]:
        """Return the histogram of the shorter sides."""
        bounds = zip(SIDE_BINS, (*SIDE_BINS[1:], 1 << 31), strict=True)
        counted = [(low, high, sum(n for side, n in self.sides.items() if low <= side < high)) for low, high in bounds]
        return [(f"{low} to {high - 1}" if high < 1 << 31 else f"{low} and more", n) for low, high, n in counted if n]

    def values(self, limit: int | None = None) -> dict[str, Any]:
        """Return all as plain data, of each kind of finding at most ``limit``."""
        kinds = Counter(finding.kind for finding in self.findings)
        kept = {kind: [f for f in self.findings if f.kind == kind][:limit] for kind in kinds}
        filled = {split: [n for n in classes.values() if n] for split, classes in self.counts.items()}
        return {
            "num_images": self.num_images,
            "num_classes": len({name for classes in self.counts.values() for name in classes}),
            "splits": {split: dict(classes) for split, classes in self.counts.items()},
            "imbalance": {split: max(counts) / min(counts) for split, counts in filled.items() if counts},
            "sides": dict(self.list_sides()),
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            "num_errors": len(self.errors),
            "kinds": {kind: {"count": kinds[kind], "meaning": KINDS[kind]} for kind in KINDS if kind in kinds},
            "findings": [dataclasses.asdict(finding) for members in kept.values() for finding in members],
        }


@dataclasses.dataclass(frozen=True)
class _Scan:
    """What a process tells of one picture."""

    path: str
    error: str | None = None
    side: int = 0
    format: str = ""
    mode: str = ""
    digest: bytes = b""
    oddities: tuple[tuple[str, str], ...] = ()


Watch = Callable[[Iterable[Any], int], Iterable[Any]]


def check_data(data: Path | str, *, num_workers: int = 0, watch: Watch | None = None) -> Check:
    """Look at every picture of a folder that ``create_datasets`` takes.

    Args:
        data: A folder with ``train``, ``val`` ... in it, each with a folder per class, or with the classes' folders.
        num_workers: Processes that read pictures, at most one per processor core; 0 reads in this one.
        watch: Called with the results as they come and their number; returns them. It shows progress.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: ``data`` is no folder of pictures.
        OSError: A process that reads pictures died.
    """
    root, name = Path(data), Path(data).resolve().name
    obstacle = _find_obstacle(root)
    has_splits, counts, files, passed_over = list_files(root)
    if not files and not passed_over:
        raise obstacle or ValueError(f"data folder {root} holds no pictures")
    sides, formats, modes = Counter[int](), Counter[str](), Counter[str]()
    findings = [Finding("structure", str(obstacle).replace(str(root), name))] if obstacle else []
    findings += [Finding("passed over", remark, (path,)) for path, remark in passed_over]
    seen: dict[bytes, str] = {}
    groups: dict[bytes, list[str]] = {}
    scans = _scan_all(root, files, num_workers)
    for scan in watch(scans, len(files)) if watch else scans:
        if scan.error is not None:
            findings.append(Finding("unreadable", scan.error, (scan.path,)))
            continue
        sides[scan.side] += 1
        formats[scan.format] += 1
        modes[scan.mode] += 1
        findings += [Finding(kind, remark, (scan.path,)) for kind, remark in scan.oddities]
        if (first := seen.setdefault(scan.digest, scan.path)) != scan.path:
            groups.setdefault(scan.digest, [first]).append(scan.path)
    for members in groups.values():
        findings += _judge_group(members, has_splits)
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings.sort(key=lambda finding: (order[finding.kind], finding.paths))
    unreadable = {path for finding in findings if finding.kind == "unreadable" for path in finding.paths}
    examples = _choose_examples([path for path in files if path not in unreadable], has_splits)
    return Check(name, counts, sides, formats, modes, tuple(findings), examples)


def _find_obstacle(root: Path) -> ValueError | FileNotFoundError | None:
    """Return the error with which training would refuse the folder, or None; raise where it is no folder."""
    if not root.is_dir() or is_sharded(root):
        if not root.exists():
            raise FileNotFoundError(f"no data folder at {root}")
        raise ValueError(f"data {root} is no folder of pictures; packed shards are checked before they are packed")
    try:
        create_datasets(f"{root}{os.sep}")  # never the built-in digits
    except (ValueError, FileNotFoundError) as error:
        return error
    return None


class _Scans(Dataset[_Scan]):
    """What is told of each file."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root, self.files = root, files

    def __getitem__(self, index: int) -> _Scan:
        return _scan(self.root, self.files[index])

    def __len__(self) -> int:
        return len(self.files)


def _scan_all(root: Path, files: Sequence[str], num_workers: int) -> Iterator[_Scan]:
    """Give what is told of each file, in order."""
    batches = DataLoader(
        _Scans(root, files),
        batch_size=16,
        collate_fn=list,
        num_workers=min(num_workers, describe_machine().cores),
        generator=torch.Generator(),  # without one, it would draw from PyTorch's own
    )
    with explain_dead_worker():
        for batch in batches:
            yield from batch


def _scan(root: Path, path: str) -> _Scan:
    try:
        content = (root / path).read_bytes()
        image = decode_image(content, path)
    except ImageError as error:
        return _Scan(path, error=str(error).removeprefix(f"cannot read {path}: "))
    except OSError as error:
        return _Scan(path, error=error.strerror or str(error))
    digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as header:
        oddities = tuple(_find_oddities(header, Path(path).suffix.lower()))
        return _Scan(path, None, min(image.size), header.format or "", header.mode, digest, oddities)


def _find_oddities(image: Image.Image, suffix: str) -> Iterator[tuple[str, str]]:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        yield "small", f"{width} x {height}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield "long", f"{width} x {height}"
    if image.mode.startswith(("1", "L", "I", "F")) and image.mode != "LAB":
        yield "grey", image.mode
    if image.mode == "CMYK":
        yield "cmyk", ""
    if image.mode.startswith(("I", "F")) or any(";16" in str(tile) for tile in getattr(image, "tile", ())):
        yield "16 bits", image.mode
    if image.has_transparency_data:
        yield "transparent", image.mode
    with contextlib.suppress(Exception):  # damaged metadata does no harm
        if (frames := getattr(image, "n_frames", 1)) > 1:
            yield "animated", f"{frames} frames"
    with contextlib.suppress(Exception):
        if (orientation := image.getexif().get(ORIENTATION, 1)) in range(2, 9):
            yield "turned", f"orientation {orientation}"
    expected = Image.registered_extensions().get(suffix)
    if expected != image.format and {expected, image.format} != {"JPEG", "MPO"}:
        yield "suffix", f"holds {image.format}"


def split_path(path: str, has_splits: bool) -> tuple[str, str]:
    """Return split and class of a picture's path."""
    parts = path.split("/")
    return (parts[0], parts[1]) if has_splits else ("all", parts[0])


def _judge_group(paths: Sequence[str], has_splits: bool) -> Iterator[Finding]:
    """Say what is wrong with equal pictures in several places."""
    splits, classes = map(set, zip(*(split_path(path, has_splits) for path in paths), strict=True))
    group = tuple(sorted(paths))
    if len(classes) > 1:
        yield Finding("across classes", ", ".join(sorted(classes)), group)
    if len(splits) > 1:
        yield Finding("across splits", ", ".join(sorted(splits)), group)
    if len(classes) == len(splits) == 1:
        yield Finding("duplicate", f"{len(group)} times", group)


def _choose_examples(files: Sequence[str], has_splits: bool) -> dict[str, tuple[str, ...]]:
    """Choose pictures of each class, spread over its names."""
    members: dict[str, list[str]] = {}
    for path in files:
        members.setdefault(split_path(path, has_splits)[1], []).append(path)
    return {
        name: tuple(paths[place * len(paths) // NUM_EXAMPLES] for place in range(NUM_EXAMPLES))
        if len(paths) > NUM_EXAMPLES
        else tuple(paths)
        for name, paths in sorted(members.items())
    }


def save_check(check: Check, data: Path | str, output: Path) -> Path:
    """Write records with thumbnails of some pictures of each class and of what was found.

    Args:
        check: Of ``data``.
        data: The folder that was checked.
        output: A new or empty folder.

    Returns:
        The record file, ``output/check.jsonl``.

    Raises:
        FileExistsError: ``output`` holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output {output} holds something already: name a new folder")
    (output / "thumbnails").mkdir(parents=True)
    condition = {"data": check.name}
    file = output / "check.jsonl"
    summary = create_record(
        "data", "data_check", check.name, condition=condition, values=check.values(limit=MAX_FINDINGS)
    )
    append_records(file, [summary])
    has_splits = list(check.counts) != ["all"]
    for number, (path, findings) in enumerate(_choose_pictures(check).items()):
        split, class_name = split_path(path, has_splits)
        picture = f"thumbnails/{number:04}.jpg"
        is_saved = _save_thumbnail(Path(data) / path, output / picture)
        values = {
            "split": split,
            "class": class_name,
            "findings": [[finding.kind, finding.remark] for finding in findings],
            "is_example": path in check.examples.get(class_name, ()),
            "is_error": any(finding.kind in ERRORS for finding in findings),
        }
        attachments = {"picture": picture} if is_saved else {}
        record = create_record("data", "data_check", path, condition=condition, values=values, attachments=attachments)
        append_records(file, [record])
    return file


def _choose_pictures(check: Check) -> dict[str, list[Finding]]:
    """Return the pictures to show, what was found first, each with its findings."""
    chosen: dict[str, list[Finding]] = {}
    for kind in KINDS:
        limit = MAX_FINDINGS if kind in (*ERRORS, *GROUPS) else MAX_ODD
        for finding in [finding for finding in check.findings if finding.kind == kind][:limit]:
            if kind != "passed over":
                for path in finding.paths[:NUM_EXAMPLES]:
                    chosen.setdefault(path, []).append(finding)
    for paths in list(check.examples.values())[:MAX_CLASSES]:
        for path in paths:
            chosen.setdefault(path, [])
    return chosen


def _save_thumbnail(source: Path, target: Path) -> bool:
    try:
        image = load_image(source)
    except ImageError:
        return False
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.save(target, quality=85)
    return True
