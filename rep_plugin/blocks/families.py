"""The published multi-branch blocks, each a short list of chains.

All are (N, in_channels, H, W) -> (N, out_channels, H', W') with the sizes of ``nn.Conv2d`` of the same arguments, deploy
as one convolution, and take ``act`` (a module after the sum), ``deploy`` and ``online`` (see
:class:`rep_plugin.blocks.base.RepBlock`). All raise ValueError where ``groups`` does
not divide the channels.
"""

from torch import nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.branches import Size, conv_average_bn, conv_bn, conv_conv_bn, identity_bn
from rep_plugin.blocks.chain import Chain
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import pair


def _odd(kernel_size: Size, block: str) -> tuple[int, int]:
    """Raise ValueError for a window that has no centre tap: smaller branches could not be put there."""
    size = pair(kernel_size)
    if size[0] % 2 == 0 or size[1] % 2 == 0:
        raise ArgumentError(f"{block} needs odd kernel sides, got {size}")
    return size


class RepVGGBlock(RepBlock):
    """``conv`` KxK, ``point`` 1x1 and, where the shape is kept, ``identity``, each with its BN.

    ``post_bn=True`` is QARepVGG's form (Chu et al., AAAI 2024): 1x1 and identity without BN, and one BN after the sum, so
    that the merged weights have no outliers and quantise well. ``unstrided=True`` leaves ``identity`` out: a block of
    stride 2 whose stride became dilation, see :func:`rep_plugin.backbones.staged.plan_steps`. Ding et al., "RepVGG" (CVPR
    2021), section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        post_bn: bool = False,
        online: bool = False,
        unstrided: bool = False,
    ):
        size = _odd(kernel_size, "RepVGGBlock")
        branches = {}
        if not deploy:
            branches["conv"] = conv_bn(in_channels, out_channels, size, stride, dilation, groups)
            if post_bn:
                point = nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)
                branches["point"] = Chain({"conv": point})
            else:
                branches["point"] = conv_bn(in_channels, out_channels, 1, stride, 1, groups)
            if in_channels == out_channels and pair(stride) == (1, 1) and not unstrided:
                branches["identity"] = Chain({"copy": nn.Identity()}) if post_bn else identity_bn(out_channels)
        super().__init__(
            in_channels, out_channels, size, branches, stride, padding, dilation, groups, act, deploy, post_bn or online,
            online,
        )  # fmt: skip


class ACBlock(RepBlock):
    """``square`` KxK, ``vertical`` Kx1 and ``horizontal`` 1xK, each with its BN.

    Ding et al., "ACNet" (ICCV 2019), section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        online: bool = False,
    ):
        height, width = _odd(kernel_size, "ACBlock")
        branches = {}
        if not deploy:
            sizes = {"square": (height, width), "vertical": (height, 1), "horizontal": (1, width)}
            branches = {
                name: conv_bn(in_channels, out_channels, size, stride, dilation, groups) for name, size in sizes.items()
            }
        super().__init__(
            in_channels, out_channels, (height, width), branches, stride, padding, dilation, groups, act, deploy,
            online=online,
        )  # fmt: skip


class DiverseBranchBlock(RepBlock):
    """``conv`` KxK, ``point`` 1x1, ``sequence`` 1x1-KxK and ``average`` 1x1-pool, a BN after each layer.

    ``mid_channels`` are those between the layers of ``sequence``; by default the inputs', twice as many in a depthwise
    block, where ``point`` adds nothing and is left out. Ding et al., "Diverse Branch Block" (CVPR 2021), section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        mid_channels: int | None = None,
        online: bool = False,
    ):
        size = _odd(kernel_size, "DiverseBranchBlock")
        branches = {}
        if not deploy:
            depthwise = groups == in_channels == out_channels > 1
            mid = mid_channels or (2 * in_channels if depthwise else in_channels)
            shape = (stride, dilation, groups)
            branches["conv"] = conv_bn(in_channels, out_channels, size, *shape)
            if not depthwise:
                branches["point"] = conv_bn(in_channels, out_channels, 1, stride, 1, groups)
            branches["sequence"] = conv_conv_bn(in_channels, out_channels, size, *shape, mid_channels=mid)
            branches["average"] = conv_average_bn(in_channels, out_channels, size, *shape)
        super().__init__(
            in_channels, out_channels, size, branches, stride, padding, dilation, groups, act, deploy, online=online
        )


class MobileOneBlock(RepBlock):
    """``copies`` of a KxK (``conv0`` ...), ``scale`` 1x1 where K > 1, and ``identity`` where the shape is kept, with BNs.

    ``unstrided`` as :class:`RepVGGBlock`'s. Vasu et al., "MobileOne" (CVPR 2023), section 3.2. Raises ValueError for
    copies < 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        copies: int = 1,
        online: bool = False,
        unstrided: bool = False,
    ):
        size = _odd(kernel_size, "MobileOneBlock")
        if copies < 1:
            raise ArgumentError(f"copies must be >= 1, got {copies}")
        branches = {}
        if not deploy:
            for index in range(copies):
                branches[f"conv{index}"] = conv_bn(in_channels, out_channels, size, stride, dilation, groups)
            if size != (1, 1):
                branches["scale"] = conv_bn(in_channels, out_channels, 1, stride, 1, groups)
            if in_channels == out_channels and pair(stride) == (1, 1) and not unstrided:
                branches["identity"] = identity_bn(out_channels)
        super().__init__(
            in_channels, out_channels, size, branches, stride, padding, dilation, groups, act, deploy, online=online
        )


class LargeKernelBlock(RepBlock):
    """``large`` KxK and ``small`` SxS in parallel, each with its BN; mostly depthwise (``groups=channels``).

    Ding et al., "Scaling Up Your Kernels to 31x31" (CVPR 2022), section 3.2. Raises ValueError for a small side over the
    large one, or an even one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 31,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        small_kernel: Size | None = 5,
        online: bool = False,
    ):
        size = _odd(kernel_size, "LargeKernelBlock")
        branches = {}
        if not deploy:
            branches["large"] = conv_bn(in_channels, out_channels, size, stride, dilation, groups)
            if small_kernel is not None:
                small = _odd(small_kernel, "LargeKernelBlock")
                branches["small"] = conv_bn(in_channels, out_channels, small, stride, dilation, groups)
        super().__init__(
            in_channels, out_channels, size, branches, stride, padding, dilation, groups, act, deploy, online=online
        )
