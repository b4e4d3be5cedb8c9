"""The published multi-branch blocks, each a short list of chains."""

from collections.abc import Callable, Mapping
from typing import Annotated, get_type_hints

from torch import nn

from rep_plugin.arguments import Channels, In, Padding, Size, check, checked
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.branches import conv_average_bn, conv_bn, conv_conv_bn, identity_bn, require_groups
from rep_plugin.blocks.chain import Chain
from rep_plugin.errors import ArgumentError, ArgumentTypeError, did_you_mean
from rep_plugin.functional.kernels import pair

Copies = Annotated[int, In("[1, 64]")]


def _odd(kernel_size: Size, block: str) -> tuple[int, int]:
    """Raise ArgumentError for a window that has no centre tap: smaller branches could not be put there."""
    size = pair(kernel_size)
    if size[0] % 2 == 0 or size[1] % 2 == 0:
        raise ArgumentError(f"{block} needs odd kernel sides, got {size}")
    return size


@checked
class FamilyBlock(RepBlock):
    """What the published blocks share: (N, in_channels, H, W) -> (N, out_channels, H', W'), the sizes of ``nn.Conv2d``.

    A subclass has ``own_options`` (the arguments of its own, with defaults), ``window``, and the static method
    ``chains(in_channels, out_channels, size, (stride, dilation, groups), **options)``, which returns the branches by name.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd sides of the window (default: 3, of :class:`LargeKernelBlock` 31).
        stride: stride in pixels.
        padding: rows and columns of zeros (default: "same").
        dilation: distance in pixels between two taps of the window.
        groups: groups of the convolution.
        act: module after the sum.
        deploy: build the merged form directly.
        online: merge the branches in every training step, see :class:`rep_plugin.blocks.base.RepBlock`.
        bn_follows: the network has a BN behind the block, so that ``online`` adds none.
        options: the family's own arguments.

    Raises:
        ArgumentError: an even side, or channels that ``groups`` does not divide.
        ArgumentTypeError: an unknown option.
    """

    window: Size = 3
    own_options: Mapping[str, object] = {}
    chains: Callable[..., dict[str, Chain]]

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Padding | None = None,
        dilation: Size = 1,
        groups: Channels = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        online: bool = False,
        bn_follows: bool = False,
        **options,
    ):
        if unknown := sorted(set(options) - set(self.own_options)):
            raise ArgumentTypeError(
                f"{type(self).__name__} takes no {unknown[0]!r}"
                + (did_you_mean(unknown[0], self.own_options) or f", expected one of {sorted(self.own_options)}")
            )
        hints = get_type_hints(self.chains, include_extras=True)
        options = self.own_options | {name: check(name, value, hints[name]) for name, value in options.items()}
        require_groups(groups, in_channels=in_channels, out_channels=out_channels)
        size = _odd(self.window if kernel_size is None else kernel_size, type(self).__name__)
        chains = {} if deploy else self.chains(in_channels, out_channels, size, (stride, dilation, groups), **options)
        post_bn = (online and not bn_follows) or options.get("post_bn", False)
        super().__init__(
            in_channels, out_channels, size, chains, stride, padding, dilation, groups, act, deploy, post_bn, online
        )


def _keeps_shape(in_channels: int, out_channels: int, stride: Size, unstrided: bool) -> bool:
    return in_channels == out_channels and pair(stride) == (1, 1) and not unstrided


class RepVGGBlock(FamilyBlock):
    """``conv`` KxK, ``point`` 1x1 and, where the shape is kept, ``identity``, each with its BN.

    Ding et al., "RepVGG" (CVPR 2021), section 3. Arguments as :class:`FamilyBlock`'s, and:

    Args:
        post_bn: QARepVGG's form (Chu et al., AAAI 2024): 1x1 and identity without BN, and one BN after the sum, so that
            the merged weights have no outliers and quantise well.
        unstrided: leave ``identity`` out: a block of stride 2 whose stride became dilation, see
            :func:`rep_plugin.backbones.staged.plan_steps`.

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import RepVGGBlock
        >>> block, x = RepVGGBlock(4, 4).eval(), torch.ones(1, 4, 9, 9)
        >>> y = block(x)
        >>> block.switch_to_deploy()
        >>> torch.allclose(block(x), y, atol=1e-5)
        True
    """

    own_options = {"post_bn": False, "unstrided": False}

    @staticmethod
    def chains(
        in_channels, out_channels, size, shape, post_bn: bool = False, unstrided: bool = False
    ) -> dict[str, Chain]:
        stride, _, groups = shape
        chains = {"conv": conv_bn(in_channels, out_channels, size, *shape)}
        if post_bn:
            point = nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)
            chains["point"] = Chain({"conv": point})
        else:
            chains["point"] = conv_bn(in_channels, out_channels, 1, stride, 1, groups)
        if _keeps_shape(in_channels, out_channels, stride, unstrided):
            chains["identity"] = Chain({"copy": nn.Identity()}) if post_bn else identity_bn(out_channels)
        return chains


