"""Rep-MobileNetV2: MobileNetV2's seven stages, trained as linear branches and deployed as plain 3x3 convolutions."""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from torch import Tensor, nn

from rep_plugin.arguments import Channels, Count, In, OneOf, checked
from rep_plugin.backbones.staged import StagedNetwork, Strides, check_maps, check_strides
from rep_plugin.backbones.warm_start import adapt_state_dict_
from rep_plugin.blocks.activations import ACTIVATIONS, build_activation
from rep_plugin.blocks.families import plain_block
from rep_plugin.blocks.inverted_residual import BRANCHES, RepInvertedResidual

# (expand ratio, channels at width 1.0, blocks) of the seven stages: MobileNetV2 (CVPR 2018), table 2.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
# Chosen by measuring (make bench-fashion-mnist; 12,000 images, 6 epochs, width 0.5): bottleneck + identity 83.9 % over
# three seeds against 81.5 % for plain training. With a 3x3 beside them (one seed each): 82.8 against 84.9, and a step
# costs a quarter more; an average-pool shortcut at stride 2 did not help either.
DEFAULT_BRANCHES = ("bottleneck", "identity")
Activation = Annotated[str, OneOf(ACTIVATIONS)]
DEFAULT_ACT = "relu6"


def make_divisible(value: float, divisor: int = 8) -> int:
    """Return the nearest multiple of a divisor, never below 90 % of the value (MobileNetV2's rule).

    Args:
        value: wanted number of channels.
        divisor: the divisor.

    Returns:
        Number of channels.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@checked
class RepMobileNetV2(StagedNetwork):
    """Rep-MobileNetV2 without a classifier: (N, in_channels, H, W) -> tuple of maps, one for each of ``out_indices``.

    Args:
        widen_factor: factor of the channels.
        branches: what every block trains as, see :class:`rep_plugin.blocks.inverted_residual.RepInvertedResidual`.
        out_indices: 0 to 6 are the stages, 7 the last feature convolution (as in mmpretrain's MobileNetV2).
        in_channels: channels of the images.
        strides: 1 or 2, of the stem and the seven stages.
        act: name of the activations.
        avg_shortcut: average-pool shortcut of the blocks of stride 2.
        last_kernel: 1 is the stock model's last convolution, 3 gives an all-3x3 network.
        deploy: build the merged network directly.
        online: merge the branches in every training step, see :class:`rep_plugin.blocks.base.RepBlock`.
        anneal: start as stock MobileNetV2 and load its checkpoints, see :mod:`rep_plugin.backbones.warm_start`;
            ``rep_plugin.LinearizeHook`` then leads to the mergeable form.
        output_stride: limit of the stride, see :func:`rep_plugin.backbones.staged.plan_steps`.

    Raises:
        ArgumentError: a bad width, stride list, output_stride, index, kernel or branch name, or both ``online`` and
            ``anneal``.

    Example:
        >>> import torch
        >>> from rep_plugin.backbones import RepMobileNetV2
        >>> net = RepMobileNetV2(0.35, out_indices=(2, 7))
        >>> [tuple(y.shape) for y in net(torch.ones(1, 3, 64, 64))]
        [(1, 16, 8, 8), (1, 1280, 2, 2)]
    """

    def __init__(
        self,
        widen_factor: Annotated[float, In("(0, 32]")] = 1.0,
        branches: Sequence[Annotated[str, OneOf(BRANCHES)]] = DEFAULT_BRANCHES,
        out_indices: Sequence[int] = (7,),
        in_channels: Channels = 3,
        strides: Strides = STRIDES,
        act: Activation = DEFAULT_ACT,
        avg_shortcut: bool = False,
        last_kernel: Literal[1, 3] = 1,
        deploy: bool = False,
        online: bool = False,
        anneal: bool = False,
        output_stride: Count | None = None,
    ):
        super().__init__()
        self.out_indices = check_maps(out_indices, len(STAGES) + 1)
        self.widen_factor, self.strides = widen_factor, check_strides(strides, len(STAGES))

        width = make_divisible(32 * widen_factor)
        self.stem = plain_block(in_channels, width, 3, strides[0], act=build_activation(act, width), deploy=deploy)
        self.stem_channels = width
        self._step(strides, output_stride)
        stages, self.out_channels = [], []
        for (expand_ratio, channels, depth), step in zip(STAGES, self.steps):
            out = make_divisible(channels * widen_factor)
            blocks = []
            for index in range(depth):
                stride, dilation, unstrided = step.of_block(index)
                block = (width, out, stride, expand_ratio, branches, avg_shortcut, act)
                form = {"deploy": deploy, "online": online, "anneal": anneal}
                blocks.append(RepInvertedResidual(*block, **form, dilation=dilation, unstrided=unstrided))
                width = out
            stages.append(nn.Sequential(*blocks))
            self.out_channels.append(out)
        self.stages = nn.Sequential(*stages)
        last = make_divisible(1280 * max(1.0, widen_factor))
        self.last_conv = plain_block(
            width, last, last_kernel, 1, self.steps[-1].dilation, act=build_activation(act, last), deploy=deploy
        )
        self.out_channels.append(last)
        self.reductions.append(self.reductions[-1])
        self._init_parameters()
        self.register_load_state_dict_pre_hook(adapt_state_dict_)

    def finish(self, x: Tensor) -> Tensor:
        """Return the last convolution's map, given the last stage's."""
        return self.last_conv(x)

    def drop_finish(self) -> None:
        """Remove the last convolution."""
        self.last_conv = nn.Identity()

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """As torch's, but a strict load that does not fit raises before anything is loaded.

        With ``anneal=True`` a stock MobileNetV2's state dict fits too.
        """
        state_dict = copy.copy(state_dict)
        adapt_state_dict_(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def parts(self) -> tuple[nn.Module, ...]:
        return (*self.stages, self.last_conv)
