"""The activations a block may end in, by name."""

import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "relu": lambda channels: nn.ReLU(inplace=True),
    "relu6": lambda channels: nn.ReLU6(inplace=True),
    "hardswish": lambda channels: nn.Hardswish(inplace=True),
    "silu": lambda channels: nn.SiLU(inplace=True),
    "gelu": lambda channels: nn.GELU(),
    "prelu": lambda channels: nn.PReLU(channels),
    "identity": lambda channels: nn.Identity(),
}

# The ones without parameters, out of place: what can stand inside an annealed bottleneck.
FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu}


def build_activation(name: str, channels: int) -> nn.Module:
    """Return a new activation for a map of ``channels``. Raises ValueError for a name that is not in ACTIVATIONS."""
    try:
        return ACTIVATIONS[name](channels)
    except KeyError:
        raise ValueError(f"unknown activation {name!r}, expected one of {sorted(ACTIVATIONS)}") from None
