"""How latency grows with the picture, with the batch and with the threads: Figures 2 and 7 beyond their one condition.

For each value all networks and engines run interleaved, so that those of one value may be compared; what one value
adds to the one before is read off the plot, beside the line on which cost is proportional to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fasternet.benchmark.networks import find_setups, list_setups
from fasternet.benchmark.prepare import find_input_size, load_engines, prepare_network
from fasternet.benchmark.results import (
    Candidate,
    check_arguments,
    choose_settings,
    create_peak_records,
    measure_candidates,
)
from fasternet.environment import describe_machine, set_threads
from fasternet.records import Record
from fasternet.timing import Track, measure_peaks, silent

SUITE = "sweeps"
NETWORKS = ("FasterNet-T0", "MobileNetV2", "ResNet50")
VALUES = {
    "input_size": (64, 96, 128, 192, 224, 256, 384, 512, 768, 1024),
    "batch_size": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "threads": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
}
NUM_BLOCKS, NUM_QUICK_BLOCKS = 16, 6


def measure_sweeps(
    sweeps: Sequence[str] = tuple(VALUES),
    *,
    networks: Sequence[str] = NETWORKS,
    engines: Sequence[str] = ("eager",),
    precision: str = "fp32",
    device: str = "cpu",
    quick: bool = False,
    seed: int = 0,
    track: Track = silent,
    say: Callable[[str], object] = lambda _: None,
) -> Iterator[Record]:
    """Measure networks over a range of input sizes, batch sizes or threads; what is not swept is 1, or their own size.

    Args:
        sweeps: Names in ``VALUES``; of threads, as many as there are cores.
        networks: As in ``measure_networks``.
        engines: See ``create_runtime``.
        precision: Likewise.
        device: "cpu" or "cuda", where threads cannot be swept.
        quick: Every second value, and fewer blocks.
        seed: Of weights, pictures and the order within rounds.
        track: Shows progress.
        say: Takes a line for each value.

    Yields:
        For each value the costs, the latencies and the A/A control.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    if unknown := [name for name in sweeps if name not in VALUES]:
        raise ValueError(f"sweeps has {unknown[0]!r}, which is not one of {', '.join(VALUES)}")
    check_arguments(batch_size=1, device=device)
    if device != "cpu" and "threads" in sweeps:
        raise ValueError(f"sweeps has 'threads', which device {device} does not compute with: name the others")
    sizes = {name: find_input_size(name) for name in networks}
    setups = find_setups(engines, (precision,), device)
    settings = choose_settings(device, quick=quick, seed=seed, track=track)
    settings["num_blocks"] = NUM_QUICK_BLOCKS if quick else NUM_BLOCKS
    load_engines(setups, device)
    for sweep in sweeps:
        for value in _list_values(sweep, device, quick=quick):
            fixed: dict[str, Any] = {"batch_size": 1, "threads": 1, "device": device, "sweep": sweep, sweep: value}
            with set_threads(fixed["threads"]) as moment:
                peaks = measure_peaks(precisions=(precision,), device=device, num_blocks=4)
                yield from create_peak_records(SUITE, peaks, {"threads": fixed["threads"], "device": device})
                candidates: list[Candidate] = []
                for name in track(networks, len(networks), f"{sweep} {value}"):
                    condition = {"input_size": sizes[name], **fixed}
                    for prepared in prepare_network(SUITE, name, condition, list_setups(name, setups), settings):
                        if isinstance(prepared, Record):
                            yield prepared
                        else:
                            candidates.append(prepared)
                if candidates:
                    first = candidates[0].name
                    yield from measure_candidates(
                        SUITE, candidates, baseline=first, pairs=(), peaks=peaks, moment=moment, settings=settings
                    )
            say(f"{sweep} {value} measured")


def _list_values(sweep: str, device: str, *, quick: bool) -> tuple[int, ...]:
    values = VALUES[sweep]
    if sweep == "threads":
        cores = describe_machine().cores
        values = (*(value for value in values if value < cores), cores)
    return values[::2] if quick and len(values) > 3 else values
