"""The ablation's variants: each another function than the base, built and counted as its words say."""

import pytest
import torch
from torch import nn

from fasternet.analysis.variants import (
    SIZES,
    VARIANTS,
    choose_variants,
    create_variant,
    describe_variant,
    summarize_variant,
)
from fasternet.complexity import count_costs
from fasternet.models.fasternet import TABLE5, FasterNet
from fasternet.ops import PConv2d

EQUAL = [label for label, variant in VARIANTS.items() if variant.equal_macs]
MACS = 2_261_504  # of the small base with ten classes


def _create(label: str) -> nn.Module:
    """Create a network whose blocks count: weights ten times as large, the same where two variants share a layer."""
    torch.manual_seed(0)
    network = create_variant(label)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data *= 10
    return network


def test_the_variants_are_sixteen_and_start_with_the_base():
    assert len(VARIANTS) == 16
    assert next(iter(VARIANTS)) == "base"
    assert len({describe_variant(label) for label in VARIANTS}) == 16


@pytest.mark.parametrize("label", VARIANTS)
def test_a_variant_trains_every_parameter_and_computes_something_else(label):
    base, network = _create("base"), _create(label)
    x = torch.randn(2, 3, 64, 64)
    y = network(x)
    y.square().sum().backward()
    assert y.shape == (2, 10)
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    same = torch.allclose(y, base(x), rtol=1e-4, atol=1e-5)
    assert same == (label == "base")


@pytest.mark.parametrize("label", EQUAL)
@pytest.mark.parametrize("size", SIZES)
def test_equal_multiply_adds_are_within_two_percent(label, size):
    side = SIZES[size].input_size
    with torch.device("meta"):
        base, network = (create_variant(name, size=size) for name in ("base", label))
    macs, wanted = (count_costs(model, (1, 3, side, side)).macs for model in (network, base))
    assert macs == pytest.approx(wanted, rel=0.02)
    assert network.config.width != base.config.width
    assert f"width {network.config.width}" in describe_variant(label, size=size)


def test_multiply_adds_of_the_others_are_those_of_the_base_but_where_they_must_differ():
    macs = {label: count_costs(create_variant(label), (1, 3, 64, 64)).macs for label in VARIANTS if label not in EQUAL}
    assert {label for label, count in macs.items() if count != MACS} == {
        *("kernel 5", "kernel 7", "untouched removed", "without PConv", "DWConv")
    }
    # Each block has 144 * 256 of them in its PConv, 9 * 16 * 256 in a DWConv's first stage, half of that in the next.
    assert macs["without PConv"] == MACS - 5 * 144 * 256
    assert macs["DWConv"] == MACS - 5 * 144 * 256 + 9 * 16 * 256 * (1 + 1 / 2 + 2 / 4 + 1 / 8)


def test_new_layers_are_drawn_like_the_networks_own():
    convs = [m for label in ("DWConv", "untouched removed") for m in create_variant(label).modules()]
    spreads = [m.weight.std().item() for m in convs if isinstance(m, nn.Conv2d) and m.weight.numel() > 500]
    assert spreads == pytest.approx([0.02] * len(spreads), rel=0.15)


def test_layers_that_two_variants_share_begin_with_the_same_weights():
    networks = []
    for label in ("base", "BN and activation everywhere"):
        torch.manual_seed(3)
        networks.append(create_variant(label))
    first, second = ([m for m in n.modules() if isinstance(m, nn.Conv2d | PConv2d)] for n in networks)
    assert len(first) == len(second)
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(first, second, strict=True))


def test_shortcut_after_pconv_is_what_code_in_place_computes():
    network = create_variant("shortcut after PConv").eval()
    block = network.stages[0].blocks[0]
    x = torch.randn(1, 16, 8, 8)
    overwritten = x.clone()
    overwritten[:, :4] = torch.conv2d(x[:, :4], block.mix.weight, padding=1)
    torch.testing.assert_close(block(x), overwritten + block.mlp(overwritten))


def test_norm_and_activation_follow_each_convolution_of_the_block():
    kinds = [type(m).__name__ for m in create_variant("BN and activation everywhere").stages[0].modules()]
    leaves = [kind for kind in kinds if kind in ("PConv2d", "Conv2d", "BatchNorm2d", "GELU")]
    assert leaves == ["PConv2d", "BatchNorm2d", "GELU", *["Conv2d", "BatchNorm2d", "GELU"] * 2]


def test_full_is_t0_and_has_the_width_of_the_papers_t0_star():
    assert SIZES["full"].input_size == 224
    with torch.device("meta"):
        network = create_variant("r=1/8", size="full", num_classes=1000)
    assert isinstance(network, FasterNet)
    assert network.config == TABLE5["T0* r=1/8"]


def test_variants_are_chosen_in_order_with_the_base():
    assert choose_variants(["LN", "r=1/8"], "small") == ["base", "r=1/8", "LN"]
    assert choose_variants(None, "full") == list(VARIANTS)


@pytest.mark.parametrize(("labels", "size"), [(["LN", "r=1/3"], "small"), (None, "tiny")])
def test_unknown_words_are_refused_in_a_sentence(labels, size):
    with pytest.raises(ValueError, match=r"^(variant 'r=1/3'|size 'tiny') is not one of (base, |small, full$)"):
        choose_variants(labels, size)


def test_words_say_what_a_size_makes_of_a_variant():
    assert describe_variant("rotating channels").endswith("other than the first in 1 of 5 blocks")
    assert describe_variant("rotating channels", size="full").endswith("other than the first in 8 of 13 blocks")
    torch.manual_seed(0)
    first, last = (create_variant(label).stages[0].blocks[0].eval() for label in ("base", "last channels"))
    last.load_state_dict(first.state_dict())
    order = [*range(4, 16), *range(4)]  # the convolved ones last
    back = torch.argsort(torch.tensor(order))
    last.pwconv1.weight.data = first.pwconv1.weight[:, order]
    last.pwconv2.weight.data = first.pwconv2.weight[order]
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(last(x[:, order])[:, back], first(x))


@pytest.mark.parametrize(("label", "left"), [("base", 0), ("LN", 0), ("BN and activation everywhere", 5)])
def test_bn_behind_pconv_is_left_by_folding(label, left):
    assert summarize_variant(label, create_variant(label), size="small")["num_batch_norms_left"] == left
