"""Multi-branch blocks that stand where an ``nn.Conv2d`` stood: same arguments, same attributes, same output size.

The network's own BN and activation stay behind them. Merging (:func:`rep_plugin.reparameterize`) puts a plain
``nn.Conv2d`` back in the same place, so that the keys are the stock network's again.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import Channels, OneOf, Padding, Size, checked
from rep_plugin.attached import what_is_attached
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.branches import he_normal_
from rep_plugin.blocks.families import ACBlock, DiverseBranchBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.online import gain_of
from rep_plugin.errors import ArgumentError, ArgumentTypeError
from rep_plugin.functional.kernels import pair


class _OwnName(nn.BatchNorm2d):
    """Keeps ``BatchNorm2d`` out of the direct bases of what derives from it: mmengine's initialisers read those."""


class SilentBatchNorm2d(_OwnName):
    """A BN that starts with gamma 0, so that its branch adds nothing yet; it trains like any other.

    mmengine resets the gammas of what is called, or derives directly from, ``_BatchNorm`` or ``BatchNorm2d``. This one
    is neither, and so stays silent when a parent's ``init_weights()`` walks over it.
    """

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def _same_padding(padding: Size | str, kernel_size: Size, dilation: Size, stride: Size) -> tuple[int, int]:
    """Return the pixels per axis that a convolution's ``padding`` stands for; names as in ``nn.Conv2d``."""
    if not isinstance(padding, str):
        return pair(padding)
    if padding == "valid":
        return 0, 0
    if padding != "same" or pair(stride) != (1, 1):
        raise ArgumentError(
            f"padding must be numbers, 'valid', or 'same' at stride 1, got {padding!r}, stride {stride}"
        )
    (height, width), (down, right) = pair(kernel_size), pair(dilation)
    return down * (height - 1) // 2, right * (width - 1) // 2


@checked
class ConvLike(RepBlock):
    """``nn.Conv2d`` as a multi-branch block: the mixin that goes in front of a family's block, with Conv2d's arguments.

    ``main_branch`` names the branch that is the convolution itself, ``own_options`` what may be given beside.

    Args:
        in_channels: as in ``nn.Conv2d``, like all up to ``padding_mode``.
        out_channels: channels of the output.
        kernel_size: odd sides of the window.
        stride: stride in pixels.
        padding: rows and columns of zeros, ``"valid"`` or ``"same"``.
        dilation: distance in pixels between two taps of the window.
        groups: groups of the convolution.
        bias: whether the merged convolution may have a bias. The branches end in BNs and so always have a shift; with
            False it goes into the BN that follows.
        padding_mode: ``"zeros"`` alone.
        deploy: build the merged form directly.
        online: merge the branches in every training step: no BN is in them, the network's own follows their sum, or one in
            the block where ``bias`` is True.
        options: the family's own arguments.

    Raises:
        ArgumentError: another ``padding_mode``, or even sides.
        ArgumentTypeError: an unknown option.
    """

    main_branch: str
    is_init = False  # read by mmengine's BaseModule: True keeps a trained block from being initialised again

    own_options: Mapping[str, object]

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding | Annotated[str, OneOf(("same", "valid"))] = 0,
        dilation: Size = 1,
        groups: Channels = 1,
        bias: bool = True,
        padding_mode: Annotated[str, OneOf(("zeros",))] = "zeros",
        deploy: bool = False,
        online: bool = False,
        **options,
    ):
        if extra := {"act", "bn_follows"} & set(options):  # FamilyBlock's own, that a convolution has not
            raise ArgumentTypeError(f"{type(self).__name__} takes no {min(extra)!r}, expected Conv2d's arguments")
        pixels = _same_padding(padding, kernel_size, dilation, stride)
        shape = (in_channels, out_channels, kernel_size, stride, pixels, dilation, groups)
        options["bn_follows"] = not bias  # who leaves out the bias has a BN behind
        super().__init__(*shape, deploy=deploy, online=online, **options)
        self.bias_free, self.silent = not bias, False

    def silence_(self) -> "ConvLike":
        """Make every branch but the main one start at zero, by a last BN (online: a gain) of 0. Returns the block."""
        self.silent = True
        for name, chain in self.branches.items():
            if name == self.main_branch:
                continue
            last, bn = list(chain.named_children())[-1]
            if (gain := gain_of(bn)) is not None:
                nn.init.zeros_(gain)
                continue
            silent = SilentBatchNorm2d(bn.num_features, bn.eps, bn.momentum)
            setattr(chain, last, silent.to(bn.weight.device, bn.weight.dtype).train(bn.training))
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise afresh, as mmcv's ConvModule does its convolution: He's normal (fan out); silent branches stay so.

        mmengine calls this on the children of its modules.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module)
            elif isinstance(module, _BatchNorm):
                module.reset_parameters()
        self.init_gains_()
        if self.online and self.silent and not self.deployed:
            self.silence_()


