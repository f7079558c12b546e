"""Predicts millions of pictures into one file: streamed in bounded memory, shared out to processes, resumed.

Pictures are dealt to the processes batch by batch (shards: shard by shard), so that a batch holds the same pictures
however many processes there are. Each process appends to a part of its own, ``OUTPUT.part-RANK-of-SIZE``: a line of
settings, then a line ``[shard, batch, prediction]`` per picture. In the end the parts are merged by these numbers,
and the settings stay in ``.OUTPUT.settings``.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import glob
import hashlib
import heapq
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasternet.data.datasets import is_sharded
from fasternet.data.images import ImageError, holds_image, list_images, load_image
from fasternet.data.loaders import explain_dead_worker
from fasternet.data.shards import stream_shard_pictures
from fasternet.data.transforms import Transform
from fasternet.environment import describe_machine
from fasternet.predict.predictor import Predictor
from fasternet.train.distributed import World, broadcast, gather

SUFFIXES = (".jsonl", ".csv")
DAMAGE = (ValueError, TypeError, KeyError, AttributeError)  # what reading a line of something else raises


class Place(NamedTuple):
    """Where a batch stands in the whole: number of its shard (0 for files), number of the batch in it."""

    shard: int
    batch: int


class Batch(NamedTuple):
    """Pictures that go through the network together: their names, and what decodes each."""

    place: Place
    names: list[str]
    loads: list[Callable[[], Image.Image]]


def predict_to_file(
    predictor: Predictor,
    images: Sequence[str | Path],
    output: Path,
    *,
    top_k: int = 5,
    num_workers: int = 0,
    resume: bool = False,
    world: World | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> tuple[int, int]:
    """Classify pictures and write a line for each, in their order; one that cannot be read gets a line with its error.

    Args:
        predictor: What classifies, in batches of its ``batch_size``.
        images: Picture files and folders, or one folder of packed shards or its address.
        output: A file ``.jsonl`` or ``.csv``. It appears when all is done; before, its parts grow beside it.
        top_k: Classes to report for each picture; at most all.
        num_workers: Processes that decode, at most one per processor core; 0 decodes in this one.
        resume: Go on where a run with the same arguments stopped; one that is done is left as it is.
        world: The processes that share the work; they see the same files.
        on_batch: Called with the number of pictures of each batch that this process has written.

    Returns:
        How many pictures all processes predicted in this call, and how many could not be read.

    Raises:
        FileNotFoundError: There are no pictures.
        FileExistsError: ``output`` or a part of it exists, and ``resume`` is off.
        ValueError: The arguments are not those of the run that is resumed, or the pictures have changed since.
    """
    world = world or World()
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output {output} must end in {' or '.join(SUFFIXES)}")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    settings = {
        "weights": predictor.fingerprint,
        "images": [str(path) for path in images],
        "top_k": min(top_k, len(predictor.class_names)),
        "batch_size": predictor.batch_size,
    }
    # One process looks, before any of them writes.
    obstacle = _find_obstacle(output, settings, resume, world.size) if world.is_main else None
    if problem := broadcast(world, obstacle):
        raise problem
    if broadcast(world, output.exists() and not _list_parts(output)):
        return 0, 0
    counts = _write_part(
        predictor, images, _name_part(output, world.rank, world.size), settings, num_workers, world, on_batch
    )
    totals = gather(world, counts)
    if world.is_main:
        _merge(output, settings)
    return sum(predicted for predicted, _ in totals), sum(unreadable for _, unreadable in totals)


def _deal(images: Sequence[str | Path], batch_size: int, world: World, first: Place) -> Iterator[Batch]:
    """Yield this process's batches; those of shards before ``first`` are passed over unread, others are not."""
    sharded = [path for path in images if is_sharded(path) or _holds_shards(Path(path))]
    if sharded and len(images) > 1:
        raise ValueError(f"name one folder of shards alone, or pictures and folders of them; {sharded[0]} has shards")
    if not sharded:
        files = ((str(path), functools.partial(load_image, path)) for path in list_images(images))
        yield from itertools.islice(_cut(files, batch_size, 0), world.rank, None, world.size)
        return
    start = max(world.rank, first.shard)
    pictures = stream_shard_pictures(images[0], start, world.size)
    by_shard = itertools.groupby(pictures, key=lambda picture: picture[0].partition("/")[0])
    for number, (_, members) in zip(itertools.count(start, world.size), by_shard, strict=False):
        yield from _cut(members, batch_size, number)


