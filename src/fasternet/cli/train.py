"""``fasternet train``: a network from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import is_main_process, note, shorten_spinning
from fasternet.cli._training import choose_output, list_changes, list_options, run_training

if TYPE_CHECKING:
    from fasternet.train.loop import Hooks
    from fasternet.train.recipe import Recipe


def train(
    name: Annotated[str, typer.Argument(help="Network: fasternet_t0 ..., a rival's name, or one of timm's.")],
    data: Annotated[str, typer.Option(help="Folder of pictures, folder or address of shards, hf:NAME, or digits.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder. [default: outputs/NAME-DATA-TIME]")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="paper, finetune, small or digits. [default: by the data]")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=...")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set batch_size=...")] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set lr=...")] = None,
    input_size: Annotated[int | None, typer.Option(help="Short for --set input_size=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Short for --set compile=true.")] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="Short for --set precision=auto, or fp32.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to start from: a model folder, a run folder or a file.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage, of a FasterNet.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: CUDA where there is one]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output, with its recipe.")] = False,
    save_minutes: Annotated[float, typer.Option(min=0, help="Time between two states within an epoch.")] = 10.0,
    watchers: Annotated[
        list[str] | None, typer.Option("--watch", help="tensorboard or wandb; repeatable. log.csv comes always.")
    ] = None,
) -> None:
    """Train a network on pictures, under torchrun with all its processes; the last line printed is the run folder.

    Example: fasternet train fasternet_t0 --data digits
    """
    shorten_spinning()
    from fasternet.train import classification

    folder = choose_output(output, name, data, resume=resume)
    shortcuts = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "input_size": input_size, "seed": seed}
    changes = list_changes(changes, {**shortcuts, "compile": compile}, amp=amp)
    chosen = _choose_recipe(
        recipe, changes, name, data, folder if resume else None, checkpoint is not None or pretrained
    )

    def run(hooks: Hooks) -> None:
        classification.train(
            name,
            data,
            folder,
            recipe=chosen,
            resume=resume,
            checkpoint=checkpoint,
            pretrained=pretrained,
            model_options=None if width is None else {"width": width},
            device=device,
            hooks=hooks,
        )

    command = ["fasternet", "train", name, "--data", data, *list_options({"--width": width, "--device": device})]
    run_training(run, command, folder, save_minutes=save_minutes, watchers=watchers)
    if is_main_process():
        _print_result(folder)


def _choose_recipe(
    name: str | None, changes: list[str], model: str, data: str, run: Path | None, from_weights: bool
) -> Recipe:
    """Return the recipe of the run to resume or, unless one is named, the one that suits the data; then change it."""
    import dataclasses

    from fasternet.rivals import is_fasternet
    from fasternet.train.recipe import Recipe, load_recipe, parse_overrides
    from fasternet.train.recipes import find_recipe

    if name is None and run is not None and (run / "recipe.yaml").is_file():
        recipe = load_recipe(run / "recipe.yaml", Recipe)
    else:
        by_data = "digits" if data == "digits" else "finetune" if from_weights else "small"
        recipe = find_recipe(name or by_data, model)
    is_changed = any(change.startswith("layer_decay=") for change in changes)
    if recipe.layer_decay is not None and not is_changed and not is_fasternet(model):
        if is_main_process():
            note(f"recipe field layer_decay={recipe.layer_decay} is for FasterNet: {model} takes none")
        recipe = dataclasses.replace(recipe, layer_decay=None)
    return parse_overrides(recipe, changes)


def _print_result(folder: Path) -> None:
    from fasternet.records import load_records

    values = next(r.values for r in load_records(folder / "log.jsonl") if r.kind == "evaluation")
    top5 = f"top-5 {values['top5']:.2f} %, " if len(values["per_class"]) > 5 else ""
    print(
        f"best checkpoint: top-1 {values['top1']:.2f} %, {top5}loss {values['loss']:.3f} "
        f"on {values['num_images']} pictures"
    )
    print(folder)
