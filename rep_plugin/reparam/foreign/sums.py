"""Multi-branch blocks of timm, mmpretrain and the official repositories, told by their attributes: no import needed.

A layout names the children that a block must hold and those that it may hold; a block with any other child, or with a
parameter of its own, is not taken. Branches are read by :mod:`rep_plugin.reparam.linear_layers` and must be centred on each
other. A Sequential takes the block's place: the convolution under the name it has in the block's own deployed form (so
that the keys agree with theirs), then everything that followed the sum. Deployed convolutions are trainable parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.layers import is_idle
from rep_plugin.functional.padded import PaddedConv, add_padded
from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.linear_layers import after_affine, bn_affine, is_plain_bn, read_chain


def live_children(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children that are not None, by name."""
    return {name: child for name, child in module._modules.items() if child is not None}


def has_layout(module: nn.Module, needed: str, allowed: str = "", parameters: str = "") -> bool:
    """True where the children's names are all of ``needed`` and any of ``allowed``, with no parameter besides."""
    must = _names(needed)
    if not must <= module._modules.keys():
        return False
    names = set(live_children(module))
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return must <= names <= must | _names(allowed) and own <= _names(parameters)


@lru_cache
def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def replace_by(name: str, conv: PaddedConv, block: nn.Module, after: str = "") -> nn.Sequential:
    """Return ``conv`` as child ``name``, followed by those of the block's children ``after`` that compute something.

    A BN that comes first of these is merged as well.
    """
    children = live_children(block)
    rest = {key: children[key] for key in after.split() if key in children and not is_idle(children[key])}
    while rest and is_plain_bn(next(iter(rest.values()))):
        conv = after_affine(conv, *bn_affine(rest.pop(next(iter(rest)))))
    kept = set(rest)
    sources = [child for key, child in children.items() if key not in kept]
    merged = nn.Sequential()
    merged.add_module(name, build_conv(conv, sources))
    for key, part in rest.items():
        merged.add_module(key, part)
    merged.training = block.training
    return merged


def read_branches(block: nn.Module, names: str) -> list[PaddedConv]:
    """Return the block's parallel branches of those names, where it has them; a ModuleList holds several.

    A branch that does not tell its channels (Identity, a pooling) takes them from the others.
    """
    children = live_children(block)
    branches = []
    for name in names.split():
        child = children.get(name)
        branches += list(child) if isinstance(child, nn.ModuleList) else [] if child is None else [child]
    telling = [b for b in branches if isinstance(next(iter(_leaves(b)), None), (nn.Conv2d, _BatchNorm))]
    read = {branch: read_chain(branch) for branch in telling}
    channels = next((conv.params.in_channels for conv in read.values()), None)
    return [read[branch] if branch in read else read_chain(branch, channels) for branch in branches]


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if not live_children(m) and not is_idle(m)]


def merge_branches(block: nn.Module, names: str) -> PaddedConv:
    """Return the sum of the block's branches as one padded convolution."""
    return add_padded(read_branches(block, names))


@dataclass(frozen=True)
class SumLayout:
    """A block that adds its ``branches`` and applies ``after`` to the sum, in that order."""

    name: str
    needed: str
    allowed: str
    branches: str
    conv: str
    after: str
    test: Callable[[nn.Module], bool] = lambda module: True

    def matches(self, module: nn.Module) -> bool:
        return has_layout(module, self.needed, self.allowed) and self.test(module)

    def merge(self, module: nn.Module) -> nn.Module:
        return replace_by(self.conv, merge_branches(module, self.branches), module, self.after)


