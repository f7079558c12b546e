"""What all suites share: the check before the timing, the records after it, and where they are written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasternet import native
from fasternet.deploy.verify import measure_correlation
from fasternet.environment import create_record, describe_machine
from fasternet.measured import create_ratio_records, describe_latency
from fasternet.records import Record, append_records, save_machine
from fasternet.timing import Measurement, Peak, Track, measure

MAX_DIFFERENCE = 5e-4  # of the largest output; folding BN rounds by 1.3e-4 in ResNeXt101 (3e-13 in fp64)
# With fewer bits and random weights no bound holds for every network: outputs have to point the same way.
# Those of another network correlate by some 0.03 over a thousand classes; RepViT in int8 keeps 0.47.
MIN_CORRELATION = {"bf16": 0.9, "int8": 0.3}
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SANE_SCALE = (1e-4, 1e4)
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


NUM_BLOCKS, NUM_QUICK_BLOCKS = 64, 32


@dataclass(frozen=True)
class Candidate:
    """Something that has passed its check and may be timed.

    Attributes:
        name: What tells it from the others of its run.
        call: Runs it once, on one batch.
        condition: Of its records.
        costs: Of one picture: ``macs``, ``memory_accesses``, and ``num_params`` of a network.
        num_bytes: Bytes that one call reads and writes (Eq. 2 to 5), 0 where they are not counted.
        notes: Further values of its latency record.
        subject: Of its records, where that is not its name.
    """

    name: str
    call: Callable[[], object]
    condition: Mapping[str, Any]
    costs: Mapping[str, int]
    num_bytes: int
    notes: Mapping[str, Any]
    subject: str = ""


def check_arguments(*, batch_size: int, device: str, memory_format: str = "contiguous") -> None:
    """Refuse what no benchmark can do.

    Raises:
        ValueError: An argument is not one of what is allowed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    at_hand = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    at_hand += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device not in at_hand:
        raise ValueError(f"device {device!r} is not one of those at hand here: {', '.join(at_hand)}")
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format {memory_format!r} is not one of {', '.join(MEMORY_FORMATS)}")


def choose_settings(device: str, *, quick: bool, seed: int, track: Track) -> dict[str, Any]:
    """Return the arguments of ``timing.measure`` that a suite's runs share."""
    num_blocks, warmup_s = (NUM_QUICK_BLOCKS, 0.1) if quick else (NUM_BLOCKS, 0.3)
    return {"num_blocks": num_blocks, "warmup_s": warmup_s, "seed": seed, "device": device, "track": track}


def find_fault(output: Tensor, expected: Tensor, precision: str = "fp32") -> str | None:
    """Compare an output with what the oracle computes in fp32 from the same input.

    Returns:
        None, or what is wrong: the oracle itself out of scale, or the largest difference over the largest value.
    """
    scale = float(expected.abs().max())
    if not SANE_SCALE[0] <= scale <= SANE_SCALE[1]:  # NaN too
        return f"wrong: the oracle's largest output is {scale:.1e}, outside of {SANE_SCALE[0]:g} to {SANE_SCALE[1]:g}"
    if output.shape != expected.shape:
        return f"wrong: shape {tuple(output.shape)} instead of {tuple(expected.shape)}"
    if least := MIN_CORRELATION.get(precision):
        if not (correlation := measure_correlation(output, expected)) >= least:
            return f"wrong: correlation {correlation:.3f} with the oracle, less than {least:g}"
    elif not (difference := float((output - expected).abs().max()) / scale) <= MAX_DIFFERENCE:
        return f"wrong: relative difference {difference:.1e} to the oracle, more than {MAX_DIFFERENCE:g}"
    return None


class WrongOutputError(ValueError):
    """A candidate does not compute what the oracle computes."""


def describe_failure(error: Exception) -> str:
    """Return "OOM", or the first line of what was raised."""
    if isinstance(error, WrongOutputError):
        return str(error)
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "OOM"
    return f"failed: {text}"


def measure_register_peaks(precisions: Sequence[str], threads: int) -> list[Peak]:
    """Measure the multiply-adds that this processor's cores do in registers, where the C++ engine is built.

    Args:
        precisions: What the engine does not have here is left out.
        threads: Cores that compute, each as fast as the one that is measured.
    """
    peaks = []
    for precision in precisions:
        if precision in native.PRECISIONS and native.explain_native(precision=precision) is None:
            isa, _ = native.select_isa(None, precision)
            rate = threads * native.measure_peak(isa, precision)
            peaks.append(Peak("registers", {"precision": precision, "isa": isa}, rate))
    return peaks


