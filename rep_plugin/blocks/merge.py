"""A chain of linear layers as one convolution."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Channels, checked
from rep_plugin.blocks.layers import Scale, channels_of, groups_of, kernel_of, require_eval, spatial_of
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import (
    ConvParams,
    avgpool_kernel,
    bn_scale_shift,
    compose_all,
    identity_kernel,
    is_constant,
    without_autocast,
)


def layer_params(
    op: nn.Module, channels: int | None, dtype: torch.dtype, device: torch.device, padded: bool = True
) -> ConvParams:
    """Return the convolution that a linear layer is; no bias where the layer adds none.

    Args:
        op: the layer, in eval mode.
        channels: channels of its input; read for layers without tensors alone.
        dtype: type to compute in.
        device: device of the result; read for layers without tensors alone.
        padded: whether zeros are padded round its input.

    Returns:
        The convolution, with the layer's stride and dilation; its own padding is not part of it.

    Raises:
        NotMergeableError: a layer that is not linear, or not plain.
        TrainModeError: a BN in train mode.
    """
    kernel_size, stride, dilation = spatial_of(op, padded)
    channels = (channels_of(op) or (channels,))[0]
    options = {"dtype": dtype, "device": device}
    if isinstance(op, nn.Conv2d):
        return ConvParams(
            kernel_of(op, dtype), None if op.bias is None else op.bias.to(dtype), groups_of(op), stride, dilation
        )
    if isinstance(op, nn.AvgPool2d):
        return ConvParams(avgpool_kernel(channels, kernel_size, **options), None, channels, stride, dilation)
    if isinstance(op, nn.Identity):
        return ConvParams(identity_kernel(channels, channels, **options), None, channels)
    if isinstance(op, Scale):
        return ConvParams(op.weight.to(dtype).view(-1, 1, 1, 1), None, channels)
    require_eval(op, f"{type(op).__name__}({channels})")
    scale, shift = bn_scale_shift(op, dtype)
    return ConvParams(scale.view(-1, 1, 1, 1), shift, channels)


def merge_ops(ops: Iterable[nn.Module], in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
    """Return the one convolution equal to a chain of linear layers on a zero-padded input; no bias where no layer adds.

    Args:
        ops: the layers, in order.
        in_channels: channels of the input; needed only for a chain of layers without tensors (poolings).
        dtype: type to compute in (default: that of the first tensor).

    Returns:
        The convolution; differentiable.

    Raises:
        NotMergeableError: a layer that is not linear.
        TrainModeError: a BN in train mode.
        ArgumentError: channels do not fit, or the chain is empty.
    """
    ops = list(ops)
    tensors = [t for op in ops for t in (*op.parameters(), *op.buffers()) if t.is_floating_point()]
    dtype = dtype or (tensors[0].dtype if tensors else torch.get_default_dtype())
    device = tensors[0].device if tensors else torch.device("cpu")
    channels = next((c[0] for c in map(channels_of, ops) if c), in_channels)
    if not ops or channels is None:
        raise ArgumentError(f"a chain of {len(ops)} layers with in_channels={in_channels} has no channel number")
    parts = []
    with without_autocast(device):
        for op in ops:
            parts.append(layer_params(op, channels, dtype, device))
            channels = parts[-1].out_channels
        return compose_all(parts)


@checked
def merge_chain(ops: Iterable[nn.Module], in_channels: Channels | None = None) -> tuple[Tensor, Tensor]:
    """Return the kernel and bias of the one convolution equal to a chain of linear layers; differentiable.

    Args:
        ops: the layers, in order.
        in_channels: channels of the input; needed only for a chain of layers without tensors (poolings).

    Returns:
        ``(kernel (O, I / groups, kh, kw), bias (O,))``.

    Raises:
        NotMergeableError: a layer that is not linear.
        TrainModeError: a BN in train mode.
        ArgumentError: channels do not fit, or the chain is empty.

    Example:
        >>> from torch import nn
        >>> from rep_plugin.blocks import merge_chain
        >>> kernel, bias = merge_chain([nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8).eval(), nn.Conv2d(8, 6, 3)])
        >>> kernel.shape, bias.shape
        (torch.Size([6, 4, 3, 3]), torch.Size([6]))
    """
    merged = merge_ops(ops, in_channels)
    bias = merged.bias if merged.bias is not None else merged.kernel.new_zeros(merged.out_channels)
    return (merged.kernel.clone() if is_constant(merged.kernel) else merged.kernel), bias
