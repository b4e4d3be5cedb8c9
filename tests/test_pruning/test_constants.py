"""Channels whose gamma is zero and whose beta is not: what they give goes into the biases behind them."""

import pytest
import torch
from torch import nn

from rep_plugin import apply_plan, plan_pruning
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, between, last):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.between, self.last = between, last

    def forward(self, x):
        return self.last(self.between(self.norm(self.first(x))))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def depthwise():
    return nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Hardswish())


NETS = {
    "bias": lambda: Net(nn.ReLU(), nn.Conv2d(16, 5, 3)),
    "no bias, then a norm": lambda: Net(nn.ReLU(), nn.Sequential(nn.Conv2d(16, 6, 3, bias=False), nn.BatchNorm2d(6))),
    "grouped": lambda: Net(nn.GELU(), nn.Conv2d(16, 6, 1, groups=2)),
    "classifier": lambda: Net(nn.Sequential(nn.ReLU(), Pool()), nn.Linear(16, 5)),
    "depthwise between": lambda: Net(depthwise(), nn.Conv2d(16, 5, 1)),
    "flattened": lambda: Net(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(64, 5)),
}


def dead(net):
    """The net with six channels, three in each half, that are constant."""
    torch.manual_seed(0)
    net.eval()
    calibrate_random_bn_(net, X)
    gone = [0, 3, 5, 9, 10, 14]
    with torch.no_grad():
        net.norm.weight[gone], net.norm.bias[gone] = 0.0, torch.linspace(0.5, 3, 6)
    return net.double(), gone


@pytest.mark.parametrize("name", NETS)
def test_removing_constants_changes_nothing(name):
    net, gone = dead(NETS[name]())
    x = X.double()
    with torch.no_grad():
        before = net(x)
        report = apply_plan(net, plan_pruning(net, X, prune_fraction=6 / 16, min_channels=1))
        assert net.first.out_channels == 10 and not any(i in gone for i in history(net))
        assert relative_error(before, net(x)) < 1e-9
    assert report.max_rel_error < 1e-9
    assert any("6 removed channels were constant" in note and "in the biases of" in note for note in report.notes)


def history(net):
    from rep_plugin.history import history_of

    return history_of(net)[-1]["plan"]["kept"]["first"]


def test_padding_is_the_only_difference():
    net, _ = dead(Net(nn.ReLU(), nn.Conv2d(16, 5, 3, padding=1)))
    with torch.no_grad():
        before = net(X.double())
        apply_plan(net, plan_pruning(net, X, prune_fraction=6 / 16, min_channels=1))
        after = net(X.double())
    assert relative_error(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1]) < 1e-9 < relative_error(before, after)


def test_what_cannot_take_a_constant_is_named():
    net, _ = dead(Net(nn.ReLU(), nn.Conv2d(16, 5, 1, bias=False)))
    report = apply_plan(net, plan_pruning(net, X, prune_fraction=6 / 16, min_channels=1))
    assert any("what they gave last is gone" in note for note in report.notes)


def test_channels_that_vary_are_masked_as_ever():
    net, _ = dead(NETS["bias"]())
    with torch.no_grad():
        net.norm.weight.fill_(0.5)
    bias = net.last.bias.clone()
    report = apply_plan(net, plan_pruning(net, X, "l1", 0.3, min_channels=1))
    assert torch.equal(net.last.bias, bias) and not any("constant" in note for note in report.notes)
