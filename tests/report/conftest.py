"""Records as the other parts of the package write them, with made-up numbers."""

import dataclasses
import io
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from fasternet.paper import load_table
from fasternet.records import Machine, Record, append_records, save_machine

MACHINE = Machine(
    id="example-cpu-2c", processor="Example CPU", architecture="x86_64", cores=2, memory_gib=8.0, accelerator=None,
    system="Linux 6.1", instruction_sets=("avx2", "fma"),
)  # fmt: skip
CPU = {"batch_size": 1, "threads": 1, "device": "cpu", "precision": "fp32", "engine": "eager"}
PCONV = "pconv3x3_r1/4"
MEASURED = (
    "FasterNet-T0", "FasterNet-T0:split_cat", "FasterNet-T0:slicing", "FasterNet-T1", "FasterNet-T2", "FasterNet-S",
    "MobileNetV2", "MobileViT-XXS", "EdgeNeXt-XXS", "ShuffleNetV2 x1.5", "ResNet50", "ConvNeXt-T", "Swin-T",
)  # fmt: skip


def make(suite: str, kind: str, subject: str, command: str = "fasternet bench", **fields: Any) -> Record:
    return Record(
        suite=suite, kind=kind, subject=subject, machine=MACHINE.id, versions={"fasternet": "0.1.0", "torch": "2.15.0"},
        commit="0123456789ab", command=command, created="2026-01-02T03:04:05+00:00", **fields,
    )  # fmt: skip


def make_latency(
    suite: str, subject: str, latency_ms: float, condition: dict[str, Any], *, macs: float, **values: Any
) -> Record:
    batch = condition["batch_size"]
    speeds = {
        "latency_ms": latency_ms, "latency_ms_min": 0.97 * latency_ms, "latency_ms_p90": 1.06 * latency_ms,
        "macs": macs, "macs_per_second": batch * macs / latency_ms * 1e3, "peak_share": 0.4, "bytes_per_second": 9e9,
        "images_per_second": 1e3 * batch / latency_ms, "unstable": False, "affinity": [0, 1], "load_average": 0.4,
    }  # fmt: skip
    samples = {"latency_ms": [latency_ms] * 3}
    return make(suite, "latency", subject, condition=condition, values=speeds | values, samples=samples)


def make_ratio(suite: str, subject: str, baseline: str, ratio: float, condition: dict[str, Any]) -> Record:
    verdict = "faster" if ratio < 0.97 else "slower" if ratio > 1.03 else "not distinguishable"
    values = {"ratio": ratio, "low": 0.98 * ratio, "high": 1.03 * ratio, "verdict": verdict, "a_a_spread": 0.012}
    pair = condition | {"baseline": baseline, "metric": "latency_ms"}
    return make(suite, "ratio", subject, condition=pair, values=values | {"num_blocks": 64})


def make_networks(batch_size: int = 1) -> list[Record]:
    """One run of FasterNet in all its forms and of its rivals; ratios to FasterNet-T0 and to the group's FasterNet."""
    condition = CPU | {"batch_size": batch_size, "memory_format": "channels_last"}
    paper = {row["network"]: row for row in load_table("table3_imagenet")}
    own = {paper[name]["group"]: name for name in MEASURED if name.startswith("FasterNet") and ":" not in name}
    latencies, records = {}, []
    for place, name in enumerate(MEASURED):
        row = paper[name.partition(":")[0]]
        latencies[name] = 0.9 * batch_size**0.9 * (1 + 0.2 * math.sin(place)) * float(row["cpu_latency_ms"])
    for name in MEASURED:
        row = paper[name.partition(":")[0]]
        here = condition | {"input_size": 256 if name.startswith(("MobileViT", "EdgeNeXt")) else 224}
        params, macs = 1e6 * float(row["params_m"]), 1e9 * float(row["macs_g"])
        costs = {"num_params": params, "macs": macs, "memory_accesses": 1e8}
        records.append(make("networks", "cost", name, condition=here, values=costs))
        records.append(make_latency("networks", name, latencies[name], here, unstable=name == "Swin-T", **costs))
        baselines = dict.fromkeys(("FasterNet-T0", own.get(row["group"], "FasterNet-T0")))
        records += [
            make_ratio("networks", name, other, latencies[name] / latencies[other], here) for other in baselines
        ]
    failed = make("networks", "latency", "Swin-S", condition=condition | {"input_size": 224}, values={"error": "OOM"})
    return [*records, failed]