def create_peak_records(suite: str, peaks: Sequence[Peak], condition: Mapping[str, Any]) -> Iterator[Record]:
    """Record what the machine attains."""
    units = {"gemm": "macs_per_second", "registers": "macs_per_second", "copy": "bytes_per_second"}
    for peak in peaks:
        values = {units[peak.subject]: peak.per_second}
        yield create_record(
            suite, "machine_peak", peak.subject, condition={**condition, **peak.condition}, values=values
        )


def measure_candidates(
    suite: str,
    candidates: Sequence[Candidate],
    *,
    baseline: str,
    pairs: Iterable[tuple[str, str]],
    peaks: Sequence[Peak],
    moment: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Generator[Record, None, Measurement]:
    """Time candidates in one interleaved run.

    Args:
        suite: See ``Record.suite``.
        candidates: What passed its check.
        baseline: The candidate that the A/A control repeats.
        pairs: Ratios to take: numerator and denominator.
        peaks: What the machine attains in the candidates' precisions.
        moment: What the machine was like, as ``set_threads`` tells it.
        settings: Further arguments of ``timing.measure``.

    Yields:
        The latencies, the A/A control, the ratios.

    Returns:
        What was measured.
    """
    measured = measure({c.name: c.call for c in candidates}, baseline=baseline, **settings)
    for candidate in candidates:
        yield create_latency_record(suite, candidate, measured, peaks, moment)
    yield from create_ratio_records(
        suite,
        measured,
        ((baseline, baseline), *pairs),
        {candidate.name: candidate.condition for candidate in candidates},
        {candidate.name: candidate.subject for candidate in candidates if candidate.subject},
    )
    return measured


def create_failure_record(
    suite: str, subject: str, condition: Mapping[str, Any], setup: tuple[str, str], fault: str
) -> Record:
    """Record why something has no latency in an engine and a precision."""
    condition = {**condition, **dict(zip(("engine", "precision"), setup, strict=True))}
    return create_record(suite, "latency", subject, condition=condition, values={"error": fault})


def create_latency_record(
    suite: str, candidate: Candidate, measured: Measurement, peaks: Sequence[Peak], moment: Mapping[str, Any]
) -> Record:
    """Record how long a candidate took, beside what the machine attains."""
    latency = describe_latency(measured, candidate.name)
    calls_per_second = 1e3 / latency["latency_ms"]
    images_per_second = candidate.condition["batch_size"] * calls_per_second
    macs_per_second = candidate.costs["macs"] * images_per_second
    precision = candidate.condition["precision"]
    known = [peak for peak in peaks if peak.condition.get("precision", "fp32") == precision]
    gemms, registers = ([p.per_second for p in known if p.subject == subject] for subject in ("gemm", "registers"))
    values = {
        **latency,
        **candidate.costs,
        "images_per_second": images_per_second,
        "macs_per_second": macs_per_second,
        "bytes_per_second": candidate.num_bytes * calls_per_second or None,
        "peak_share": macs_per_second / max(gemms) if gemms else None,
        **({"register_peak_share": macs_per_second / max(registers)} if registers else {}),
        **candidate.notes,
        **moment,
    }
    samples = {"latency_ms": measured.samples_ms[candidate.name]}
    return create_record(
        suite,
        "latency",
        candidate.subject or candidate.name,
        condition=candidate.condition,
        values=values,
        samples=samples,
    )


def find_results_file(suite: str) -> Path:
    """Return where a suite's records of this machine and day go: ``results/<machine>/<date>-<suite>.jsonl``."""
    return Path("results") / describe_machine().id / f"{datetime.now(UTC):%Y-%m-%d}-{suite}.jsonl"


def save_results(path: Path, records: Iterable[Record]) -> Iterator[Record]:
    """Append each record to ``path`` as it comes, and pass it on; the machine is described beside it.

    The description goes to ``machines/<id>.json`` in the folder of the file, or in ``results`` for a file that lies
    where ``find_results_file`` puts it.
    """
    machine = describe_machine()
    folder = path.parent.parent if path.parent.name == machine.id else path.parent
    for count, record in enumerate(records):
        if count == 0:
            save_machine(folder / "machines", machine)
        append_records(path, [record])
        yield record
