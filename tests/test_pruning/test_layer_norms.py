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


class Responses(nn.Module):
    """Global response normalisation, as ConvNeXt V2's: a norm of each channel over the mean of all."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        weight, bias = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias))
        return x + torch.addcmul(bias, weight, x * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6)))


OVER_CHANNELS = {
    "group norm": lambda: nn.GroupNorm(4, 16),
    "one group": lambda: nn.GroupNorm(1, 16),
    "response norm": Responses,
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_norms_of_groups_and_of_responses_are_those_of_the_channels_that_stay(name):
    torch.manual_seed(0)
    conv, norm, head = nn.Conv2d(3, 16, 3), OVER_CHANNELS[name](), nn.Conv2d(16, 5, 1)
    net = nn.Sequential(conv, norm, nn.Sigmoid(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    dense, plan = copy.deepcopy(net), plan_pruning(net, X, "l1", 0.4)
    kept = list(plan.kept["0"])
    if name == "group norm":
        assert [sum(index // 4 == group for index in kept) for group in range(4)] == [len(kept) // 4] * 4
    assert len(kept) < 16 and apply_plan(net, plan).max_rel_error < 1e-9
    with torch.no_grad():
        x = dense[0](X.double())[:, kept]
        dense[1].weight.data, dense[1].bias.data = dense[1].weight[kept], dense[1].bias[kept]
        x = dense[1](x) if name == "response norm" else F.group_norm(x, norm.num_groups, dense[1].weight, dense[1].bias)
        expected = F.conv2d(x.sigmoid(), dense[3].weight[:, kept], dense[3].bias).mean((2, 3))
        assert relative_error(expected, net(X.double())) < 1e-12
    assert name == "response norm" or net[1].num_channels == len(kept)


def test_convnext_v2_of_timm_loses_channels_of_its_response_norms():
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)).eval()
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            nn.init.normal_(parameter)
    plan = plan_pruning(model, (1, 3, 32, 32), "l1", macs=0.5)
    assert any(plan.widths[name][1] < plan.widths[name][0] for name in plan.widths if name.endswith("fc1"))
    assert apply_plan(model, plan).max_rel_error < 1e-9
