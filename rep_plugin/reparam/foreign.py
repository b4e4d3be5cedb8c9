"""Multi-branch blocks of timm, mmpretrain and the official repositories, told by their attributes: no import needed.

A layout names the children that a block must hold and those that it may hold; a block with any other child, or with a
parameter of its own, is not taken. Branches are read by :mod:`rep_plugin.reparam.reading` and must be centred on each
other. A Sequential takes the block's place: the convolution under the name it has in the block's own deployed form (so
that the keys agree with theirs), then everything that followed the sum. Deployed convolutions are trainable parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.border_conv import build_conv
from rep_plugin.functional.padded import PaddedConv, add_padded, scale_padded
from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.reparam.reading import (
    after_affine,
    bn_affine,
    identity_conv,
    is_idle,
    is_plain_bn,
    read_chain,
)


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


def _merge_token_mixer(module: nn.Module) -> nn.Module:
    """FastViT: x + scale * (mixer(x) - norm(x)), both without activation."""
    mixer, norm = (_sum_only(getattr(module, name)) for name in ("mixer", "norm"))
    channels = norm.params.in_channels
    scale = getattr(module, "layer_scale", None)
    scale = getattr(scale, "gamma", scale)
    factor = scale.detach().double().reshape(-1) if isinstance(scale, nn.Parameter) else 1.0
    parts = [identity_conv(channels, norm.params.bias.device), scale_padded(mixer, factor), scale_padded(norm, -factor)]
    return replace_by("reparam_conv", add_padded(parts), module)


def _sum_only(block: nn.Module) -> PaddedConv:
    """Return a MobileOne block, merged or not, as a padded convolution. Raises TypeError where it has an activation."""
    children = live_children(block)
    after = [children[name] for name in ("se", "act", "activation", "attn") if name in children]
    if not all(map(is_idle, after)):
        raise TypeError(f"{type(block).__name__} inside a token mixer must be linear, got {after}")
    names = "reparam_conv" if "reparam_conv" in children else "conv_kxk conv_scale identity rbr_conv rbr_scale rbr_skip"
    return merge_branches(block, names)


def _is_layer_scale(scale: object) -> bool:
    if isinstance(scale, nn.Parameter) or scale is None:
        return True
    return is_idle(scale) or (has_layout(scale, "", "", "gamma") and "gamma" in scale._parameters)


register_adapter(
    Adapter(
        "FastViT token mixer",
        lambda module: (
            has_layout(module, "mixer norm", "layer_scale", "layer_scale")
            and type(module).__name__ == "RepMixer"
            and _is_layer_scale(getattr(module, "layer_scale", None))
        ),
        _merge_token_mixer,
    )
)


def _plus_identity(name: str, conv_name: str) -> Callable[[nn.Module], nn.Module]:
    """For x + conv(x): merged under ``name``, or as the bare convolution where the name is empty."""

    def merge(module: nn.Module) -> nn.Module:
        conv = read_chain(getattr(module, conv_name))
        whole = add_padded([conv, identity_conv(conv.params.in_channels, conv.params.bias.device)])
        return replace_by(name, whole, module) if name else build_conv(whole, [module])

    return merge


for kind, conv_name in (("RepConditionalPosEnc", "pos_enc"), ("RepCPE", "pe")):
    register_adapter(
        Adapter(
            "conditional position encoding",
            lambda module, kind=kind, conv_name=conv_name: (
                has_layout(module, conv_name) and type(module).__name__ == kind
            ),
            _plus_identity("reparam_conv", conv_name),
        )
    )


def _merge_repvit_depthwise(module: nn.Module) -> nn.Module:
    """RepViT: bn(conv(x) + conv1(x) + x); the older form has no BN after the sum."""
    branches = read_branches(module, "conv conv1")
    whole = add_padded([*branches, identity_conv(branches[0].params.in_channels, branches[0].params.bias.device)])
    if "bn" in live_children(module) and not is_idle(module.bn):
        whole = after_affine(whole, *bn_affine(module.bn))
    return build_conv(whole, [module])


register_adapter(
    Adapter(
        "RepViT depthwise block",
        lambda module: has_layout(module, "conv conv1", "bn") and type(module).__name__ in {"RepVggDw", "RepVGGDW"},
        _merge_repvit_depthwise,
    )
)
