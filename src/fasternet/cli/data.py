"""``fasternet data``: looks at pictures before a long run, packs them into shards, lists shards, imports formats."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fasternet.cli._common import note, print_json, print_table, track

if TYPE_CHECKING:
    from fasternet.data.check import Check
    from fasternet.data.coco_check import CocoCheck
    from fasternet.data.packing import Packed

MAX_CLASSES = 40  # that are printed one by one
NUM_EXTREME = 10  # classes with the most and with the fewest pictures, where there are more
NUM_EXAMPLES = 5  # findings of a kind, and
NUM_ERRORS = 50  # of what training would trip over

data = typer.Typer(help="Look at data sets, pack them into shards, list shards, import formats.", no_args_is_help=True)


@data.command("check")
def check(
    folder: Annotated[str, typer.Argument(help="Of classes, with or without train and val; in COCO's format; shards.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for records and a page of thumbnails.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Look at every picture: classes, sizes, what cannot be read, what is odd, what is there twice.

    Equal pictures are found by their pixels, whatever the format and metadata of their files. The exit status is 1
    where training would trip over something: a picture that cannot be read, or a folder that it refuses. For detection
    name an annotation file in COCO's format, or a folder with such files: objects, masks and pictures are looked at.
    Of packed shards, also at an address, the hashes are compared.

    Example: fasternet data check flowers -o outputs/flowers-check
    """
    from fasternet.data.check import check_data, save_check
    from fasternet.data.datasets import is_sharded

    if is_sharded(folder):
        _check_shards(folder, output, json=json)
        return
    path = Path(folder)
    if _is_coco(path):
        _check_coco(path, output, num_workers=num_workers, json=json)
        return
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output {output} holds something already: name a new folder")
    found = check_data(
        path, num_workers=num_workers, watch=lambda scans, total: track(scans, total, "reading pictures")
    )
    if json:
        print_json(found.values())
    else:
        _print_tables(found)
    if output is not None:
        from fasternet.report import create_report

        page = create_report([save_check(found, path, output)], output / "check.html")
        (note if json else typer.echo)(str(page))
    if found.errors:
        raise typer.Exit(1)


@data.command("pack")
def pack(
    source: Annotated[str, typer.Argument(help="Folder of pictures: with train and val, or a folder per class.")],
    output: Annotated[Path, typer.Argument(help="New folder for the shards.")],
    *,
    images_per_shard: Annotated[int, typer.Option(min=1, help="The last shard of a split may hold fewer.")] = 1000,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 2,
    seed: Annotated[int, typer.Option(help="Decides the order in which pictures are packed, and the split.")] = 0,
) -> None:
    """Pack pictures into tar shards that are read in sequence, from a disk or an address; their files stay as they are.

    Example: fasternet data pack imagenet imagenet-shards --images-per-shard 1000
    """
    from fasternet.data.packing import pack_shards

    with _show_progress("packing") as progress:
        packed = pack_shards(
            source,
            output,
            images_per_shard=images_per_shard,
            seed=seed,
            num_workers=num_workers,
            progress=progress,
        )
    if errors := packed.unreadable:
        more = [f"... and {len(errors) - NUM_ERRORS} more"] if len(errors) > NUM_ERRORS else []
        note("\n".join([f"left out, as they cannot be read: {len(errors)}", *errors[:NUM_ERRORS], *more]))
    _print_packed(packed)


@data.command("index")
def index(
    folder: Annotated[Path, typer.Argument(help="Folder of train*.tar and val*.tar or test*.tar.")],
    *,
    classes: Annotated[
        Path | None, typer.Option(help="Text file, a name of a class per line, in the order of the numbers.")
    ] = None,
) -> None:
    """List the WebDataset shards of another tool in shards.json, so that they can be trained on and evaluated.

    The label of a picture is the text of KEY.cls, or in KEY.json the value of label, cls, class or class_name: the
    number of a class or its name. The tar files are read once, and stay as they are.

    Example: fasternet data index imagenet-wds --classes names.txt
    """
    from fasternet.data.indexing import index_shards

    with _show_progress("indexing") as progress:
        _print_packed(index_shards(folder, classes=classes, progress=progress))


@data.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder in the layout of Pascal VOC or YOLO.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder, for COCO's layout.")],
    format: Annotated[Literal["voc", "yolo"] | None, typer.Option(help="Default: what the folder looks like.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the pictures instead of linking them.")] = False,
    masks: Annotated[bool, typer.Option("--masks", help="Only pictures whose objects all have masks.")] = False,
) -> None:
    """Turn Pascal VOC or YOLO, with boxes or masks, into the COCO format that detectors learn from.

    The source stays as it is. What is left out or changed is counted and said.

    Example: fasternet data import VOCdevkit/VOC2012 -o voc2012
    """
    from fasternet.data.importing import import_data

    found = import_data(
        source,
        output,
        format=format,
        copy=copy,
        masks=masks,
        watch=lambda pictures, total: track(pictures, total, "reading annotations"),
    )
    for remark, files in found.notes.items():
        _note_files(remark, files)
    print_table(
        ("split", "pictures", "objects", "with masks"),
        [(split, values["pictures"], values["objects"], values["masks"]) for split, values in found.splits.items()],
    )
    typer.echo(f"{len(found.class_names):,} classes: {', '.join(found.class_names[:MAX_CLASSES])}")
    typer.echo(str(found.output))