def make_engines(device: str = "cpu") -> list[Record]:
    """Two networks in three engines, with the ratios between networks, between engines and between the best ones."""
    condition = CPU | {"input_size": 224, "device": device}
    times = {"MobileViT-XXS": (30.0, 24.0, 12.0), "FasterNet-T0": (10.0, 9.0, 5.0)}
    engines, records = ("eager", "compile", "openvino"), []
    for name, latencies in times.items():
        for engine, latency in zip(engines, latencies, strict=True):
            own = condition | {"engine": engine, "input_size": 256 if name.startswith("Mobile") else 224}
            macs, load = 1e9 * (0.41 if name.startswith("Mobile") else 0.34), {"load_s": 0.4, "file_bytes": None}
            records.append(make_latency("networks", name, latency, own, macs=macs, num_params=3e6, **load))
            pairs = [
                ("FasterNet-T0", engine, times["FasterNet-T0"][engines.index(engine)]),
                (name, "eager", latencies[0]),
            ]
            for baseline, baseline_engine, other in pairs:
                pair = own | {"baseline_engine": baseline_engine, "baseline_precision": "fp32"}
                records.append(make_ratio("networks", name, baseline, latency / other, pair))
    condition |= {"input_size": 256}
    best = condition | {"engine": "openvino", "baseline_engine": "openvino", "baseline_precision": "fp32"}
    return [*records, make_ratio("networks", "MobileViT-XXS", "FasterNet-T0", 2.4, best | {"best_engines": True})]


def make_forms() -> list[Record]:
    """Table 9: two networks in the published forms and optimised."""
    records = []
    for name, latency in (("fasternet_t1", 18.0), ("fasternet_t0", 9.0)):
        condition = CPU | {"input_size": 224, "memory_format": "channels_last"}
        records.append(make_latency("deploy", f"{name}:optimized", 0.8 * latency, condition, macs=3e8))
        for form, factor in (("split_cat", 1.0), ("slicing", 1.1), ("inplace", 0.9)):
            for memory_format, more in (("contiguous", 1.05), ("channels_last", 1.0)):
                subject, own = f"{name}:{form}:{memory_format}", condition | {"memory_format": memory_format}
                records.append(make_latency("deploy", subject, factor * more * latency, own, macs=3e8))
                records.append(make_ratio("deploy", f"{name}:optimized", subject, 0.8 / factor / more, condition))
    return records


def make_operators() -> list[Record]:
    records = []
    for row in load_table("table1_operators"):
        shape = {name: int(row[name]) for name in ("channels", "height", "width")}
        condition = CPU | shape | {"num_layers": 10, "memory_format": "contiguous"}
        macs, latency = 1e6 * float(row["macs_millions_10_layers"]), 0.3 * float(row["cpu_latency_ms"])
        forms = (PCONV, f"{PCONV}:in_place") if row["operator"] == PCONV else (row["operator"],)
        for name in forms:
            records.append(make_latency("operators", name, latency, condition, macs=macs))
            records.append(make_ratio("operators", name, PCONV, 1.0 if name == PCONV else 0.4, condition))
    gemm = {"condition": {"precision": "fp32", "size": 1024}, "values": {"macs_per_second": 5.5e10}}
    copy = {"condition": {"precision": "fp32", "mib": 8}, "values": {"bytes_per_second": 1.2e10}}
    return [*records, *(make("operators", "machine_peak", n, **f) for n, f in (("gemm", gemm), ("copy", copy)))]


def make_optimize() -> list[Record]:
    values = {"max_relative_difference": 3.1e-7, "changed_predictions": 0, "num_images": 360}
    difference = make(
        "deploy", "difference", "fasternet_t0:optimized", condition={"baseline": "fasternet_t0"}, values=values
    )
    return [difference, make_ratio("deploy", "optimised", "split_cat, BN folded", 0.81, CPU | {"input_size": 32})]


def make_run(epochs: int = 15, pictures: int = 24) -> list[Record]:
    command = "fasternet train fasternet_t0 --data digits"
    recipe = {"data": "digits", "epochs": epochs, "batch_size": 64, "lr": 0.002, "random_resized_crop": [0.7, 1.0]}
    facts = {"num_params": 2_634_800, "num_train": 1437, "num_validation": 360}
    records = [make("train", "run", "fasternet_t0", command, condition=recipe, values=facts)]
    for epoch in range(1, epochs + 1):
        rest = math.exp(-4 * epoch / epochs)
        accuracies = {"top1": 99.2 - 90 * rest**2, "top5": 100 - 40 * rest**3}
        losses = {"train_loss": 0.6 + 1.7 * rest, "validation_loss": 0.1 + 2 * rest}
        values = accuracies | losses | {"lr": 0.002 * rest, "images_per_second": 800.0, "seconds": 1.8}
        records.append(make("train", "epoch", "fasternet_t0", command, condition={"epoch": epoch}, values=values))
    records.append(make("train", "evaluation", "fasternet_t0", command, values=make_evaluation()))
    for index in range(pictures):
        label, truth = str(index % 10), "3" if index == 8 else str(index % 10)
        values = {"label": label, "probability": 0.98, "top": [[label, 0.98]], "truth": truth, "role": "lot"}
        attached = {"picture": f"pictures/{index:02}.png"}
        records.append(make("train", "prediction", f"digit {index}", command, values=values, attachments=attached))
    return records


