"""Kernels that are buffers, shared, or computed from parameters."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune

from rep_plugin import apply_plan, plan_pruning

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs=16, outputs=16, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def masked(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


COMPUTED = {
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "old weight norm": lambda: nn.utils.weight_norm(conv()),
    "pruning mask": lambda: masked(conv()),
    "standardised": lambda: StdConv2d(16, 16, 3, padding=1),
    "scaled standardised": lambda: ScaledStdConv2d(16, 16, 3, padding=1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda width: nn.Identity()], ids=["bn", "plain"])
def test_outputs_of_computed_kernels_are_pruned(name, norm):
    torch.manual_seed(0)
    net = nn.Sequential(conv(3), nn.ReLU(), COMPUTED[name](), norm(16), nn.ReLU(), conv(16, 5)).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.widths["2"][1] < 16 and plan.widths["0"] == (16, 16) and "'2'" in plan.frozen["0"]
    assert apply_plan(net, plan).max_rel_error < 1e-9 and net[2].out_channels == plan.widths["2"][1]
    net.train()(X).sum().backward()
    assert "2" in plan_pruning(net.eval(), X, "l1", 0.2, ignore=["2"], prune_outputs=True).frozen


def test_kernels_coupled_through_all_channels_stay_and_say_so():
    net = nn.Sequential(
        conv(3), nn.ReLU(), parametrizations.spectral_norm(conv()), nn.ReLU(), conv(), conv(16, 5)
    ).eval()
    plan = plan_pruning(net, X, "l1", 0.3)
    assert plan.widths["2"] == (16, 16) and "'2'" in plan.frozen["2"] and "rep_plugin/" not in str(plan.frozen)


class Blur(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.head, self.kind = conv(3), nn.Conv2d(16, 5, 1), kind
        self.register_buffer("input_kernel", torch.randn(3, 1, 3, 3))
        self.register_buffer("kernel", torch.randn(1 if kind == "expanded" else 16, 1, 3, 3))

    def forward(self, x):
        if self.kind == "input":
            return self.head(self.conv(F.conv2d(x, self.input_kernel, groups=3)).relu())
        x = self.conv(x).relu()
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1) if self.kind == "expanded" else self.kernel
        return self.head(F.conv2d(x, kernel, groups=x.shape[1]))


@pytest.mark.parametrize("kind", ["input", "own", "expanded"])
def test_kernels_that_are_buffers(kind):
    torch.manual_seed(0)
    net = Blur(kind).eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.widths["conv"][1] < 16 and apply_plan(net, plan).max_rel_error < 1e-9
    net(X)


class Tied(nn.Module):
    """Two layers of each kind with one weight."""

    def __init__(self, groups):
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3), conv(groups=groups), conv(groups=groups), conv(16, 5)
        self.norm, self.again = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.two.weight, self.again.weight = self.one.weight, self.norm.weight

    def forward(self, x):
        return self.head(self.again(self.two(self.norm(self.one(self.stem(x).relu())).relu())))


@pytest.mark.parametrize("groups", [1, 16])
def test_layers_that_share_a_weight_all_know_their_widths(groups):
    torch.manual_seed(0)
    net = Tied(groups).eval()
    assert apply_plan(net, plan_pruning(net, X, "l1", 0.4)).max_rel_error < 1e-9
    width = len(net.one.weight)
    for layer in (net.one, net.two):
        assert (layer.out_channels, layer.in_channels) == (width, width) and layer.groups == (
            1 if groups == 1 else width
        )
    assert net.norm.num_features == net.again.num_features == width < 16