class DBBConv2d(ConvLike, DiverseBranchBlock):
    """A :class:`rep_plugin.blocks.families.DiverseBranchBlock` (Ding et al., CVPR 2021), with its ``mid_channels``.

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import DBBConv2d
        >>> DBBConv2d(4, 8, 3, stride=2, padding=1)(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    main_branch = "conv"


class ACBConv2d(ConvLike, ACBlock):
    """A :class:`rep_plugin.blocks.families.ACBlock` (Ding et al., "ACNet", ICCV 2019).

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import ACBConv2d
        >>> ACBConv2d(4, 8, 3)(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """

    main_branch = "square"


class RepConv2d(ConvLike, RepVGGBlock):
    """A :class:`rep_plugin.blocks.families.RepVGGBlock` (Ding et al., CVPR 2021).

    Example:
        >>> from rep_plugin.blocks import RepConv2d
        >>> list(RepConv2d(4, 4, 3, padding=1).branches)
        ['conv', 'point', 'identity']
    """

    main_branch, own_options = "conv", {}


class MobileOneConv2d(ConvLike, MobileOneBlock):
    """A :class:`rep_plugin.blocks.families.MobileOneBlock` (Vasu et al., CVPR 2023) of 4 ``copies``.

    Example:
        >>> from rep_plugin.blocks import MobileOneConv2d
        >>> list(MobileOneConv2d(4, 8, 3).branches)
        ['conv0', 'conv1', 'conv2', 'conv3', 'scale']
    """

    main_branch = "conv0"
    own_options = {"copies": 4}


CONV_LIKES: dict[str, type[ConvLike]] = {
    "dbb": DBBConv2d,
    "acb": ACBConv2d,
    "repvgg": RepConv2d,
    "rep": RepConv2d,
    "mobileone": MobileOneConv2d,
}


def look_alike(block: str) -> type[ConvLike]:
    """Return the look-alike of a family's name. Raises ArgumentError for one that is not in CONV_LIKES."""
    if block not in CONV_LIKES:
        raise ArgumentError(f"unknown block {block!r}, expected one of {sorted(CONV_LIKES)}")
    return CONV_LIKES[block]


def why_not_replaceable(conv: nn.Module) -> str | None:
    """Return the reason why a look-alike cannot take a layer's place, None where it can."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__}, not a plain Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    if conv.kernel_size == (1, 1):
        return "kernel side 1"
    if conv.kernel_size[0] % 2 == 0 or conv.kernel_size[1] % 2 == 0:
        return "even kernel side"
    if "weight" not in conv._parameters:
        return "its weight is computed by a parametrization or a hook"
    if (what := what_is_attached(conv)) is not None:
        return f"it {what}"
    if not conv.weight.requires_grad:
        return "frozen"
    return None


def like_conv(conv: nn.Conv2d, block: str, **options) -> ConvLike:
    """Return a new, initialised look-alike of a convolution's shape, on its device and in its dtype and mode.

    Args:
        conv: the convolution.
        block: name in CONV_LIKES.
        options: the family's own arguments.

    Returns:
        Block with the convolution's input and output shapes.

    Raises:
        ArgumentError: an unknown block.
    """
    made = look_alike(block)(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode, **options,
    )  # fmt: skip
    made.init_weights()
    return made.to(conv.weight.device, conv.weight.dtype).train(conv.training)
