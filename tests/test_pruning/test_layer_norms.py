"""Layer norms over channels normalise those that stay; position embeddings and tokens follow their channels."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin import apply_plan, plan_pruning
from rep_plugin.pruning.methods.clusters import plan_clusters
from rep_plugin.pruning.planning import Budget
from tests.helpers import relative_error

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """A patch embedding with a class token and positions, and a block on it."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.norm, self.up, self.down, self.last = norm(16), nn.Linear(16, 24), nn.Linear(24, 16), norm(16)
        self.scale, self.head = nn.Parameter(torch.rand(16)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.scale * self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.last(x)[:, 0])


class Maps(nn.Module):
    """A layer norm of maps, as ConvNeXt's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.LayerNorm(16), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x.sigmoid()).mean((2, 3))


NETS = {"layer norm": lambda: Tokens(nn.LayerNorm), "rms norm": lambda: Tokens(nn.RMSNorm), "maps": Maps}


@pytest.mark.parametrize("name", NETS)
def test_channels_of_a_layer_norm_are_removed(name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    first = "conv" if name == "maps" else "stem"
    plan = plan_pruning(net, X, "l1", 0.4)
    width = plan.widths[first][1]
    assert width < 16 and apply_plan(net, plan).max_rel_error < 1e-9
    assert net.norm.normalized_shape == (width,) and net.norm.weight.shape == (width,)
    net.train()(X).sum().backward()
    if name != "maps":
        assert net.position.shape == (1, 17, width) and net.cls.shape == (1, 1, width)


def test_the_norm_is_one_of_the_channels_that_stay():
    """Zeros would count in mean and variance: the masked model leaves them out, as an own computation does."""
    torch.manual_seed(0)
    net = Maps().double().eval()
    nn.init.normal_(net.norm.weight)
    nn.init.normal_(net.norm.bias)
    dense, plan = copy.deepcopy(net), plan_pruning(net, X, "l1", 0.4)
    apply_plan(net, plan)
    kept = list(plan.kept["conv"])
    with torch.no_grad():
        x = dense.conv(X.double())[:, kept].permute(0, 2, 3, 1)
        x = F.layer_norm(x, (len(kept),), dense.norm.weight[kept], dense.norm.bias[kept]).permute(0, 3, 1, 2)
        expected = F.conv2d(x.sigmoid(), dense.head.weight[:, kept], dense.head.bias).mean((2, 3))
        assert relative_error(expected, net(X.double())) < 1e-12


def test_equal_channels_behind_a_layer_norm_are_not_one():
    torch.manual_seed(0)
    net = Tokens(nn.LayerNorm).eval()
    plan = plan_clusters(net, X, Budget(prune_fraction=0.3)).plan
    assert "norm over channels" in plan.frozen["stem"] and plan.widths["up"][1] < 24


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet_ln", "test_vit"])
def test_networks_of_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    plan = plan_pruning(model, x, "l1", 0.4)
    report = apply_plan(model, plan)
    assert report.max_rel_error < 1e-9 and report.macs_after < 0.85 * report.macs_before
    assert model.num_features == model.forward_features(x).shape[2 if "vit" in name else 1]
