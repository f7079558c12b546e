"""fold_batch_norm: what is folded and what must not be, in any network; the caller's model stays as it is."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from fasternet.deploy import fold_batch_norm
from fasternet.rivals import create_rival

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomise(model):
    """Give every BN statistics and affine parameters that a wrong fold would show."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            if module.track_running_stats:
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def count_norms(model):
    return sum(isinstance(module, BATCH_NORMS) for module in model.modules())


def check_fold(model, x, num_left, tolerance=1e-5):
    """Fold a model; the function stays, the given number of BN is left. Returns the folded model."""
    model = randomise(model)
    folded = fold_batch_norm(model, x)
    with torch.no_grad():
        expected, found = model(x), folded(x)
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    for a, b in pairs:
        assert a.isfinite().all()
        assert ((a - b).abs().max() / a.abs().max()).item() <= tolerance
    assert count_norms(folded) == num_left
    return folded


class Net(nn.Module):
    """A network of named layers whose forward pass is a function of them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=4, outputs=4, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def picture():
    return torch.randn(2, 4, 9, 7)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (conv(4, 6), nn.BatchNorm2d(6), (2, 4, 9, 7)),
        (conv(4, 6, bias=False), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 7)),
        (conv(4, 8, groups=4), nn.BatchNorm2d(8, eps=0.1), (1, 4, 9, 7)),
        (nn.Conv1d(4, 6, 3, dilation=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), (2, 2, 3, 4, 5)),
        (nn.Linear(5, 6), nn.BatchNorm1d(6), (3, 5)),
        (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), (1, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norm_behind_a_layer_is_folded(layer, norm, shape):
    folded = check_fold(nn.Sequential(layer, norm, nn.ReLU()), torch.randn(shape), num_left=0)
    assert isinstance(folded[0], type(layer))
    assert folded[0].bias is not None


def test_forward_order_counts_and_the_order_of_definition_does_not():
    def run(net, x):
        return net.norm2(net.conv2(net.norm1(net.conv1(x)).relu()))

    layers = {"norm2": nn.BatchNorm2d(6), "norm1": nn.BatchNorm2d(4), "conv2": conv(4, 6), "conv1": conv()}
    check_fold(Net(run, **layers), picture(), num_left=0)


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: net.norm(y := net.conv(x)) + y,
        lambda net, x: net.norm(y := net.conv(x)) * y[:, :1],
        lambda net, x: net.norm(net.conv(x).relu()),
        lambda net, x: net.norm(net.conv(x).relu_()),
        lambda net, x: net.norm(net.conv(x).flip(2)),
        lambda net, x: net.norm(net.conv(net.conv(x))),
        lambda net, x: net.norm(net.conv(x)) + net.conv(2 * x),
        lambda net, x: net.norm(net.norm(net.conv(x))),
        lambda net, x: net.conv(net.norm(x)),
    ],
    ids=[
        "output added too",
        "output sliced too",
        "activation between",
        "activation between, in place",
        "view between",
        "layer run twice in a row",
        "layer run twice in parallel",
        "norm run twice",
        "norm before the layer",
    ],
)
def test_norm_that_something_else_depends_on_is_left(run):
    check_fold(Net(run, conv=conv(), norm=nn.BatchNorm2d(4)), picture(), num_left=1)


def test_two_norms_that_read_one_layer_are_left():
    net = Net(lambda net, x: net.a(y := net.conv(x)) + net.b(y), conv=conv(), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))
    check_fold(net, picture(), num_left=2)


def test_second_norm_in_a_row_is_left():
    check_fold(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), picture(), num_left=1)


def test_norm_of_batch_statistics_is_left():
    check_fold(nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), picture(), num_left=1)


def test_norm_behind_a_layer_that_does_not_run_is_left():
    net = Net(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(4), conv=conv())
    check_fold(net, picture(), num_left=1)


def test_other_norms_and_transposed_convolutions_are_left():
    layers = (conv(), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4))
    folded = check_fold(nn.Sequential(*layers), picture(), num_left=1)
    assert isinstance(folded[1], nn.GroupNorm)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, None])
def test_norm_with_an_activation_of_its_own_keeps_it(act):
    options = {"apply_act": False} if act is None else {"act_layer": act}
    check_fold(nn.Sequential(conv(), BatchNormAct2d(4, **options)), picture(), num_left=0)


def test_callers_model_and_its_hooks_stay_as_they_are():
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(0.5), conv(), nn.BatchNorm2d(4))).train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = picture()
    before = x.clone()
    folded = fold_batch_norm(model, x)
    assert model.training
    assert all(module.training for module in model.modules())
    assert count_norms(model) == 2
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(x, before)
    assert not any(module.training for module in folded.modules())
    for network in (model, folded):
        for module in network.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    theirs = {tensor.data_ptr() for tensor in folded.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_folded_network_takes_other_sizes_and_precisions():
    model = randomise(nn.Sequential(conv(), nn.BatchNorm2d(4))).double()
    folded = fold_batch_norm(model, torch.zeros(1, 4, 3, 3, dtype=torch.double))
    x = torch.randn(3, 4, 17, 5, dtype=torch.double)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), rtol=1e-12)


@pytest.mark.parametrize(("name", "num_norms"), [("ShuffleNetV2 x1.5", 56), ("MobileNetV2", 52), ("ResNet50", 53)])
def test_rivals_are_folded_whole(name, num_norms):
    model = create_rival(name)
    assert count_norms(model) == num_norms
    # A randomised ResNet grows by each block: the tolerance is relative to the largest output.
    check_fold(model, torch.randn(1, 3, 64, 64), num_left=0, tolerance=1e-4)


def test_timm_fasternet_is_folded_whole():
    model = timm.create_model("fasternet_t0", embed_dim=8)
    assert count_norms(model) == 1 + 13 + 3
    check_fold(model, torch.randn(1, 3, 64, 64), num_left=0)


@pytest.mark.parametrize("num_classes", [5, 6])
def test_norm_over_another_dimension_than_the_layers_is_left(num_classes):
    check_fold(nn.Sequential(nn.Linear(7, num_classes), nn.BatchNorm1d(5)), torch.randn(3, 5, 7), num_left=1)


def test_norm_of_an_output_that_the_network_returns_too_is_left():
    net = Net(lambda net, x: (net.norm(y := net.conv(x)), y), conv=conv(), norm=nn.BatchNorm2d(4))
    check_fold(net, picture(), num_left=1)


def test_layer_under_two_names_is_folded_under_both():
    shared = conv()
    net = Net(lambda net, x: net.norm(net.second(x)), first=shared, second=shared, norm=nn.BatchNorm2d(4))
    folded = check_fold(net, picture(), num_left=0)
    assert folded.first is folded.second


def test_norm_called_by_keyword_is_folded():
    net = Net(lambda net, x: net.norm(input=net.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4))
    check_fold(net, picture(), num_left=0)
