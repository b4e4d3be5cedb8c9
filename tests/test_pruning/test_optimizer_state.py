"""What optimizers keep of a parameter becomes narrower with it, begins anew with a note, or is refused beforehand."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from rep_plugin import apply_plan, plan_pruning
from rep_plugin.errors import ArgumentError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Its square layer is the hard one: means along either side are of one length."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.deep = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 1, groups=24)
        self.square, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.square(self.deep(self.norm(self.conv(x)).relu()).relu().mean((2, 3))).relu())


def step(net, optimizer):
    def loss():
        optimizer.zero_grad()
        value = net(X).square().mean()
        value.backward(create_graph=getattr(optimizer, "is_second_order", False))
        return value

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(loss)
    loss()
    return optimizer.step()


def check(make):
    """Return the notes on states of pruning between steps; every kernel moves before and after."""
    torch.manual_seed(0)
    net = Net()
    net.train()
    optimizer = make(net)
    step(net, optimizer)
    step(net, optimizer)
    report = apply_plan(net, plan_pruning(net, X, "l1", 0.4), optimizer)
    before = copy.deepcopy([p.detach() for p in net.parameters()])
    step(net, optimizer)
    step(net, optimizer)
    assert len(net.conv.weight) < 24 and any(not torch.equal(p, old) for p, old in zip(net.parameters(), before))
    assert all(p.isfinite().all() for p in net.parameters())
    return [note for note in report.notes if "begins anew" in note]


TORCHS = ["Adafactor", "Adadelta", "Adagrad", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
TIMMS = ["adamp", "adan", "lamb", "lion", "madgradw", "novograd", "sgdp", "lookahead_adam", "laprop", "mars"]


@pytest.mark.parametrize("name", TORCHS)
def test_optimizers_of_torch(name):
    assert check(lambda net: getattr(torch.optim, name)(net.parameters(), lr=1e-3)) == []


@pytest.mark.parametrize("name", TIMMS)
def test_optimizers_of_timm(name):
    assert check(lambda net: timm.optim.create_optimizer_v2(net, opt=name, lr=1e-3)) == []


def test_what_cannot_be_sliced_begins_anew_with_a_note():
    (note,) = check(lambda net: timm.optim.create_optimizer_v2(net, opt="adafactor", lr=1e-3))
    assert "Adafactor begins anew with 1 parameters ('square.weight' is the first)" in note


def test_one_history_of_all_is_refused_before_anything_is_done():
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters())
    step(net, optimizer)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ArgumentError, match=r"LBFGS\) keeps one history"):
        apply_plan(net, plan_pruning(net, X, "l1", 0.4), optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
