"""Normalisation in front of or behind linear layers: LeViT, RepViT, NextViT and kin.

They are recognised by attributes and class name, as in :mod:`rep_plugin.reparam.foreign.parts`.
"""

from collections.abc import Sequence

import torch
from torch import nn

from rep_plugin.errors import ArgumentError
from rep_plugin.reparam.adapters import adapts
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.foreign.parts import has_layout, in_sequence, live_children
from rep_plugin.reparam.linear_layers import is_plain_bn, read_chain, read_linear


def build_linear(weight: torch.Tensor, bias: torch.Tensor, source: nn.Module) -> nn.Linear:
    """Return a trainable linear layer that takes the place of a module.

    Args:
        weight: (O, I).
        bias: (O,).
        source: the module, whose dtype, device and mode are taken over.

    Returns:
        The layer.
    """
    like = next(source.parameters())
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    trained = any(p.requires_grad for p in source.parameters())
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype, copy=True), trained)
    linear.bias = nn.Parameter(bias.to(like.device, like.dtype, copy=True), trained)
    return linear.train(source.training)


# Normalisation in front of a pointwise layer


def _fold_before_(layer: nn.Module, bns: Sequence[nn.Module]) -> nn.Module:
    """Return a pointwise layer (Linear, or an unpadded 1x1 Conv2d) that has taken in the BNs in front of it."""
    if isinstance(layer, nn.Linear):
        return build_linear(*read_linear(layer, before=bns), layer)
    conv = read_chain([*bns, layer])
    if conv.edge is not None or conv.kernel_size != (1, 1):
        raise ArgumentError(f"a BN cannot be folded into the padded {layer} behind it")
    return build_conv(conv, [layer])


@adapts(
    "NextViT convolution block",
    lambda module: type(module).__name__ == "NextConvBlock" and module.is_fused is False and is_plain_bn(module.norm),
)
def _merge_next_conv(module: nn.Module) -> nn.Module:
    module.mlp.fc1 = _fold_before_(module.mlp.fc1, [module.norm])
    module.norm, module.is_fused = nn.Identity(), True
    return module


@adapts(
    "NextViT transformer block",
    lambda module: (
        type(module).__name__ == "NextTransformerBlock" and module.is_fused is False and is_plain_bn(module.norm1)
    ),
)
def _merge_next_transformer(module: nn.Module) -> nn.Module:
    attention, norm = module.e_mhsa, module.norm1
    behind_pool = [norm] if attention.norm is None else [norm, attention.norm]  # an average commutes with a BN
    for name, bns in {"q": [norm], "k": behind_pool, "v": behind_pool}.items():
        setattr(attention, name, _fold_before_(getattr(attention, name), bns))
    if attention.norm is not None:
        attention.norm = nn.Identity()
    module.mlp.fc1 = _fold_before_(module.mlp.fc1, [module.norm2])
    module.norm1, module.norm2, module.is_fused = nn.Identity(), nn.Identity(), True
    return module


# BN round a linear layer


def _linear_of(module: nn.Module) -> nn.Linear | None:
    return next((child for child in live_children(module).values() if isinstance(child, nn.Linear)), None)


@adapts("Linear-BN", lambda module: _is_bn_linear(module, {"LinearNorm", "LinearBatchNorm", "Linear_BN"}))
def _merge_linear_norm(module: nn.Module) -> nn.Module:
    bn = next(child for child in live_children(module).values() if not isinstance(child, nn.Linear))
    return build_linear(*read_linear(_linear_of(module), after=[bn]), module)


@adapts("BN-Linear", lambda module: _is_bn_linear(module, {"NormLinear", "BatchNormLinear", "BN_Linear"}))
def _merge_norm_linear(module: nn.Module) -> nn.Module:
    children = live_children(module)
    linear = build_linear(*read_linear(_linear_of(module), before=[module.bn]), module)
    drop = children.get("drop")
    if drop is None or getattr(drop, "p", 0.0) == 0.0:
        return linear
    return in_sequence(module, {"drop": drop, "linear": linear})


def _is_bn_linear(module: nn.Module, names: set[str]) -> bool:
    if type(module).__name__ not in names or _linear_of(module) is None:
        return False
    layouts = ("bn linear", "bn l", "c bn")
    return any(has_layout(module, layout, "drop") for layout in layouts) and not module._parameters


@adapts(
    "RepViT classifier",
    lambda module: (
        type(module).__name__ == "RepVitClassifier"
        and has_layout(module, "head head_drop", "head_dist")
        and _is_bn_linear(module.head, {"NormLinear"})
    ),
)
def _merge_distilled(module: nn.Module) -> nn.Module:
    """RepViT's classifier: the mean of two heads becomes one, behind the same dropout."""
    heads = [module.head] + ([module.head_dist] if module.distillation else [])
    pairs = [read_linear(_linear_of(head), before=[head.bn]) for head in heads]
    weight = torch.stack([weight for weight, _ in pairs]).mean(0)
    bias = torch.stack([bias for _, bias in pairs]).mean(0)
    return in_sequence(module, {"head_drop": module.head_drop, "head": build_linear(weight, bias, module)})
