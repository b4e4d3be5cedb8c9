"""Networks with the parameter names of the authors' own code, written anew from those names: oracles for conversions."""

from itertools import pairwise

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(outputs))
    return layers


def folded(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    scale = layers.bn.weight / torch.sqrt(layers.bn.running_var + layers.bn.eps)
    return layers.conv.weight * scale.view(-1, 1, 1, 1), layers.bn.bias - layers.bn.running_mean * scale


@torch.no_grad()
def merged_conv(branches: list[nn.Sequential], identity: nn.BatchNorm2d | None = None) -> nn.Conv2d:
    """The first branch's convolution with the sum of all branches, smaller ones in its middle."""
    conv, side = branches[0].conv, branches[0].conv.weight.shape[-1]
    if identity is not None:
        copy = conv_bn(conv.in_channels, conv.out_channels, 1, groups=conv.groups).to(conv.weight.dtype)
        copy.conv.weight.zero_()
        for channel in range(conv.in_channels):
            copy.conv.weight[channel, channel % (conv.in_channels // conv.groups)] = 1
        copy.bn = identity
        branches = [*branches, copy]
    shape = (conv.in_channels, conv.out_channels, side, conv.stride, conv.padding)
    merged = nn.Conv2d(*shape, groups=conv.groups).to(conv.weight.dtype)
    merged.weight.zero_()
    merged.bias.zero_()
    for branch in branches:
        kernel, bias = folded(branch)
        ring = (side - kernel.shape[-1]) // 2
        merged.weight[..., ring : side - ring, ring : side - ring] += kernel
        merged.bias += bias
    return merged


def merge_blocks_(model: nn.Module) -> nn.Module:
    """The authors' merged form of a network: every block's branches as one convolution; other BNs stay."""
    for module in list(model.modules()):
        if hasattr(module, "merge_"):
            module.merge_()
    return model


@torch.no_grad()
def fold_bns_(model: nn.Module) -> nn.Module:
    """The step that RepLKNet's authors offer after it: the other convolutions take their BN in."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and hasattr(module, "bn"):
            kernel, bias = folded(module)
            module.conv.weight.copy_(kernel)
            module.conv.bias, module.bn = nn.Parameter(bias), nn.Identity()
    return model


class Gate(nn.Module):
    """Squeeze-and-excitation whose two layers have the given names."""

    def __init__(self, channels: int, names: tuple[str, str]):
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(channels, channels // 16, 1))
        self.add_module(names[1], nn.Conv2d(channels // 16, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.names)
        return x * second(first(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class OfficialRepVGGBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1, groups=1, se=False):
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        self.se = Gate(outputs, ("down", "up")) if se else nn.Identity()

    def forward(self, x):
        if hasattr(self, "rbr_reparam"):
            return self.se(self.rbr_reparam(x)).relu()
        out = self.rbr_dense(x) + self.rbr_1x1(x) + (0 if self.rbr_identity is None else self.rbr_identity(x))
        return self.se(out).relu()

    def merge_(self):
        self.rbr_reparam = merged_conv([self.rbr_dense, self.rbr_1x1], self.rbr_identity)
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class OfficialMobileOneBlock(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, groups=1, se=False, copies=1):
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_conv = nn.ModuleList([conv_bn(inputs, outputs, kernel, stride, groups) for _ in range(copies)])
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, groups) if kernel > 1 else None
        self.se = Gate(outputs, ("reduce", "expand")) if se else nn.Identity()

    def forward(self, x):
        if hasattr(self, "reparam_conv"):
            return self.se(self.reparam_conv(x)).relu()
        branches = [*self.rbr_conv, self.rbr_skip, self.rbr_scale]
        return self.se(sum(branch(x) for branch in branches if branch is not None)).relu()

    def merge_(self):
        scale = [] if self.rbr_scale is None else [self.rbr_scale]
        self.reparam_conv = merged_conv([*self.rbr_conv, *scale], self.rbr_skip)
        del self.rbr_conv, self.rbr_scale, self.rbr_skip


class OfficialStages(nn.Module):
    """``stage0`` ... ``stage4`` and ``linear``, as RepVGG and MobileOne have them."""

    def __init__(self, stages: list[nn.Module], channels: int, num_classes: int):
        super().__init__()
        for index, stage in enumerate(stages):
            self.add_module(f"stage{index}", stage)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x):
        for index in range(5):
            x = getattr(self, f"stage{index}")(x)
        return self.linear(x.mean((2, 3)))


def official_repvgg(depths, widths, groups=1, se=False, num_classes=7) -> nn.Module:
    width = min(64, widths[0])
    stages, layer = [OfficialRepVGGBlock(3, width, 2, se=se)], 0
    for depth, out in zip(depths, widths):
        blocks = []
        for index in range(depth):
            layer += 1
            grouped = groups if layer in range(2, 27, 2) else 1
            blocks.append(OfficialRepVGGBlock(width, out, 2 if index == 0 else 1, grouped, se))
            width = out
        stages.append(nn.Sequential(*blocks))
    return OfficialStages(stages, width, num_classes)


def official_mobileone(depths, widths, copies=1, se_blocks=(0, 0, 0, 0), num_classes=7) -> nn.Module:
    width = min(64, widths[0])
    stages = [OfficialMobileOneBlock(3, width, 3, 2)]
    for depth, out, attended in zip(depths, widths, se_blocks):
        blocks = []
        for index in range(depth):
            options = dict(se=index >= depth - attended, copies=copies)
            blocks.append(OfficialMobileOneBlock(width, width, 3, 2 if index == 0 else 1, width, **options))
            blocks.append(OfficialMobileOneBlock(width, out, 1, **options))
            width = out
        stages.append(nn.Sequential(*blocks))
    return OfficialStages(stages, width, num_classes)


class LargeKernel(nn.Module):
    def __init__(self, channels, kernel, small):
        super().__init__()
        self.lkb_origin, self.small_conv = (conv_bn(channels, channels, k, groups=channels) for k in (kernel, small))

    def forward(self, x):
        return self.lkb_reparam(x) if hasattr(self, "lkb_reparam") else self.lkb_origin(x) + self.small_conv(x)

    def merge_(self):
        self.lkb_reparam = merged_conv([self.lkb_origin, self.small_conv])
        del self.lkb_origin, self.small_conv


class LargeUnit(nn.Module):
    def __init__(self, channels, kernel, small):
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.pw1, self.pw2 = conv_bn(channels, channels, 1), conv_bn(channels, channels, 1)
        self.large_kernel = LargeKernel(channels, kernel, small)

    def forward(self, x):
        return x + self.pw2(self.large_kernel(self.pw1(self.prelkb_bn(x)).relu()).relu())


class FFN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(channels)
        self.pw1, self.pw2 = conv_bn(channels, 4 * channels, 1), conv_bn(4 * channels, channels, 1)

    def forward(self, x):
        return x + self.pw2(nn.functional.gelu(self.pw1(self.preffn_bn(x))))


class OfficialRepLKNet(nn.Module):
    def __init__(self, channels, kernels, depths, small=5, num_classes=7):
        super().__init__()
        width = channels[0]
        self.stem = nn.ModuleList(
            [conv_bn(3, width, 3, 2), conv_bn(width, width, 3, 1, width), conv_bn(width, width, 1),
             conv_bn(width, width, 3, 2, width)]
        )  # fmt: skip
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for width, kernel, depth in zip(channels, kernels, depths):
            stage = nn.Module()
            stage.blocks = nn.Sequential(
                *[m for _ in range(depth) for m in (LargeUnit(width, kernel, small), FFN(width))]
            )
            self.stages.append(stage)
        for width, out in pairwise(channels):
            self.transitions.append(nn.Sequential(conv_bn(width, out, 1), conv_bn(out, out, 3, 2, out)))
        self.norm, self.head = nn.BatchNorm2d(channels[-1]), nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        for layer in self.stem:
            x = layer(x).relu()
        for index, stage in enumerate(self.stages):
            if index:
                for layer in self.transitions[index - 1]:
                    x = layer(x).relu()
            x = stage.blocks(x)
        return self.head(self.norm(x).mean((2, 3)))