def _holds_shards(folder: Path) -> bool:
    """Tell whether a folder holds tar files and no pictures."""
    return next(folder.glob("*.tar"), None) is not None and not holds_image(folder)


def _cut(pictures: Iterable[tuple[str, Callable[[], Image.Image]]], batch_size: int, shard: int) -> Iterator[Batch]:
    pictures = iter(pictures)
    for number in itertools.count():
        if not (batch := list(itertools.islice(pictures, batch_size))):
            return
        yield Batch(Place(shard, number), [name for name, _ in batch], [load for _, load in batch])


class _Decoder(Dataset[Any]):
    """Decodes a batch where a loader's worker asks for it: ``decoder[batch]``."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __getitem__(self, batch: Any) -> tuple[Place, list[str], list[str | None], Tensor | None]:
        tensors: list[Tensor] = []
        errors: list[str | None] = []
        for load in batch.loads:
            try:
                tensors.append(self.transform(load()))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        return batch.place, batch.names, errors, torch.stack(tensors) if tensors else None  # (N, 3, S, S)


def _keep(decoded: Any) -> Any:
    return decoded


def _write_part(
    predictor: Predictor,
    images: Sequence[str | Path],
    part: Path,
    settings: dict[str, Any],
    num_workers: int,
    world: World,
    on_batch: Callable[[int], object] | None,
) -> tuple[int, int]:
    """Append what a part lacks; return how many pictures were predicted, and how many could not be read."""
    predicted = unreadable = 0
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is still writing {part}: wait for it, or end it") from None
        first, digest = _resume_part(file, settings)
        batches = _skip(_deal(images, predictor.batch_size, world, first), first, digest)
        loader = DataLoader[Any](
            _Decoder(predictor.transform),
            sampler=batches,  # any iterable will do; the loader draws it as it goes
            batch_size=None,
            collate_fn=_keep,
            num_workers=min(num_workers, describe_machine().cores),
            pin_memory=False,
        )
        with explain_dead_worker():
            for place, names, errors, tensors in loader:
                tops = iter(() if tensors is None else predictor.classify(tensors, settings["top_k"]))
                lines = [[*place, _describe(*pair, tops)] for pair in zip(names, errors, strict=True)]
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                file.flush()
                predicted += len(names)
                unreadable += len(names) - errors.count(None)
                if on_batch is not None:
                    on_batch(len(names))
        os.fsync(file.fileno())
    return predicted, unreadable


def _describe(name: str, error: str | None, tops: Iterator[tuple[tuple[str, float], ...]]) -> dict[str, Any]:
    if error is not None:
        return {"path": name, "error": error}
    return {"path": name, "top": [{"label": label, "probability": probability} for label, probability in next(tops)]}


def _find_difference(before: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Return the first setting that is not as before, in words."""
    for key, value in settings.items():
        if before[key] != value:
            return f"with {key} {before[key]!r}, not {value!r}"
    return None


def _resume_part(file: BinaryIO, settings: dict[str, Any]) -> tuple[Place, str]:
    """Cut a part behind its last complete batch, the last of all counting as torn.

    Returns:
        The place to go on at, and a hash of the names that stand before it in its shard.

    Raises:
        ValueError: The settings differ, or a line is not what this module writes.
    """
    file.seek(0)
    header = file.readline()
    if not header.endswith(b"\n"):
        file.truncate(0)
        file.write(json.dumps(settings).encode() + b"\n")
        file.flush()
        return Place(0, 0), hashlib.sha256().hexdigest()
    try:
        difference = _find_difference(json.loads(header), settings)
    except DAMAGE:
        raise _explain_damage(file.name, 1) from None
    if difference:
        raise ValueError(f"{file.name} was begun {difference}: resume it with that")
    place, end = Place(0, 0), file.tell()
    digest, names = hashlib.sha256(), ""
    position = end
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            break
        try:
            shard, batch, prediction = json.loads(line)
            name = prediction["path"] + "\0"
        except DAMAGE:
            raise _explain_damage(file.name, number) from None
        if (found := Place(shard, batch)) != place:
            digest.update(names.encode("utf-8", "surrogateescape"))
            if found.shard != place.shard:
                digest = hashlib.sha256()
            place, end, names = found, position, ""
        names += name
        position += len(line)
    file.truncate(end)
    file.seek(end)
    return place, digest.hexdigest()


