"""A chain of linear layers as one convolution."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rep_plugin.blocks.layers import Scale, _channels_of, _groups_of, kernel_of, spatial_of
from rep_plugin.errors import ArgumentError, TrainModeError
from rep_plugin.functional.kernels import (
    ConvParams,
    avgpool_kernel,
    bn_scale_shift,
    compose_all,
    identity_kernel,
    is_constant,
)


def _op_params(op: nn.Module, channels: int, dtype: torch.dtype, device: torch.device) -> ConvParams:
    kernel_size, stride, dilation = spatial_of(op)
    options = {"dtype": dtype, "device": device}
    if isinstance(op, nn.Conv2d):
        return ConvParams(
            kernel_of(op, dtype), None if op.bias is None else op.bias.to(dtype), _groups_of(op), stride, dilation
        )
    if isinstance(op, nn.AvgPool2d):
        return ConvParams(avgpool_kernel(channels, kernel_size, **options), None, channels, stride, dilation)
    if isinstance(op, nn.Identity):
        return ConvParams(identity_kernel(channels, channels, **options), None, channels)
    if isinstance(op, Scale):
        return ConvParams(op.weight.to(dtype).view(-1, 1, 1, 1), None, channels)
    if op.training:
        raise TrainModeError(
            f"{type(op).__name__}({channels}) is in train mode (batch statistics cannot be merged): call model.eval() first"
        )
    scale, shift = bn_scale_shift(op, dtype)
    return ConvParams(scale.view(-1, 1, 1, 1), shift, channels)


def merge_ops(ops: Iterable[nn.Module], in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
    """Return the one convolution equal to a chain of linear layers on a zero-padded input; no layer adds: no bias.

    ``in_channels`` is needed only where no layer tells it (a chain of poolings). Computes in ``dtype`` (default: that of
    the first tensor). Raises TypeError for a layer that is not linear, RuntimeError for a BN in train mode, ValueError
    where channels do not fit or the chain is empty.
    """
    ops = list(ops)
    tensors = [t for op in ops for t in (*op.parameters(), *op.buffers()) if t.is_floating_point()]
    dtype = dtype or (tensors[0].dtype if tensors else torch.get_default_dtype())
    device = tensors[0].device if tensors else torch.device("cpu")
    channels = next((c[0] for c in map(_channels_of, ops) if c), in_channels)
    if not ops or channels is None:
        raise ArgumentError(f"a chain of {len(ops)} layers with in_channels={in_channels} says no channel number")
    parts = []
    with torch.autocast(device.type, enabled=False):  # a half-precision merge would cost 2.3 times the accuracy
        for op in ops:
            parts.append(_op_params(op, channels, dtype, device))
            channels = parts[-1].out_channels
        return compose_all(parts)


def merge_chain(ops: Iterable[nn.Module], in_channels: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(kernel, bias)`` of the one convolution equal to the chain; differentiable. See :func:`merge_ops`."""
    merged = merge_ops(ops, in_channels)
    bias = merged.bias if merged.bias is not None else merged.kernel.new_zeros(merged.out_channels)
    return (merged.kernel.clone() if is_constant(merged.kernel) else merged.kernel), bias
