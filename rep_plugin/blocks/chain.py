"""A chain of linear layers on a zero-padded input: how it runs in training, and how it becomes one convolution.

Semantics: zeros are padded once, round the chain's *input*; every later layer sees the padded map. So the merge is exact
at the border too. Batch statistics that are taken before the first spatial layer count the real positions only.

Execution pads nothing by hand. On the way the map is carried as ``y`` together with a pending per-channel ``scale`` and
``shift``, the value being ``y * scale + shift``. Before the first spatial layer the padding holds ``shift`` alone, so the
convolution can pad ``y`` itself with zeros. BatchNorm costs statistics but no pass that normalises: the next kernel
absorbs the scale, and a constant of the kernel the shift.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import checked
from rep_plugin.blocks.batch_norm import run_bn
from rep_plugin.blocks.layers import Scale, average, groups_of, kernel_of, spatial_of
from rep_plugin.blocks.merge import merge_ops
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import ConvParams, pair, scale_kernel_inputs, sum_kernel_taps


def run_conv(
    conv: nn.Conv2d, y: Tensor, scale: Tensor | None, shift: Tensor | None, padding: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Return the convolution of the value ``y * scale + shift``, as a map and a pending shift.

    Args:
        conv: the layer, whose own padding is not used.
        y: map (N, C, H, W).
        scale: pending factor (C,); None: 1.
        shift: pending shift (C,), also of the padding; None: 0.
        padding: rows and columns round the map.

    Returns:
        ``(map (N, O, H', W'), shift (O,) or None)``.
    """
    groups = groups_of(conv)
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


@checked
class Chain(nn.Module):
    """Named linear layers that run one after the other on a zero-padded input.

    A layer's own ``padding`` is not used: the chain is padded once, at its head.

    Args:
        ops: Conv2d, BatchNorm2d, AvgPool2d, Identity or Scale by fixed names, which are the checkpoint keys.

    Raises:
        NotMergeableError: a layer that is not linear.
        ArgumentError: no layer, or a stride in front of the first window (padding would be skipped).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rep_plugin.blocks import Chain
        >>> chain = Chain({"conv": nn.Conv2d(4, 8, 3, bias=False), "bn": nn.BatchNorm2d(8)})
        >>> chain(torch.ones(2, 4, 9, 9), padding=(1, 1)).shape, chain.eval().merge().kernel.shape
        (torch.Size([2, 8, 9, 9]), torch.Size([8, 4, 3, 3]))
    """

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
        """Return the output as a map and a pending scale and shift.

        Args:
            x: map (N, C, H, W).
            padding: rows and columns of zeros round it; negative ones crop.

        Returns:
            ``(y, scale, shift)``, the output being ``y * scale + shift`` (None: 1 and 0).
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
                y, shift = run_conv(op, y, scale, shift, here)
                scale = None
            elif isinstance(op, nn.AvgPool2d):
                y = average(y, op, here)  # taps sum to one and the padding holds `shift` too: both stay pending
            elif isinstance(op, Scale):
                scale = op.weight if scale is None else scale * op.weight
                shift = None if shift is None else shift * op.weight
            elif isinstance(op, _BatchNorm):
                scale, shift = run_bn(op, y, scale, shift)
        return y, scale, shift

    def forward(self, x: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the chain's output.

        Args:
            x: map (N, C, H, W).
            padding: rows and columns of zeros round it; negative ones crop.

        Returns:
            Map (N, O, H', W').
        """
        y, scale, shift = self.run(x, pair(padding))
        out = y if scale is None else y * scale.view(1, -1, 1, 1)
        return (out if shift is None else out + shift.view(1, -1, 1, 1)).type_as(y)

    def merge(self, in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
        """Return the chain as one convolution, see :func:`merge_ops`.

        Args:
            in_channels: channels of the input, where no layer has a channel number.
            dtype: type to compute in (default: that of the first tensor).
        """
        return merge_ops(self.children(), in_channels, dtype)
