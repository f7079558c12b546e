"""PVT: attention against PyTorch's own, positions at any size, the class token, the four maps."""

import torch
import torch.nn.functional as F
from torch import nn

from fasternet.rivals.pvt import DEPTHS, PVT, SpatialReductionAttention, Stage


def test_attention_is_multihead_attention_to_the_reduced_map():
    torch.manual_seed(0)
    for reduction in (1, 2):
        attention = SpatialReductionAttention(32, 4, reduction)
        x = torch.randn(2, 6 * 4, 32)
        reduced = x
        if reduction > 1:
            nn.init.normal_(attention.norm.bias)
            picture = x.reshape(2, 6, 4, 32).permute(0, 3, 1, 2)
            reduced = attention.norm(attention.reduce(picture).permute(0, 2, 3, 1)).reshape(2, 3 * 2, 32)
        theirs = nn.MultiheadAttention(32, 4, batch_first=True)
        theirs.in_proj_weight.data = torch.cat([attention.q.weight, attention.kv.weight])
        theirs.in_proj_bias.data = torch.cat([attention.q.bias, attention.kv.bias])
        theirs.out_proj = attention.proj
        torch.testing.assert_close(attention(x, 6, 4), theirs(x, reduced, reduced)[0])


def test_positions_are_learned_at_224_and_interpolated_elsewhere():
    stage = Stage(2, [], class_token=False)
    nn.init.zeros_(stage.proj.weight)
    nn.init.zeros_(stage.proj.bias)
    nn.init.normal_(stage.positions)
    for height, width in ((14, 14), (28, 9)):
        tokens, *sides = stage(torch.randn(2, 128, 2 * height, 2 * width))
        assert sides == [height, width]
        expected = F.interpolate(stage.positions, size=(height, width), mode="bilinear")
        torch.testing.assert_close(tokens[1].T.reshape(320, height, width), expected[0])


def test_features_are_the_maps_behind_the_classifier():
    torch.manual_seed(0)
    network, backbone = PVT((1, 1, 1, 1), 5).eval(), PVT((1, 1, 1, 1), features_only=True).eval()
    absent = set(network.state_dict()) - set(backbone.state_dict())
    assert absent == {
        *("stages.3.class_token", "stages.3.class_position"),
        *("norm.weight", "norm.bias", "head.weight", "head.bias"),
    }
    backbone.load_state_dict({key: value for key, value in network.state_dict().items() if key not in absent})
    x = torch.randn(1, 3, 200, 128)
    with torch.no_grad():
        maps = backbone(x)
        tokens = network.stages[3](maps[2])[0]
        assert tokens.shape == (1, 1 + 6 * 4, 512)
        torch.testing.assert_close(network(x), network.head(network.norm(tokens))[:, 0])
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 50, 32), (128, 25, 16), (320, 12, 8), (512, 6, 4)]


def test_class_token_and_positions_count():
    torch.manual_seed(0)
    network, x = PVT((1, 1, 1, 1), 5).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network(x)
        assert not torch.allclose(before[0], before[1])
        for name in ("class_token", "class_position", "positions"):
            nn.init.normal_(getattr(network.stages[3], name))
            after = network(x)
            assert not torch.allclose(after, before)
            before = after


def test_stochastic_depth_grows_to_the_last_block():
    network = PVT(DEPTHS["pvt_tiny"], 5, drop_path_rate=0.7)
    rates = [block.drop_path.p for stage in network.stages for block in stage.blocks]
    torch.testing.assert_close(rates, [i / 10 for i in range(8)], rtol=0, atol=1e-6)
