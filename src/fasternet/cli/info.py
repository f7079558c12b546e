"""``fasternet list`` and ``fasternet info``: which networks there are, and what one costs layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from fasternet.cli._common import print_json, print_table

if TYPE_CHECKING:
    from torch import nn

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def list_(as_json: Json = False) -> None:
    """List the variants of FasterNet and the networks it is compared with; numbers as the paper prints them.

    Example: fasternet list
    """
    from fasternet.models import WEIGHTS, list_models
    from fasternet.rivals import list_rivals

    variants = [
        {"name": name, "input_size": 224, **_read_table3(_paper_name(name)), "weights": WEIGHTS[name].hub}
        for name in list_models()
    ]
    rivals = [
        {"name": rival.name, "input_size": rival.input_size, **_read_table3(rival.name), "built_by": rival.source}
        for rival in list_rivals()
    ]
    if as_json:
        print_json({"variants": variants, "rivals": rivals})
        return
    columns = ("name", "input size", "params M", "MACs G", "top-1 %")
    print_table((*columns, "weights"), map(_cells, variants), title="FasterNet (Table 8)")
    print_table((*columns, "built by"), map(_cells, rivals), title="Rivals (Tables 3 and 4, and newer ones)")


def info(
    name: Annotated[str, typer.Argument(help="A name that `fasternet list` shows.")],
    input_size: Annotated[
        int | None, typer.Option(help="Side of the picture. [default: the network's own]", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a network layer by layer: shapes, parameters, multiply-adds and memory accesses for one picture.

    Example: fasternet info fasternet_t0 --input-size 192
    """
    import dataclasses

    from fasternet.complexity import count_costs

    model, own_size = _create(name)
    size = input_size or own_size
    costs = count_costs(model, (1, 3, size, size))
    totals = {
        "num_params": costs.num_params,
        "num_params_without_batch_norm": costs.num_params_without_batch_norm,
        "macs": costs.macs,
        "memory_accesses": costs.memory_accesses,
    }
    if as_json:
        layers = [dataclasses.asdict(row) for row in costs.rows]
        print_json({"name": name, "input_size": size, **totals, "layers": layers})
        return
    rows = [
        (
            *(row.name, row.kind, _shape(row.input_shape), _shape(row.output_shape)),
            *(row.num_params, row.macs, row.memory_accesses),
        )
        for row in costs.rows
    ]
    columns = ("layer", "kind", "input", "output", "params", "MACs", "accesses")
    print_table(columns, rows, title=f"{name} on one picture of {size} x {size}")
    print_table(("", "total"), totals.items())


def _create(name: str) -> tuple[nn.Module, int]:
    """Build a variant, one of Table 5 (``FasterNet-T0 LN``) or a rival, with the size of its pictures."""
    import difflib

    from fasternet.models import create_model, list_models
    from fasternet.models.registry import create_ablation
    from fasternet.rivals import create_rival, list_rivals

    variants = {spelling: variant for variant in list_models() for spelling in (variant, _paper_name(variant))}
    rivals = {rival.name: rival.input_size for rival in list_rivals()}
    if name in variants:
        return create_model(variants[name]), 224
    if name in rivals:
        return create_rival(name), rivals[name]
    if name.startswith("FasterNet-") and " " in name:
        return create_ablation(name.removeprefix("FasterNet-")), 224
    known = {known.lower(): known for known in (*variants.values(), *rivals)}
    near = [known[match] for match in difflib.get_close_matches(name.lower(), known, cutoff=0.5)]
    raise ValueError(f"unknown network {name!r}: near names are {', '.join(near or known.values())}")


def _paper_name(variant: str) -> str:
    """Return a variant's name as the paper prints it: ``fasternet_t0`` is FasterNet-T0."""
    return "FasterNet-" + variant.removeprefix("fasternet_").upper()


def _read_table3(network: str) -> dict[str, float | None]:
    """Return the paper's numbers of a network, None where it has none."""
    from fasternet.paper import load_table

    row = next((row for row in load_table("table3_imagenet") if row["network"] == network), None)
    return {column: float(row[column]) if row else None for column in ("params_m", "macs_g", "top1")}


def _cells(row: Mapping[str, object]) -> tuple[object, ...]:
    """Write the paper's numbers with the digits it prints: 15.0 and 1.90."""
    digits = {"params_m": 1, "macs_g": 2, "top1": 1}
    return tuple(
        f"{cell:>5.{digits[column]}f}" if column in digits and isinstance(cell, float) else cell
        for column, cell in row.items()
    )


def _shape(shape: tuple[int, ...]) -> str:
    """Write a shape, without the batch where that is one picture."""
    return " x ".join(map(str, shape[1:] if shape[:1] == (1,) else shape))
