"""Maps that meet a map of one channel, their gate: the gate stays, and says nothing of which channels are zero."""

import pytest
import torch
from torch import Tensor, nn

from rep_plugin import PrunePlan, apply_plan
from tests.helpers import relative_error

GATES = {
    "behind": lambda y, g, p: torch.sigmoid(y) * g,
    "in front": lambda y, g, p: g * torch.sigmoid(y),
    "in place": lambda y, g, p: torch.sigmoid(y).mul_(g),
    "squashed": lambda y, g, p: y.relu() * g.sigmoid(),
    "scaled by a parameter": lambda y, g, p: y.sigmoid() * (g * p),
    "a parameter alone": lambda y, g, p: y.sigmoid() * p,
    "of one position": lambda y, g, p: y.sigmoid() * g.mean((2, 3), keepdim=True),
    "a divisor": lambda y, g, p: y.sigmoid() / (g.exp() + 1),
    "added": lambda y, g, p: y + g,
    "subtracted": lambda y, g, p: g - y,
    "the larger": lambda y, g, p: torch.maximum(y, g),
    "two of them": lambda y, g, p: (y.sigmoid() * g + g) * p,
}


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.first, self.one, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(8, 4, 3)
        self.factor, self.gate = nn.Parameter(torch.full((1, 1, 1, 1), 0.7)), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.first(x), self.one(x), self.factor))


@pytest.mark.parametrize("name", GATES)
def test_channels_behind_a_gate_can_be_removed(name):
    torch.manual_seed(0)
    net, x = Gated(GATES[name]).double().eval(), torch.randn(2, 3, 9, 9).double()
    plan = PrunePlan.from_widths(net, x, {"first": 5})
    removed = sorted(set(range(8)) - set(plan.kept["first"]))
    whole = net.gate(net.first(x), net.one(x), net.factor)
    whole[:, removed] = 0
    expected = net.last(whole)
    report = apply_plan(net, plan, example_input=x)
    assert net.first.out_channels == 5 and net.one.out_channels == 1 and report.max_rel_error < 1e-12
    assert relative_error(expected, net(x)) < 1e-12
