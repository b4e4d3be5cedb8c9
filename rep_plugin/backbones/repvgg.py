"""RepVGG: four stages of 3x3 blocks. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again" (CVPR 2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rep_plugin.arguments import Channels, Count, checked
from rep_plugin.backbones.staged import Depths, StagedNetwork, Strides, Widths, check_stages
from rep_plugin.blocks.activations import relu_after
from rep_plugin.blocks.families import RepVGGBlock


@checked
@dataclass(frozen=True)
class RepVGGArch:
    """What the networks of the paper differ in.

    Args:
        depths: blocks of each stage.
        widths: factors of 64, 128, 256 and 512 channels.
        groups: groups of every second layer.
        se: squeeze-and-excitation in every block.
    """

    depths: Depths
    widths: Widths
    groups: Channels = 1
    se: bool = False

    def __post_init__(self):
        check_stages(depths=self.depths, widths=self.widths)


_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
# Tables 2 and 3 of the paper; D2se came later, with the authors' code.
ARCHS = {
    "A0": RepVGGArch(_A, (0.75, 0.75, 0.75, 2.5)),
    "A1": RepVGGArch(_A, (1, 1, 1, 2.5)),
    "A2": RepVGGArch(_A, (1.5, 1.5, 1.5, 2.75)),
    "B0": RepVGGArch(_B, (1, 1, 1, 2.5)),
    **{f"B1{g and f'g{g}'}": RepVGGArch(_B, (2, 2, 2, 4), g or 1) for g in ("", 2, 4)},
    **{f"B2{g and f'g{g}'}": RepVGGArch(_B, (2.5, 2.5, 2.5, 5), g or 1) for g in ("", 2, 4)},
    **{f"B3{g and f'g{g}'}": RepVGGArch(_B, (3, 3, 3, 5), g or 1) for g in ("", 2, 4)},
    "D2se": RepVGGArch(_D, (2.5, 2.5, 2.5, 5), se=True),
}


@checked
class RepVGG(StagedNetwork):
    """RepVGG without a classifier: (N, in_channels, H, W) -> tuple of maps, one for each of ``out_indices``.

    Args:
        arch: a name of ``ARCHS``, or a dict of :class:`RepVGGArch`'s fields.
        out_indices: stages, 0 to 3.
        in_channels: channels of the images.
        strides: 1 or 2, of the stem and the four stages.
        post_bn: train QARepVGG's blocks, whose merged weights quantise well.
        deploy: build the merged network directly.
        online: merge the branches in every training step, see :class:`rep_plugin.blocks.base.RepBlock`.
        output_stride: limit of the stride, see :func:`rep_plugin.backbones.staged.plan_steps`.

    Raises:
        ArgumentError: an unknown arch, a bad stride list, output_stride or index.

    Example:
        >>> import torch
        >>> from rep_plugin.backbones import RepVGG
        >>> net = RepVGG(dict(depths=(1, 1), widths=(0.25, 0.25)), out_indices=(0, 1), strides=(2, 2, 2))
        >>> [tuple(y.shape) for y in net(torch.ones(1, 3, 64, 64))]
        [(1, 16, 16, 16), (1, 32, 8, 8)]
    """

    def __init__(
        self,
        arch: str | Mapping = "A0",
        out_indices: Sequence[int] = (3,),
        in_channels: Channels = 3,
        strides: Strides = (2, 2, 2, 2, 2),
        post_bn: bool = False,
        deploy: bool = False,
        online: bool = False,
        output_stride: Count | None = None,
    ):
        super().__init__()
        settings: RepVGGArch = self._lay_out(arch, ARCHS, "RepVGG", out_indices, strides, output_stride)

        def block(
            inputs: int, outputs: int, stride: int, dilation: int = 1, groups: int = 1, unstrided: bool = False
        ) -> RepVGGBlock:
            act = relu_after(outputs, settings.se)
            options = {"deploy": deploy, "post_bn": post_bn, "online": online, "unstrided": unstrided}
            return RepVGGBlock(inputs, outputs, 3, stride, None, dilation, groups, act, **options)

        self.stem = block(in_channels, self.stem_channels, strides[0])
        stages, width, layer = [], self.stem_channels, 0
        for depth, out, step in zip(settings.depths, self.out_channels, self.steps):
            blocks = []
            for index in range(depth):
                layer += 1
                groups = settings.groups if layer % 2 == 0 else 1
                stride, dilation, unstrided = step.of_block(index)
                blocks.append(block(width, out, stride, dilation, groups, unstrided))
                width = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self._init_parameters()
