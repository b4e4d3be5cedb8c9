"""Dilation in the place of strides: every 2nd or 4th pixel of the dense map is the strided network's."""

import pytest
import timm
import torch

import rep_plugin
from rep_plugin.backbones.mobileone import MobileOne
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.backbones.replknet import RepLKNet
from rep_plugin.backbones.repvgg import RepVGG
from rep_plugin.backbones.staged import plan_steps
from rep_plugin.blocks.annealed import set_alpha_
from rep_plugin.measure.verify import FastDepthwise
from tests.helpers import randomise_bn_, relative_error

X = torch.randn(1, 3, 75, 66, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Widths of 64, 128 and 256: stages that keep theirs, whose first block would grow an identity branch at stride 1.
LEVEL = dict(depths=(1, 2, 2, 1), widths=(0.25, 0.125, 0.0625, 0.0625))
LARGE = dict(channels=(8, 8, 16, 16), kernels=(7, 5, 7, 5), depths=(1, 1, 2, 1), small_kernel=3)
NETS = {
    "repvgg": (RepVGG, dict(arch=LEVEL)),
    "repvgg-quantisable": (RepVGG, dict(arch=LEVEL | dict(groups=2), post_bn=True)),
    "mobileone": (MobileOne, dict(arch=LEVEL | dict(copies=2))),
    "replknet": (RepLKNet, dict(arch=LARGE)),
    "mbv2": (RepMobileNetV2, dict(widen_factor=0.1, branches=("bottleneck", "identity", "conv3x3", "conv1x1"))),
    "mbv2-average": (RepMobileNetV2, dict(widen_factor=0.1, avg_shortcut=True, last_kernel=3)),
    "mbv2-pools": (RepMobileNetV2, dict(widen_factor=0.1, branches=("avgpool", "identity"))),
}
FORMS = ("train", "deploy", "online")


def build(kind, options, **changes):
    torch.manual_seed(0)
    maps = range(8 if kind is RepMobileNetV2 else 4)
    return randomise_bn_(kind(out_indices=tuple(maps), **options, **changes)).double().eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [4, 8, 16])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_other_pixel_is_the_strided_networks(name, limit, form):
    kind, options = NETS[name]
    if form == "online" and options.get("post_bn"):
        form = "train"
    changes = {} if form == "train" else {form: True}
    strided, dense = build(kind, options, **changes), build(kind, options, **changes, output_stride=limit)
    dense.load_state_dict(strided.state_dict())
    assert dense.reductions == [min(r, limit) for r in strided.reductions] != strided.reductions
    with FastDepthwise():
        for few, many, before, after in zip(strided(X), dense(X), strided.reductions, dense.reductions, strict=True):
            step = before // after
            assert many.shape[2:] == tuple(-(-side // after) for side in X.shape[2:])
            assert relative_error(few, many[:, :, ::step, ::step]) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_merged_is_what_deploy_builds(name):
    kind, options = NETS[name]
    model = build(kind, options, output_stride=8)
    merged, report = rep_plugin.reparameterize(model, X.float())
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    deployed = build(kind, options, output_stride=8, deploy=True)
    deployed.load_state_dict(merged.state_dict())
    with torch.no_grad(), FastDepthwise():
        assert relative_error(model(X)[-1], deployed(X)[-1]) < 1e-9


@torch.no_grad()
def test_annealed_form():
    options = dict(widen_factor=0.1, anneal=True)
    strided, dense = (build(RepMobileNetV2, options, output_stride=limit) for limit in (None, 8))
    for alpha in (0.0, 0.5, 1.0):
        set_alpha_(strided, alpha), dense.load_state_dict(strided.state_dict())
        assert relative_error(strided(X)[-1], dense(X)[-1][:, :, ::4, ::4]) < 1e-12


@pytest.mark.parametrize("kind", [RepVGG, MobileOne, RepMobileNetV2, RepLKNet])
@pytest.mark.parametrize("limit", [0, 2.5, 3, -8, "8", 1024])
def test_other_numbers_are_refused(kind, limit):
    with pytest.raises(ValueError, match=rf"output_stride must be (one of .*4, 8, 16, |a whole number).*got {limit!r}"):
        kind(output_stride=limit)


def test_steps_follow_each_other():
    steps = plan_steps((2, 1, 2, 2, 2, 1, 2, 1), 8)
    assert [step.stride for step in steps] == [1, 2, 2, 1, 1, 1, 1]
    assert [(step.first_dilation, step.dilation) for step in steps] == [
        (1, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4)
    ]  # fmt: skip
    assert [step.unstrided for step in steps] == [False] * 3 + [True, False, True, False]


@pytest.mark.parametrize("name", ["rep_mobilenetv2_035", "rep_repvgg_a0", "rep_mobileone_s0", "rep_replknet_31b"])
def test_features_are_as_many_as_without(name):
    options = {
        "rep_repvgg_a0": dict(arch=LEVEL),
        "rep_mobileone_s0": dict(arch=LEVEL),
        "rep_replknet_31b": dict(arch=LARGE),
    }
    options = dict(options.get(name, {}), features_only=True)
    strided, dense = timm.create_model(name, **options), timm.create_model(name, **options, output_stride=8)
    assert dense.feature_info.channels() == strided.feature_info.channels()
    assert dense.feature_info.module_name() == strided.feature_info.module_name()
    assert dense.feature_info.reduction() == [min(r, 8) for r in strided.feature_info.reduction()]
    maps = dense.eval()(X.float())
    assert [m.shape[1] for m in maps] == dense.feature_info.channels()


def test_pruned_and_merged():
    """Channels leave dilated blocks as they leave others."""
    model = randomise_bn_(RepMobileNetV2(widen_factor=0.25, output_stride=8)).eval()
    plan = rep_plugin.plan_pruning(model, X.float(), scores="l1", prune_fraction=0.3)
    report = rep_plugin.apply_plan(model, plan)
    assert report.macs_after < 0.8 * report.macs_before and report.max_rel_error < 1e-9
    assert rep_plugin.reparameterize(model, X.float())[1].max_rel_error < 1e-9
