"""``fasternet push``: a model folder to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Model folder, or run folder: its best checkpoint.")],
    repository: Annotated[str, typer.Argument(help="USER/NAME on the hub; it is created where it is absent.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Create the repository for your own eyes.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, as the hub writes it; kept in the folder too.")
    ] = None,
) -> None:
    """Upload a model folder to the Hugging Face hub: weights, config.json and the model card; print its address.

    The token is that of `hf auth login`, or HF_TOKEN. Training states, logs and pictures of a run stay here.

    Example: fasternet push outputs/run me/flowers --license cc-by-4.0 --private
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from fasternet.models.push import push_folder

    if not sys.stderr.isatty():
        disable_progress_bars()
    typer.echo(push_folder(folder, repository, private=private, license=license))
