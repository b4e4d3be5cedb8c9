"""Multi-branch blocks of timm, mmpretrain and the official repositories that add their branches.

Branches are read by :mod:`rep_plugin.reparam.linear_layers` and must be centred on each other. A Sequential takes the
block's place: the convolution under the name it has in the block's own deployed form (so that the keys agree with theirs),
then everything that followed the sum. Deployed convolutions are trainable parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rep_plugin.functional.padded import add_padded
from rep_plugin.reparam.adapters import adapts
from rep_plugin.reparam.foreign.parts import has_layout, live_children, merge_branches, replace_by
from rep_plugin.reparam.linear_layers import after_affine, bn_affine, read_chain


@dataclass(frozen=True)
class SumLayout:
    """A block that adds its branches, ``needed`` and ``optional``, and applies ``after`` to the sum, in that order.

    ``dropped``: what it may hold besides, and loses.
    """

    name: str
    needed: str
    optional: str
    after: str
    conv: str
    dropped: str = ""
    test: Callable[[nn.Module], bool] = lambda module: True

    def matches(self, module: nn.Module) -> bool:
        return has_layout(module, self.needed, f"{self.optional} {self.after} {self.dropped}") and self.test(module)

    def merge(self, module: nn.Module) -> nn.Module:
        return replace_by(self.conv, merge_branches(module, f"{self.needed} {self.optional}"), module, self.after)


# Drop path on the branches is for training, and goes with them. stock mmpretrain passes over the SE layer when it deploys.
LAYOUTS = [
    SumLayout("timm RepVGG block", "conv_kxk conv_1x1", "identity", "attn act", "reparam_conv", "drop_path"),
    SumLayout("timm MobileOne block", "conv_kxk", "conv_scale identity", "attn se act", "reparam_conv", "drop_path",
              lambda module: isinstance(module.conv_kxk, nn.ModuleList)),
    SumLayout("timm large-kernel convolution", "large_conv", "small_conv", "se act", "reparam_conv"),
    SumLayout("mmpretrain RepVGG block", "branch_3x3 branch_1x1", "branch_norm", "se_layer act", "branch_reparam"),
    SumLayout("mmpretrain MobileOne block", "branch_conv_list", "branch_scale branch_norm", "se act", "branch_reparam"),
    # DingXiaoH/RepVGG with its plus and QA forms, YOLOv6, YOLOv7, mmyolo
    SumLayout("RepVGG block", "rbr_dense rbr_1x1", "rbr_identity", "se bn nonlinearity act post_se", "rbr_reparam"),
    # apple/ml-mobileone, ml-fastvit
    SumLayout("MobileOne block", "rbr_conv", "rbr_scale rbr_skip", "se activation", "reparam_conv",
              test=lambda module: isinstance(module.rbr_conv, nn.ModuleList)),
    # DingXiaoH/RepLKNet-pytorch, mmpretrain
    SumLayout("large-kernel convolution", "lkb_origin", "small_conv", "", "lkb_reparam"),
    # DingXiaoH/DiverseBranchBlock
    SumLayout("diverse branch block", "dbb_origin dbb_avg dbb_1x1_kxk", "dbb_1x1", "nonlinear", "dbb_reparam"),
]  # fmt: skip
for layout in LAYOUTS:
    adapts(layout.name, layout.matches)(layout.merge)


@adapts(
    "asymmetric convolution block",
    lambda module: (
        has_layout(module, "square_conv square_bn ver_conv ver_bn hor_conv hor_bn") and hasattr(module, "crop")
    ),
)
def _merge_acb(module: nn.Module) -> nn.Module:
    """DingXiaoH/ACNet: with little padding the 3x1 and 1x3 layers see a cropped map, which is a negative padding."""
    branches = []
    for name, crops in {"square": (0, 0), "ver": (0, 1), "hor": (1, 0)}.items():
        conv = read_chain([getattr(module, f"{name}_conv")])
        padding = tuple(p - int(module.crop) * times for p, times in zip(conv.padding, crops))
        branches.append(after_affine(conv._replace(padding=padding), *bn_affine(getattr(module, f"{name}_bn"))))
    return replace_by("fused_conv", add_padded(branches), module)


def _is_dilated_block(module: nn.Module) -> bool:
    names = set(live_children(module))
    dilated = {name for name in names if name.startswith("dil_conv_")}
    rest = {name.replace("conv", "bn") for name in dilated} | {"lk_origin", "origin_bn"}
    return {"lk_origin", "origin_bn"} <= names == dilated | rest


@adapts("dilated large-kernel block", _is_dilated_block)
def _merge_dilated(module: nn.Module) -> nn.Module:
    """UniRepLKNet: a large kernel and smaller dilated ones, each with its BN in another attribute."""
    convs = {"lk_origin": "origin_bn"} | {n: n.replace("conv", "bn") for n in live_children(module) if "dil_conv" in n}
    branches = [
        after_affine(read_chain([getattr(module, conv)]), *bn_affine(getattr(module, bn))) for conv, bn in convs.items()
    ]
    return replace_by("lk_origin", add_padded(branches), module)