def make_evaluation() -> dict[str, Any]:
    """Ten digits of 36 pictures; two times 3 was taken for 8, once 8 for 3."""
    classes = [{"name": str(digit), "num_images": 36, "top1": 100 - digit / 3} for digit in range(10)]
    confusion = [[36 * (row == column) for column in range(10)] for row in range(10)]
    for truth, label, count in ((3, 8, 2), (8, 3, 1)):
        confusion[truth][truth] -= count
        confusion[truth][label] += count
    calibration = [*([0, None, None] for _ in range(13)), [60, 0.9, 0.95], [300, 0.99, 1.0]]
    return {
        "top1": 99.17, "top5": 100.0, "loss": 0.0712, "num_images": 360, "per_class": classes, "ece": 0.0167,
        "calibration": calibration, "confusion": confusion,
    }  # fmt: skip


def make_learning(
    subject: str = "fasternet_t0", data: str = "flowers", seed: int = 0, top1: float = 72.0, **condition: Any
) -> list[Record]:
    """A short run of one seed: its record, four epochs, its evaluation."""
    recipe = {"data": data, "epochs": 4, "lr": 0.001, "seed": seed, "num_workers": seed} | condition
    records = [make("train", "run", subject, condition=recipe, values={"num_params": 2_500_000})]
    for epoch in range(1, 5):
        values = {"train_loss": 1 / epoch, "top1": top1 - 4 + epoch, "images_per_second": 100.0 * (seed + 1) + epoch}
        records.append(make("train", "epoch", subject, condition={"epoch": epoch}, values=values))
    return [*records, make("train", "evaluation", subject, values={"top1": top1, "num_images": 40})]


def make_faults() -> list[Record]:
    values = {"injected": 24, "recovered": 24, "bitwise_equal": 23, "remark": "at random moments"}
    return [make("faults", "fault", "SIGKILL", values=values)]


def make_steps() -> list[Record]:
    """Training steps of two networks, with the ratio to FasterNet and the A/A control, which warns."""
    condition = CPU | {"batch_size": 32, "memory_format": "channels_last"}
    times = {"MobileViT-XXS": (900.0, 256), "FasterNet-T0": (300.0, 224)}
    records = []
    for name, (latency, size) in times.items():
        own = condition | {"input_size": size}
        records.append(make_latency("steps", name, latency, own, macs=1e9))
        records.append(make_ratio("steps", name, "FasterNet-T0", latency / 300, own))
    records[-1] = dataclasses.replace(records[-1], values=records[-1].values | {"warnings": ["other load: 1.2"]})
    return records


def make_training_speed() -> list[Record]:
    condition = CPU | {"batch_size": 64}
    speeds = (("t0:data", 100.0), ("t0:step", 160.0), ("t0:both", 200.0), ("plain:both", 210.0))
    records = [make_latency("training-speed", name, ms, condition, macs=1e8) for name, ms in speeds]
    return [*records, make_ratio("training-speed", "t0:both", "plain:both", 0.95, condition)]


def make_picture(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).point(lambda value: (value + shade) % 256).save(file, "PNG")
    return file.getvalue()


def write_run(folder: Path) -> Path:
    append_records(folder / "log.jsonl", make_run())
    (folder / "pictures").mkdir()
    for index in range(24):
        (folder / "pictures" / f"{index:02}.png").write_bytes(make_picture(10 * index))
    save_machine(folder / "machines", MACHINE)
    return folder


ABLATED = {
    "base": ("base", "r = 1/4, BN, GELU, PConv of kernel 3 over the first channels", 60.0),
    "r=1/8": ("partial ratio", "r = 1/8, equal multiply-adds by width 17 (base 16)", 59.5),
    "LN": ("normalization", "LayerNorm over the channels in place of every BN", 55.0),
    "kernel 5": ("kernel size", "PConv of kernel 5", 62.0),
}


def make_ablation(seeds: int = 3) -> list[Record]:
    recipe = {"size": "small", "data": "cifar10", "epochs": 8, "batch_size": 64, "lr": 0.004, "input_size": 64}
    recipe |= {"num_train": 6000, "num_validation": 2000, "precision": "fp32"}
    records = []
    rng = random.Random(0)
    for name, (group, differs, top1) in ABLATED.items():
        for seed in range(seeds):
            values = {"group": group, "differs": differs, "top1": top1 + 0.4 * seed + 0.2 * rng.random()}
            values |= {"validation_loss": 1.1, "train_loss": 1.0, "num_params": 210_000, "macs": 9_100_000}
            condition = recipe | {"seed": seed}
            records.append(make("ablation", "study", name, condition=condition, values=values | {"seconds": 9}))
    condition = CPU | {"size": "small", "input_size": 64}
    for name, ratio in (("base", 1.0), ("r=1/8", 1.01), ("LN", 1.3), ("kernel 5", 1.1)):
        records.append(make_latency("ablation", name, 3 * ratio, condition, macs=9e6))
        records.append(make_ratio("ablation", name, "base", ratio, condition))
    return records


@pytest.fixture(scope="session")
def example() -> ModuleType:
    """The builders above."""
    return sys.modules[__name__]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[Record]], Path]:
    """Write records to a file of their own."""

    def write_records(records: list[Record]) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        append_records(path, records)
        return path

    return write_records


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with its pictures."""
    return write_run(tmp_path / "run")