class ACBlock(FamilyBlock):
    """``square`` KxK, ``vertical`` Kx1 and ``horizontal`` 1xK, each with its BN; arguments as :class:`FamilyBlock`'s.

    Ding et al., "ACNet" (ICCV 2019), section 3.

    Example:
        >>> from rep_plugin.blocks import ACBlock
        >>> [tuple(chain.conv.weight.shape[2:]) for chain in ACBlock(4, 8).branches.values()]
        [(3, 3), (3, 1), (1, 3)]
    """

    @staticmethod
    def chains(in_channels, out_channels, size, shape) -> dict[str, Chain]:
        sizes = {"square": size, "vertical": (size[0], 1), "horizontal": (1, size[1])}
        return {name: conv_bn(in_channels, out_channels, size, *shape) for name, size in sizes.items()}


class DiverseBranchBlock(FamilyBlock):
    """``conv`` KxK, ``point`` 1x1, ``sequence`` 1x1-KxK and ``average`` 1x1-pool, a BN after each layer.

    In a depthwise block ``point`` adds nothing and is left out. Ding et al., "Diverse Branch Block" (CVPR 2021), section
    3.3. Arguments as :class:`FamilyBlock`'s, and:

    Args:
        mid_channels: channels between the layers of ``sequence`` (default: the inputs', twice as many in a depthwise
            block).

    Example:
        >>> from rep_plugin.blocks import DiverseBranchBlock
        >>> list(DiverseBranchBlock(4, 8).branches)
        ['conv', 'point', 'sequence', 'average']
    """

    own_options = {"mid_channels": None}

    @staticmethod
    def chains(in_channels, out_channels, size, shape, mid_channels: Channels | None = None) -> dict[str, Chain]:
        stride, _, groups = shape
        depthwise = groups == in_channels == out_channels > 1
        mid = mid_channels or (2 * in_channels if depthwise else in_channels)
        chains = {"conv": conv_bn(in_channels, out_channels, size, *shape)}
        if not depthwise:
            chains["point"] = conv_bn(in_channels, out_channels, 1, stride, 1, groups)
        chains["sequence"] = conv_conv_bn(in_channels, out_channels, size, *shape, mid_channels=mid)
        chains["average"] = conv_average_bn(in_channels, out_channels, size, *shape)
        return chains


class MobileOneBlock(FamilyBlock):
    """``copies`` of a KxK (``conv0`` ...), ``scale`` 1x1 where K > 1, and ``identity`` where the shape is kept, with BNs.

    Vasu et al., "MobileOne" (CVPR 2023), section 3.2. Arguments as :class:`FamilyBlock`'s, and:

    Args:
        copies: number of KxK branches, >= 1.
        unstrided: leave ``identity`` out, as in :class:`RepVGGBlock`.

    Example:
        >>> from rep_plugin.blocks import MobileOneBlock
        >>> list(MobileOneBlock(8, 8, groups=8, copies=2).branches)
        ['conv0', 'conv1', 'scale', 'identity']
    """

    own_options = {"copies": 1, "unstrided": False}

    @staticmethod
    def chains(in_channels, out_channels, size, shape, copies: Copies = 1, unstrided: bool = False) -> dict[str, Chain]:
        stride, _, groups = shape
        chains = {f"conv{index}": conv_bn(in_channels, out_channels, size, *shape) for index in range(copies)}
        if size != (1, 1):
            chains["scale"] = conv_bn(in_channels, out_channels, 1, stride, 1, groups)
        if _keeps_shape(in_channels, out_channels, stride, unstrided):
            chains["identity"] = identity_bn(out_channels)
        return chains


class LargeKernelBlock(FamilyBlock):
    """``large`` KxK and ``small`` SxS in parallel, each with its BN; mostly depthwise (``groups=channels``).

    Ding et al., "Scaling Up Your Kernels to 31x31" (CVPR 2022), section 3.2. Arguments as :class:`FamilyBlock`'s, and:

    Args:
        small_kernel: odd sides of ``small``, no larger than the window; None: no such branch.

    Example:
        >>> from rep_plugin.blocks import LargeKernelBlock
        >>> list(LargeKernelBlock(8, 8, 13, groups=8).branches)
        ['large', 'small']
    """

    window = 31
    own_options = {"small_kernel": 5}

    @staticmethod
    def chains(in_channels, out_channels, size, shape, small_kernel: Size | None = 5) -> dict[str, Chain]:
        chains = {"large": conv_bn(in_channels, out_channels, size, *shape)}
        if small_kernel is not None:
            small = _odd(small_kernel, "the small kernel of LargeKernelBlock")
            chains["small"] = conv_bn(in_channels, out_channels, small, *shape)
        return chains


def plain_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    act: nn.Module | None = None,
    deploy: bool = False,
) -> RepBlock:
    """Return a block of one convolution and its BN (``conv``), with "same" padding.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, dilation: sides, stride and dilation of the window, in pixels.
        groups: groups of the convolution.
        act: module after the BN.
        deploy: build the merged form directly.

    Returns:
        Block (N, in_channels, H, W) -> (N, out_channels, H', W').
    """
    shape = (stride, dilation, groups)
    chains = {} if deploy else {"conv": conv_bn(in_channels, out_channels, kernel_size, *shape)}
    return RepBlock(
        in_channels, out_channels, kernel_size, chains, stride, None, dilation, groups, act=act, deploy=deploy
    )
