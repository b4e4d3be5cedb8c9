"""Small networks, one for each thing a tracer has to understand. All take (N, 3, H, W)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.testing import calibrate_random_bn_


class ConvBN(nn.Module):
    """Convolution, BN, activation."""

    def __init__(self, ins: int, outs: int, k: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, k, stride, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outs)
        self.act = nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.first, self.second = ConvBN(width, inner), ConvBN(inner, width, act=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Concat(nn.Module):
    def __init__(self, width: int, left: int, right: int):
        super().__init__()
        self.left, self.right = ConvBN(width, left, 1), ConvBN(width, right)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Halves(nn.Module):
    """Chunk, work on one half, put together, shuffle: ShuffleNetV2's unit."""

    def __init__(self, width: int, shuffle: bool = True):
        super().__init__()
        self.right, self.shuffle = ConvBN(width // 2, width // 2), shuffle

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.right(right)], 1)
        if not self.shuffle:
            return x
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Gate(nn.Module):
    """Squeeze and excite, by 1x1 convolutions or linear layers."""

    def __init__(self, width: int, squeeze: int, linear: bool = False):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(width, squeeze) if linear else nn.Conv2d(width, squeeze, 1)
        self.up = nn.Linear(squeeze, width) if linear else nn.Conv2d(squeeze, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        s = torch.sigmoid(self.up(F.relu(self.down(s))))
        return x * (s[:, :, None, None] if self.linear else s)


class Ghost(nn.Module):
    """Half of the channels by a cheap depthwise convolution, cut to a fixed number."""

    def __init__(self, ins: int, outs: int):
        super().__init__()
        self.outs = outs
        self.first, self.cheap = ConvBN(ins, outs // 2, 1), ConvBN(outs // 2, outs // 2, groups=outs // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : self.outs]


class Flat(nn.Module):
    """A head that flattens the map: every channel owns H * W columns."""

    def __init__(self, ins: int, side: int = 4, classes: int = 5):
        super().__init__()
        self.side, self.fc = side, nn.Linear(ins * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, self.side).flatten(1))


class Pooled(nn.Module):
    def __init__(self, ins: int, classes: int = 5):
        super().__init__()
        self.fc = nn.Linear(ins, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Last(nn.Module):
    """A classifier before a convolution's output: permuted to channels last, through a linear layer and back."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x.permute(0, 2, 3, 1))))
        return x + y.permute(0, 3, 1, 2)


class Normed(nn.Module):
    """A layer norm over channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Call(nn.Module):
    """Any function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def ready(*layers: nn.Module, seed: int = 0, side: int = 13) -> nn.Sequential:
    """A network with random calibrated BNs, in eval mode."""
    net = nn.Sequential(*layers)
    return calibrate_random_bn_(net, torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(seed)), seed)


def mask_outputs(net: nn.Module, plan) -> list:
    """Oracle: hooks that set removed channels to zero behind every ConvBN, 1x1 convolution and linear layer of a plan."""
    handles = []
    for name, kept in plan.kept.items():
        owner = name.rsplit(".", 1)[0]
        module = net.get_submodule(owner) if isinstance(net.get_submodule(owner), ConvBN) else net.get_submodule(name)
        mask = torch.zeros(plan.widths[name][0])
        mask[list(kept)] = 1

        def hook(module, args, output, mask=mask):
            along_last = isinstance(module, nn.Linear)
            return output * (mask if along_last else mask.view(1, -1, 1, 1)).to(output.dtype)

        handles.append(module.register_forward_hook(hook))
    return handles
