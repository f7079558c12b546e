"""Where the CPU engine's time goes: embedding, stages, mergings and head, each beside what registers could do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fasternet import native
from fasternet.deploy import to_layers
from fasternet.environment import create_record
from fasternet.records import Record
from fasternet.timing import Peak

NUM_WARM_UPS = 3


def measure_stages(
    suite: str,
    subject: str,
    model: nn.Module,
    x: Tensor,
    condition: Mapping[str, Any],
    peaks: Sequence[Peak],
    num_runs: int,
) -> Iterator[Record]:
    """Run a FasterNet in the CPU engine, which tells for each of its layers how long it took.

    Args:
        suite: Of the records.
        subject: Likewise.
        model: A FasterNet.
        x: (N, C, H, W).
        condition: With the precision and the threads.
        peaks: Those of registers tell the share.
        num_runs: Every one is a sample.

    Yields:
        A record of kind ``stage`` for each part, in order, with ``condition.stage``.
    """
    precision, threads = condition["precision"], condition["threads"]
    layers = to_layers(model)
    network = native.Network(layers, precision=precision)
    pictures, seconds = x.contiguous().cpu().numpy(), np.zeros(len(layers))
    runs = np.empty((num_runs, len(layers)))
    for number in range(-NUM_WARM_UPS, num_runs):
        network.run(pictures, threads=threads, seconds=seconds)
        runs[max(number, 0)] = seconds  # those that warm up are overwritten
    parts = list_parts(layers, x.shape[2], x.shape[3])
    known = [peak for peak in peaks if peak.subject == "registers" and peak.condition["precision"] == precision]
    peak = known[0].per_second if known else None
    stages = list(dict.fromkeys(name for name, _ in parts))
    members = {stage: [index for index, (name, _) in enumerate(parts) if name == stage] for stage in stages}
    samples = {stage: 1e3 * runs[:, members[stage]].sum(axis=1) for stage in stages}
    latencies = {stage: float(np.median(samples[stage])) for stage in stages}
    for stage, latency_ms in latencies.items():
        macs = sum(parts[index][1] for index in members[stage])
        rate = macs * len(x) / latency_ms * 1e3 if latency_ms else None
        values = {
            "latency_ms": latency_ms,
            "share": latency_ms / sum(latencies.values()) if latency_ms else None,
            "macs": macs,
            "macs_per_second": rate,
            "register_peak_share": rate / peak if rate and peak else None,
            "num_layers": len(members[stage]),
            "isa": network.isa,
        }
        yield create_record(
            suite,
            "stage",
            subject,
            condition={**condition, "stage": stage},
            values=values,
            samples={"latency_ms": samples[stage].tolist()},
        )


def list_parts(layers: Sequence[native.Layer], height: int, width: int) -> list[tuple[str, int]]:
    """Return for each layer the part of the network that it belongs to, and its multiply-adds of one picture.

    Args:
        layers: As ``to_layers`` gives them.
        height: Of the picture.
        width: Likewise.
    """
    parts, stage = [], 0
    for layer in layers:
        if isinstance(layer, native.Patch):
            k = layer.weight.shape[2]
            height, width = height // k, width // k
            parts.append((f"merging {stage}" if stage else "embedding", layer.weight.size * height * width))
            stage += 1
        elif isinstance(layer, native.Block):
            weights = layer.partial.size + layer.expand.size + layer.project.size
            parts.append((f"stage {stage}", weights * height * width))
        elif isinstance(layer, native.Head):
            parts.append(("head", layer.weight.size + (0 if layer.classifier is None else layer.classifier.size)))
        else:
            parts.append(("feature maps", 0))
    return parts
