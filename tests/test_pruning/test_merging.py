"""Pruning and merging in either order: the same function as the masked network's, merged."""

import copy

import pytest
import timm
import torch
from mmpretrain.models import build_classifier
from torch import nn

from rep_plugin import apply_plan, expand, plan_pruning, reparameterize
from rep_plugin.blocks.annealed import set_alpha_
from rep_plugin.blocks.conv_like import ConvLike
from rep_plugin.blocks.families import ACBlock, DiverseBranchBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.blocks.layers import NormedConv2d
from rep_plugin.errors import AnnealError, EquivalenceError
from rep_plugin.history import history_of
from rep_plugin.pruning import trace_channels
from rep_plugin.pruning.apply import kept_by
from rep_plugin.pruning.surgery import remove as gains
from rep_plugin.pruning.surgery.mask import mask_channels_
from rep_plugin.reparam.border_conv import BorderConv2d
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_pruning.nets import Call, ConvBN, Pooled, ready

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def classifier(backbone: str, arch: str, channels: int) -> nn.Module:
    head = dict(type="LinearClsHead", num_classes=5, in_channels=channels)
    neck, backbone = dict(type="GlobalAveragePooling"), dict(type=backbone, arch=arch)
    return build_classifier(dict(type="ImageClassifier", backbone=backbone, neck=neck, head=head))


NETWORKS = {
    **{
        name: lambda name=name: timm.create_model(name, num_classes=5)
        for name in ("rep_repvgg_a0", "rep_mobileone_s0", "rep_mobilenetv2_035", "repvgg_a0", "mobileone_s0")
    },
    "mmpretrain RepVGG": lambda: classifier("RepVGG", "A0", 1280),
    "mmpretrain MobileOne": lambda: classifier("MobileOne", "s0", 1024),
}


def masked_of(model: nn.Module, plan) -> nn.Module:
    """A float64 copy of the model in which what the plan removes is zero."""
    trace = trace_channels(model, plan.input_shape)
    return mask_channels_(copy.deepcopy(model).double(), trace, kept_by(plan, model, trace))


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, x: torch.Tensor = X) -> float:
    return relative_error(one(x.double()), other(x.double()))


@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_and_merging_change_places(name):
    model = NETWORKS[name]()
    model.eval()
    calibrate_random_bn_(model, torch.randn(4, 3, 32, 32)).double()
    merged, _ = reparameterize(model, X, fold_bn=False, verify=False)

    plan = plan_pruning(model, X, "random", 0.3)
    expected, _ = reparameterize(masked_of(model, plan), X, fold_bn=False, verify=False)
    pruned = copy.deepcopy(model)
    report = apply_plan(pruned, plan, example_input=X)
    got, _ = reparameterize(pruned, X, fold_bn=False, verify=False)
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    assert difference(expected, got) < 1e-9 and difference(merged, got) > 1e-3
    assert sum(p.numel() for p in got.parameters()) < 0.85 * sum(p.numel() for p in merged.parameters())
    assert [step["step"] for step in history_of(got)] == ["prune", "reparameterize"]

    plan = plan_pruning(merged, X, "random", 0.3)
    expected = masked_of(merged, plan)
    assert apply_plan(merged, plan, example_input=X).max_rel_error < 1e-9
    assert difference(expected, merged) < 1e-9


def online_net():
    return ready(
        RepVGGBlock(3, 8, act=nn.ReLU(), online=True),
        DiverseBranchBlock(8, 8, online=True),
        nn.Sigmoid(),  # half a map of a removed channel goes on: the next block's columns are masked
        ACBlock(8, 12, groups=2, online=True),
        MobileOneBlock(12, 12, groups=12, copies=2, online=True),
        RepInvertedResidual(12, 12, branches=("avgpool", "bottleneck", "identity"), online=True),
        Pooled(12),
    )


@pytest.mark.parametrize("method", ["_run_merged", "_run_branches"])
def test_online_blocks_keep_their_filters(method, monkeypatch):
    """The norm a filter is divided by runs over all inputs, those that go too."""
    pays = method == "_run_merged"
    monkeypatch.setattr("rep_plugin.blocks.base.RepBlock._merging_pays", lambda self, x: pays)
    net = online_net()
    gain, optimizer = net[1].branches["conv"].conv.gain, torch.optim.Adam(net.parameters(), 1e-3)
    net(X).sum().backward()
    optimizer.step()
    plan = plan_pruning(net, X, "l1", 0.4)
    masked = masked_of(net, plan)
    assert apply_plan(net, plan, optimizer).max_rel_error < 1e-9
    conv = net[1].branches["conv"].conv
    assert isinstance(conv, NormedConv2d) and conv.gain is gain
    assert optimizer.state[gain]["exp_avg"].shape == gain.shape == (plan.widths["1"][1],) != (8,)
    merged, report = reparameterize(net, X)
    assert report.max_rel_error < 1e-9 and difference(masked, copy.deepcopy(merged).double()) < 1e-5


