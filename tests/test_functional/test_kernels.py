"""The algebra against real convolutions, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rep_plugin.functional.kernels import (
    ConvParams,
    avgpool_kernel,
    compose,
    dilate_kernel,
    fold_bn,
    identity_kernel,
    merge_sum,
    pad_kernel,
    regroup_kernel,
    scale_kernel_inputs,
    sum_kernel_taps,
)
from tests.helpers import randomise_bn_, relative_error

F64 = {"dtype": torch.float64}
SIDES = st.sampled_from([1, 1, 2, 3, 4, 5])
GROUPS = st.sampled_from([1, 1, 2, 3, 6])


def run(conv: ConvParams, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, conv.kernel, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def random_conv(inputs: int, outputs: int, size, groups: int = 1, stride=(1, 1), dilation=(1, 1)) -> ConvParams:
    return ConvParams(
        torch.randn(outputs, inputs // groups, *size, **F64), torch.randn(outputs, **F64), groups, stride, dilation
    )


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(SIDES, SIDES, SIDES, SIDES),
    st.tuples(GROUPS, GROUPS),
    st.tuples(*[st.integers(1, 3)] * 4),
    st.tuples(*[st.integers(1, 2)] * 4),
    st.sampled_from([(6, 6, 6), (6, 12, 6), (12, 6, 12), (6, 6, 18)]),
    st.integers(0, 10**6),
)
def test_compose_equals_two_convolutions(sides, groups, dilations, strides, channels, seed):
    torch.manual_seed(seed)
    first = random_conv(channels[0], channels[1], sides[:2], groups[0], strides[:2], dilations[:2])
    second = random_conv(channels[1], channels[2], sides[2:], groups[1], strides[2:], dilations[2:])
    x = torch.randn(2, channels[0], 41, 38, **F64)
    merged = compose(first, second)
    assert merged.stride == (strides[0] * strides[2], strides[1] * strides[3])
    assert relative_error(run(second, run(first, x)), run(merged, x)) < 1e-12


def test_compose_keeps_depthwise_kernels_small():
    merged = compose(random_conv(6, 6, (3, 3), 6), random_conv(6, 6, (3, 3), 6))
    assert merged.groups == 6 and merged.kernel.shape == (6, 1, 5, 5)


def test_compose_refuses_channels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"outputs of the first convolution \(=6\).*\(=4\)"):
        compose(random_conv(3, 6, (1, 1)), random_conv(4, 6, (1, 1)))


def test_compose_has_the_right_gradient():
    first, second = random_conv(2, 4, (2, 3), 2), random_conv(4, 4, (3, 1), 4)
    bottleneck = random_conv(4, 3, (1, 1))

    def merged(k1, b1, k2, b2, k3, b3):
        chain = compose(compose(ConvParams(k1, b1, 2), ConvParams(k2, b2, 4)), ConvParams(k3, b3))
        return chain.kernel, chain.bias

    leaves = [t.requires_grad_() for conv in (first, second, bottleneck) for t in (conv.kernel, conv.bias)]
    assert torch.autograd.gradcheck(merged, leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_fold_bn_equals_conv_then_bn(bias, affine, kind):
    conv = nn.Conv2d(4, 6, (3, 2), groups=2, bias=bias, **F64)
    bn = randomise_bn_(kind(6, affine=affine, **F64)).eval()
    kernel, folded = fold_bn(conv.weight, bn, conv.bias)
    x = torch.randn(2, 4, 7, 8, **F64)
    expected = F.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    assert relative_error(expected, F.conv2d(x, kernel, folded, groups=2)) < 1e-13


def test_fold_bn_refuses_missing_statistics_and_wrong_widths():
    kernel = torch.randn(6, 4, 3, 3)
    with pytest.raises(ValueError, match="no running statistics"):
        fold_bn(kernel, nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"BN channels \(=5\).*outputs \(=6\)"):
        fold_bn(kernel, nn.BatchNorm2d(5))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_identity_kernel_copies(groups):
    x = torch.randn(2, 6, 5, 4, **F64)
    assert torch.equal(F.conv2d(x, identity_kernel(6, groups, **F64), groups=groups), x)
    with pytest.raises(ValueError, match=r"channels \(=6\).*groups \(=4\)"):
        identity_kernel(6, 4)


def test_avgpool_kernel_is_a_pool_that_counts_padding():
    x = torch.randn(2, 3, 7, 6, **F64)
    expected = F.avg_pool2d(x, 3, 2, 1, count_include_pad=True)
    got = F.conv2d(x, avgpool_kernel(3, (3, 3), **F64), stride=2, padding=1, groups=3)
    assert relative_error(expected, got) < 1e-14


def test_pad_kernel_keeps_the_function_and_refuses_what_has_no_centre():
    kernel, x = torch.randn(3, 2, 1, 3, **F64), torch.randn(1, 2, 6, 6, **F64)
    padded = pad_kernel(kernel, (3, 5))
    assert relative_error(F.conv2d(x, kernel, padding=(0, 1)), F.conv2d(x, padded, padding=(1, 2))) < 1e-14
    for size in [(2, 5), (3, 4), (1, 1)]:
        with pytest.raises(ValueError, match="cannot be centred"):
            pad_kernel(kernel, size)


@pytest.mark.parametrize(("groups", "new"), [(6, 1), (6, 2), (6, 3), (4, 2), (2, 2)])
def test_regroup_kernel_keeps_the_function(groups, new):
    kernel, x = torch.randn(12, 12 // groups, 3, 2, **F64), torch.randn(1, 12, 6, 6, **F64)
    wide = regroup_kernel(kernel, groups, new)
    assert wide.shape == (12, 12 // new, 3, 2)
    assert relative_error(F.conv2d(x, kernel, groups=groups), F.conv2d(x, wide, groups=new)) < 1e-14
    with pytest.raises(ValueError, match="multiple"):
        regroup_kernel(kernel, groups, groups + 1)


def test_dilate_kernel_writes_the_zeros_out():
    kernel, x = torch.randn(3, 2, 3, 2, **F64), torch.randn(1, 2, 11, 9, **F64)
    assert relative_error(F.conv2d(x, kernel, dilation=(3, 2)), F.conv2d(x, dilate_kernel(kernel, (3, 2)))) < 1e-14


@pytest.mark.parametrize("groups", [1, 3])
def test_constant_maps_and_scaled_inputs(groups):
    kernel, value = torch.randn(6, 9 // groups, 3, 3, **F64), torch.randn(9, **F64)
    x = torch.randn(1, 9, 5, 5, **F64)
    constant = value.view(1, -1, 1, 1).expand(1, 9, 3, 3)
    assert (
        relative_error(F.conv2d(constant, kernel, groups=groups).flatten(), sum_kernel_taps(kernel, groups, value))
        < 1e-13
    )
    scaled = F.conv2d(x * value.view(1, -1, 1, 1), kernel, groups=groups)
    assert relative_error(scaled, F.conv2d(x, scale_kernel_inputs(kernel, groups, value), groups=groups)) < 1e-13


def test_merge_sum_adds_centred_kernels():
    sizes = [(3, 3), (1, 1), (3, 1), (5, 3)]
    parts = [(torch.randn(4, 2, *size, **F64), torch.randn(4, **F64)) for size in sizes]
    x = torch.randn(2, 2, 8, 7, **F64)
    expected = sum(F.conv2d(x, k, b, padding=(k.shape[2] // 2, k.shape[3] // 2)) for k, b in parts)
    kernel, bias = merge_sum(parts)
    assert relative_error(expected, F.conv2d(x, kernel, bias, padding=(2, 1))) < 1e-13


def test_merge_sum_refuses_nothing_and_unequal_channels():
    with pytest.raises(ValueError, match="got none"):
        merge_sum([])
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 3\)"):
        merge_sum([(torch.randn(4, 2, 1, 1), torch.zeros(4)), (torch.randn(4, 3, 1, 1), torch.zeros(4))])
