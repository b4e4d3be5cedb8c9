"""RepLKNet: depthwise kernels up to 31x31. Ding et al., "Scaling Up Your Kernels to 31x31" (CVPR 2022)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Count, Fraction, In, Pixels, Side, checked
from rep_plugin.backbones.staged import Depths, StagedNetwork, check_maps, check_stages, pick_arch
from rep_plugin.blocks.families import LargeKernelBlock, plain_block
from rep_plugin.errors import ArgumentError


@checked
@dataclass(frozen=True)
class RepLKNetArch:
    """What the networks of the paper differ in.

    Args:
        channels: channels of each stage.
        kernels: side of each stage's large kernels.
        depths: large-kernel blocks of each stage.
        dw_ratio: width of the depthwise layers against the stage's.
        small_kernel: side of the kernel beside each large one; 0: none.
    """

    channels: Sequence[Channels]
    kernels: Sequence[Side] = (31, 29, 27, 13)
    depths: Depths = (2, 2, 18, 2)
    dw_ratio: Annotated[float, In("(0, 64]")] = 1.0
    small_kernel: Pixels = 5

    def __post_init__(self):
        check_stages(channels=self.channels, kernels=self.kernels, depths=self.depths)


# Section 4.1 of the paper; XL is trained without small kernels.
ARCHS = {
    "31B": RepLKNetArch((128, 256, 512, 1024)),
    "31L": RepLKNetArch((192, 384, 768, 1536)),
    "XL": RepLKNetArch((256, 512, 1024, 2048), (27, 27, 27, 13), dw_ratio=1.5, small_kernel=0),
}


class DropPath(nn.Module):
    """Leave out a residual branch of whole images with probability ``rate`` in training, and scale up the others'.

    Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016).
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.rate)
        return x * mask.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:.3f}"


class _Parts:
    """Builds the network's layers in training or merged form."""

    def __init__(self, deploy: bool, keep_bn: bool, online: bool):
        self.deploy, self.merge_plain, self.online = deploy, deploy and not keep_bn, online

    def plain(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
        dilation: int = 1,
    ):
        act = nn.ReLU(inplace=True) if relu else None
        return plain_block(inputs, outputs, kernel, stride, dilation, groups, act, self.merge_plain)

    def large(self, channels: int, kernel: int, small_kernel: int | None, dilation: int) -> LargeKernelBlock:
        options = {"groups": channels, "act": nn.ReLU(inplace=True), "deploy": self.deploy, "online": self.online}
        return LargeKernelBlock(channels, channels, kernel, dilation=dilation, small_kernel=small_kernel, **options)


class _LargeKernelUnit(nn.Module):
    """Residual BN, 1x1, large depthwise kernel, 1x1: (N, C, H, W) -> (N, C, H, W). Section 4.1, figure 4."""

    def __init__(
        self,
        channels: int,
        inner: int,
        kernel: int,
        small: int | None,
        drop_path: float,
        parts: _Parts,
        dilation: int = 1,
    ):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.pw1 = parts.plain(channels, inner, 1)
        self.large = parts.large(inner, kernel, small, dilation)
        self.pw2 = parts.plain(inner, channels, 1, relu=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.large(self.pw1(self.norm(x)))))


class _ConvFFN(nn.Module):
    """Residual BN, 1x1, GELU, 1x1: (N, C, H, W) -> (N, C, H, W). Section 4.1, figure 4."""

    def __init__(self, channels: int, inner: int, drop_path: float, parts: _Parts):
        super().__init__()
        self.ffn_norm = nn.BatchNorm2d(channels)
        self.pw1 = parts.plain(channels, inner, 1, relu=False)
        self.gelu = nn.GELU()
        self.pw2 = parts.plain(inner, channels, 1, relu=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.gelu(self.pw1(self.ffn_norm(x)))))


