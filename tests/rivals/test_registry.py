from decimal import Decimal

import pytest
import torch
from torch import nn

from fasternet.complexity import count_costs
from fasternet.paper import load_table
from fasternet.rivals import create_rival, list_rivals
from fasternet.rivals.registry import TABLE3, TODAY

PAPER = {row["network"]: row for row in load_table("table3_imagenet")}
UNWRITTEN = ("FasterNet", "PVT", "CycleMLP")


def _create_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_rival(name)


def _round_as(printed: str, value: float) -> str:
    return str(Decimal(value).quantize(Decimal(printed)))


def _count_normalized_elements(model: nn.Module, input_size: int) -> int:
    """Count the elements that leave layer and group normalization."""
    counts: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.register_forward_hook(lambda _, inputs, output: counts.append(output.numel()))
    with torch.no_grad():
        logits = model(torch.empty(1, 3, input_size, input_size, device="meta"))
    assert logits.shape == (1, 1000)
    return sum(counts)


def test_rivals_are_those_of_table3_that_libraries_keep() -> None:
    expected = [name for name in PAPER if not name.startswith(UNWRITTEN)]
    assert [rival.name for rival in TABLE3] == expected
    assert len(expected) == 23
    names = [rival.name for rival in list_rivals()]
    assert len(names) == len(set(names)) == 37


@pytest.mark.parametrize("rival", TABLE3, ids=lambda rival: rival.name)
def test_rival_costs_match_the_paper_to_the_printed_digit(rival) -> None:  # type: ignore[no-untyped-def]
    model = _create_on_meta(rival.name)
    batch_norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    num_folded = sum(p.numel() for module in batch_norms for p in module.parameters(recurse=False))
    num_params = sum(p.numel() for p in model.parameters()) - num_folded
    macs = count_costs(model, (1, 3, rival.input_size, rival.input_size)).macs
    macs += 5 * _count_normalized_elements(model, rival.input_size)
    printed = PAPER[rival.name]
    assert _round_as(printed["params_m"], num_params / 1e6) == printed["params_m"]
    assert _round_as(printed["macs_g"], macs / 1e9) == printed["macs_g"]


@pytest.mark.parametrize("rival", TODAY, ids=lambda rival: rival.name)
def test_rival_of_today_classifies_pictures_of_its_size(rival) -> None:  # type: ignore[no-untyped-def]
    model = _create_on_meta(rival.name)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(torch.empty(2, 3, rival.input_size, rival.input_size, device="meta"))
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("wrong", "near"), [("mobilenetv2", "MobileNetV2"), ("Swin-t", "Swin-T"), ("resnet5", "ResNet50")]
)
def test_unknown_rival_is_refused_with_near_names(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"rival '{wrong}' is unknown; near names are .*{near}"):
        create_rival(wrong)
