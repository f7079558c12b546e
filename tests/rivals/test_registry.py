import functools
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn

from fasternet import complexity
from fasternet.complexity import count_costs
from fasternet.deploy import fold_batch_norm
from fasternet.models import create_model
from fasternet.paper import load_table
from fasternet.rivals import (
    create_network,
    create_rival,
    list_rivals,
    load_network,
    randomize_batch_norm,
    resolve_network,
    save_network,
)
from fasternet.rivals.registry import DETECTION, FOOTNOTES, TABLE3, TODAY

DOCS = Path(__file__).parents[2] / "docs"
PAPER = {row["network"]: row for row in load_table("table3_imagenet")}
SIZES = {rival.name: rival.input_size for rival in list_rivals()}
LARGE = [name for name, row in PAPER.items() if row["group"] in "56"]  # more of the blocks that others have
OWN = [rival.name for rival in TABLE3 if rival.source == "fasternet"]


def _mark_large(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in names]


def _create_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        if name.startswith("FasterNet-"):
            return create_model(name.lower().replace("-", "_")).eval()
        return create_rival(name)


def _round_as(printed: str, value: float) -> str:
    return str(Decimal(value).quantize(Decimal(printed)))


@functools.cache
def _count_as_the_paper(name: str) -> tuple[int, int]:
    """Count parameters without BN, and multiply-adds with five for each element of a layer or group normalization."""
    model, size = _create_on_meta(name), SIZES.get(name, 224)
    costs = count_costs(model, (1, 3, size, size))
    assert costs.rows[-1].output_shape == (1, 1000)
    elements = sum(math.prod(row.output_shape) for row in costs.rows if re.search("LayerNorm|GroupNorm", row.kind))
    return costs.num_params_without_batch_norm, costs.macs + 5 * elements


def test_rivals_are_those_of_table_3_in_its_order() -> None:
    assert [rival.name for rival in TABLE3] == [name for name in PAPER if not name.startswith("FasterNet")]
    names = [rival.name for rival in list_rivals()]
    assert len(TABLE3) == 29
    assert len(names) == len(set(names)) == 46


def test_detection_adds_the_backbones_that_only_table_4_has() -> None:
    backbones = [row["backbone"] for row in load_table("table4_coco")]
    assert [rival.name for rival in DETECTION] == [name for name in backbones if name not in PAPER]


def test_pages_hold_every_rival_and_every_footnote() -> None:
    models, complexity_page = (
        " ".join((DOCS / page).read_text(encoding="utf-8").split()) for page in ("models.md", "complexity.md")
    )
    for rival in list_rivals():
        assert re.search(rf"[|,] {re.escape(rival.name)}( \[\d\])?[ ,]", models), rival.name
    for number, (name, note) in enumerate(FOOTNOTES.items(), start=1):
        assert f"{name} [{number}]" in models
        assert f"* [{number}] {name}: {note}" in complexity_page


@pytest.mark.parametrize("name", _mark_large(PAPER))
def test_costs_match_table_3_to_the_printed_digit_or_have_a_footnote(name) -> None:  # type: ignore[no-untyped-def]
    num_params, macs = _count_as_the_paper(name)
    row = PAPER[name]
    assert _round_as(row["params_m"], num_params / 1e6) == row["params_m"]
    counted = _round_as(row["macs_g"], macs / 1e9)
    if counted == row["macs_g"]:
        assert name not in FOOTNOTES
    else:
        note = re.match(r"([\d.]+) G counted, ([\d.]+) G printed: ", FOOTNOTES[name])
        assert note is not None
        assert note.groups() == (counted, row["macs_g"])


def test_footnotes_explain_what_the_paper_prints() -> None:
    macs = {name: _count_as_the_paper(name)[1] for name in FOOTNOTES}
    # four per element of the position embeddings that PVT's released code resizes, five per token it normalizes
    useless = 4 * (28**2 * 128 + 14**2 * 320 + 7**2 * 512) + 5 * 49 * 512
    assert f"{useless / 1e6:.2f} M" in FOOTNOTES["PVT-Medium"]
    assert f"{(macs.pop('PVT-Medium') + useless) / 1e9:.2f}" == PAPER["PVT-Medium"]["macs_g"]
    for name, count in macs.items():
        digit = f"{count / 1e9:.1f}"
        assert f" {digit} G of " in FOOTNOTES[name]
        assert PAPER[name]["macs_g"] == f"{digit}0"


@pytest.mark.parametrize("name", _mark_large(["PVT-Tiny", "PVT-Small", "PVT-Large"]))
def test_other_costs_of_pvt_stay_printed_with_what_its_code_does_in_vain(name: str) -> None:
    assert f"{(_count_as_the_paper(name)[1] + 878_080) / 1e9:.2f}" == PAPER[name]["macs_g"]


@pytest.mark.parametrize("name", _mark_large(OWN))
def test_own_rivals_are_counted_on_the_meta_device(name: str) -> None:
    model = _create_on_meta(name)
    costs = complexity._count(model, (1, 3, 224, 224), "meta")
    assert costs.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert costs.macs > 1e9


@pytest.mark.slow
@pytest.mark.parametrize("rival", list_rivals(), ids=lambda rival: rival.name)
def test_every_rival_keeps_its_function_when_batch_norm_is_folded(rival) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x = torch.randn(2, 3, rival.input_size, rival.input_size, dtype=torch.double)  # single rounds ResNet101 by 1e-4
    model = randomize_batch_norm(create_rival(rival.name).double(), x)
    folded = fold_batch_norm(model, x[:1])
    with torch.no_grad():
        expected, found = model(x), folded(x)
    assert expected.shape == (2, 1000)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", ["PVT-Tiny", "CycleMLP-B1"])
def test_own_rivals_train_and_live_in_a_model_folder(name, tmp_path) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(1, 3, 32, 32)
    model = create_network(name, num_classes=3, drop_path_rate=0.1)
    assert model.training
    save_network(tmp_path, model, name=name)
    found = load_network(tmp_path)
    assert (found.name, found.num_classes) == (name, 3)
    with torch.no_grad():
        assert torch.equal(found.model(x), model.eval()(x))
    other = create_network(name, num_classes=5, checkpoint_path=tmp_path)
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert other.head.weight.shape == (5, 512)


def test_own_rivals_refuse_what_they_do_not_have() -> None:
    assert resolve_network("pvt_tiny").name == "PVT-Tiny"
    with pytest.raises(ValueError, match="PVT-Tiny cannot be built: there are no pretrained weights of it"):
        create_network("PVT-Tiny", num_classes=3, pretrained=True)
    with pytest.raises(ValueError, match=r"CycleMLP-B1 cannot be built with {'colour': 1}"):
        create_network("CycleMLP-B1", num_classes=3, colour=1)
    with pytest.raises(ValueError, match=r"unknown network 'pvt_tiny.in1k': did you mean "):
        create_network("pvt_tiny.in1k", num_classes=3)


@pytest.mark.parametrize("rival", TODAY, ids=lambda rival: rival.name)
def test_rival_of_today_classifies_pictures_of_its_size(rival) -> None:  # type: ignore[no-untyped-def]
    model = _create_on_meta(rival.name)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(torch.empty(2, 3, rival.input_size, rival.input_size, device="meta"))
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("mobilenetv2", "MobileNetV2"), ("Swin-t", "Swin-T"), ("resnet5", "ResNet50"), ("PVT-tiny", "PVT-Tiny")],
)
def test_unknown_rival_is_refused_with_near_names(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"rival '{wrong}' is unknown; near names are .*{near}"):
        create_rival(wrong)
