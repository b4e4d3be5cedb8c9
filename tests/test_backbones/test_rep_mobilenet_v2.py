"""Rep-MobileNetV2 as a plain module."""

import pytest
import torch
from torch import nn

from rep_plugin import reparameterize
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2, make_divisible
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

ALL_BRANCHES = ("bottleneck", "identity", "avgpool", "conv1x1", "conv3x3")


@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize(
    "options", [{}, {"branches": ALL_BRANCHES, "avg_shortcut": True, "last_kernel": 3, "act": "prelu"}]
)
def test_deployed_network_equals_the_trained_one_at_every_stage(size, options):
    model = RepMobileNetV2(0.35, out_indices=range(8), **options).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    calibrate_random_bn_(model, x)
    merged, report = reparameterize(model, x)
    for expected, got in zip(model(x), merged(x)):
        assert relative_error(expected, got) < 1e-10
    assert report.max_rel_error < 1e-10 and report.sensitivity > 1e-3


def test_deployed_form_is_plain_convolutions():
    merged, _ = reparameterize(calibrate_random_bn_(RepMobileNetV2(0.35), torch.randn(4, 3, 64, 64)))
    leaves = [m for m in merged.modules() if not list(m.children())]
    convs = [m for m in leaves if isinstance(m, nn.Conv2d)]
    assert {type(m) for m in leaves} == {nn.Conv2d, nn.ReLU6}
    assert [conv.kernel_size for conv in convs] == [(3, 3)] * 18 + [(1, 1)] and all(conv.groups == 1 for conv in convs)
    built = RepMobileNetV2(0.35, deploy=True)
    built.load_state_dict(merged.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(built.eval()(x)[0], merged(x)[0])


def test_costs_at_width_one():
    model = RepMobileNetV2(deploy=True)
    classifier = 1280 * 1000 + 1000
    assert count_params(model) + classifier <= 3.2e6
    assert count_macs(model, torch.zeros(1, 3, 224, 224)) + 1280 * 1000 <= 262e6


def test_maps_have_mobilenet_v2_shapes():
    model = RepMobileNetV2(out_indices=range(8)).eval()
    shapes = [tuple(y.shape[1:]) for y in model(torch.zeros(1, 3, 64, 64))]
    assert shapes == [
        (16, 32, 32), (24, 16, 16), (32, 8, 8), (64, 4, 4), (96, 4, 4), (160, 2, 2), (320, 2, 2), (1280, 2, 2)
    ]  # fmt: skip
    assert model.out_channels == [s[0] for s in shapes] and model.reductions == [64 // s[1] for s in shapes]


def test_small_images_and_one_channel():
    model = RepMobileNetV2(0.5, in_channels=1, strides=(1, 1, 2, 2, 2, 1, 2, 1)).eval()
    assert model(torch.zeros(2, 1, 28, 28))[0].shape == (2, 1280, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widen_factor": 0}, r"widen_factor must be a number .*got 0"),
        ({"widen_factor": float("inf")}, r"widen_factor must be .*got inf"),
        ({"branches": "identity"}, r"branches must be a list of .*got 'identity': write \['identity'\]"),
        ({"out_indices": 7}, "out_indices must be a list of whole numbers, got 7"),
        ({"in_channels": 0}, "in_channels must be a whole number in .*got 0"),
        ({"strides": (2, 1, 2)}, r"strides must be 8 numbers of 1 or 2 .*got \(2, 1, 2\)"),
        ({"strides": (3,) * 8}, "strides.0. must be a whole number in .1, 2., got 3"),
        ({"out_indices": (7, 8)}, r"out_indices must lie in 0..7, got 8"),
        ({"last_kernel": 5}, "last_kernel must be one of 1, 3, got 5"),
        ({"branches": ("linear",)}, "branches.0. must be one of .*got 'linear'"),
        ({"act": "tanh"}, "act must be one of .*got 'tanh'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RepMobileNetV2(**options)


def test_a_checkpoint_that_does_not_fit_is_refused_whole():
    model, other = RepMobileNetV2(0.35), RepMobileNetV2(0.35, deploy=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"missing.*stem.branches.conv.conv.weight.*unexpected.*stem.reparam_conv.weight"
    ):
        model.load_state_dict(other.state_dict())
    wide = RepMobileNetV2(0.5).state_dict()
    with pytest.raises(RuntimeError, match=r"another shape.*stages"):
        model.load_state_dict(wide)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.load_state_dict(other.state_dict(), strict=False).missing_keys


def test_make_divisible_follows_mobilenet():
    assert [make_divisible(c * w) for c, w in [(32, 0.35), (16, 0.35), (24, 0.75), (320, 1.4)]] == [16, 8, 24, 448]
