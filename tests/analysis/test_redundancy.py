"""Redundancy of feature maps: numbers on constructed maps, the grid of maps, the study of a small network."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fasternet import create_model
from fasternet.analysis.redundancy import Moments, draw_grid, find_blocks, measure_redundancy
from fasternet.analysis.reference import Reference, hash_pictures
from fasternet.models.checkpoint import Preprocessing


def _values(maps, batch_size=4):
    moments = Moments()
    for batch in maps.split(batch_size):
        moments.add(batch)
    return moments.values("layer")


def test_noise_has_full_rank_and_a_quarter_explains_a_quarter():
    values = _values(torch.randn(16, 32, 20, 20))
    assert values["num_positions"] == 6400
    assert values["effective_rank"] == pytest.approx(32, rel=0.01)
    assert values["redundant_share"] == 0
    assert values["mean_abs_correlation"] < 0.02
    for quarter in ("first_quarter_variance", "first_quarter_explained", "random_quarter_explained"):
        assert values[f"{quarter}_share"] == pytest.approx(0.25, abs=0.01)
    assert values["first_quarter_explained_share"] < values["best_quarter_explained_share"] < 0.3


def test_duplicated_channels_are_redundant_and_halve_the_rank():
    half = torch.randn(8, 16, 20, 20)
    values = _values(torch.cat([half, -2 * half], 1))
    assert values["redundant_share"] == 1
    assert values["effective_rank"] == pytest.approx(16, rel=0.01)
    assert values["first_quarter_variance_share"] == pytest.approx(0.1, abs=0.01)  # 8 of 16 + 4 * 16
    assert values["first_quarter_explained_share"] == pytest.approx(0.5, abs=0.01)


def test_maps_of_rank_one_are_explained_by_any_channel():
    values = _values(torch.randn(4, 1, 9, 9) * torch.linspace(1, 2, 12)[:, None, None])
    assert values["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert values["mean_abs_correlation"] == pytest.approx(1, abs=1e-6)
    assert values["first_quarter_explained_share"] == pytest.approx(1, abs=1e-6)
    assert values["random_quarter_explained_share"] == pytest.approx(1, abs=1e-6)


def test_numbers_are_those_of_numpy_whatever_the_batch_size_and_the_offset():
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(12, 12), torch.randn(10, 12, 7, 5))
    maps = (mixed + 1000).float()
    values = _values(maps, batch_size=3)
    assert _values(maps, batch_size=10) == pytest.approx(values, rel=1e-10)
    channels = maps.double().transpose(0, 1).flatten(1).numpy()
    correlation = np.abs(np.corrcoef(channels))
    assert values["mean_abs_correlation"] == pytest.approx((correlation.sum() - 12) / 132, rel=1e-8)
    centred = (channels - channels.mean(1, keepdims=True)).T  # (P, C)
    solution = np.linalg.lstsq(centred[:, :3], centred, rcond=None)[0]
    residual = ((centred - centred[:, :3] @ solution) ** 2).sum()
    assert values["first_quarter_explained_share"] == pytest.approx(1 - residual / (centred**2).sum(), rel=1e-8)


def test_constant_channels_are_counted_and_left_out():
    maps = torch.randn(4, 8, 6, 6)
    without = _values(maps[:, :6])
    maps[:, 6], maps[:, 7] = 0.1, 0
    values = _values(maps)
    assert values["num_dead"] == 2
    assert values["channels"] == 8
    for name in ("mean_abs_correlation", "effective_rank", "redundant_share"):
        assert values[name] == pytest.approx(without[name])
    with pytest.raises(ValueError, match="layer 'layer' has 1 channels that vary"):
        _values(maps[:, 5:])


def test_grid_shows_picture_and_maps_and_stays_small():
    noise = np.random.default_rng(0).random((2048, 56, 56))
    grid, num_shown = draw_grid(noise, Image.new("RGB", (224, 224), "red"))
    file = io.BytesIO()
    grid.save(file, "PNG", optimize=True)
    assert num_shown == 252
    assert len(file.getvalue()) < 700_000
    assert grid.size == (16 * 58, 16 * 58)
    few = np.zeros((3, 2, 2))
    few[0, 0, 1], few[1, 1, 0] = 5, -1
    grid, num_shown = draw_grid(few, Image.new("RGB", (8, 8), "red"))
    pixels = np.asarray(grid.convert("RGB"))
    assert num_shown == 3
    assert pixels.shape == (2 * 66, 16 * 66, 3)
    assert pixels[60, 60].tolist() == [255, 0, 0]
    first = pixels[1:65, 2 * 66 + 1 : 3 * 66 - 1, 0]
    assert first[:32, 32:].min() == 255
    assert first.sum() == 32 * 32 * 255
    assert pixels[40, 3 * 66 + 10].tolist() == [0, 0, 0]
    assert pixels[10, 3 * 66 + 10].tolist() == [255, 255, 255]
    assert pixels[1:65, 4 * 66 + 1 : 5 * 66 - 1].max() == 0  # constant


def test_default_layers_are_the_first_blocks_of_the_stages():
    model = create_model("fasternet_t0", num_classes=2).eval()
    blocks = find_blocks(model, 64)
    assert len(blocks) == 4
    assert [type(model.get_submodule(name)).__name__ for name in blocks] == ["FasterNetBlock"] * 4
    timm = pytest.importorskip("timm")
    resnet = timm.create_model("resnet18").eval()
    assert find_blocks(resnet, 64) == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    with pytest.raises(ValueError, match="layers must be given"):
        find_blocks(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU()), 32)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "blossoms" / "val" / f"{number}.png" for number in range(5)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def reference():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.Flatten())
    return Reference(model.eval().requires_grad_(False), "small", "random", Preprocessing(input_size=32))


def test_study_writes_a_record_and_a_grid_per_layer(reference, pictures, tmp_path):
    found = list(measure_redundancy(reference, pictures, tmp_path, data="mine", layers=["1", "2"], picture=pictures[0]))
    assert [(record.subject, record.values["stage"]) for record in found] == [("1", 1), ("2", 2)]
    assert (found[1].values["height"], found[1].values["num_positions"]) == (4, 5 * 16)
    assert found[0].condition == {
        **reference.condition,
        "data": "mine",
        "input_size": 32,
        "num_images": 5,
        "pictures_hash": hash_pictures(pictures),
        "picture": "0.png",
    }
    assert found[0].values["num_shown"] == 8
    with Image.open(tmp_path / found[0].attachments["grid"]) as grid:
        assert grid.format == "PNG"
    json.dumps(found[0].values, allow_nan=False)
    options = {"data": "mine", "layers": ["1", "2"], "known": found[:1]}
    again = list(measure_redundancy(reference, pictures, tmp_path, picture=pictures[0], **options))
    assert [record.subject for record in again] == ["2"]
    without = list(measure_redundancy(reference, pictures, tmp_path, **options))
    assert [record.condition["picture"] for record in without] == [None, None]
    assert without[0].attachments == {}
    assert "num_shown" not in without[0].values
    larger = list(
        measure_redundancy(reference, pictures, tmp_path, layers=["1"], data="mine", input_size=64, known=found)
    )
    assert larger[0].condition["data"] == "mine"
    assert (larger[0].values["height"], larger[0].values["stage"]) == (16, 1)


def test_study_names_what_is_no_layer_of_maps(reference, pictures, tmp_path):
    with pytest.raises(ValueError, match="layer '9' is not a module"):
        list(measure_redundancy(reference, pictures, tmp_path, data="mine", layers=["9"]))
    with pytest.raises(ValueError, match=r"layer '3' must return maps \(N, C, H, W\), not the shape \(5, 192\)"):
        list(measure_redundancy(reference, pictures, tmp_path, data="mine", layers=["3"]))
    with pytest.raises(ValueError, match="pictures must name"):
        list(measure_redundancy(reference, [], tmp_path, data="mine"))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pair = nn.Conv2d(3, 4, 3), Pair()

    def forward(self, x):
        return self.pair(self.conv(x))[0]


def test_layer_that_returns_a_pair_is_named(pictures, tmp_path):
    paired = Reference(Paired().eval(), "pair", "random", Preprocessing(input_size=32))
    with pytest.raises(ValueError, match=r"layer 'pair' must return maps \(N, C, H, W\), not tuple"):
        list(measure_redundancy(paired, pictures, tmp_path, data="mine", layers=["pair"]))
