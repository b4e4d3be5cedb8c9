"""Algebra of zero-padded convolutions that were trained as such: the padding lies anywhere in the sequence.

In a stock network every convolution pads for itself: ``1x1(-BN) -> KxK(pad)`` pads zeros *behind* the 1x1's bias, so that
the merged kernel, padded at its head, would answer to that bias where the network sees zeros. The missing part depends on
the position alone: it is what a kernel ``ring`` answers to a zero-padded map of ones. So ``(kernel, bias, ring)`` is
closed under composition and addition, and exact at every border, size, stride and dilation. Derived here; it has DBB's
padding with running statistics (Ding et al., CVPR 2021) as the case in which the ring cancels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import ConvParams, compose, dilate_kernel, pad_kernel, regroup_kernel


class PaddedConv(NamedTuple):
    """A convolution with its own zero padding and an optional position-dependent bias.

    ``params`` as in :class:`ConvParams`; ``padding`` in pixels per axis (negative: the map is cropped); ``ring`` (O, 1,
    kh, kw): the kernel, of the same geometry, whose answer to a zero-padded map of ones is added to the output; None: 0.
    """

    params: ConvParams
    padding: tuple[int, int] = (0, 0)
    ring: Tensor | None = None

    @property
    def kernel_size(self) -> tuple[int, int]:
        return tuple(self.params.kernel.shape[2:])


def _constant_ring(conv: PaddedConv, value: Tensor, axes: Sequence[bool]) -> Tensor:
    """A 1-channel kernel of ``conv``'s size that answers ``value`` (O,) wherever a centre tap lies inside the map.

    Raises ValueError on an axis of ``axes`` whose centre tap may lie outside.
    """
    kernel_size, dilation = conv.kernel_size, conv.params.dilation
    for side, d, padding, needed in zip(kernel_size, dilation, conv.padding, axes):
        if needed and (side % 2 == 0 or 2 * padding != d * (side - 1)):
            raise ArgumentError(
                f"a bias behind a window of side {side} with padding {padding} cannot be placed before a second padding: "
                f"'same' padding (={d * (side - 1) // 2}) is needed"
            )
    ring = value.new_zeros(value.numel(), 1, *kernel_size)
    ring[:, 0, (kernel_size[0] - 1) // 2, (kernel_size[1] - 1) // 2] = value
    return ring


def compose_padded(first: PaddedConv, second: PaddedConv) -> PaddedConv:
    """Return the one padded convolution equal to ``second(first(x))``, each padding zeros for itself.

    Raises ValueError where the channels do not fit, or ``second`` pads an axis on which ``first`` has a window or a
    padding of its own: that pair is no convolution at the border.
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
    if not any(second.padding) and first.ring is None:
        return PaddedConv(compose(first.params, second.params), (padding[0], padding[1]))
    # What reaches `second` besides the kernel's answer is a map of constants, cut off where `second` pads.
    no_bias = first.params._replace(bias=torch.zeros_like(first.params.bias))
    merged = PaddedConv(compose(no_bias, second.params), (padding[0], padding[1]))
    constant = first.params.bias
    if not constant.any() and first.ring is None:
        return merged
    ring = first.params.kernel.new_zeros(first.params.out_channels, 1, *first.kernel_size)
    if any(second.padding):
        windows = [side != 1 or p != 0 for side, p in zip(first.kernel_size, first.padding)]
        ring = ring + _constant_ring(first, constant, windows)
        constant = torch.zeros_like(constant)
    if first.ring is not None:
        ring = ring + first.ring
    as_conv = ConvParams(ring, constant, 1, first.params.stride, first.params.dilation)
    through = compose(as_conv, second.params._replace(bias=torch.zeros_like(second.params.bias)))
    kernel, bias = through.kernel, through.bias + merged.params.bias
    if not any(padding):  # nothing is cut off: the ring is a constant
        return PaddedConv(merged.params._replace(bias=bias + kernel.sum((1, 2, 3))))
    return PaddedConv(merged.params._replace(bias=bias), merged.padding, kernel)


def _written_out(conv: PaddedConv, axis: int) -> PaddedConv:
    """The same convolution without dilation along one axis."""
    steps, rest = [1, 1], list(conv.params.dilation)
    steps[axis], rest[axis] = rest[axis], 1
    ring = None if conv.ring is None else dilate_kernel(conv.ring, steps)
    kernel = dilate_kernel(conv.params.kernel, steps)
    return conv._replace(params=conv.params._replace(kernel=kernel, dilation=(rest[0], rest[1])), ring=ring)


def add_padded(convs: Sequence[PaddedConv]) -> PaddedConv:
    """Return the one padded convolution equal to the sum of parallel ones, centred on each other by their padding.

    Unequal dilations are written out with zeros, unequal groups with fewer groups. Raises ValueError on an empty list,
    for unequal strides or channels, or where the windows are not centred on each other.
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
        found = {conv.params.dilation[axis] for conv in convs if conv.kernel_size[axis] > 1}
        if len(found) > 1:
            convs = [_written_out(conv, axis) for conv in convs]
        elif found:
            dilation[axis] = found.pop()
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
    whole = max(convs, key=lambda conv: conv.params.kernel.numel() * (conv.kernel_size == size))
    kernel = regroup_kernel(whole.params.kernel, whole.params.groups, groups)
    kernel = kernel.clone() if whole.kernel_size == size else pad_kernel(kernel, size)
    for conv in convs:  # added in place: no padded copies
        if conv is not whole:
            top, left = ((big - small) // 2 for big, small in zip(size, conv.kernel_size))
            part = kernel[:, :, top : top + conv.kernel_size[0], left : left + conv.kernel_size[1]]
            part += regroup_kernel(conv.params.kernel, conv.params.groups, groups)
    bias = torch.stack([conv.params.bias for conv in convs]).sum(0)
    rings = [pad_kernel(conv.ring, size) for conv in convs if conv.ring is not None]
    ring = torch.stack(rings).sum(0) if rings else None
    return PaddedConv(ConvParams(kernel, bias, groups, convs[0].params.stride, tuple(dilation)), padding, ring)


def scale_padded(conv: PaddedConv, factor: Tensor | float) -> PaddedConv:
    """Return the convolution whose output is multiplied by ``factor``: a number, or one for each channel (O,)."""
    factor = torch.as_tensor(factor, dtype=conv.params.kernel.dtype, device=conv.params.kernel.device).reshape(-1)
    each = factor.expand(conv.params.out_channels)
    params = conv.params._replace(kernel=conv.params.kernel * each.view(-1, 1, 1, 1), bias=conv.params.bias * each)
    return conv._replace(params=params, ring=None if conv.ring is None else conv.ring * each.view(-1, 1, 1, 1))
