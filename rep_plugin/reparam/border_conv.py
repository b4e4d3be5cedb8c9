"""A convolution with a position-dependent bias: what an already trained, zero-padded linear sequence merges to."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.functional.padded import PaddedConv


class BorderConv2d(nn.Conv2d):
    """Convolution plus the answer of a one-channel kernel ``ring`` to a zero-padded map of ones.

    (N, in_channels, H, W) -> (N, out_channels, H', W') as ``nn.Conv2d``, for any H and W. Inside the map the second part is a
    constant; near the border it has one value for each way in which the window is cut (9 for a 3x3 with padding 1). It costs
    one more input channel of a *single* image, whatever the batch, where a channel of ones appended to the input would cost
    one for every image and every group. Exports to ONNX as plain operators.

    Args:
        in_channels: as for ``nn.Conv2d``, like all arguments.
        out_channels: channels of the output.
        kernel_size: side, or height and width.
        stride: step of the window.
        padding: zeros on each side.
        dilation: distance of the kernel's taps.
        groups: number of groups; of the ring it is 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=True)
        self.ring = nn.Parameter(torch.zeros(out_channels, 1, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        ones = x.new_ones(1, 1, x.shape[2], x.shape[3])
        border = F.conv2d(ones, self.ring, self.bias, self.stride, self.padding, self.dilation)
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups) + border


@torch.no_grad()
def build_conv(merged: PaddedConv, sources: Iterable[nn.Module]) -> nn.Conv2d:
    """Return the trainable layer that computes a merged convolution.

    Args:
        merged: the convolution.
        sources: the layers that it stands for. Dtype, device, memory format, train mode and ``requires_grad`` are theirs.

    Returns:
        An ``nn.Conv2d``, or a :class:`BorderConv2d` where the bias depends on the position.

    Raises:
        ArgumentError: the padding is negative.
    """
    if min(merged.padding) < 0:
        raise ArgumentError(f"padding must be >= 0, got {merged.padding}")
    sources = list(sources)
    own = [p for module in sources for p in module.parameters()]
    like = own[0] if own else next(b for module in sources for b in module.buffers() if b.is_floating_point())
    params = merged.params
    kind = nn.Conv2d if merged.edge is None else BorderConv2d
    with torch.device("meta"):  # no random numbers are drawn for weights that are set below
        shape = (params.in_channels, params.out_channels, merged.kernel_size, params.stride, merged.padding)
        conv = kind(*shape, params.dilation, params.groups)
    last = any(
        p.dim() == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last) for p in own
    )
    layout = torch.channels_last if last else torch.contiguous_format
    trained = not own or any(p.requires_grad for p in own)  # a frozen block stays frozen
    tensors = {"weight": params.kernel.contiguous(memory_format=layout), "bias": params.bias}
    if merged.edge is not None:
        tensors["ring"] = merged.edge
    for name, tensor in tensors.items():
        setattr(conv, name, nn.Parameter(tensor.detach().to(like.device, like.dtype, copy=True), trained))
    return conv.train(any(module.training for module in sources))
