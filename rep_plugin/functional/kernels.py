"""Algebra of convolution kernels: everything that lets linear branches become one convolution.

Pure tensor functions: no modules are changed, no state is kept, and all of it is differentiable. Kernels are
``(O, I / groups, kh, kw)`` as in ``torch.nn.functional.conv2d``; biases are ``(O,)``.

Sources: Ding et al., "RepVGG" (CVPR 2021) and "Diverse Branch Block" (CVPR 2021, transforms I to VI). The composition of
strided, dilated and grouped convolutions is derived here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Dims, Side, That
from rep_plugin.errors import ArgumentError

Kernel = Annotated[Tensor, Dims("(O, I / groups, kh, kw)")]
Bias = Annotated[Tensor, Dims("(O,)")]
Inputs = Annotated[Tensor, Dims("(I,)")]
BatchNorm = Annotated[nn.Module, That(lambda module: hasattr(module, "running_mean"), "a batch norm")]


class ConvParams(NamedTuple):
    """One zero-padded convolution as plain tensors.

    Args:
        kernel: (O, I / groups, kh, kw).
        bias: (O,); None: 0.
        groups: groups of the convolution.
        stride: pixels per axis.
        dilation: distance in pixels between two taps, per axis.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams
        >>> ConvParams(torch.ones(6, 2, 3, 3), None, groups=2).in_channels
        4
    """

    kernel: Kernel
    bias: Bias | None
    groups: Channels = 1
    stride: tuple[Side, Side] = (1, 1)
    dilation: tuple[Side, Side] = (1, 1)

    @property
    def in_channels(self) -> int:
        return self.kernel.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.kernel.shape[0]

    @property
    def is_diagonal(self) -> bool:
        """True where channel i of the output depends on channel i of the input alone."""
        return self.groups == self.out_channels and self.kernel.shape[1] == 1


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return (value, value) for a number, and the two numbers of a sequence, as torch's 2-d layers read them.

    Example:
        >>> from rep_plugin.functional import pair
        >>> pair(3), pair([1, 2])
        ((3, 3), (1, 2))
    """
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def autocast_enabled(device: torch.device) -> bool:
    """Return True where autocast is on for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast: a merge in half precision would cost 2.3 times the accuracy.

    It is entered only where that changes something: exporters stumble over it, and the meta device has none.
    """
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def plain_ops() -> bool:
    """Return True where autograd functions of our own must not be used.

    A graph is recorded for another runtime, which does not know them; or there is no gradient, and they are only in the way.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or not torch.is_grad_enabled()


def bn_scale_shift(bn: BatchNorm, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the scale and shift of a BN in eval mode: ``bn(x) == x * scale + shift``.

    Args:
        bn: BatchNorm or SyncBatchNorm, affine or not.
        dtype: type to compute in (default: the statistics' own).

    Returns:
        ``(scale (C,), shift (C,))``.

    Raises:
        ArgumentError: the layer keeps no running statistics, so that it is no affine map.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import bn_scale_shift
        >>> bn, x = torch.nn.BatchNorm2d(2).eval(), torch.ones(1, 2, 3, 3)
        >>> scale, shift = bn_scale_shift(bn)
        >>> torch.allclose(bn(x), x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
        True
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ArgumentError(f"{type(bn).__name__}({bn.num_features}) keeps no running statistics and cannot be folded")
    dtype = dtype or bn.running_var.dtype
    mean, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    return scale, shift


def fold_bn(kernel: Kernel, bn: BatchNorm, bias: Bias | None = None) -> tuple[Tensor, Tensor]:
    """Return the one convolution equal to ``bn(conv(x))`` in eval mode, in the kernel's dtype.

    Pass float64 and cast the result: folding in half precision loses 2.3 times more.

    Args:
        kernel: (O, I / groups, kh, kw).
        bn: BatchNorm or SyncBatchNorm of O channels.
        bias: (O,); None: 0.

    Returns:
        ``(kernel, bias)``.

    Raises:
        ArgumentError: the channels differ, or the BN keeps no running statistics.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import fold_bn
        >>> kernel, bias = fold_bn(torch.ones(2, 4, 3, 3), torch.nn.BatchNorm2d(2))
        >>> kernel.shape, bias.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([2]))
    """
    if bn.num_features != kernel.shape[0]:
        raise ArgumentError(f"BN channels (={bn.num_features}) must equal the kernel's outputs (={kernel.shape[0]})")
    scale, shift = bn_scale_shift(bn, kernel.dtype)
    if scale.device != kernel.device:
        raise ArgumentError(f"bn must be on the kernel's device, {kernel.device}, got {scale.device}")
    folded = shift if bias is None else shift + bias * scale
    return kernel * scale.view(-1, 1, 1, 1), folded


def identity_kernel(channels: Channels, groups: Channels = 1, **tensor_options) -> Tensor:
    """Return the kernel that copies its input.

    Args:
        channels: inputs and outputs.
        groups: groups of the convolution.
        tensor_options: ``dtype``, ``device``.

    Returns:
        (channels, channels / groups, 1, 1).

    Raises:
        ArgumentError: ``groups`` does not divide ``channels``.

    Example:
        >>> from rep_plugin.functional import identity_kernel
        >>> identity_kernel(2).flatten().tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    if channels % groups:
        raise ArgumentError(f"channels (={channels}) must be divisible by groups (={groups})")
    width = channels // groups
    return torch.eye(width, **tensor_options).repeat(groups, 1).view(channels, width, 1, 1)


