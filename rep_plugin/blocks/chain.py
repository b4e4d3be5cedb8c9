"""A chain of linear layers on a zero-padded input: how it runs in training, and how it becomes one convolution.

Semantics: zeros are padded once, round the chain's *input*; every later layer sees the padded map. So the merge is exact
at the border too. Batch statistics that are taken before the first spatial layer count the real positions only.

Execution pads nothing by hand. On the way the map is carried as ``y`` together with a pending per-channel ``scale`` and
``shift``, the value being ``y * scale + shift``. All that a padding ring holds before the first spatial layer is then
``shift``, so ``y`` itself can be padded with zeros by the convolution, and BatchNorm costs statistics but no pass that
normalises: the next kernel absorbs the scale, and a constant of the kernel the shift.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.batch_norm import _run_bn
from rep_plugin.blocks.layers import Scale, _average, _groups_of, kernel_of, spatial_of
from rep_plugin.blocks.merge import merge_ops
from rep_plugin.blocks.scripted import ScriptedChain
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import (
    ConvParams,
    pair,
    scale_kernel_inputs,
    sum_kernel_taps,
)


def _run_conv(conv: nn.Conv2d, y: Tensor, scale: Tensor | None, shift: Tensor | None, padding: tuple[int, int]):
    groups = _groups_of(conv)
    weight = kernel_of(conv)
    kernel = weight if scale is None else scale_kernel_inputs(weight, groups, scale.to(weight.dtype))
    stride = pair(conv.stride)
    if kernel.shape[2:] == (1, 1) and stride != (1, 1) and padding == (0, 0):
        # Not left to oneDNN: the weight gradient of its strided 1x1 writes past its buffer where a channels_last map has
        # fewer than 16 channels (uxlfoundation/oneDNN#6035), as every stem has: wrong gradients, or a crash.
        y, stride = y[:, :, :: stride[0], :: stride[1]], (1, 1)
    out = F.conv2d(y, kernel, None, stride, padding, conv.dilation, groups)
    new_shift = None if shift is None else sum_kernel_taps(weight, groups, shift.to(weight.dtype))
    if conv.bias is not None:
        new_shift = conv.bias if new_shift is None else new_shift + conv.bias
    return out, new_shift


class Chain(ScriptedChain):
    """Named linear layers that run one after the other on a zero-padded input.

    ``ops`` maps fixed names (they are the checkpoint keys) to Conv2d, BatchNorm2d, AvgPool2d, Identity or Scale. A conv's
    own ``padding`` is not used: the chain is padded once, at its head. Raises TypeError for a layer that is not linear and
    ValueError for a stride in front of the first window (the ring would be skipped).
    """

    __jit_unused_properties__ = ["kernel_size"]

    def __init__(self, ops: Mapping[str, nn.Module]):
        super().__init__()
        if not ops:
            raise ArgumentError("a chain needs at least one layer, got none")
        strided = None
        for name, op in ops.items():
            kernel_size, stride, _ = spatial_of(op)
            if strided and kernel_size != (1, 1):
                raise ArgumentError(
                    f"layer {name!r} of size {kernel_size} stands behind {strided!r}, which has a stride"
                )
            if stride != (1, 1):
                strided = name
            self.add_module(name, op)

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Sides of the merged kernel, in taps of the chain's dilation."""
        sides = [1, 1]
        for op in self.children():
            (kh, kw), _, _ = spatial_of(op)
            sides = [sides[0] + kh - 1, sides[1] + kw - 1]
        return sides[0], sides[1]

    def last_bn(self) -> _BatchNorm | None:
        """The BN that ends the chain, whose gamma scales its whole output; None where it ends otherwise."""
        last = list(self.children())[-1]
        return last if isinstance(last, _BatchNorm) else None

    def run(self, x: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return ``(y, scale, shift)`` with chain(x) == y * scale + shift (None: 1 and 0).

        ``x`` (N, C, H, W); ``padding`` is the ring in pixels per axis, a negative one crops.
        """
        y, scale, shift = x, None, None
        ops = list(self.children())
        spatial = [spatial_of(op)[0] != (1, 1) for op in ops]
        if min(padding) < 0 or (max(padding) > 0 and not any(spatial)):
            y, padding = F.pad(y, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
        for op, is_spatial in zip(ops, spatial):
            here = padding if is_spatial else (0, 0)
            if is_spatial:
                padding = (0, 0)
            if isinstance(op, nn.Conv2d):
                y, shift = _run_conv(op, y, scale, shift, here)
                scale = None
            elif isinstance(op, nn.AvgPool2d):
                y = _average(y, op, here)  # taps sum to one and the ring holds `shift` too: both stay pending
            elif isinstance(op, Scale):
                scale = op.weight if scale is None else scale * op.weight
                shift = None if shift is None else shift * op.weight
            elif isinstance(op, _BatchNorm):
                scale, shift = _run_bn(op, y, scale, shift)
        return y, scale, shift

    def forward(self, x: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the chain's output, (N, O, H', W'), for a zero ring of ``padding`` pixels."""
        if torch.jit.is_scripting():
            return self.layer_by_layer(x, padding)
        else:
            return self._settle(*self.run(x, pair(padding)))

    @staticmethod
    def _settle(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        out = y if scale is None else y * scale.view(1, -1, 1, 1)
        return (out if shift is None else out + shift.view(1, -1, 1, 1)).type_as(y)

    def merge(self, in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
        """Return the chain as one convolution. See :func:`merge_ops`."""
        return merge_ops(self.children(), in_channels, dtype)
