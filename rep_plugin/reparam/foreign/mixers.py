"""Linear token mixers and position encodings that add their own input: FastViT and RepViT.

They are recognised by attributes and class name, as in :mod:`rep_plugin.reparam.foreign.parts`.
"""

from torch import nn

from rep_plugin.blocks.layers import is_idle
from rep_plugin.errors import NotMergeableError
from rep_plugin.functional.padded import PaddedConv, add_padded, scale_padded
from rep_plugin.reparam.adapters import adapts
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.foreign.parts import has_layout, live_children, merge_branches, plus_identity, replace_by
from rep_plugin.reparam.linear_layers import after_affine, bn_affine, identity_conv, read_chain


@adapts(
    "FastViT token mixer",
    lambda module: (
        has_layout(module, "mixer norm", "layer_scale", "layer_scale")
        and type(module).__name__ == "RepMixer"
        and _is_layer_scale(getattr(module, "layer_scale", None))
    ),
)
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
    """Return a MobileOne block, merged or not, as a padded convolution. It must have no activation."""
    children = live_children(block)
    after = [children[name] for name in ("se", "act", "activation", "attn") if name in children]
    if not all(map(is_idle, after)):
        raise NotMergeableError(f"{type(block).__name__} inside a token mixer must be linear, got {after}")
    names = "reparam_conv" if "reparam_conv" in children else "conv_kxk conv_scale identity rbr_conv rbr_scale rbr_skip"
    return merge_branches(block, names)


def _is_layer_scale(scale: nn.Module | nn.Parameter | None) -> bool:
    if isinstance(scale, nn.Parameter) or scale is None:
        return True
    return is_idle(scale) or (has_layout(scale, "", "", "gamma") and "gamma" in scale._parameters)


POSITION_ENCODINGS = {"RepConditionalPosEnc": "pos_enc", "RepCPE": "pe"}  # class -> its convolution


@adapts(
    "conditional position encoding",
    lambda module: (conv := POSITION_ENCODINGS.get(type(module).__name__)) is not None and has_layout(module, conv),
)
def _merge_position_encoding(module: nn.Module) -> nn.Module:
    conv = getattr(module, POSITION_ENCODINGS[type(module).__name__])
    return replace_by("reparam_conv", plus_identity(read_chain(conv)), module)


@adapts(
    "RepViT depthwise block",
    lambda module: has_layout(module, "conv conv1", "bn") and type(module).__name__ in {"RepVggDw", "RepVGGDW"},
)
def _merge_repvit_depthwise(module: nn.Module) -> nn.Module:
    """RepViT: bn(conv(x) + conv1(x) + x); the older form has no BN after the sum."""
    whole = plus_identity(merge_branches(module, "conv conv1"))
    if "bn" in live_children(module) and not is_idle(module.bn):
        whole = after_affine(whole, *bn_affine(module.bn))
    return build_conv(whole, [module])
