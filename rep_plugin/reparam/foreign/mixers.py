"""Linear token mixers and position encodings that add their own input: FastViT and RepViT.

Told by attributes and class name, as in :mod:`rep_plugin.reparam.foreign.sums`.
"""

from collections.abc import Callable

from torch import nn

from rep_plugin.blocks.layers import is_idle
from rep_plugin.errors import NotMergeableError
from rep_plugin.functional.padded import PaddedConv, add_padded, scale_padded
from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.foreign.sums import has_layout, live_children, merge_branches, read_branches, replace_by
from rep_plugin.reparam.linear_layers import after_affine, bn_affine, identity_conv, read_chain


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
        raise NotMergeableError(f"{type(block).__name__} inside a token mixer must be linear, got {after}")
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
