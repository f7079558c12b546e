"""``fasternet env``: the machine, the versions, and what is ready on it or why not."""

from __future__ import annotations

from typing import Annotated

import typer

from fasternet.cli._common import print_json, print_table


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Describe this machine and its software; for each implementation and engine 'ready', or why not.

    Example: fasternet env
    """
    import dataclasses
    import importlib.util
    import itertools

    from fasternet import native
    from fasternet.deploy import ENGINES, PRECISIONS, explain_engine
    from fasternet.environment import describe_machine, describe_software
    from fasternet.ops import list_impls

    machine = dataclasses.asdict(describe_machine())
    ready = {f"pconv2d {impl}": "ready" for impl in list_impls()}
    ready["pconv2d native"] = native.explain_native() or "ready"
    device = "cuda" if machine["accelerator"] else "cpu"
    for engine, precision in itertools.product(ENGINES, PRECISIONS):
        for place in dict.fromkeys(("cpu", device)):
            ready[f"engine {engine} {precision} {place}"] = explain_engine(engine, precision, place) or "ready"
    for isa, precision in itertools.product(native.ISAS, native.PRECISIONS):
        ready[f"isa {isa} {precision}"] = native.explain_native(isa, precision) or "ready"
    ready["device cuda"] = "ready" if machine["accelerator"] else "no CUDA device is visible to torch"
    for package, extra in (("sklearn", "quickstart"), ("matplotlib", "report")):
        found = importlib.util.find_spec(package) is not None
        ready[f"extra {extra}"] = "ready" if found else f"{package} is missing: pip install 'fasternet[{extra}]'"
    versions = describe_software()
    chosen = {precision: _choose_isa(precision) for precision in native.PRECISIONS}
    if as_json:
        print_json({"machine": machine, "versions": versions, "ready": ready, "isa": chosen})
        return
    sets = ", ".join(machine.pop("instruction_sets")) or None
    print_table(("machine", ""), [*machine.items(), ("instruction_sets", sets)])
    print_table(("software", ""), versions.items())
    print_table(("part", "state"), ready.items())
    print_table(("engine cpu", "instruction set"), chosen.items())


def _choose_isa(precision: str) -> str:
    from fasternet.native import select_isa

    try:
        return "{}: {}".format(*select_isa(None, precision))
    except ValueError as error:
        return f"none: {error}"
