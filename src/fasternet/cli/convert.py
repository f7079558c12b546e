"""``fasternet convert``: weights from any format into any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fasternet.cli._common import note


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A weight file of any format, or a model folder.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .pth, .ckpt or .safetensors file, or a model folder.")
    ],
    to: Annotated[str, typer.Option(help="official, lightning, mmdet, timm, or fasternet (a model folder).")],
    model: Annotated[str | None, typer.Option(help="Variant, where its size does not tell.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert weights; what was written is read back and compared.

    Example: fasternet convert fasternet_t0-epoch.281-val_acc1.71.9180.pth fasternet_t0.safetensors --to timm
    """
    from fasternet.models.exchange import convert_file

    note(convert_file(source, target, to=to, model=model, overwrite=overwrite))
    typer.echo(target)
