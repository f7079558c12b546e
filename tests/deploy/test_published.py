"""What somebody has put in the place of a published part is refused by name, never dropped in silence."""

import pytest
import timm
from torch import nn

from fasternet.deploy import to_layers
from fasternet.models import create_model


def create():
    return create_model("fasternet_t0", width=8, depths=(1, 1, 1, 1), head_width=16, num_classes=5).eval()


class Negated(nn.Conv2d):
    """Computes something else."""

    def forward(self, x):
        return -super().forward(x)


def change(path, part, network=create):
    """Return a network with another part."""
    model = network()
    model.set_submodule(path, part)
    return model


def negate(network):
    network.__class__ = type("Own", (type(network),), {"forward": lambda self, x: -super(type(self), self).forward(x)})
    return network


def hook(network, path):
    network.get_submodule(path).register_forward_hook(lambda *_: None)
    return network


def create_timm():
    return timm.create_model("fasternet_t0", embed_dim=8, depths=(1, 1, 1, 1), feature_dim=16, num_classes=5).eval()


BLOCK, TIMM_BLOCK = "stages.1.blocks.0", "stages.1.blocks.0.mlp"


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: change("head.fc", nn.Sequential(nn.Dropout(), nn.Linear(16, 5))), "classifier must be .*Sequential"),
        (lambda: change("head.drop", nn.Tanh()), "Tanh has taken the place of its dropout"),
        (lambda: change(f"{BLOCK}.pwconv1", Negated(16, 32, 1, bias=False)), "Negated.* is not the published 1 x 1"),
        (lambda: change(f"{BLOCK}.pwconv1", nn.Conv2d(16, 32, 1, groups=2, bias=False)), "groups=2.* is not the publ"),
        (lambda: change("embedding.conv", nn.Conv2d(3, 8, 4, 4, padding=1)), "is not the published 4 x 4 .*stride 4"),
        (lambda: change("stages.1.merging.conv", nn.Conv2d(8, 16, 2, 1)), "not the published 2 x 2 .*stride 2"),
        (lambda: change("stages.0.merging", nn.Tanh()), "Tanh has taken the place of its embedding or merging"),
        (lambda: change(BLOCK, nn.Tanh()), "Tanh has taken the place of its block"),
        (lambda: hook(create(), f"{BLOCK}.norm"), rf"{BLOCK}\.norm has hooks"),
        (lambda: negate(create()), "model is a Own, a class of its own"),
        (lambda: hook(create_timm(), TIMM_BLOCK), "has hooks"),
        (lambda: negate(create_timm()), "Own has taken the place of its network"),
        (lambda: change(f"{TIMM_BLOCK}.0", Negated(16, 32, 1, bias=False), create_timm), "Negated.* is not the publ"),
        (lambda: change(f"{TIMM_BLOCK}.2", nn.ReLU(), create_timm), "exact GELU or ReLU throughout"),
        (lambda: change(f"{TIMM_BLOCK}.1", nn.BatchNorm2d(32, eps=1e-3), create_timm), "published BN"),
        (
            lambda: change("classifier", nn.Sequential(nn.Linear(16, 5)), create_timm),
            "Sequential has .*classifier",
        ),
    ],
)
def test_parts_of_ones_own_are_refused_instead_of_dropped(model, match):
    with pytest.raises(ValueError, match=match) as caught:
        to_layers(model())
    assert "\n" not in str(caught.value)


def test_forward_of_an_instance_is_refused():
    model = create()
    model.stages[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of stages\.0 was replaced"):
        to_layers(model)
