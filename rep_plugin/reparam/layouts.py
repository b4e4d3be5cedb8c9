"""How blocks of other projects look once they are deployed, so that merged models have the keys that are theirs.

What a block computes is read from its forward (:mod:`rep_plugin.reparam.linear_parts`). Its children's names only tell under
which name the merged convolution stands; what follows it keeps its own, and drop paths go.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """The deployed form of one kind of block.

    Args:
        name: kind of block, for reports.
        children: names of modules that it holds, at any depth.
        conv: name of the convolution in the Sequential that takes the block's place; empty: the convolution takes it itself.
        kinds: names of classes, where the children's are anybody's.
    """

    name: str
    children: str
    conv: str
    kinds: str = ""

    def fits(self, module: nn.Module) -> bool:
        """Return whether a module is such a block, not yet deployed."""
        named = not self.kinds or type(module).__name__ in self.kinds.split()
        return named and all(_holds(module, name.split(".")) for name in self.children.split())

    @property
    def certain(self) -> bool:
        """Whether the names of the children leave no doubt."""
        return not self.kinds


def _holds(module: nn.Module | None, path: list[str]) -> bool:
    for key in path:
        module = None if module is None else module._modules.get(key)
    return module is not None


LAYOUTS = [
    Layout("timm RepVGG block", "conv_kxk conv_1x1", "reparam_conv"),
    Layout("timm MobileOne block", "conv_kxk.0.conv", "reparam_conv"),
    Layout("timm large-kernel convolution", "large_conv", "reparam_conv"),
    Layout("mmpretrain RepVGG block", "branch_3x3 branch_1x1", "branch_reparam"),
    Layout("mmpretrain MobileOne block", "branch_conv_list.0", "branch_reparam"),
    Layout("RepVGG block", "rbr_dense rbr_1x1", "rbr_reparam"),  # official, plus and QA forms, YOLOv6, YOLOv7, mmyolo
    Layout("MobileOne block", "rbr_conv.0", "reparam_conv"),  # apple/ml-mobileone, ml-fastvit
    Layout("large-kernel convolution", "lkb_origin", "lkb_reparam"),  # RepLKNet, mmpretrain
    Layout("dilated large-kernel block", "lk_origin origin_bn", "lk_origin"),  # UniRepLKNet
    Layout("diverse branch block", "dbb_origin dbb_avg dbb_1x1_kxk", "dbb_reparam"),
    Layout("asymmetric convolution block", "square_conv square_bn ver_conv hor_conv", "fused_conv"),
    Layout("FastViT token mixer", "mixer norm", "reparam_conv", "RepMixer"),
    Layout("conditional position encoding", "pos_enc", "reparam_conv", "RepConditionalPosEnc"),
    Layout("conditional position encoding", "pe", "reparam_conv", "RepCPE"),
    Layout("RepViT depthwise block", "conv conv1", "", "RepVggDw RepVGGDW"),
    Layout("depthwise residual", "cpe", "", "RepCPE"),  # iFormer
    Layout("depthwise residual", "", "", "Residual ResidualDrop"),  # RepViT, EfficientViT, SHViT
]


def find_layout(module: nn.Module) -> Layout | None:
    """Return the layout of a block, None where it is of no known kind."""
    return next((layout for layout in LAYOUTS if layout.fits(module)), None)