def avgpool_kernel(channels: Channels, kernel_size: tuple[Side, Side], **tensor_options) -> Tensor:
    """Return the depthwise kernel of an average pool that counts its zero padding.

    Args:
        channels: inputs and outputs.
        kernel_size: sides of the window.
        tensor_options: ``dtype``, ``device``.

    Returns:
        (channels, 1, kh, kw), a view of one element for each channel.

    Example:
        >>> from rep_plugin.functional import avgpool_kernel
        >>> avgpool_kernel(1, (2, 2)).flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    kh, kw = kernel_size
    return torch.full((channels, 1, 1, 1), 1.0 / (kh * kw), **tensor_options).expand(-1, -1, kh, kw)


def pad_kernel(kernel: Kernel, size: tuple[Side, Side]) -> Tensor:
    """Return a kernel with zeros round it, its centre kept.

    Args:
        kernel: (O, I, kh, kw).
        size: sides of the result.

    Returns:
        (O, I, *size); the kernel itself where it has this size.

    Raises:
        ArgumentError: the kernel is larger, or the difference is odd so that the centres cannot meet.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import pad_kernel
        >>> pad_kernel(torch.ones(1, 1, 1, 1), (1, 3)).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    have = tuple(kernel.shape[2:])
    dh, dw = size[0] - have[0], size[1] - have[1]
    if dh < 0 or dw < 0 or dh % 2 or dw % 2:
        raise ArgumentError(f"kernel of size {have} cannot be centred in {tuple(size)}")
    if dh == dw == 0:  # F.pad would copy
        return kernel
    return F.pad(kernel, (dw // 2, dw // 2, dh // 2, dh // 2))


def dilate_kernel(kernel: Kernel, dilation: tuple[Side, Side]) -> Tensor:
    """Write a dilated kernel out with its zeros.

    Args:
        kernel: (O, I, kh, kw).
        dilation: distance in pixels between two taps, per axis.

    Returns:
        The kernel without dilation; side k becomes (k - 1) * dilation + 1.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import dilate_kernel
        >>> dilate_kernel(torch.ones(1, 1, 1, 3), (1, 2)).flatten().tolist()
        [1.0, 0.0, 1.0, 0.0, 1.0]
    """
    if tuple(dilation) == (1, 1):
        return kernel
    kh, kw = kernel.shape[2:]
    out = kernel.new_zeros(*kernel.shape[:2], (kh - 1) * dilation[0] + 1, (kw - 1) * dilation[1] + 1)
    out[:, :, :: dilation[0], :: dilation[1]] = kernel
    return out


def regroup_kernel(kernel: Kernel, groups: Channels, new_groups: Channels) -> Tensor:
    """Write a grouped kernel with fewer groups, zeros between the old ones.

    Args:
        kernel: (O, I / groups, kh, kw).
        groups: its groups.
        new_groups: the wanted groups.

    Returns:
        (O, I / new_groups, kh, kw).

    Raises:
        ArgumentError: ``new_groups`` does not divide ``groups``: a kernel cannot be split further.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import regroup_kernel
        >>> regroup_kernel(torch.ones(2, 1, 1, 1), 2, 1).flatten(1).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if groups % new_groups:
        raise ArgumentError(f"groups (={groups}) must be a multiple of the new groups (={new_groups})")
    ratio = groups // new_groups
    if ratio == 1:
        return kernel
    out_channels, width = kernel.shape[:2]
    rows = kernel.view(new_groups, ratio, out_channels // groups, width, *kernel.shape[2:])
    eye = torch.eye(ratio, dtype=kernel.dtype, device=kernel.device)
    # (G, r, o, w, kh, kw) x (r, q) -> (G, r, o, q, w, kh, kw): group r of a new group sees only slot q == r.
    spread = torch.einsum("growhk,rq->groqwhk", rows, eye)
    return spread.reshape(out_channels, ratio * width, *kernel.shape[2:])


def sum_kernel_taps(kernel: Kernel, groups: Channels, value: Inputs) -> Tensor:
    """Return what a convolution answers to a constant map.

    Args:
        kernel: (O, I / groups, kh, kw).
        groups: its groups.
        value: the map's value in each channel, (I,).

    Returns:
        (O,).

    Example:
        >>> import torch
        >>> from rep_plugin.functional import sum_kernel_taps
        >>> sum_kernel_taps(torch.ones(1, 2, 3, 3), 1, torch.tensor([1.0, 2.0])).item()
        27.0
    """
    taps = kernel.sum((2, 3)).view(groups, -1, kernel.shape[1])  # (G, O/G, I/G)
    return (taps * value.view(groups, 1, -1)).sum(-1).reshape(-1)  # not a matmul: autocast would round it to half


def scale_kernel_inputs(kernel: Kernel, groups: Channels, scale: Inputs) -> Tensor:
    """Return the kernel that sees ``x * scale`` where it is given ``x``.

    Args:
        kernel: (O, I / groups, kh, kw).
        groups: its groups.
        scale: (I,).

    Returns:
        (O, I / groups, kh, kw).

    Example:
        >>> import torch
        >>> from rep_plugin.functional import scale_kernel_inputs
        >>> scale_kernel_inputs(torch.ones(1, 2, 1, 1), 1, torch.tensor([2.0, 3.0])).flatten().tolist()
        [2.0, 3.0]
    """
    out_channels, width = kernel.shape[:2]
    per_group = scale.view(groups, 1, width, 1, 1)
    return (kernel.view(groups, out_channels // groups, width, *kernel.shape[2:]) * per_group).view_as(kernel)


def _convolve_taps(large: Tensor, small: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Full 2-D convolution of two kernels (., ., h, w), ``combine`` joining one tap of ``small`` with all of ``large``.

    A loop over taps, not ``conv2d``: that has no fast float64 kernel for groups on CPU (8 s for one network).
    """
    u, v = small.shape[2:]
    parts = []
    for a in range(u):
        for b in range(v):
            part = combine(large, small[:, :, a, b])
            parts.append(part if (u, v) == (1, 1) else F.pad(part, (b, v - 1 - b, a, u - 1 - a)))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _taps(kernel: Tensor) -> int:
    return kernel.shape[2] * kernel.shape[3]


def is_constant(kernel: Kernel) -> bool:
    """Return True for a window whose taps are one and the same element.

    Example:
        >>> from rep_plugin.functional import avgpool_kernel, is_constant
        >>> is_constant(avgpool_kernel(2, (3, 3))), is_constant(avgpool_kernel(2, (3, 3)).clone())
        (True, False)
    """
    return _taps(kernel) > 1 and all(kernel.stride(axis) == 0 or kernel.shape[axis] == 1 for axis in (2, 3))


def _compose_dense(k1: Tensor, k2: Tensor, groups: int) -> Tensor:
    """Compose kernels of equal groups: (M, I/G, u, v) then (O, M/G, h, w) -> (O, I/G, u+h-1, v+w-1)."""

    def split(kernel: Tensor) -> Tensor:
        return kernel.reshape(groups, -1, *kernel.shape[1:])

    if _taps(k1) <= _taps(k2):
        return _convolve_taps(
            k2, k1, lambda large, tap: torch.einsum("gomhw,gmi->goihw", split(large), split(tap)).flatten(0, 1)
        )
    return _convolve_taps(
        k1, k2, lambda large, tap: torch.einsum("gmihw,gom->goihw", split(large), split(tap)).flatten(0, 1)
    )


def _compose_diagonal(kernel: Tensor, filters: Tensor) -> Tensor:
    """Convolve every slice ``kernel[c]`` (C, X, h, w) with its own filter (C, 1, u, v)."""
    for one, window in ((kernel, filters), (filters, kernel)):
        if _taps(one) == 1 and is_constant(window):  # an average stays a view: its taps are not written out
            return (one * window[:, :, :1, :1]).expand(-1, -1, *window.shape[2:])
    if (
        _taps(kernel) == 1 and _taps(filters) > 1 and kernel.shape[1] > 1
    ):  # outer products: a matmul is fast backwards too
        return (kernel.flatten(1).unsqueeze(2) @ filters.flatten(2)).unflatten(2, tuple(filters.shape[2:]))
    large, small = (kernel, filters) if _taps(filters) <= _taps(kernel) else (filters, kernel)
    return _convolve_taps(large, small, lambda rest, tap: rest * tap[:, :, None, None])


def compose(first: ConvParams, second: ConvParams) -> ConvParams:
    """Return the one convolution equal to ``second(first(x))``, zeros being padded once, before ``first``.

    Groups may differ; the result has as many as both allow. Strides multiply. Equal dilations are kept, unequal ones are
    written out into a larger kernel.

    Args:
        first, second: the convolutions, in the order in which they are applied.

    Returns:
        The composed convolution.

    Raises:
        ArgumentError: the channels do not fit.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams, compose
        >>> compose(ConvParams(torch.ones(8, 4, 1, 1), None), ConvParams(torch.ones(6, 8, 3, 3), None)).kernel.shape
        torch.Size([6, 4, 3, 3])
    """
    if first.out_channels != second.in_channels:
        raise ArgumentError(
            f"outputs of the first convolution (={first.out_channels}) must equal the inputs of the second "
            f"(={second.in_channels})"
        )
    if first.kernel.dtype != second.kernel.dtype:
        raise ArgumentError(f"first and second must be of one type, got {first.kernel.dtype} and {second.kernel.dtype}")
    k1, k2 = first.kernel, second.kernel
    d1, d2 = list(first.dilation), [d * s for d, s in zip(second.dilation, first.stride)]
    for axis in (0, 1):  # a side of 1 has no dilation of its own
        if k2.shape[2 + axis] == 1:
            d2[axis] = d1[axis]
        elif k1.shape[2 + axis] == 1:
            d1[axis] = d2[axis]
        if d1[axis] != d2[axis]:
            steps1, steps2 = [1, 1], [1, 1]
            steps1[axis], steps2[axis] = d1[axis], d2[axis]
            k1, k2 = dilate_kernel(k1, steps1), dilate_kernel(k2, steps2)
            d1[axis] = d2[axis] = 1

    if first.is_diagonal and not second.is_diagonal:
        groups, g2 = second.groups, second.groups
        rows = k2.view(g2, -1, *k2.shape[1:]).transpose(1, 2).flatten(0, 1)  # (M, O/G, h, w)
        out = _compose_diagonal(rows, k1)
        out = out.view(g2, -1, *out.shape[1:]).transpose(1, 2)
        kernel = out.reshape(*k2.shape[:2], *out.shape[3:])
    elif second.is_diagonal:
        groups = first.groups
        kernel = _compose_diagonal(k1, k2)
    else:
        groups = math.gcd(first.groups, second.groups)
        kernel = _compose_dense(
            regroup_kernel(k1, first.groups, groups), regroup_kernel(k2, second.groups, groups), groups
        )
    bias = second.bias
    if first.bias is not None:
        constant = sum_kernel_taps(second.kernel, second.groups, first.bias)
        bias = constant if bias is None else bias + constant
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return ConvParams(kernel, bias, groups, stride, (d1[0], d1[1]))


def _product_size(first: ConvParams, second: ConvParams) -> int:
    """Elements of the kernel that two convolutions compose to."""
    if first.is_diagonal:
        groups = second.groups
    else:
        groups = first.groups if second.is_diagonal else math.gcd(first.groups, second.groups)
    sides = [a + b - 1 for a, b in zip(first.kernel.shape[2:], second.kernel.shape[2:])]
    return second.out_channels * (first.in_channels // groups) * sides[0] * sides[1]


def compose_all(convolutions: Iterable[ConvParams]) -> ConvParams:
    """Return the one convolution equal to several in a row: :func:`compose`, the pair of the smallest product first.

    Raises:
        ArgumentError: an empty list, or channels that do not fit.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import ConvParams, compose_all
        >>> compose_all(ConvParams(torch.ones(4, 4, 3, 3), None) for _ in range(3)).kernel.shape
        torch.Size([4, 4, 7, 7])
    """
    rest = list(convolutions)
    if not rest:
        raise ArgumentError("compose_all needs at least one convolution, got none")
    while len(rest) > 1:
        at = min(range(len(rest) - 1), key=lambda i: _product_size(rest[i], rest[i + 1]))
        rest[at : at + 2] = [compose(rest[at], rest[at + 1])]
    return rest[0]


class _AddCentred(torch.autograd.Function):
    """Adds a small kernel into the centre of a large one, in place: nothing is padded, and backward costs nothing."""

    @staticmethod
    def forward(ctx, large: Tensor, small: Tensor) -> Tensor:
        ctx.size = small.shape[2:]
        _centre(large, ctx.size).add_(small)
        ctx.mark_dirty(large)
        return large

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, _centre(grad, ctx.size)


def _centre(kernel: Tensor, size: Sequence[int]) -> Tensor:
    rows, cols = (kernel.shape[2] - size[0]) // 2, (kernel.shape[3] - size[1]) // 2
    return kernel[:, :, rows : rows + size[0], cols : cols + size[1]]


def _add_centred(large: Tensor, small: Tensor) -> Tensor:
    """``large`` + ``small``, centres aligned; ``large`` must be a temporary. Raises ArgumentError where they cannot meet."""
    if plain_ops():
        return large + pad_kernel(small, tuple(large.shape[2:]))
    if any((a - b) % 2 for a, b in zip(large.shape[2:], small.shape[2:])):
        raise ArgumentError(f"kernel of size {tuple(small.shape[2:])} cannot be centred in {tuple(large.shape[2:])}")
    return _AddCentred.apply(large, small)


def merge_sum(kernels: Iterable[tuple[Kernel, Bias | None]]) -> tuple[Tensor, Tensor | None]:
    """Add parallel convolutions of equal channels, stride and groups: centre-pad to the largest side, add.

    Args:
        kernels: pairs of kernel (O, I / groups, kh, kw) and bias (O,) or None.

    Returns:
        ``(kernel, bias)``; the bias is None where no pair has one.

    Raises:
        ArgumentError: an empty list, unequal channels, or centres that cannot meet (odd beside even sides).

    Example:
        >>> import torch
        >>> from rep_plugin.functional import merge_sum
        >>> merge_sum([(torch.ones(1, 1, 1, 1), None), (torch.ones(1, 1, 1, 3), None)])[0].flatten().tolist()
        [1.0, 2.0, 1.0]
    """
    pairs = list(kernels)
    if not pairs:
        raise ArgumentError("merge_sum needs at least one (kernel, bias) pair, got none")
    shapes = {tuple(kernel.shape[:2]) for kernel, _ in pairs}
    if len(shapes) > 1:
        raise ArgumentError(f"parallel kernels must agree in (outputs, inputs / groups), got {sorted(shapes)}")
    size = (max(k.shape[2] for k, _ in pairs), max(k.shape[3] for k, _ in pairs))
    pairs.sort(key=lambda pair: -_taps(pair[0]))  # the largest first: the others are added into it
    total, fresh = pad_kernel(pairs[0][0], size), pairs[0][0].shape[2:] != size
    for kernel, _ in pairs[1:]:
        if kernel.shape[2:] == size:
            total, fresh = total + kernel, True
        else:
            total, fresh = _add_centred(total if fresh else total.clone(), kernel), True
    biases = [bias for _, bias in pairs if bias is not None]
    total = total.clone() if is_constant(total) else total
    return total, sum(biases[1:], biases[0]) if biases else None
