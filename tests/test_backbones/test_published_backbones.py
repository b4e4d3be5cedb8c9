"""RepVGG, MobileOne and RepLKNet as plain modules."""

import pytest
import timm
import torch
from torch import nn

from rep_plugin import reparameterize
from rep_plugin.backbones.mobileone import ARCHS as MOBILEONES
from rep_plugin.backbones.mobileone import MobileOne
from rep_plugin.backbones.replknet import DropPath, RepLKNet
from rep_plugin.backbones.repvgg import ARCHS as REPVGGS
from rep_plugin.backbones.repvgg import RepVGG
from rep_plugin.blocks.base import RepBlock
from rep_plugin.measure.costs import count_params
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

LARGE = dict(channels=(8, 8, 16, 16), kernels=(13, 9, 7, 7), depths=(1, 1, 2, 1))
SMALL = {
    "RepVGG-A0": (RepVGG, {}),
    "RepVGG-A0-post-bn": (RepVGG, dict(post_bn=True)),
    "RepVGG-short-g4-se": (RepVGG, dict(arch=dict(depths=(2, 2, 2, 1), widths=(0.25,) * 4, groups=4, se=True))),
    "MobileOne-s0": (MobileOne, {}),
    "MobileOne-short-se": (MobileOne, dict(arch=dict(widths=(0.5,) * 4, depths=(1, 1, 2, 1), se_blocks=(0, 0, 1, 1)))),
    "RepLKNet-short": (RepLKNet, dict(arch=LARGE)),
    "RepLKNet-short-xl": (RepLKNet, dict(arch=dict(**LARGE, dw_ratio=1.5, small_kernel=0), norm_maps=False)),
}


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_deployed_network_equals_the_trained_one_at_every_stage(name, fold_bn):
    kind, options = SMALL[name]
    model = kind(out_indices=range(4), **options).double()
    x = torch.randn(2, 3, 65, 64, dtype=torch.float64)
    calibrate_random_bn_(model, x)
    merged, report = reparameterize(model, x, fold_bn=fold_bn)
    built = kind(out_indices=range(4), deploy=True, **options).double().eval()
    built.load_state_dict(merged.state_dict())
    with torch.no_grad():
        maps = model(x)
        for expected, got, again in zip(maps, merged(x), built(x)):
            assert relative_error(expected, got) < 1e-9 and torch.equal(got, again)
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    assert [y.shape[1] for y in maps] == model.out_channels
    assert [tuple(y.shape[2:]) for y in maps] == [(-(-65 // r), 64 // r) for r in model.reductions]


@pytest.mark.parametrize("name", SMALL)
def test_deployed_form_holds_plain_layers_and_trains(name):
    kind, options = SMALL[name]
    model = kind(deploy=True, **options)
    assert all(block.deployed for block in model.modules() if isinstance(block, RepBlock))
    kinds = {type(m) for m in model.modules() if not list(m.children())}
    assert kinds <= {nn.Conv2d, nn.ReLU, nn.GELU, nn.Identity, nn.BatchNorm2d, DropPath, nn.ModuleDict}
    model(torch.randn(2, 3, 64, 64))[0].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_are_counted_as_timm_does():
    networks = [(RepVGG, arch, f"repvgg_{arch.lower()}") for arch in REPVGGS]
    networks += [(MobileOne, arch, f"mobileone_{arch}") for arch in MOBILEONES]
    known = [entry for entry in networks if timm.is_model(entry[2])]
    assert {entry[1] for entry in networks} - {entry[1] for entry in known} == {"B1g2", "B2g2", "B3g2"}
    with torch.device("meta"):
        for kind, arch, name in known:
            assert count_params(kind(arch)) == count_params(timm.create_model(name, num_classes=0)), arch


@pytest.mark.parametrize(
    ("arch", "classifier", "published"),
    [("31B", 1025000, 79864168), ("31L", 1537000, 172671016), ("XL", 2049000, 335435752)],
)
def test_parameters_of_replknet_are_the_published_ones(arch, classifier, published):
    with torch.device("meta"):
        assert count_params(RepLKNet(arch)) + classifier == published
        assert count_params(RepLKNet(arch, small_kernel=3)) != count_params(RepLKNet(arch))


def test_every_second_layer_is_grouped():
    with torch.device("meta"):
        model = RepVGG("B1g4", deploy=True)
    assert [block.groups for stage in model.stages for block in stage] == [1, 4] * 13 + [1]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("deploy", [False, True])
def test_first_weights_count_the_groups(name, deploy):
    kind, options = SMALL[name]
    convs = [
        m for m in kind(deploy=deploy, **options).modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 1000
    ]
    assert len(convs) > 5 and (name.startswith("RepVGG-A0") or any(conv.groups > 1 for conv in convs))
    for conv in convs:
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1] / conv.groups
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
        assert conv.bias is None or not conv.bias.any()


def test_drop_path_keeps_the_mean_and_only_acts_in_training():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 1, 2, 2)
    y = drop(x)
    assert y.unique().allclose(torch.tensor([0, 4 / 3]))
    assert y.mean() == pytest.approx(1, abs=0.05) and (y.std(dim=(1, 2, 3)) == 0).all()
    assert drop.eval()(x) is x and DropPath(0.0)(x) is x
    rates = [m.rate for m in RepLKNet(LARGE, drop_path_rate=0.4).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_small_images_and_one_channel():
    for kind, options in ((RepVGG, {}), (MobileOne, {})):
        model = kind(in_channels=1, strides=(1, 1, 2, 2, 2), **options).eval()
        assert model(torch.zeros(2, 1, 28, 28))[0].shape[2:] == (4, 4) and model.reductions == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RepVGG, {"arch": "C9"}, "unknown arch 'C9' of RepVGG, expected one of A0, A1, "),
        (MobileOne, {"arch": 0}, "arch must be a string or a dict, got 0"),
        (RepLKNet, {"arch": dict(channel=8)}, "of RepLKNet: RepLKNetArch takes no 'channel', did you mean 'channels'"),
        (RepVGG, {"arch": dict(depths=(1,), widths=(1, 2))}, r"one value a stage .*\{'depths': 1, 'widths': 2\}"),
        (RepVGG, {"arch": dict(depths=(1, 0), widths=(1, 2))}, "depths.1. must be a whole number .*got 0"),
        (
            MobileOne,
            {"arch": dict(widths=(1,) * 4, se_blocks=(0, 0, 0, 2))},
            r"se_blocks must be 0 to .*\(0, 0, 0, 2\)",
        ),
        (RepVGG, {"out_indices": 3}, "out_indices must be a list of whole numbers, got 3"),
        (MobileOne, {"out_indices": (4,)}, r"out_indices must lie in 0..3, got 4"),
        (RepLKNet, {"in_channels": 0}, "in_channels must be a whole number in .*got 0"),
        (RepVGG, {"strides": (2, 2)}, r"strides must be 5 numbers of 1 or 2 .*got \(2, 2\)"),
        (RepLKNet, {"drop_path_rate": 1}, r"drop_path_rate must be a number in \[0, 1\), got 1"),
        (RepLKNet, {"arch": LARGE, "small_kernel": 4}, "needs odd kernel sides"),
        (RepLKNet, {"arch": LARGE, "small_kernel": 9}, r"branch 'small' of size \(9, 9\) cannot be centred"),
        (RepLKNet, {"keep_bn": True}, "keep_bn is a choice of the deployed form"),
        (
            RepVGG,
            {"arch": dict(depths=(1,), widths=(0.1,), se=True), "strides": (2, 2), "out_indices": (0,)},
            ">= ratio",
        ),
    ],
)
def test_bad_arguments_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        kind(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["RepVGG-short-g4-se", "MobileOne-short-se", "RepLKNet-short"])
def test_a_checkpoint_that_does_not_fit_is_refused_whole(name):
    kind, options = SMALL[name]
    model, other = kind(**options), kind(deploy=True, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"missing.*branches.*unexpected.*reparam_conv"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
