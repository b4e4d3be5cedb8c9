"""Squeeze-and-excitation: an attention that comes after a block's sum, so that it stays when the block is merged."""

from collections import OrderedDict

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that its own mean and all others' decide: (N, C, H, W) -> (N, C, H, W).

    Two 1x1 convolutions, ``reduce`` to C // ``ratio`` and ``expand``. Hu et al., "Squeeze-and-Excitation Networks"
    (CVPR 2018). Raises ValueError for fewer channels than ``ratio``.
    """

    def __init__(self, channels: int, ratio: int = 16):
        super().__init__()
        if channels < ratio:
            raise ValueError(f"squeeze-and-excitation needs channels (={channels}) >= ratio (={ratio})")
        self.reduce = nn.Conv2d(channels, channels // ratio, 1)
        self.expand = nn.Conv2d(channels // ratio, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid()


def relu_after(channels: int, se: bool) -> nn.Module:
    """Return the ``act`` of a block: ReLU, with squeeze-and-excitation (``se``) before it where asked for."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(se=SqueezeExcite(channels), relu=relu)) if se else relu
