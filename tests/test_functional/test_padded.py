"""Padded convolutions composed and added, against the layers run one after the other, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rep_plugin.functional.kernels import ConvParams
from rep_plugin.functional.padded import PaddedConv, add_padded, compose_padded, scale_padded
from tests.helpers import relative_error


def run(conv: PaddedConv, x: torch.Tensor) -> torch.Tensor:
    """A padded convolution as its docstring says it."""
    p, (ph, pw) = conv.params, conv.padding
    padded = F.pad(x, (pw, pw, ph, ph))
    out = F.conv2d(padded, p.kernel, p.bias, p.stride, 0, p.dilation, p.groups)
    if conv.edge is not None:
        ones = F.pad(torch.ones_like(x[:1, :1]), (pw, pw, ph, ph))
        out = out + F.conv2d(ones, conv.edge, None, p.stride, 0, p.dilation)
    return out


def random_conv(c_in, c_out, k=(1, 1), padding=(0, 0), groups=1, stride=(1, 1), dilation=(1, 1)) -> PaddedConv:
    kernel = torch.randn(c_out, c_in // groups, *k, dtype=torch.float64)
    return PaddedConv(ConvParams(kernel, torch.randn(c_out).double(), groups, stride, dilation), padding)


sides = st.sampled_from([1, 2, 3, 5])
steps = st.sampled_from([1, 2])


@settings(max_examples=40, deadline=None)
@given(
    k=st.tuples(sides, sides),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=st.tuples(steps, steps),
    dilation=st.tuples(steps, steps),
    first_stride=st.tuples(steps, steps),
    groups=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(17, 20), st.integers(17, 20)),
    seed=st.integers(0, 999),
)
def test_pointwise_window_pointwise(k, padding, stride, dilation, first_stride, groups, size, seed):
    """1x1 with bias, any window that pads for itself, 1x1: exact to the border, whatever the geometry."""
    torch.manual_seed(seed)
    layers = [
        random_conv(4, 8, stride=first_stride),
        random_conv(8, 8, k, padding, groups, stride, dilation),
        random_conv(8, 6, groups=2),
    ]
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = run(layers[2], run(layers[1], run(layers[0], x)))
    assert relative_error(expected, run(compose_padded(compose_padded(layers[0], layers[1]), layers[2]), x)) < 1e-12
    assert relative_error(expected, run(compose_padded(layers[0], compose_padded(layers[1], layers[2])), x)) < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 4), (7, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_separable_windows_that_pad_one_axis_each(size, stride):
    """1x1, 1x5, 5x1, 1x1, each with a bias, on maps smaller than the window too."""
    layers = [
        random_conv(3, 4),
        random_conv(4, 4, (1, 5), (0, 2), 4),
        random_conv(4, 4, (5, 1), (2, 0), 4, (stride, stride)),
        random_conv(4, 5),
    ]
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, merged = x, layers[0]
    for layer in layers:
        expected = run(layer, expected)
    for layer in layers[1:]:
        merged = compose_padded(merged, layer)
    assert merged.padding == (2, 2) and merged.edge is not None
    assert relative_error(expected, run(merged, x)) < 1e-12


def test_padding_the_head_alone_would_be_wrong():
    """The edge matters: without it the border, and only the border, is off."""
    merged = compose_padded(random_conv(3, 4), random_conv(4, 5, (3, 3), (1, 1)))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    inside = merged.edge.sum((1, 2, 3))
    naive = merged._replace(edge=None, params=merged.params._replace(bias=merged.params.bias + inside))
    gap = (run(merged, x) - run(naive, x)).abs()
    assert gap[:, :, 1:-1, 1:-1].max() < 1e-12 and gap.max() > 0.1


def test_no_ring_where_none_is_needed():
    no_bias = random_conv(3, 4)
    no_bias = no_bias._replace(params=no_bias.params._replace(bias=torch.zeros(4).double()))
    assert compose_padded(no_bias, random_conv(4, 5, (3, 3), (1, 1))).edge is None
    assert compose_padded(random_conv(3, 4), random_conv(4, 5, (3, 3))).edge is None
    assert compose_padded(random_conv(3, 4, (3, 3), (1, 1)), random_conv(4, 5)).edge is None


def test_two_windows_that_both_pad_are_refused():
    with pytest.raises(ValueError, match=r"pads its height by 1.*not one convolution"):
        compose_padded(random_conv(3, 4, (3, 3), (1, 1)), random_conv(4, 4, (3, 3), (1, 1)))
    with pytest.raises(ValueError, match=r"side 3 with padding 0 cannot be placed before a second padding"):
        compose_padded(random_conv(3, 4, (1, 3)), random_conv(4, 4, (3, 1), (1, 0)))


@pytest.mark.parametrize("stride", [1, 2])
def test_sums_of_every_kind(stride):
    """Unequal windows, groups and dilations, a crop, an edge, a scale."""
    s = (stride, stride)
    convs = [
        random_conv(4, 4, (5, 5), (2, 2), 1, s),
        random_conv(4, 4, (3, 3), (2, 2), 4, s, (2, 2)),
        random_conv(4, 4, (1, 3), (0, 1), 2, s),
        random_conv(4, 4, (1, 1), (0, 0), 1, s),
        compose_padded(random_conv(4, 4), random_conv(4, 4, (3, 3), (1, 1), 1, s)),
    ]
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    factor = torch.randn(4).double()
    expected = sum(run(conv, x) for conv in convs) * factor.view(1, -1, 1, 1)
    merged = scale_padded(add_padded(convs), factor)
    assert relative_error(expected, run(merged, x)) < 1e-12
    cropped, window = random_conv(4, 4, (1, 1), (-1, -1), 1, s), random_conv(4, 4, (3, 3), (0, 0), 1, s)
    assert relative_error(run(cropped, x) + run(window, x), run(add_padded([cropped, window]), x)) < 1e-12


def test_equal_dilations_are_kept():
    convs = [random_conv(4, 4, (3, 3), (2, 2), 1, (1, 1), (2, 2)), random_conv(4, 4)]
    assert add_padded(convs).params.dilation == (2, 2) and add_padded(convs).kernel_size == (3, 3)


def test_sums_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one convolution"):
        add_padded([])
    with pytest.raises(ValueError, match="must agree, got strides"):
        add_padded([random_conv(4, 4), random_conv(4, 4, stride=(2, 2))])
    with pytest.raises(ValueError, match="is not centred"):
        add_padded([random_conv(4, 4, (3, 3), (1, 1)), random_conv(4, 4, padding=(1, 1))])
