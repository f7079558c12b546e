"""Equations 1 to 7, the counter, and the paper's columns that follow from them to the printed digit."""

import copy
import dataclasses
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fasternet import complexity
from fasternet.complexity import count_costs
from fasternet.models.fasternet import TABLE5, VARIANTS, FasterNet
from fasternet.models.registry import create_ablation, list_ablations
from fasternet.ops.pconv import PConv2d
from fasternet.ops.reference_ops import TConv2d, create_operator
from fasternet.paper import load_table

TABLE1 = load_table("table1_operators")
TABLE8 = load_table("table8_architecture")

sides = st.integers(1, 20)
kernels = st.sampled_from([1, 3, 5, 7])


def printed(value: int, text: str, *, unit: int, rounding: str) -> str:
    """Write a count in units of 10^unit with as many digits as the paper prints."""
    return str(Decimal(value).scaleb(-unit).quantize(Decimal(text), rounding=rounding))


# Equations


@settings(max_examples=30, deadline=None)
@given(height=sides, width=sides, width_factor=st.integers(1, 6), groups=st.integers(1, 6), k=kernels)
def test_conv_equations_equal_the_count_of_a_convolution(height, width, width_factor, groups, k):
    channels = width_factor * groups
    conv = nn.Conv2d(channels, channels, k, padding=k // 2, groups=groups, bias=False)
    costs = count_costs(conv, (1, channels, height, width))
    sizes = (height, width, channels)
    assert costs.macs == complexity.conv_macs(*sizes, kernel_size=k, groups=groups)
    assert costs.memory_accesses == complexity.conv_memory_accesses(*sizes, kernel_size=k, groups=groups)
    weights = conv.weight.numel()
    approximation = complexity.conv_memory_accesses(*sizes, kernel_size=k, groups=groups, exact=False)
    assert costs.memory_accesses - weights == approximation == height * width * 2 * channels


@settings(max_examples=30, deadline=None)
@given(height=sides, width=sides, channels=st.integers(1, 24), k=kernels, data=st.data())
def test_partial_equations_equal_the_count_of_real_modules(height, width, channels, k, data):
    cp = data.draw(st.integers(1, channels))
    shape = (1, channels, height, width)
    pconv = PConv2d(channels, partial_channels=cp, kernel_size=k)
    costs = count_costs(pconv, shape)
    assert costs.macs == complexity.pconv_macs(height, width, cp, kernel_size=k)
    assert costs.memory_accesses == complexity.pconv_memory_accesses(height, width, cp, kernel_size=k)

    pair = nn.Sequential(pconv, nn.Conv2d(channels, channels, 1, bias=False))
    assert count_costs(pair, shape).macs == complexity.pconv_pwconv_macs(height, width, channels, cp, kernel_size=k)
    tconv = TConv2d(channels, cp / channels, kernel_size=k)
    assert tconv.weight.shape[1] == cp
    assert count_costs(tconv, shape).macs == complexity.tconv_macs(height, width, channels, cp, kernel_size=k)


@pytest.mark.parametrize("impl", ["split_cat", "slicing"])
@pytest.mark.parametrize("position", ["first", "last", "rotate"])
def test_pconv_costs_do_not_depend_on_the_implementation(impl, position):
    pconv = PConv2d(16, position=position, index=1, impl=impl)
    assert count_costs(pconv, (1, 16, 9, 7)).memory_accesses == complexity.pconv_memory_accesses(9, 7, 4)


@given(channels=st.integers(3, 2000), k=st.sampled_from([3, 5, 7]), data=st.data())
def test_tconv_costs_more_than_pconv_and_pwconv_where_the_paper_says_so(channels, k, data):
    cp = data.draw(st.integers(1, (channels - 1) // 2))
    assert channels - cp > cp
    sizes = (14, 14, channels, cp)
    assert complexity.tconv_macs(*sizes, kernel_size=k) > complexity.pconv_pwconv_macs(*sizes, kernel_size=k)


@pytest.mark.parametrize("channels", [96, 192, 384, 768])
def test_pconv_ratios_are_those_of_the_paper(channels):
    claims = {row["claim"]: float(row["v1"]) for row in load_table("claims") if row["v1"]}
    macs = complexity.pconv_macs(7, 7, channels // 4) / complexity.conv_macs(7, 7, channels)
    accesses = complexity.pconv_memory_accesses(7, 7, channels // 4, exact=False) / complexity.conv_memory_accesses(
        7, 7, channels, exact=False
    )
    assert macs == claims["PConv r=1/4 against regular conv: FLOPs"] == 1 / 16
    assert accesses == claims["PConv r=1/4 against regular conv: memory access"] == 1 / 4


@pytest.mark.parametrize("row", TABLE1, ids=lambda row: f"{row['operator']}-{row['channels']}")
def test_latency_ms_connects_the_columns_of_table_1(row):
    macs = 1e6 * float(row["macs_millions_10_layers"])
    latency = complexity.latency_ms(macs, 1e9 * float(row["cpu_gmacs_per_second"]))
    assert latency == pytest.approx(float(row["cpu_latency_ms"]), rel=0.01)


def test_conv_equations_refuse_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups must divide the 96 channels, not 5"):
        complexity.conv_macs(7, 7, 96, groups=5)
    with pytest.raises(ValueError, match="groups must divide the 96 channels, not 0"):
        complexity.conv_memory_accesses(7, 7, 96, groups=0)


# The paper's columns


@pytest.mark.parametrize("row", TABLE1, ids=lambda row: f"{row['operator']}-{row['channels']}")
def test_table_1_macs_agree_to_the_printed_digit(row):
    channels, height, width = int(row["channels"]), int(row["height"]), int(row["width"])
    layers = nn.Sequential(*(create_operator(row["operator"], channels) for _ in range(10)))
    macs = count_costs(layers, (1, channels, height, width)).macs
    text = row["macs_millions_10_layers"]
    assert printed(macs, text, unit=6, rounding=ROUND_DOWN) == text  # this column truncates


# parameters, those without BN, and multiply-adds in units of 10 000 at 224 x 224
EXACT = {
    "T0": (3_905_500, 3_895_820, "335.42"),
    "T1": (7_595_368, 7_579_880, "850.51"),
    "T2": (14_982_888, 14_959_656, "1904.33"),
    "S": (31_181_032, 31_139_816, "4549.74"),
    "M": (53_521_464, 53_455_512, "8721.94"),
    "L": (93_465_192, 93_377_256, "15494.38"),
}


@pytest.mark.parametrize("row", TABLE8, ids=lambda row: row["variant"])
def test_table_8_agrees_to_the_printed_digit(row, monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: weight)  # slow, and nothing here runs
    costs = count_costs(FasterNet(VARIANTS[f"fasternet_{row['variant'].lower()}"]))
    num_params, num_params_without_batch_norm, macs = EXACT[row["variant"]]
    assert costs.num_params == num_params
    assert costs.num_params_without_batch_norm == num_params_without_batch_norm
    assert printed(costs.macs, macs, unit=6, rounding=ROUND_HALF_EVEN) == macs

    rounded = {"rounding": ROUND_HALF_EVEN}
    assert printed(costs.macs, row["macs_g_224"], unit=9, **rounded) == row["macs_g_224"]
    assert printed(num_params_without_batch_norm, row["params_m"], unit=6, **rounded) == row["params_m"]


def test_table_8_macs_are_those_of_convolutions_and_the_classifier():
    costs = count_costs(FasterNet(VARIANTS["fasternet_t0"]))
    kinds = {row.kind for row in costs.rows if row.macs}
    assert kinds == {"Conv2d", "PConv2d", "Linear"}


# multiply-adds in units of 10 000; of T0* only r = 1/8 was published
TABLE5_MACS = {
    "T0* r=1/2": "336.27",
    "T0* r=1/8": "338.78",
    "T0 LN": "335.42",
    "T0 ReLU": "335.42",
    "T2 GELU": "1904.33",
}


def test_table_5_variants_have_their_multiply_adds(monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, **_: weight)
    assert {*TABLE5, "T0* ReLU"} == {row["variant"] for row in load_table("table5_ablation")}
    assert list_ablations() == list(TABLE5_MACS)
    for variant, macs in TABLE5_MACS.items():
        model = create_ablation(variant, num_classes=1000, drop_path_rate=0.1)
        assert printed(count_costs(model).macs, macs, unit=6, rounding=ROUND_HALF_EVEN) == macs
        norms = {type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__}
        assert ("BatchNorm2d" in norms) == (variant != "T0 LN")
        assert any(isinstance(module, nn.ReLU) for module in model.modules()) == (variant == "T0 ReLU")
    pconv = create_ablation("T0* r=1/2").stages[0].blocks[0].pconv
    assert (pconv.partial_channels, pconv.channels) == (18, 36)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "poolformer_s12", "swin_tiny_patch4_window7_224"])
def test_networks_are_counted_as_torch_counts_them(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        x = torch.empty(1, 3, 224, 224)
    costs = count_costs(model)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * costs.macs == counter.get_total_flops()
    assert costs.num_params == sum(parameter.numel() for parameter in model.parameters())


# The counter


def total(costs: complexity.Costs) -> tuple[int, int, int]:
    return costs.num_params, costs.macs, costs.memory_accesses


def test_count_costs_counts_norm_and_activation_as_memory_only():
    layers = nn.Sequential(nn.BatchNorm2d(6), nn.GELU(), nn.ReLU(inplace=True), nn.AvgPool2d(2))
    costs = count_costs(layers, (2, 6, 4, 8))
    size = 2 * 6 * 4 * 8
    assert [row.kind for row in costs.rows] == ["BatchNorm2d", "GELU", "ReLU", "AvgPool2d"]
    assert [row.memory_accesses for row in costs.rows] == [
        2 * size + 4 * 6,
        2 * size,
        2 * size,
        size + size // 4,
    ]
    assert costs.macs == 0
    assert (costs.num_params, costs.num_params_without_batch_norm) == (12, 0)


def test_count_costs_counts_bias_and_layer_norm_as_parameters():
    costs = count_costs(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), (3, 6))
    linear, norm = costs.rows
    assert (linear.num_params, linear.macs, linear.memory_accesses) == (35, 90, 18 + 35 + 15)
    assert (norm.num_params, norm.macs, norm.memory_accesses) == (10, 0, 15 + 10 + 15)
    assert costs.num_params_without_batch_norm == 45


class Rearranger(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        x = torch.cat([b, a], dim=1).transpose(1, 2).contiguous()
        x = torch.roll(F.pad(x, (1, 1, 1, 1)), 1, dims=2)
        return F.channel_shuffle(x.clone(), 2) if x.shape[1] % 2 == 0 else x


def test_count_costs_ignores_what_only_moves():
    assert count_costs(Rearranger(), (1, 4, 6, 5)).rows == ()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv(x)


def test_count_costs_books_an_operation_on_the_module_that_calls_it():
    outer, conv = count_costs(nn.Sequential(Residual()), (1, 4, 5, 6)).rows
    assert (outer.name, outer.kind, outer.macs, outer.memory_accesses) == ("0", "Residual", 0, 3 * 120)
    assert (conv.name, conv.kind, conv.macs) == ("0.conv", "Conv2d", 9 * 4 * 120)
    assert conv.input_shape == conv.output_shape == (1, 4, 5, 6)


class Attention(nn.Module):
    """Matrix products without a module around them, or the fused function."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        if self.fused:
            return F.scaled_dot_product_attention(x, x, x)
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


@pytest.mark.parametrize("fused", [True, False])
def test_count_costs_sees_functional_attention(fused):
    (row,) = count_costs(Attention(fused), (2, 10, 8)).rows
    assert (row.name, row.macs) == ("", 2 * 2 * 10 * 10 * 8)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def test_count_costs_handles_multihead_attention():
    attention = SelfAttention(32, 4, batch_first=True)
    (row,) = count_costs(attention, (1, 49, 32)).rows
    assert row.macs == 49 * 32 * 32 * 4 + 2 * 49 * 49 * 32
    assert row.num_params == sum(parameter.numel() for parameter in attention.parameters()) == 4 * 32 * 33


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)),
        SelfAttention(32, 4, batch_first=True),  # has a fused fast path on the CPU
        nn.Sequential(nn.Conv1d(12, 8, 3), nn.BatchNorm1d(8), nn.ReLU()),
        Attention(fused=True),
        Residual(),
    ],
    ids=lambda module: type(next(iter(module.children()), module)).__name__,
)
def test_count_costs_is_the_same_on_meta_and_cpu(module):
    shape = (2, 4, 9, 9) if isinstance(module, Residual) else (2, 12, 32)
    meta, cpu = (complexity._count(module, shape, device) for device in ("meta", "cpu"))
    assert meta == cpu
    assert meta.macs > 0


def test_count_costs_is_the_same_in_inference_mode():
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    expected = count_costs(encoder, (1, 9, 32))
    with torch.inference_mode():
        assert count_costs(encoder, (1, 9, 32)) == expected


def test_count_costs_sees_into_recurrent_layers():
    (row,) = count_costs(nn.LSTM(32, 8), (2, 12, 32)).rows
    assert (row.kind, row.macs) == ("LSTM", 2 * 12 * 4 * 8 * (32 + 8))


class Steered(nn.Module):
    """Creates a tensor on a fixed device and looks at values: the meta device cannot follow."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = torch.ones(4)  # no buffer

    def forward(self, x):
        x = self.linear(x) * self.scale + torch.zeros(4, device="cpu")
        return self.linear(x) if x.abs().sum().item() >= 0 else x


def test_count_costs_follows_modules_that_meta_cannot_run():
    with pytest.raises(RuntimeError):
        complexity._count(Steered(), (2, 4), "meta")
    costs = count_costs(Steered(), (2, 4))
    assert (costs.macs, costs.num_params) == (2 * 32, 20)


def test_count_costs_moves_plain_tensors_with_the_module():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.ones(4)

        def forward(self, x):
            return x * self.scale * torch.ones(4)  # both meet on the meta device

    assert complexity._count(Scaled(), (2, 4), "meta").memory_accesses == 2 * (8 + 4 + 8)


def test_count_costs_leaves_the_module_alone():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), Steered()).train()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random_state = torch.get_rng_state()
    count_costs(module, (2, 3, 6, 6))
    assert module.training
    assert module[1].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(tensor.device.type == "cpu" for tensor in module.state_dict().values())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_count_costs_counts_shared_weights_once_and_their_work_twice():
    linear = nn.Linear(4, 4, bias=False)
    assert total(count_costs(nn.Sequential(linear, nn.ReLU(), linear), (1, 4))) == (16, 32, 2 * 24 + 8)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    costs = count_costs(tied, (1, 4))
    assert [row.num_params for row in costs.rows] == [16, 0]


def test_count_costs_keeps_parameters_that_never_run():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2))

        def forward(self, x):
            return self.used(x)

    costs = count_costs(Auxiliary(), (1, 4))
    assert costs.num_params == sum(row.num_params for row in costs.rows) == 30
    assert {row.name: row.num_params for row in costs.rows} == {"": 10, "used": 20}


def test_count_costs_scale_with_the_batch():
    conv = nn.Conv2d(3, 8, 3, bias=False)
    one, four = (count_costs(conv, (batch, 3, 8, 8)) for batch in (1, 4))
    assert four.macs == 4 * one.macs
    assert four.memory_accesses == 4 * (one.memory_accesses - 216) + 216


def test_count_costs_takes_the_type_of_the_parameters():
    model = FasterNet(dataclasses.replace(VARIANTS["fasternet_t0"], width=8))
    assert count_costs(copy.deepcopy(model).bfloat16(), (1, 3, 64, 64)) == count_costs(model, (1, 3, 64, 64))


def test_count_costs_takes_modules_on_meta():
    with torch.device("meta"):
        conv = nn.Conv2d(3, 8, 3)
    assert count_costs(conv, (1, 3, 8, 8)).macs == 27 * 8 * 36


def test_count_costs_names_the_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"input_shape \(1, 4, 8, 8\) does not fit Conv2d: .*channels"):
        count_costs(nn.Conv2d(3, 8, 3), (1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"input_shape \(1, 3, 200, 200\) does not fit VisionTransformer: "):
        count_costs(timm.create_model("vit_tiny_patch16_224", depth=1), (1, 3, 200, 200))