def _explain_damage(part: str, line: int) -> ValueError:
    return ValueError(f"{part} is damaged at line {line}: delete it, and resume predicts anew what it held")


def _skip(batches: Iterator[Batch], first: Place, digest: str) -> Iterator[Batch]:
    """Pass over the batches before ``first``; raise where they are not those that were predicted."""
    passed = hashlib.sha256()
    rest = iter(batches)
    for batch in rest:
        if batch.place >= first:
            rest = itertools.chain([batch], rest)
            break
        passed.update("".join(name + "\0" for name in batch.names).encode("utf-8", "surrogateescape"))
    else:
        digest = digest if first == Place(0, 0) else ""  # the batch to go on with is gone
    if passed.hexdigest() != digest:
        raise ValueError("the pictures are not those that this run began with: begin anew, without resume")
    yield from rest


def _name_part(output: Path, rank: int, size: int) -> Path:
    return output.with_name(f"{output.name}.part-{rank:05}-of-{size:05}")


def _list_parts(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-?????-of-?????"))


def _name_settings(output: Path) -> Path:
    return output.with_name(f".{output.name}.settings")


def _find_obstacle(output: Path, settings: dict[str, Any], resume: bool, size: int) -> Exception | None:
    """Return what keeps a run from beginning, or None."""
    parts = _list_parts(output)
    if not output.parent.is_dir():
        return FileNotFoundError(f"no folder {output.parent} for the output")
    if not resume and parts:
        return FileExistsError(f"{output} was begun already: resume it, or delete {output.name}.part-*")
    if not resume and output.exists():
        return FileExistsError(f"{output} exists already")
    if parts and (before := int(parts[0].name[-5:])) != size:
        return ValueError(f"{output} was begun with {before} processes, not {size}: resume it with as many")
    try:
        next(_deal(settings["images"], 1, World(), Place(0, 0)), None)
        if output.exists() and not parts:
            _compare_finished(output, settings)
    except (OSError, ValueError) as error:
        return error
    return None


def _compare_finished(output: Path, settings: dict[str, Any]) -> None:
    """Compare settings with those that a finished output was made with, where they are known."""
    try:
        difference = _find_difference(json.loads(_name_settings(output).read_bytes()), settings)
    except (OSError, *DAMAGE):
        warnings.warn(f"{output} is complete; it was not checked, as it is not known what made it", stacklevel=4)
        return
    if difference:
        raise ValueError(f"{output} is complete, and was made {difference}: name another output")


def _merge(output: Path, settings: dict[str, Any]) -> None:
    """Put the lines of all parts into the output, by their places, keep the settings, and delete the parts."""
    top_k = settings["top_k"]
    parts = _list_parts(output)
    merging = output.with_name(f".{output.name}.merging")
    lines = (prediction for *_, prediction in heapq.merge(*map(_read_part, parts), key=lambda line: line[:2]))
    with merging.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        if output.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            columns = [(f"label_{number}", f"probability_{number}") for number in range(1, top_k + 1)]
            writer.writerow(["path", "error", *itertools.chain.from_iterable(columns)])
            for line in lines:
                best = itertools.chain.from_iterable(top.values() for top in line.get("top", []))
                writer.writerow(
                    [line["path"], line.get("error", ""), *best, *([""] * 2 * top_k if "error" in line else [])]
                )
        else:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    _name_settings(output).write_text(json.dumps(settings) + "\n")
    merging.replace(output)
    for part in parts:
        part.unlink()


def _read_part(part: Path) -> Iterator[list[Any]]:
    with part.open(encoding="utf-8") as file:
        next(file)  # the settings
        yield from map(json.loads, file)
