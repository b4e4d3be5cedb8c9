"""Rep-MobileNetV2's block: an inverted residual without inner activation, trained as a sum of linear branches.

Source: the Rep-MobileNetV2 thesis (2023) for the idea; border handling as in :mod:`rep_plugin.blocks.chain`.
"""

from collections.abc import Sequence
from typing import Annotated

from rep_plugin.arguments import Channels, In, OneOf, Side, checked
from rep_plugin.blocks.activations import ACTIVATIONS, build_activation
from rep_plugin.blocks.annealed import ALPHA, AnnealedActivation, AnnealedBottleneck
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.branches import average_conv_bn, conv_bn, identity_bn, linear_bottleneck
from rep_plugin.errors import ArgumentError

BRANCHES = ("bottleneck", "identity", "avgpool", "conv1x1", "conv3x3")


@checked
class RepInvertedResidual(RepBlock):
    """Sum of the chosen linear branches, then an activation; deploys as one 3x3 convolution and the activation.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1 or 2.
        expand_ratio: width of the bottleneck's depthwise layer against the input.
        branches: any of ``bottleneck identity avgpool conv1x1 conv3x3``; ``identity`` is left out where the shape changes.
        avg_shortcut: give a block of stride 2 the average-pool shortcut (avg3x3 -> 1x1 -> bn).
        act: name of the activation after the sum, see :mod:`rep_plugin.blocks.activations`.
        deploy: build the merged form directly.
        online: merge the branches in every training step.
        anneal: start as stock MobileNetV2's block, see :mod:`rep_plugin.blocks.annealed`; no effect with ``deploy``.
        dilation: dilation of the windows.
        unstrided: give a block of stride 1 the branches of one of stride 2: dilation stands in for the stride, see
            :func:`rep_plugin.backbones.staged.plan_steps`.

    Raises:
        ArgumentError: an unknown branch name, no branch that remains, or both ``online`` and ``anneal``.

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import RepInvertedResidual
        >>> block, x = RepInvertedResidual(8, 8).eval(), torch.ones(1, 8, 7, 7)
        >>> y = block(x)
        >>> block.switch_to_deploy()
        >>> y.shape, torch.allclose(block(x), y, atol=1e-4), block.reparam_conv.kernel_size
        (torch.Size([1, 8, 7, 7]), True, (3, 3))
    """

    # Plain and finished annealed checkpoints fit each other, see rep_plugin.checkpoints.strict.
    optional_state = {f"act.{ALPHA}": 1, f"branches.bottleneck.{ALPHA}": 1}

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        stride: Side = 1,
        expand_ratio: Annotated[int, In("[1, 64]")] = 6,
        branches: Sequence[Annotated[str, OneOf(BRANCHES)]] = ("bottleneck", "identity"),
        avg_shortcut: bool = False,
        act: Annotated[str, OneOf(ACTIVATIONS)] = "relu6",
        deploy: bool = False,
        online: bool = False,
        anneal: bool = False,
        dilation: Side = 1,
        unstrided: bool = False,
    ):
        if online and anneal:
            raise ArgumentError(
                "anneal=True starts from stock's BNs inside the branches, which online=True does not have"
            )
        strided = unstrided or stride != 1
        keeps_shape = not strided and in_channels == out_channels
        chains = {}
        if not deploy:
            if "bottleneck" in branches:
                bottleneck = linear_bottleneck(in_channels, out_channels, stride, expand_ratio, dilation)
                chains["bottleneck"] = AnnealedBottleneck(bottleneck, act) if anneal else bottleneck
            if "conv3x3" in branches:
                chains["conv3x3"] = conv_bn(in_channels, out_channels, 3, stride, dilation)
            if "conv1x1" in branches:
                chains["conv1x1"] = conv_bn(in_channels, out_channels, 1, stride)
            if "avgpool" in branches or (avg_shortcut and strided):
                chains["avgpool"] = average_conv_bn(in_channels, out_channels, 3, stride, dilation, strided)
            if "identity" in branches and keeps_shape:
                chains["identity"] = identity_bn(out_channels)
            if not chains:
                raise ArgumentError(
                    f"branches {tuple(branches)} leave a block ({in_channels} -> {out_channels}, stride {stride}) without "
                    "any branch: 'identity' needs equal channels and stride 1"
                )
        activation = AnnealedActivation(act) if anneal and not deploy else build_activation(act, out_channels)
        super().__init__(
            in_channels, out_channels, 3, chains, stride, None, dilation, act=activation, deploy=deploy, online=online
        )

    def switch_to_deploy(self) -> None:
        """As :class:`RepBlock`'s.

        Raises:
            AnnealError: the block is annealed and its alpha is not 1; the block is left as it was.
            TrainModeError: a BN in train mode.
        """
        act = self.act.finished() if isinstance(self.act, AnnealedActivation) else self.act
        super().switch_to_deploy()
        self.act = act