def test_a_forgotten_gain_is_seen(monkeypatch):
    monkeypatch.setattr("rep_plugin.pruning.surgery.remove.keep_filters_", lambda *args: None)
    net = online_net()
    with pytest.raises(EquivalenceError, match="does not equal setting them to zero"):
        apply_plan(net, plan_pruning(net, X, "l1", 0.4))
    assert gains.measure_filters(net, trace_channels(net, X)).keys() >= {"1.branches.conv.conv"}


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_annealed_blocks(alpha):
    """Exact wherever the anneal stands; merged kernels, which l1 needs, are there at its end alone."""
    blocks = [RepInvertedResidual(3, 8, 2, anneal=True), RepInvertedResidual(8, 8, 1, 1, anneal=True)]
    net = ready(*blocks, RepInvertedResidual(8, 12, 2, anneal=True), Pooled(12))
    set_alpha_(net, alpha)
    plan = plan_pruning(net, X, "bn_gamma", 0.4)
    masked = masked_of(net, plan)
    assert apply_plan(net, plan).max_rel_error < 1e-9
    assert difference(masked, copy.deepcopy(net).double()) < 1e-9
    if alpha == 1:
        assert reparameterize(net, X)[1].max_rel_error < 1e-9
        assert plan_pruning(net, X, "l1", 0.4).units[1]
    else:
        with pytest.raises(AnnealError, match=f"alpha is {alpha}, expected 1"):
            plan_pruning(net, X, "l1", 0.4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("block", ["dbb", "acb", "repvgg", "mobileone"])
def test_expanded_models(block, trained):
    """Silent branches included: of gamma 0, until they are trained."""
    net = ready(ConvBN(3, 8), ConvBN(8, 16, groups=8), ConvBN(16, 8, groups=2), Pooled(8))
    net, _ = expand(net, block)
    net.eval()
    if trained:
        calibrate_random_bn_(net, torch.randn(4, 3, 13, 13))
    assert isinstance(net[0].conv, ConvLike)
    plan = plan_pruning(net, X, "l1", 0.4)
    masked = masked_of(net, plan)
    assert apply_plan(net, plan).max_rel_error < 1e-9 and net[0].conv.out_channels < 8
    merged, report = reparameterize(net, X, fold_bn=False)
    assert report.max_rel_error < 1e-9 and type(merged[0].conv) is nn.Conv2d
    assert difference(masked, copy.deepcopy(merged).double()) < 1e-5


def test_border_convolutions():
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)]
    net, _ = reparameterize(ready(*layers, *second, nn.ReLU(), Pooled(12)), X, merge_linear=True)
    convs = [module for module in net if isinstance(module, BorderConv2d)]
    assert len(convs) == 2
    plan = plan_pruning(net, X, "l1", 0.4)
    masked = masked_of(net, plan)
    assert apply_plan(net, plan).max_rel_error < 1e-9
    assert difference(masked, copy.deepcopy(net).double(), X[:, :, :9, :7]) < 1e-9
    assert [len(conv.ring) for conv in convs] == [conv.out_channels for conv in convs]
    assert convs[0].out_channels < 8 and convs[1].in_channels == convs[0].out_channels


def test_parametrized_weights_inside_a_block_freeze_their_channels():
    block = RepVGGBlock(8, 8)
    nn.utils.parametrizations.weight_norm(block.branches["conv"].conv)
    net = ready(ConvBN(3, 8), block, Call(torch.relu), ConvBN(8, 8), Pooled(8))
    plan = plan_pruning(net, X, "bn_gamma", 0.4)
    assert (
        "'1.branches.conv.conv', whose weight a parametrization computes" in plan.frozen["1"]
        and "0.conv" in plan.frozen
    )
    assert apply_plan(net, plan).max_rel_error < 1e-9 and plan.widths["3.conv"][1] < 8
