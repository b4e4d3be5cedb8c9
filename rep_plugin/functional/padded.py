"""Algebra of zero-padded convolutions that were trained as such: the padding lies anywhere in the sequence.

In a stock network every convolution pads for itself: ``1x1(-BN) -> KxK(pad)`` pads zeros *behind* the 1x1's bias, so that
the merged kernel, padded at its head, would answer to that bias where the network sees zeros. The missing part depends on
the position alone: it is what a kernel ``edge`` answers to a zero-padded map of ones. So ``(kernel, bias, edge)`` is
closed under composition and addition, and exact at every border, size, stride and dilation. Derived here; it has DBB's
padding with running statistics (Ding et al., CVPR 2021) as the case in which the edge cancels.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from rep_plugin.arguments import That
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import Bias, ConvParams, Kernel, compose, dilate_kernel, pad_kernel, regroup_kernel

Biased = Annotated[ConvParams, That(lambda conv: conv.bias is not None, "a ConvParams with a bias")]


class PaddedConv(NamedTuple):
    """A convolution with its own zero padding and an optional position-dependent bias.

    Args:
        params: the convolution.
        padding: rows and columns of zeros; negative ones crop the map.
        edge: kernel (O, 1, kh, kw) of the same geometry, whose answer to a zero-padded map of ones is added to the output;
            None: 0.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams, PaddedConv
        >>> PaddedConv(ConvParams(torch.ones(4, 2, 3, 3), torch.zeros(4)), padding=(1, 1)).kernel_size
        (3, 3)
    """

    params: Biased
    padding: tuple[int, int] = (0, 0)
    edge: Kernel | None = None

    @property
    def kernel_size(self) -> tuple[int, int]:
        height, width = self.params.kernel.shape[2:]
        return height, width


def _has_own_edge(conv: PaddedConv) -> bool:
    return conv.edge is None or conv.edge.shape == (conv.params.out_channels, 1, *conv.kernel_size)


Padded = Annotated[PaddedConv, That(_has_own_edge, "a PaddedConv with an edge (O, 1, kh, kw), the size of its kernel")]


def _constant_edge(conv: PaddedConv, value: Tensor, axes: Sequence[bool]) -> Tensor:
    """A 1-channel kernel of ``conv``'s size that answers ``value`` (O,) wherever a centre tap lies inside the map.

    Raises ArgumentError on an axis of ``axes`` whose centre tap may lie outside.
    """
    kernel_size, dilation = conv.kernel_size, conv.params.dilation
    for side, d, padding, needed in zip(kernel_size, dilation, conv.padding, axes):
        if needed and (side % 2 == 0 or 2 * padding != d * (side - 1)):
            raise ArgumentError(
                f"a bias behind a window of side {side} with padding {padding} cannot be placed before a second padding: "
                f"'same' padding (={d * (side - 1) // 2}) is needed"
            )
    edge = value.new_zeros(value.numel(), 1, *kernel_size)
    edge[:, 0, (kernel_size[0] - 1) // 2, (kernel_size[1] - 1) // 2] = value
    return edge


def compose_padded(first: Padded, second: Padded) -> PaddedConv:
    """Return the one padded convolution equal to ``second(first(x))``, each padding zeros for itself.

    Args:
        first, second: the convolutions, each with a bias.

    Returns:
        The composed convolution, with a bias.

    Raises:
        ArgumentError: the channels do not fit, or ``second`` pads an axis on which ``first`` has a window or a padding of its
            own: that pair is no convolution at the border.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams, PaddedConv, compose_padded
        >>> point = PaddedConv(ConvParams(torch.ones(4, 2, 1, 1), torch.ones(4)))
        >>> window = PaddedConv(ConvParams(torch.ones(3, 4, 3, 3), torch.zeros(3)), padding=(1, 1))
        >>> compose_padded(point, window).edge.shape
        torch.Size([3, 1, 3, 3])
    """
    padding = []
    for axis, name in enumerate(("height", "width")):
        inner, outer = first.padding[axis], second.padding[axis]
        if outer != 0 and (inner != 0 or first.kernel_size[axis] != 1):
            raise ArgumentError(
                f"the map between a window of {first.kernel_size} (padding {first.padding}) and one that pads its "
                f"{name} by {outer} is cut off at the border: the two are not one convolution"
            )
        padding.append(inner + outer * first.params.stride[axis])
    if not any(second.padding) and first.edge is None:
        return PaddedConv(compose(first.params, second.params), (padding[0], padding[1]))
    # What reaches `second` besides the kernel's answer is a map of constants, cut off where `second` pads.
    no_bias = first.params._replace(bias=torch.zeros_like(first.params.bias))
    merged = PaddedConv(compose(no_bias, second.params), (padding[0], padding[1]))
    constant = first.params.bias
    if not constant.any() and first.edge is None:
        return merged
    edge = first.params.kernel.new_zeros(first.params.out_channels, 1, *first.kernel_size)
    if any(second.padding):
        windows = [side != 1 or p != 0 for side, p in zip(first.kernel_size, first.padding)]
        edge = edge + _constant_edge(first, constant, windows)
        constant = torch.zeros_like(constant)
    if first.edge is not None:
        edge = edge + first.edge
    as_conv = ConvParams(edge, constant, 1, first.params.stride, first.params.dilation)
    through = compose(as_conv, second.params._replace(bias=torch.zeros_like(second.params.bias)))
    kernel, bias = through.kernel, through.bias + merged.params.bias
    if not any(padding):  # nothing is cut off: the edge is a constant
        return PaddedConv(merged.params._replace(bias=bias + kernel.sum((1, 2, 3))))
    return PaddedConv(merged.params._replace(bias=bias), merged.padding, kernel)


def _written_out(conv: PaddedConv, axis: int) -> PaddedConv:
    """The same convolution without dilation along one axis."""
    steps, rest = [1, 1], list(conv.params.dilation)
    steps[axis], rest[axis] = rest[axis], 1
    edge = None if conv.edge is None else dilate_kernel(conv.edge, steps)
    kernel = dilate_kernel(conv.params.kernel, steps)
    return conv._replace(params=conv.params._replace(kernel=kernel, dilation=(rest[0], rest[1])), edge=edge)


def add_padded(convs: Sequence[Padded]) -> PaddedConv:
    """Return the one padded convolution equal to the sum of parallel ones, centred on each other by their padding.

    Unequal dilations are written out with zeros, unequal groups with fewer groups.

    Raises:
        ArgumentError: an empty list, unequal strides or channels, or windows that are not centred on each other.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams, PaddedConv, add_padded
        >>> point = PaddedConv(ConvParams(torch.ones(2, 2, 1, 1), torch.ones(2)))
        >>> window = PaddedConv(ConvParams(torch.ones(2, 2, 3, 3), torch.zeros(2)), padding=(1, 1))
        >>> add_padded([point, window]).params.kernel[0, 0].tolist()
        [[1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if not convs:
        raise ArgumentError("a sum needs at least one convolution, got none")
    strides = {conv.params.stride for conv in convs}
    channels = {(conv.params.in_channels, conv.params.out_channels) for conv in convs}
    if len(strides) > 1 or len(channels) > 1:
        raise ArgumentError(
            f"parallel layers must agree, got strides {sorted(strides)} and channels {sorted(channels)}"
        )
    dilation = [1, 1]
    for axis in (0, 1):  # a side of 1 has no dilation of its own
        dilations = {conv.params.dilation[axis] for conv in convs if conv.kernel_size[axis] > 1}
        if len(dilations) > 1:
            convs = [_written_out(conv, axis) for conv in convs]
        elif dilations:
            dilation[axis] = dilations.pop()
    size = tuple(max(conv.kernel_size[axis] for conv in convs) for axis in (0, 1))
    padding = tuple(next(c.padding[axis] for c in convs if c.kernel_size[axis] == size[axis]) for axis in (0, 1))
    groups = math.gcd(*(conv.params.groups for conv in convs))
    for conv in convs:
        for side, p, whole, want, d in zip(conv.kernel_size, conv.padding, size, padding, dilation):
            if 2 * (want - p) != d * (whole - side):
                raise ArgumentError(
                    f"a window of {conv.kernel_size} with padding {conv.padding} is not centred in one of {size} with "
                    f"padding {padding}"
                )
    widest = max(convs, key=lambda conv: conv.params.kernel.numel() * (conv.kernel_size == size))
    kernel = regroup_kernel(widest.params.kernel, widest.params.groups, groups)
    kernel = kernel.clone() if widest.kernel_size == size else pad_kernel(kernel, size)
    for conv in convs:  # added in place: no padded copies
        if conv is not widest:
            top, left = ((big - small) // 2 for big, small in zip(size, conv.kernel_size))
            part = kernel[:, :, top : top + conv.kernel_size[0], left : left + conv.kernel_size[1]]
            part += regroup_kernel(conv.params.kernel, conv.params.groups, groups)
    bias = torch.stack([conv.params.bias for conv in convs]).sum(0)
    edges = [pad_kernel(conv.edge, size) for conv in convs if conv.edge is not None]
    edge = torch.stack(edges).sum(0) if edges else None
    return PaddedConv(ConvParams(kernel, bias, groups, convs[0].params.stride, tuple(dilation)), padding, edge)


def scale_padded(conv: Padded, factor: Bias | float) -> PaddedConv:
    """Return the convolution whose output is multiplied by a factor.

    Args:
        conv: the convolution.
        factor: a number, or one for each channel (O,).

    Returns:
        Convolution of the same geometry.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams, PaddedConv, scale_padded
        >>> scale_padded(PaddedConv(ConvParams(torch.ones(1, 1, 1, 1), torch.ones(1))), 3.0).params.bias.tolist()
        [3.0]
    """
    outputs, device = conv.params.out_channels, conv.params.kernel.device
    if isinstance(factor, Tensor) and (factor.numel() not in (1, outputs) or factor.device != device):
        raise ArgumentError(
            f"factor must be a number or {outputs} of them on {device}, got shape {tuple(factor.shape)} on {factor.device}"
        )
    factor = torch.as_tensor(factor, dtype=conv.params.kernel.dtype, device=device).reshape(-1)
    each = factor.expand(outputs)
    params = conv.params._replace(kernel=conv.params.kernel * each.view(-1, 1, 1, 1), bias=conv.params.bias * each)
    return conv._replace(params=params, edge=None if conv.edge is None else conv.edge * each.view(-1, 1, 1, 1))