def _print_packed(packed: Packed) -> None:
    print_table(
        ("training pictures", "validation pictures", "shards", "left out"),
        [(packed.num_train, packed.num_validation, packed.num_shards, len(packed.unreadable))],
    )
    typer.echo(str(packed.output))


def _note_files(remark: str, files: Sequence[str]) -> None:
    more = [f"... and {len(files) - NUM_EXAMPLES:,} more"] if len(files) > NUM_EXAMPLES else []
    note("\n  ".join([f"{remark}: {len(files):,}", *files[:NUM_EXAMPLES], *more]))


def _is_coco(path: Path) -> bool:
    """Whether it is an annotation file, or a folder with some, rather than one of classes."""
    if path.is_file():
        return path.suffix.lower() == ".json"
    if any(path.glob("annotations/*.json")) or any(path.glob("train/*.json")):
        return True
    return any(b'"annotations"' in file.read_bytes() for file in path.glob("*.json"))


def _check_coco(path: Path, output: Path | None, *, num_workers: int, json: bool) -> None:
    from fasternet.data.coco_check import check_coco

    if output is not None:
        raise ValueError(f"output {output}: a page is made of folders of classes; --json prints all of {path}")
    found = check_coco(
        path, num_workers=num_workers, watch=lambda pictures, total: track(pictures, total, "reading pictures")
    )
    if json:
        print_json(found.values())
    else:
        _print_coco(found)
    if found.errors:
        raise typer.Exit(1)


def _check_shards(root: str, output: Path | None, *, json: bool) -> None:
    from fasternet.data.shard_files import check_shard, load_contents

    if output is not None:
        raise ValueError(f"output {output}: a page is made of folders of classes, not of shards")
    root = root.rstrip("/")
    contents = load_contents(root)
    shards = [*contents.train, *contents.validation]
    checked = track((check_shard(root, shard) for shard in shards), len(shards), "reading shards")
    errors = [error for error in checked if error]
    if json:
        print_json({"num_shards": len(shards), "num_images": sum(s.num_images for s in shards), "errors": errors})
    else:
        if errors:
            print_table(("training would trip over",), [(error,) for error in errors[:NUM_ERRORS]])
        typer.echo(f"{root}: {len(shards):,} shards, of which {len(errors):,} are not as shards.json describes them")
    if errors:
        raise typer.Exit(1)


def _print_coco(found: CocoCheck) -> None:
    splits: Mapping[str, dict[str, Any]] = found.values()["splits"]
    columns = {
        "num_images": "pictures",
        "num_images_without_objects": "without objects",
        "num_objects": "objects",
        "num_crowds": "crowds",
        "has_masks": "masks",
    }
    rows = [(name, *(values[key] for key in columns), *values["sizes"].values()) for name, values in splits.items()]
    print_table(("split", *columns.values(), "small", "medium", "large"), rows)
    if splits:
        _print_classes({name: values["classes"] for name, values in splits.items()}, {})
    for name, values in splits.items():
        for remark, count in values["skipped"].items():
            typer.echo(f"{name}: {remark}: {count:,}")
        if values["grey"]:
            typer.echo(f"{name}: grey pictures, which become RGB: {len(values['grey']):,}")
        if turned := values["ambiguous"]:
            typer.echo(f"{name}: pictures that EXIF data turn, perhaps without their objects: {len(turned):,}")
    if found.errors:
        print_table(("training would trip over",), [(error,) for error in found.errors[:NUM_ERRORS]])
    typer.echo(f"{found.name}: training would trip over {len(found.errors):,} findings")


@contextlib.contextmanager
def _show_progress(description: str) -> Iterator[Callable[[int, int], object] | None]:
    """Give a function of the numbers done and in all that moves a bar; None where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_tables(found: Check) -> None:
    values = found.values()
    _print_classes(values["splits"], values["imbalance"])
    print_table(("shorter side", "pictures"), list(values["sides"].items()))
    print_table(("format", "pictures"), list(values["formats"].items()))
    for kind, entry in values["kinds"].items():
        members = [finding for finding in found.findings if finding.kind == kind]
        limit = NUM_ERRORS if members[0] in found.errors else NUM_EXAMPLES
        more = f", {limit} of {entry['count']:,}" if entry["count"] > limit else f": {entry['count']:,}"
        rows = [(finding.remark, "  ".join(finding.paths)) for finding in members[:limit]]
        typer.echo(f"{kind}: {entry['meaning']}{more}")
        print_table(("detail", "files"), rows)
    num_notes = len(found.findings) - len(found.errors)
    typer.echo(
        f"{found.name}: {found.num_images:,} pictures, {values['num_classes']:,} classes; "
        f"training would trip over {len(found.errors):,} of {len(found.errors) + num_notes:,} findings"
    )


def _print_classes(splits: Mapping[str, Mapping[str, int]], imbalance: Mapping[str, float]) -> None:
    totals: dict[str, int] = {}
    for counts in splits.values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals)
    if len(names) > MAX_CLASSES:
        ordered = sorted(totals, key=lambda name: -totals[name])
        names = ordered[:NUM_EXTREME] + ordered[-NUM_EXTREME:]
        typer.echo(f"the {NUM_EXTREME} largest and {NUM_EXTREME} smallest of {len(totals)} classes (--json lists all)")
    rows: list[tuple[object, ...]] = [(name, *(counts.get(name) for counts in splits.values())) for name in names]
    rows.append(("all classes", *(sum(counts.values()) for counts in splits.values())))
    if imbalance:
        rows.append(("largest by smallest class", *(imbalance.get(split) for split in splits)))
    print_table(("class", *splits), rows)
