"""Layers that are annealed where they stand: what they compute at each alpha, and what they stay to others."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rep_plugin.blocks.annealed import set_alpha_
from rep_plugin.blocks.annealed_layers import (
    InnerActivation,
    Place,
    anneal_conv_,
    anneal_in_,
    anneal_norm_,
    finish_,
    has_segments,
    in_segments,
    require_finished,
    stock_class,
    why_not_annealed,
)
from rep_plugin.errors import AnnealError
from rep_plugin.measure.copies import copy_model

PLACE = Place("a..b", 1, 2, False)


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(inplace=True), nn.GELU(), nn.LeakyReLU(0.2)]
)
def test_inner_activations_go_from_stock_to_the_identity(act):
    inner, x = InnerActivation(act), torch.randn(2, 3, 4, 4)
    kept = x.clone()
    expected = copy.deepcopy(act)(x.clone())
    for alpha in (0, 0.25, 1):
        set_alpha_(inner, alpha)
        assert torch.allclose(inner(x), (1 - alpha) * expected + alpha * kept) and torch.equal(x, kept)
    assert type(act) is not nn.ReLU or act.inplace  # the given module stays as it was


def test_a_convolution_reads_its_ring_times_alpha():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    weight, x = conv.weight, torch.randn(1, 2, 9, 8)
    whole, inside = conv(x)[:, :, 1:-1, 1:-1], conv(x[:, :, 1:-1, 1:-1])
    anneal_conv_(conv, (0, 0), (1, 1), PLACE)
    assert isinstance(conv, nn.Conv2d) and type(conv).__name__ == "Conv2d" and conv.weight is weight
    for alpha in (0, 0.5, 1):
        set_alpha_(conv, alpha)
        assert torch.allclose(conv(x), torch.lerp(inside, whole, alpha), atol=1e-6)
    assert has_segments(conv) and stock_class(conv) is nn.Conv2d


def test_the_head_is_an_ordinary_convolution():
    conv = nn.Conv2d(2, 3, 1)
    anneal_conv_(conv, (2, 1), None, PLACE)
    assert type(conv) is nn.Conv2d and conv(torch.zeros(1, 2, 4, 4)).shape[2:] == (8, 6) and not list(in_segments(conv))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_are_those_inside_the_ring(momentum):
    bn, x = nn.BatchNorm2d(3, momentum=momentum).train(), torch.randn(4, 3, 9, 8)
    stock = copy.deepcopy(bn)
    expected = stock(x[:, :, 2:-2, 1:-1])
    anneal_norm_(bn, (2, 1))
    assert torch.allclose(bn(x)[:, :, 2:-2, 1:-1], expected, atol=1e-5)
    for name, value in stock.state_dict().items():
        assert torch.allclose(value.float(), bn.state_dict()[name].float(), atol=1e-6), name
    bn.eval(), stock.eval()
    assert torch.allclose(bn(x), stock(x), atol=1e-6)


def test_an_activation_is_added_behind_blocks_of_both_kinds():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(x) + x

    x = torch.randn(1, 2, 5, 5)
    for block in (Block(), nn.Sequential(nn.Conv2d(2, 2, 1))):
        expected, keys = block(x), block.state_dict().keys()
        anneal_in_(block, "relu", torch.device("cpu"))
        assert torch.equal(block(x), expected) and block.state_dict().keys() - keys == {"act_after.anneal_alpha"}
        block.load_state_dict({k: v for k, v in block.state_dict().items() if "alpha" not in k})
        set_alpha_(block, 1.0)
        assert torch.equal(block(x), expected.relu())
        finish_(block)
        assert torch.equal(block(x), expected.relu()) and type(block.act_after) is nn.ReLU


def test_finished_layers_are_stock_again():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    anneal_conv_(model[0], (0, 0), (1, 1), PLACE)
    anneal_norm_(model[1], (1, 1))
    model[2] = InnerActivation(model[2])
    with pytest.raises(AnnealError, match="alpha is 0, expected 1"):
        require_finished(model)
    set_alpha_(model, 1.0)
    require_finished(model)
    finish_(model)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Identity]
    assert not [key for key in model.state_dict() if "alpha" in key]


def test_annealed_layers_are_pickled_and_copied():
    conv, bn = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
    anneal_conv_(conv, (0, 0), (1, 1), PLACE)
    anneal_norm_(bn, (1, 1))
    model = nn.Sequential(conv, bn)
    set_alpha_(model, 0.5)
    x = torch.randn(2, 2, 9, 8)
    model.eval()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy_model(model)):
        assert torch.equal(other(x), model(x)) and stock_class(other[0]) is nn.Conv2d and other[0].segment == PLACE
        set_alpha_(other, 1.0)
        assert conv.alpha == 0.5 and other[0].weight is not conv.weight


def test_what_cannot_be_annealed_is_said():
    assert "parameters would be lost" in why_not_annealed(nn.PReLU())
    assert "Softmax, no activation" in why_not_annealed(nn.Softmax(1))
    assert why_not_annealed(nn.Mish()) is None
