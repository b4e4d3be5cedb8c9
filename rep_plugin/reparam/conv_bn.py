"""Folding a network's own Conv-BN pairs, found on its graph: the BN must be the convolution's only reader."""

import inspect

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.base import RepBlock
from rep_plugin.functional.kernels import fold_bn


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (RepBlock, nn.Conv2d, _BatchNorm)) or super().is_leaf_module(module, qualified_name)


class TraceError(RuntimeError):
    """The model's forward cannot be traced symbolically."""


def find_conv_bn_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the (conv, bn) module names where the BN alone reads the convolution, each called once.

    Raises TraceError, with the reason, where torch.fx cannot trace the model.
    """
    # Flags with a default keep it: mmpretrain's classifiers (mode, data_samples) and mmcv's ConvModule branch on theirs.
    arguments = inspect.signature(model.forward).parameters.values()
    concrete = {a.name: a.default for a in arguments if isinstance(a.default, (bool, int, float, str, type(None)))}
    try:
        graph = _LeafTracer().trace(model, concrete)
    except Exception as error:  # fx raises whatever the traced code raises on a proxy
        raise TraceError(f"torch.fx cannot trace {type(model).__name__}: {str(error).splitlines()[0]}") from error
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = [node.target for node in calls]
    pairs = []
    for node in calls:
        bn = modules[node.target]
        source = node.args[0] if node.args else None
        if not isinstance(bn, _BatchNorm) or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv = modules[source.target]
        called_once = uses.count(node.target) == 1 and uses.count(source.target) == 1
        if isinstance(conv, nn.Conv2d) and len(source.users) == 1 and called_once and bn.running_var is not None:
            pairs.append((source.target, node.target))
    return pairs


def find_pairs_by_parts(model: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the (conv, bn) pairs of a model and the names of the parts that could not be traced.

    Where torch.fx cannot trace a module as a whole, its children are traced one by one, and so on: a detector may be
    untraceable, its backbone hardly is. A pair is then the BN that alone reads the convolution inside such a part.
    """
    try:
        return find_conv_bn_pairs(model), []
    except TraceError:
        pairs, untraced = [], [""]
    for name, child in model.named_children():
        if isinstance(child, (RepBlock, nn.Conv2d, _BatchNorm)) or not any(child.children()):
            continue
        inner, lost = find_pairs_by_parts(child)
        pairs += [(f"{name}.{conv}", f"{name}.{bn}") for conv, bn in inner]
        untraced += [f"{name}.{part}" if part else name for part in lost]
    return pairs, untraced


def _after_bn(bn: _BatchNorm) -> nn.Module:
    """What stays of a BN once it is folded: timm's BatchNormAct2d carries its dropout and activation."""
    rest = [part for part in (getattr(bn, "drop", None), getattr(bn, "act", None)) if isinstance(part, nn.Module)]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    if not rest:
        return nn.Identity()
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands in a model: a shared module has several names."""
    for parent in list(model.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


@torch.no_grad()
def fold_conv_bn_(model: nn.Module) -> list[tuple[str, str]]:
    """Fold every Conv-BN pair of an eval-mode model in place and return their (conv, bn) names.

    The convolution keeps its place, with a bias; the BN's becomes Identity (or the activation it carried). Computed in
    float64. Raises TraceError where the model cannot be traced, RuntimeError for a BN in train mode; the model is then as
    it was.
    """
    pairs = find_conv_bn_pairs(model)
    training = [bn for _, bn in pairs if model.get_submodule(bn).training]
    if training:
        raise RuntimeError(
            f"BN {training[0]!r} is in train mode (batch statistics cannot be folded): call model.eval()"
        )
    for conv_name, bn_name in pairs:
        conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
        bias = None if conv.bias is None else conv.bias.double()
        kernel, bias = fold_bn(conv.weight.double(), bn, bias)
        conv.weight.copy_(kernel)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
        model.set_submodule(bn_name, _after_bn(bn))
    return pairs


@torch.no_grad()
def absorb_biases_(model: nn.Module, names: list[str]) -> list[str]:
    """Move the biases of the named convolutions into the running means of the BNs that follow, in place.

    ``BN(y + b)`` with mean m equals ``BN(y)`` with mean m - b, in eval mode and, batch means moving along, in train mode.
    Returns the names of the convolutions that keep their bias: no BN with running statistics alone reads them.
    """
    pairs = dict(find_pairs_by_parts(model)[0]) if names else {}
    for name in names:
        if name not in pairs:
            continue
        conv, bn = model.get_submodule(name), model.get_submodule(pairs[name])
        bn.running_mean.copy_(bn.running_mean.double() - conv.bias.double())
        conv.bias = None
    return [name for name in names if name not in pairs]
