"""MobileOne: depthwise and pointwise blocks in turn. Vasu et al., "MobileOne" (CVPR 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rep_plugin.arguments import Channels, Count, Pixels, checked
from rep_plugin.backbones.staged import Depths, StagedNetwork, Strides, Widths, check_stages
from rep_plugin.blocks.activations import relu_after
from rep_plugin.blocks.families import Copies, MobileOneBlock
from rep_plugin.errors import ArgumentError

_DEPTHS = (2, 8, 10, 1)


@checked
@dataclass(frozen=True)
class MobileOneArch:
    """What the networks of the paper differ in.

    Args:
        widths: factors of 64, 128, 256 and 512 channels.
        copies: copies of every convolution.
        depths: blocks of each stage.
        se_blocks: how many of them, the last ones, have attention.
    """

    widths: Widths
    copies: Copies = 1
    depths: Depths = _DEPTHS
    se_blocks: Sequence[Pixels] = (0, 0, 0, 0)

    def __post_init__(self):
        check_stages(widths=self.widths, depths=self.depths)
        if len(self.se_blocks) != len(self.depths) or any(not 0 <= n <= d for n, d in zip(self.se_blocks, self.depths)):
            raise ArgumentError(f"se_blocks must be 0 to {tuple(self.depths)} (depths), got {tuple(self.se_blocks)}")


# Table 2 of the paper.
ARCHS = {
    "s0": MobileOneArch((0.75, 1.0, 1.0, 2.0), copies=4),
    "s1": MobileOneArch((1.5, 1.5, 2.0, 2.5)),
    "s2": MobileOneArch((1.5, 2.0, 2.5, 4.0)),
    "s3": MobileOneArch((2.0, 2.5, 3.0, 4.0)),
    "s4": MobileOneArch((3.0, 3.5, 3.5, 4.0), se_blocks=(0, 0, 5, 1)),
}


@checked
class MobileOne(StagedNetwork):
    """MobileOne without a classifier: (N, in_channels, H, W) -> tuple of maps, one for each of ``out_indices``.

    A stage is a Sequential of depthwise 3x3 and pointwise blocks in turn.

    Args:
        arch: a name of ``ARCHS``, or a dict of :class:`MobileOneArch`'s fields.
        out_indices: stages, 0 to 3.
        in_channels: channels of the images.
        strides: 1 or 2, of the stem and the four stages.
        deploy: build the merged network directly.
        online: merge the branches in every training step, see :class:`rep_plugin.blocks.base.RepBlock`.
        output_stride: limit of the stride, see :func:`rep_plugin.backbones.staged.plan_steps`.

    Raises:
        ArgumentError: an unknown arch, a bad stride list, output_stride or index.

    Example:
        >>> import torch
        >>> from rep_plugin.backbones import MobileOne
        >>> net = MobileOne(dict(depths=(1, 1), widths=(0.25, 0.25), se_blocks=(0, 0)), (1,), strides=(2, 2, 2))
        >>> [tuple(y.shape) for y in net(torch.ones(1, 3, 64, 64))]
        [(1, 32, 8, 8)]
    """

    def __init__(
        self,
        arch: str | Mapping = "s0",
        out_indices: Sequence[int] = (3,),
        in_channels: Channels = 3,
        strides: Strides = (2, 2, 2, 2, 2),
        deploy: bool = False,
        online: bool = False,
        output_stride: Count | None = None,
    ):
        super().__init__()
        settings: MobileOneArch = self._lay_out(arch, ARCHS, "MobileOne", out_indices, strides, output_stride)

        width = self.stem_channels
        form = {"deploy": deploy, "online": online}
        self.stem = MobileOneBlock(in_channels, width, 3, strides[0], act=relu_after(width, False), **form)
        stages = []
        for depth, attended, out, step in zip(
            settings.depths, settings.se_blocks, self.out_channels, self.steps, strict=True
        ):
            blocks = []
            for index in range(depth):
                se = index >= depth - attended
                options = {"copies": settings.copies, **form}
                act = relu_after(width, se)
                stride, dilation, unstrided = step.of_block(index)
                shape = (stride, None, dilation, width, act)
                blocks.append(MobileOneBlock(width, width, 3, *shape, **options, unstrided=unstrided))
                blocks.append(MobileOneBlock(width, out, 1, act=relu_after(out, se), **options))
                width = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self._init_parameters()
