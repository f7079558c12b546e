"""Lists what lies in a folder of classes: pictures by class and split, and what training passes over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fasternet.data.datasets import list_folders, list_splits
from fasternet.data.images import IMAGE_SUFFIXES

LOOP = "a link to a folder above it"


def list_files(root: Path) -> tuple[bool, dict[str, dict[str, int]], list[str], list[tuple[str, str]]]:
    """Return whether there are splits, the pictures per split and class, their paths, and what is passed over."""
    splits = list_splits(root)
    counts: dict[str, dict[str, int]] = {}
    files: list[str] = []
    others: list[tuple[str, str]] = []
    for split in splits or [root]:
        classes = counts[split.name if splits else "all"] = {}
        folders = list_folders(split)
        for folder in folders:
            found = list(_walk(folder, root))
            pictures = [path for path, remark in found if remark is None]
            classes[folder.name] = len(pictures)
            files += pictures
            others += [(path, remark) for path, remark in found if remark is not None]
        for path in sorted(set(split.iterdir()) - set(folders)):
            if path.is_dir() and path.is_symlink():
                others.append((path.relative_to(root).as_posix(), LOOP))
            elif path.name.lower().endswith(IMAGE_SUFFIXES) and not path.name.startswith("."):
                others.append((path.relative_to(root).as_posix(), "beside the folders of the classes"))
    return bool(splits), counts, files, others


def _walk(folder: Path, root: Path, above: tuple[os.stat_result, ...] = ()) -> Iterator[tuple[str, str | None]]:
    """Yield the files below a folder, each with the reason why training passes over it, or None."""
    here = (*above, folder.stat())
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            is_loop = any(os.path.samestat(path.stat(), other) for other in here)
            yield from [(name, LOOP)] if is_loop else _walk(path, root, here)
        elif path.exists() and not path.is_file():
            yield name, "no regular file"
        else:
            yield name, None if name.lower().endswith(IMAGE_SUFFIXES) else path.suffix