@checked
class RepLKNet(StagedNetwork):
    """RepLKNet without a classifier: (N, in_channels, H, W) -> tuple of maps, at strides 4, 8, 16, 32.

    A stage is a ``transition`` (from the second on), then large-kernel units and ConvFFNs in turn.

    Args:
        arch: a name of ``ARCHS``, or a dict of :class:`RepLKNetArch`'s fields.
        out_indices: stages, 0 to 3.
        in_channels: channels of the images.
        small_kernel: side of the small kernels; None: the arch's own, 0: none.
        ffn_ratio: width inside a ConvFFN against the stage's.
        drop_path_rate: largest rate of stochastic depth; it grows along the depth from 0.
        norm_maps: put a BN on every map that leaves, as the authors' classifiers and mmpretrain do.
        deploy: build the merged network directly: one convolution for each large kernel, and for each 1x1 or stem
            convolution with its BN.
        keep_bn: leave these BNs in it: the form of the deployed files that the authors and mmpretrain publish.
        online: merge the large and the small kernel in every training step, see :class:`rep_plugin.blocks.base.RepBlock`.
        output_stride: limit of the stride, see :func:`rep_plugin.backbones.staged.plan_steps`.

    Raises:
        ArgumentError: an unknown arch, a bad index, output_stride, kernel or rate.

    Example:
        >>> import torch
        >>> from rep_plugin.backbones import RepLKNet
        >>> net = RepLKNet(dict(channels=(8, 16), kernels=(7, 5), depths=(1, 1)), out_indices=(1,))
        >>> [tuple(y.shape) for y in net(torch.ones(1, 3, 64, 64))]
        [(1, 16, 8, 8)]
    """

    def __init__(
        self,
        arch: str | Mapping = "31B",
        out_indices: Sequence[int] = (3,),
        in_channels: Channels = 3,
        small_kernel: Pixels | None = None,
        ffn_ratio: Annotated[float, In("(0, 64]")] = 4.0,
        drop_path_rate: Fraction = 0.3,
        norm_maps: bool = True,
        deploy: bool = False,
        keep_bn: bool = False,
        online: bool = False,
        output_stride: Count | None = None,
    ):
        super().__init__()
        settings: RepLKNetArch = pick_arch(arch, ARCHS, "RepLKNet")
        count = len(settings.channels)
        self.arch, self.out_indices = arch, check_maps(out_indices, count)
        if keep_bn and not deploy:
            raise ArgumentError("keep_bn is a choice of the deployed form, expected deploy=True with it")
        small = settings.small_kernel if small_kernel is None else small_kernel
        self._step((4, 1) + (2,) * (count - 1), output_stride)
        self.out_channels, self.stem_channels = list(settings.channels), settings.channels[0]

        parts, width = _Parts(deploy, keep_bn, online), settings.channels[0]
        self.stem = nn.Sequential(
            parts.plain(in_channels, width, 3, 2),
            parts.plain(width, width, 3, groups=width),
            parts.plain(width, width, 1),
            parts.plain(width, width, 3, 2, groups=width),
        )
        rates = iter(torch.linspace(0, drop_path_rate, sum(settings.depths), device="cpu").tolist())
        stages = []
        for depth, out, kernel, step in zip(settings.depths, settings.channels, settings.kernels, self.steps):
            blocks = OrderedDict()
            if stages:
                blocks["transition"] = nn.Sequential(
                    parts.plain(width, out, 1),
                    parts.plain(out, out, 3, step.stride, groups=out, dilation=step.first_dilation),
                )
            width, inner = out, int(out * settings.dw_ratio)
            for index in range(depth):
                rate = next(rates)
                blocks[f"{2 * index}"] = _LargeKernelUnit(
                    width, inner, kernel, small or None, rate, parts, step.dilation
                )
                blocks[f"{2 * index + 1}"] = _ConvFFN(width, int(width * ffn_ratio), rate, parts)
            stages.append(nn.Sequential(blocks))
        self.stages = nn.Sequential(*stages)
        leaving = sorted(set(self.out_indices)) if norm_maps else []
        self.norms = nn.ModuleDict({str(index): nn.BatchNorm2d(self.out_channels[index]) for index in leaving})
        self._init_parameters()

    def outgoing(self, index: int, x: Tensor) -> Tensor:
        """Return the map of stage ``index``, normalised where it has a BN."""
        for name, norm in self.norms.items():  # TorchScript takes no other way to a module by its name
            if name == str(index):
                x = norm(x)
        return x

    def drop_finish(self) -> None:
        """Remove the BNs of the maps that leave."""
        self.norms = nn.ModuleDict()
