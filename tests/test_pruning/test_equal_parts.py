"""Channels in equal parts: halves by slices, split of a size, gated linear units, pixels moved into channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin import apply_plan, plan_pruning
from tests.test_pruning.nets import Call

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def slices(x):
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:]


def split(x):
    first, second = x.split(x.shape[1] // 2, 1)
    return first * second


def split_sizes(x):
    first, second = torch.split(x, [x.shape[1] // 2, x.shape[1] // 2], dim=1)
    return first + second.sigmoid()


PARTS = {
    "slices": (slices, 16),
    "split": (split, 16),
    "split into sizes": (split_sizes, 16),
    "glu": (lambda x: F.glu(x, 1), 16),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 128),
}


@pytest.mark.parametrize("name", PARTS)
def test_equal_parts_stay_equal(name):
    torch.manual_seed(0)
    function, width = PARTS[name]
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), Call(function), nn.Conv2d(width, 5, 1)).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.widths["0"][1] < 32 and apply_plan(net, plan).max_rel_error < 1e-9
    assert net(X).shape[1] == 5


@pytest.mark.parametrize("sizes", [[16, 16], 16])
def test_sizes_written_out_keep_their_channels(sizes):
    def function(x):
        first, second = torch.split(x, sizes, dim=1)
        return first * second

    layers = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 32, 3), Call(function), nn.Conv2d(16, 5, 1)]
    net = nn.Sequential(*layers).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.widths["2"] == (32, 32) and "written out" in plan.frozen["2"] and plan.widths["0"][1] < 12
    assert apply_plan(net, plan).max_rel_error < 1e-9


class Mixed(nn.Module):
    """Parts of sizes that the module keeps, a convolution for each, as MixNet's; a second attribute is one of them."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.last = sizes, sizes[-1]
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for n in sizes)

    def forward(self, x):
        parts = torch.split(x, self.sizes, 1)
        last = parts[-1].reshape(len(x), self.last, *x.shape[2:])
        return torch.cat([conv(part) for conv, part in zip(self.convs, (*parts[:-1], last))], 1)


@pytest.mark.parametrize("sizes", [[8, 20, 4], (16, 16), [5, 27]])
def test_sizes_that_a_module_keeps_follow_its_parts(sizes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), Mixed(sizes), nn.Conv2d(32, 5, 1)).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert apply_plan(net, plan).max_rel_error < 1e-9
    assert type(net[2].sizes) is type(sizes) and sum(net[2].sizes) == plan.widths["0"][1] < 32
    assert [conv.in_channels for conv in net[2].convs] == list(net[2].sizes) and net[2].last == net[2].sizes[-1]
    net.train()(X).sum().backward()
