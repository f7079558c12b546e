"""The ablation study: paired runs, resumable, judged by the last epoch; latencies against the base."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.analysis import ablation, ablation_latency
from fasternet.analysis.ablation import measure_ablation
from fasternet.analysis.ablation_latency import measure_ablation_latency
from fasternet.records import Record, append_records, load_records
from fasternet.timing import measure

CLASSES = ("black", "grey", "white")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes that brightness tells apart, 12 + 6 pictures each, of unlike shapes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "shades" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(90 * label, 90 * label + 60, (20, 16 + index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "shades"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    plan = ablation.PLANS["small"]
    recipe = dataclasses.replace(plan.recipe, epochs=4, batch_size=8, warmup_epochs=1)
    monkeypatch.setattr(ablation, "PLANS", {"small": dataclasses.replace(plan, recipe=recipe)})


def _reload(records: list[Record], folder: Path) -> list[Record]:
    append_records(folder / "log.jsonl", records)
    return load_records(folder / "log.jsonl")


def test_each_run_gives_a_record_and_learns(data):
    said: list[str] = []
    records = list(measure_ablation(data, data="shades", variants=["LN"], seeds=(0,), say=said.append))
    assert [(r.suite, r.kind, r.subject) for r in records] == [
        ("ablation", "study", "base"),
        ("ablation", "study", "LN"),
    ]
    assert records[0].condition == {
        **{"size": "small", "data": "shades", "seed": 0, "epochs": 4, "batch_size": 8, "lr": 4e-3},
        **{"input_size": 64, "num_train": 36, "num_validation": 18, "precision": "fp32"},
        "pictures_hash": records[0].condition["pictures_hash"],
    }
    assert set(records[1].values) == {
        *("group", "differs", "top1", "validation_loss", "train_loss", "num_params", "macs", "seconds"),
        "num_batch_norms_left",
    }
    assert records[0].values["top1"] > 60
    assert len(said) == 3
    assert said[1].endswith(" min left")
    json.dumps([dict(r.values) for r in records])


def test_runs_are_paired_and_resumed(data, tmp_path):
    first = list(measure_ablation(data, data="shades", variants=["base"], seeds=(5,), epochs=1))
    known = _reload(first, tmp_path)
    rest = list(measure_ablation(data, data="shades", variants=["ReLU"], seeds=(5, 6), epochs=1, known=known))
    assert [(r.subject, r.condition["seed"]) for r in rest] == [("ReLU", 5), ("base", 6), ("ReLU", 6)]
    again = next(measure_ablation(data, data="shades", variants=["base"], seeds=(5,), epochs=1))
    assert again.values["validation_loss"] == first[0].values["validation_loss"]
    assert list(measure_ablation(data, data="shades", variants=["base"], seeds=(5,), epochs=1, known=known)) == []
    assert len(list(measure_ablation(data, data="shades", variants=["base"], seeds=(5,), epochs=2, known=known))) == 1


def test_subset_is_balanced_and_does_not_depend_on_the_seed(data):
    dataset = ablation.create_datasets(data).train
    chosen = ablation._select(dataset, 8, "num_train")
    assert sorted(chosen.labels.count(label) for label in range(3)) == [2, 3, 3]
    assert chosen.paths == ablation._select(dataset, 8, "num_train").paths
    assert len(ablation._select(dataset, 99, "num_train")) == 36


def test_augmentation_shifts_and_mirrors_and_follows_from_the_seed():
    images = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8)
    one, same, other = (ablation._augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == images.shape
    assert one.dtype == torch.uint8
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    # Whatever the shift of at most two pixels, the picture's centre is there, as it was or mirrored.
    num_mirrored = 0
    for whole, result in zip(images, one, strict=True):
        shifts = result.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # (25, 3, 12, 12)
        centres = torch.stack([whole, whole.flip(-1)])[:, :, 2:14, 2:14]
        found = (shifts[:, None] == centres).flatten(2).all(2)  # (25, 2)
        assert found.sum() == 1
        num_mirrored += int(found[:, 1].sum())
    assert 20 <= num_mirrored <= 44


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variants": ["no such"]}, "variant 'no such' is not one of base, "),
        ({"size": "huge"}, "size 'huge' is not one of small, full"),
        ({"num_train": 2}, "num_train must be at least 3"),
        ({"epochs": 0}, "recipe field epochs=0 must be at least 1"),
        ({"device": "tpu"}, "device 'tpu' must be cpu"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(data, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(measure_ablation(data, data="shades", **options))


def test_latency_has_intervals_and_a_control(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation_latency, "measure", _measure_shortly)
    records = list(measure_ablation_latency(variants=["LN", "BN and activation everywhere"], quick=True))
    labels = ["base", "LN", "BN and activation everywhere"]
    assert [(r.kind, r.subject) for r in records] == [(k, label) for k in ("latency", "ratio") for label in labels]
    ratios = records[3:]
    assert all(r.condition["baseline"] == "base" and r.condition["threads"] == 1 for r in ratios)
    assert all(0 < r.values["low"] <= r.values["ratio"] <= r.values["high"] for r in ratios)
    assert "warnings" in ratios[0].values
    assert ratios[0].samples
    assert len(records[1].samples["latency_ms"]) == 4
    assert 0 < records[0].values["relative_difference"] < 1e-4  # folded, and the same
    known = _reload(records, tmp_path)
    assert list(measure_ablation_latency(variants=["LN"], known=known)) == []


def test_a_variant_that_is_folded_wrong_is_not_timed(monkeypatch):
    def fold(network, x):
        wrong = copy.deepcopy(network)
        wrong.head.fc.bias.data += 1
        return wrong

    monkeypatch.setattr(ablation_latency, "fold_batch_norm", fold)
    with pytest.raises(ValueError, match="variant base, contiguous: folded, its outputs differ by"):
        next(measure_ablation_latency(variants=["base"]))


def test_each_form_is_compared_before_it_is_timed(monkeypatch):
    def difference(output, expected):
        differences.append(output.shape[0])
        return {"max_relative_difference": 0.0 if len(differences) == 1 else 1.0}

    differences = []
    monkeypatch.setattr(ablation_latency, "describe_difference", difference)
    with pytest.raises(ValueError, match="variant base, channels_last: folded, its outputs differ by"):
        next(measure_ablation_latency(variants=["base"]))
    assert differences == [1, 1]  # at the batch size that is timed


def _measure_shortly(candidates, **options):
    return measure(candidates, **{**options, "num_blocks": 4, "warmup_s": 0.0, "min_block_s": 1e-4})
