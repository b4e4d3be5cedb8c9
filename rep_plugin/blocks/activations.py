"""The activations a block may end in, by name."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.errors import ArgumentError

ACTIVATIONS = {
    "relu": lambda channels: nn.ReLU(inplace=True),
    "relu6": lambda channels: nn.ReLU6(inplace=True),
    "hardswish": lambda channels: nn.Hardswish(inplace=True),
    "silu": lambda channels: nn.SiLU(inplace=True),
    "gelu": lambda channels: nn.GELU(),
    "prelu": lambda channels: nn.PReLU(channels),
    "identity": lambda channels: nn.Identity(),
}

# The ones without parameters, as functions that work out of place.
FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu}


def build_activation(name: str, channels: int) -> nn.Module:
    """Return a new activation.

    Args:
        name: name in ACTIVATIONS.
        channels: channels of its map.

    Returns:
        Module that keeps the shape.

    Raises:
        ArgumentError: another name.
    """
    try:
        return ACTIVATIONS[name](channels)
    except KeyError:
        raise ArgumentError(f"unknown activation {name!r}, expected one of {sorted(ACTIVATIONS)}") from None


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that its own mean and all others' decide: (N, C, H, W) -> (N, C, H, W).

    Two 1x1 convolutions. Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018).

    Args:
        channels: channels C.
        ratio: C against the channels between the two convolutions.

    Raises:
        ArgumentError: fewer channels than ``ratio``.
    """

    def __init__(self, channels: int, ratio: int = 16):
        super().__init__()
        if channels < ratio:
            raise ArgumentError(f"squeeze-and-excitation needs channels (={channels}) >= ratio (={ratio})")
        self.reduce = nn.Conv2d(channels, channels // ratio, 1)
        self.expand = nn.Conv2d(channels // ratio, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid()


def relu_after(channels: int, se: bool) -> nn.Module:
    """Return the ``act`` of a block: ReLU.

    Args:
        channels: channels of its map.
        se: put squeeze-and-excitation before it.

    Returns:
        Module that keeps the shape (N, channels, H, W).
    """
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(se=SqueezeExcite(channels), relu=relu)) if se else relu