# Drop path on the branches is for training, and goes with them. stock mmpretrain passes over the SE layer when it deploys.
LAYOUTS = [
    SumLayout(
        "timm RepVGG block",
        "conv_kxk conv_1x1",
        "identity drop_path attn act",
        "conv_kxk conv_1x1 identity",
        "reparam_conv",
        "attn act",
    ),
    SumLayout(
        "timm MobileOne block",
        "conv_kxk",
        "conv_scale identity drop_path attn se act",
        "conv_kxk conv_scale identity",
        "reparam_conv",
        "attn se act",
        lambda module: isinstance(module.conv_kxk, nn.ModuleList),
    ),
    SumLayout(
        "timm large-kernel convolution",
        "large_conv",
        "small_conv se act",
        "large_conv small_conv",
        "reparam_conv",
        "se act",
    ),
    SumLayout(
        "mmpretrain RepVGG block",
        "branch_3x3 branch_1x1",
        "branch_norm se_layer act",
        "branch_3x3 branch_1x1 branch_norm",
        "branch_reparam",
        "se_layer act",
    ),
    SumLayout(
        "mmpretrain MobileOne block",
        "branch_conv_list",
        "branch_scale branch_norm se act",
        "branch_conv_list branch_scale branch_norm",
        "branch_reparam",
        "se act",
    ),
    SumLayout(  # DingXiaoH/RepVGG with its plus and QA forms, YOLOv6, YOLOv7, mmyolo
        "RepVGG block",
        "rbr_dense rbr_1x1",
        "rbr_identity se bn nonlinearity act post_se",
        "rbr_dense rbr_1x1 rbr_identity",
        "rbr_reparam",
        "se bn nonlinearity act post_se",
    ),
    SumLayout(  # apple/ml-mobileone, ml-fastvit
        "MobileOne block",
        "rbr_conv",
        "rbr_scale rbr_skip se activation",
        "rbr_conv rbr_scale rbr_skip",
        "reparam_conv",
        "se activation",
        lambda module: isinstance(module.rbr_conv, nn.ModuleList),
    ),
    SumLayout(  # DingXiaoH/RepLKNet-pytorch, mmpretrain
        "large-kernel convolution",
        "lkb_origin",
        "small_conv",
        "lkb_origin small_conv",
        "lkb_reparam",
        "",
    ),
    SumLayout(  # DingXiaoH/DiverseBranchBlock
        "diverse branch block",
        "dbb_origin dbb_avg dbb_1x1_kxk",
        "dbb_1x1 nonlinear",
        "dbb_origin dbb_1x1 dbb_avg dbb_1x1_kxk",
        "dbb_reparam",
        "nonlinear",
    ),
]
for layout in LAYOUTS:
    register_adapter(Adapter(layout.name, layout.matches, layout.merge))


def _merge_acb(module: nn.Module) -> nn.Module:
    """DingXiaoH/ACNet: with little padding the 3x1 and 1x3 layers see a cropped map, which is a negative padding."""
    branches = []
    for name, crops in {"square": (0, 0), "ver": (0, 1), "hor": (1, 0)}.items():
        conv = read_chain([getattr(module, f"{name}_conv")])
        padding = tuple(p - int(module.crop) * times for p, times in zip(conv.padding, crops))
        branches.append(after_affine(conv._replace(padding=padding), *bn_affine(getattr(module, f"{name}_bn"))))
    return replace_by("fused_conv", add_padded(branches), module)


register_adapter(
    Adapter(
        "asymmetric convolution block",
        lambda module: (
            has_layout(module, "square_conv square_bn ver_conv ver_bn hor_conv hor_bn") and hasattr(module, "crop")
        ),
        _merge_acb,
    )
)


def _merge_dilated(module: nn.Module) -> nn.Module:
    """UniRepLKNet: a large kernel and smaller dilated ones, each with its BN in another attribute."""
    convs = {"lk_origin": "origin_bn"} | {n: n.replace("conv", "bn") for n in live_children(module) if "dil_conv" in n}
    branches = [
        after_affine(read_chain([getattr(module, conv)]), *bn_affine(getattr(module, bn))) for conv, bn in convs.items()
    ]
    return replace_by("lk_origin", add_padded(branches), module)


def _is_dilated_block(module: nn.Module) -> bool:
    names = set(live_children(module))
    dilated = {name for name in names if name.startswith("dil_conv_")}
    rest = {name.replace("conv", "bn") for name in dilated} | {"lk_origin", "origin_bn"}
    return {"lk_origin", "origin_bn"} <= names == dilated | rest


register_adapter(Adapter("dilated large-kernel block", _is_dilated_block, _merge_dilated))
