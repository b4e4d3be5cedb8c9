"""Blocks of other libraries of which only a part is linear: they keep their class and are switched to its deployed form.

They are recognised by attributes and class name, as in :mod:`rep_plugin.reparam.foreign.parts`.
"""

import torch
from torch import nn

from rep_plugin.functional.padded import PaddedConv, add_padded
from rep_plugin.measure.copies import copy_model
from rep_plugin.reparam.adapters import adapts
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.foreign.parts import delete_children_, has_layout, live_children
from rep_plugin.reparam.linear_layers import bn_affine, is_plain_bn, read_chain
from rep_plugin.reparam.linear_parts import build_sum, read_sum


def _pop_sum_(module: nn.Module, children: str) -> nn.Conv2d:
    """Delete children of a block; return the layer that computes what they did together."""
    conv = build_sum(read_sum(module, children))
    delete_children_(module, children)
    return conv


@adapts(
    "RepGhost module",
    lambda module: (
        has_layout(module, "primary_conv fusion_conv fusion_bn cheap_operation", "relu") and len(module.fusion_bn) > 0
    ),
)
def _merge_repghost(module: nn.Module) -> nn.Module:
    module.cheap_operation = build_sum(read_sum(module, "cheap_operation fusion_conv fusion_bn"))
    module.fusion_conv, module.fusion_bn = nn.Sequential(), nn.Sequential()
    return module


@adapts(
    "GhostNetV3 module",
    lambda module: has_layout(
        module,
        "primary_rpr_conv cheap_rpr_conv",
        "primary_conv cheap_operation primary_rpr_scale primary_rpr_skip cheap_rpr_scale cheap_rpr_skip "
        "primary_activation cheap_activation short_conv gate_fn",
    ),
)
def _merge_ghost_v3(module: nn.Module) -> nn.Module:
    """Two sums, each followed by its activation; the gated shortcut stays as it is."""
    branches = {
        target: f"{part}_rpr_conv {part}_rpr_scale {part}_rpr_skip"
        for part, target in (("primary", "primary_conv"), ("cheap", "cheap_operation"))
    }
    convs = {target: build_sum(read_sum(module, children)) for target, children in branches.items()}
    for (target, conv), act in zip(convs.items(), (module.primary_activation, module.cheap_activation)):
        setattr(module, target, nn.Sequential(conv, act if act is not None else nn.Identity()))
        delete_children_(module, branches[target])
    module.infer_mode = True
    return module


@adapts(
    "GhostNetV3 bottleneck",
    lambda module: (
        has_layout(module, "dw_rpr_conv", "dw_rpr_scale dw_rpr_skip ghost1 ghost2 se shortcut conv_dw bn_dw")
        and len(module.dw_rpr_conv) > 0
    ),
)
def _merge_ghost_v3_depthwise(module: nn.Module) -> nn.Module:
    module.conv_dw, module.bn_dw = _pop_sum_(module, "dw_rpr_conv dw_rpr_scale dw_rpr_skip"), nn.Identity()
    module.infer_mode = True
    return module


@adapts("PP-LCNetV2 block", lambda module: has_layout(module, "dw_conv_list", "dw_act se pw_conv"))
def _merge_lcnet(module: nn.Module) -> nn.Module:
    module.dw_conv, module.dw_conv_list = _pop_sum_(module, "dw_conv_list"), None
    return module


@adapts(
    "EfficientViM residuals",
    lambda module: (
        type(module).__name__ in {"EfficientViMBlock", "PatchMerging"}
        and has_layout(module, "dwconv1 dwconv2", "conv mixer norm ffn drop_path", "alpha")
        and getattr(module, "fused", None) is False
    ),
)
def _merge_efficientvim(module: nn.Module) -> nn.Module:
    """EfficientViM: x + layer(x), and in its blocks x + gate * (layer(x) - x) with a learned gate for each channel."""
    for name in ("dwconv1", "dwconv2"):
        layer, part = getattr(module, name), read_sum(module, name)
        layer.conv, layer.norm = build_sum(part), None
    module.fused = True
    return module


@adapts(
    "RIFormer block",
    lambda module: (
        type(module).__name__ == "RIFormerBlock"
        and has_layout(module, "norm1 token_mixer norm2 mlp", "drop_path", "layer_scale_1 layer_scale_2")
        and has_layout(module.token_mixer, "affine")
        and getattr(module.norm1, "bias", None) is not None
    ),
)
def _merge_riformer(module: nn.Module) -> nn.Module:
    """RIFormer: the affine token mixer minus the identity goes into the group norm's own affine map."""
    norm, affine = copy_model(module.norm1), module.token_mixer.affine
    factor = affine.weight.detach().double().reshape(-1) - 1.0
    with torch.no_grad():
        shift = norm.bias.double() * factor + affine.bias.double()
        norm.weight.copy_(norm.weight.double() * factor)
        norm.bias.copy_(shift)
    module.norm_reparam = norm
    delete_children_(module, "norm1 token_mixer")
    module.deploy = True
    return module


@adapts(
    "RepMLP block",
    lambda module: (
        type(module).__name__ == "RepMLPBlock"
        and {"gp", "fc3", "fc3_bn"} <= set(live_children(module))
        and not module.deploy
        and is_plain_bn(module.fc3_bn)
    ),
)
def _merge_repmlp(module: nn.Module) -> nn.Module:
    """RepMLP: convolutions on a partition of fixed size are a matrix on it, and join the grouped fully connected layer."""
    sharesets, size = module.num_sharesets, module.path_h * module.path_w
    scale, shift = bn_affine(module.fc3_bn)
    fc = module.fc3
    bias = fc.weight.new_zeros(fc.weight.shape[0]) if fc.bias is None else fc.bias
    scale, shift = scale.repeat_interleave(size), shift.repeat_interleave(size)
    weight = fc.weight.detach().double().flatten(1) * scale[:, None]  # (sharesets * size, size)
    bias = bias.detach().double() * scale + shift
    branches = [child for name, child in live_children(module).items() if name.startswith("repconv")]
    if branches:
        conv = add_padded([read_chain(branch) for branch in branches])
        eye = torch.eye(size, dtype=torch.float64, device=weight.device).view(size, 1, module.path_h, module.path_w)
        answer = torch.nn.functional.conv2d(
            eye.expand(-1, sharesets, -1, -1), conv.params.kernel, None, padding=conv.padding, groups=sharesets
        )  # (inputs, sharesets, H, W)
        weight = weight + answer.permute(1, 2, 3, 0).reshape(sharesets * size, size)
        bias = bias + conv.params.bias.repeat_interleave(size)
    params = read_chain([fc]).params._replace(kernel=weight[:, :, None, None], bias=bias)
    module.fc3, module.fc3_bn = build_conv(PaddedConv(params), [fc]), nn.Identity()
    delete_children_(module, " ".join(name for name in live_children(module) if name.startswith("repconv")))
    module.deploy = True
    return module
