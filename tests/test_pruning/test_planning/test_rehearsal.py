"""Widths that a model's code has written out are found when a plan is made, and what no run reaches keeps what it reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning
from rep_plugin.errors import ArgumentError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions; what the head reads of them is ``read``."""

    def __init__(self, read, inputs):
        super().__init__()
        self.a, self.b, self.head = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.Linear(inputs, 5),
        )
        self.read, self.width = read, 32

    def forward(self, x):
        return self.head(self.read(self, self.b(self.a(x).relu()).relu()))


def checked_width(net, y):
    assert y.shape[1] == 32, "wrong width"
    return y.mean((2, 3))


def windows(net, y):
    return y.view(len(y), 32, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(len(y), -1, 32).mean(1)


READS = {
    "view(-1, 288)": (lambda net, y: F.adaptive_avg_pool2d(y, 3).view(-1, 288), 288),
    "view(n, 288)": (lambda net, y: F.adaptive_avg_pool2d(y, 3).view(len(y), 288), 288),
    "windows": (windows, 32),
    "an assertion": (checked_width, 32),
}


@pytest.mark.parametrize("name", READS)
def test_widths_written_out_are_found_when_planning(name):
    torch.manual_seed(0)
    net = Net(*READS[name]).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert "test_rehearsal.py:" in plan.frozen["b"] and plan.widths["b"] == (32, 32)
    assert plan.widths["a"][1] < 16 and apply_plan(net, plan).max_rel_error < 1e-9
    with pytest.raises(ArgumentError, match=r"widths cannot be met: 'b' .* written out .*test_rehearsal.py:"):
        PrunePlan.from_widths(net, X, {"b": 24})


def test_an_attribute_of_which_a_view_is_made_follows():
    torch.manual_seed(0)
    net = Net(lambda net, y: y.reshape(len(y), net.width, -1).mean(2), 32).eval()
    plan = PrunePlan.from_widths(net, X, {"b": 24})
    assert apply_plan(net, plan).max_rel_error < 1e-9 and net.width == 24


def test_a_latency_is_met_without_what_is_bound():
    class Slower:  # time is the number of kernel weights
        def __call__(self, calls, seconds):
            return {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in calls.items()}

    net = Net(*READS["view(n, 288)"]).eval()
    plan = plan_pruning(net, X, "l1", latency=0.8, timer=Slower())
    assert plan.widths["b"] == (32, 32) and plan.widths["a"][1] < 16


def test_where_nothing_else_could_go_the_line_is_told():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.AdaptiveAvgPool2d(3), nn.Unflatten(1, (16, 1)), nn.Flatten())
    net.append(nn.Linear(144, 5)).eval()
    with pytest.raises(ArgumentError, match="'0' has its number of channels written out"):
        plan_pruning(net, X, "l1", 0.4)


class Tasks(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.a, self.b, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 3), second

    def forward(self, x, other=False):
        y = self.b(self.a(x).relu()).relu()
        return self.second(y).mean((2, 3)) if other else self.first(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("second", "stays"),
    [
        (nn.Conv2d(24, 5, 1), "b"),
        (nn.Sequential(nn.BatchNorm2d(24), nn.Conv2d(24, 5, 1)), "b"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 5), nn.Unflatten(1, (5, 1, 1))), "b"),
    ],
    ids=["conv", "norm", "flattened"],
)
def test_what_no_run_reaches_keeps_what_it_may_read(second, stays):
    torch.manual_seed(0)
    net = Tasks(second).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.widths[stays] == (24, 24) and "does not reach" in plan.frozen[stays]
    assert plan.widths["a"][1] < 16 and any("not reached by the example's forward: 'second" in n for n in plan.notes)
    apply_plan(net, plan)
    assert net(X, other=True).shape == net(X, other=True).shape == (2, 5)
