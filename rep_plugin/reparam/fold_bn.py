"""Folding a network's own BNs, found on its graph, into the layers before them or the convolutions behind them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.layers import require_eval
from rep_plugin.functional.kernels import bn_scale_shift
from rep_plugin.functional.padded import compose_padded
from rep_plugin.reparam.fixed import UNSELECTED, Fixed, find_fixed
from rep_plugin.reparam.fx_parts import Readers, TracedPart, trace_parts
from rep_plugin.reparam.linear_layers import affine_conv, after_affine, is_plain_bn, is_plain_conv, read_layer

# Layers besides Conv2d that take in a BN behind them.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FROZEN = {"weight", "bias", "running_mean", "running_var"}


def _takes_bn(layer: nn.Module | None) -> bool:
    """True for a layer whose output channels can be scaled and shifted by its own weights."""
    return is_plain_conv(layer) or (type(layer) in _LAYERS and layer is not None and "weight" in layer._parameters)


def is_frozen_bn(module: nn.Module) -> bool:
    """Return whether a module is a FrozenBatchNorm2d: torchvision's, detectron2's or a detector's own."""
    return type(module).__name__ == "FrozenBatchNorm2d" and module._buffers.keys() == _FROZEN and hasattr(module, "eps")


def _thaw_(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Put BNs in the place of frozen ones; return {BN: what it stands for}."""
    made: dict[nn.Module, nn.Module] = {}
    for frozen in [module for module in model.modules() if is_frozen_bn(module)]:
        bn = nn.BatchNorm2d(frozen.running_mean.numel(), frozen.eps, device="meta").eval()
        for name, tensor in frozen._buffers.items():
            kept = nn.Parameter(tensor, False) if name in ("weight", "bias") else tensor
            setattr(bn, name, kept)
        made[bn] = frozen
        replace_module_(model, frozen, bn)
    return made


def _is_affine(bn: nn.Module) -> bool:
    """True for a BN that is an affine map in eval mode, whatever it applies afterwards."""
    activated = type(bn).__name__ in {"BatchNormAct2d", "SyncBatchNormAct"} and isinstance(bn, _BatchNorm)
    return is_plain_bn(bn) or (activated and bn.running_var is not None)


def find_pairs(model: nn.Module, part: TracedPart) -> list[tuple[str, str, bool]]:
    """Return the layers and BNs of a traced part that can be folded.

    A BN behind a layer must be its only reader; one in front must have only unpadded convolutions as readers, one pair
    for each. Every module must be called once.

    Args:
        model: the whole model.
        part: the traced part.

    Returns:
        Names of convolution and BN, and whether the BN comes first.
    """
    readers, pairs = Readers(model, part), []
    for node in readers.calls:
        bn = readers.module(node)
        if bn is None or not _is_affine(bn):
            continue
        source = readers.source(node)
        if source is not None and _takes_bn(readers.module(source)):
            pairs.append((part.full_name(source.target), part.full_name(node.target), False))
            continue
        behind = readers.readers(node)
        convs = [readers.module(reader) for reader in behind]
        if behind and is_plain_bn(bn) and all(is_plain_conv(c) and not any(c.padding) for c in convs):
            pairs += [(part.full_name(reader.target), part.full_name(node.target), True) for reader in behind]
    return pairs


def find_pairs_by_parts(model: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the (conv, bn) names where a BN alone reads the convolution, and what torch.fx could not trace."""
    parts, failures = trace_parts(model)
    pairs = [pair for part in parts for pair in find_pairs(model, part)]
    convs = [(conv, bn) for conv, bn, bn_first in pairs if not bn_first and is_plain_conv(model.get_submodule(conv))]
    return convs, failures


def _after_bn(bn: _BatchNorm) -> nn.Module:
    """What stays of a BN once it is folded: timm's BatchNormAct2d carries its dropout and activation."""
    rest = [part for part in (getattr(bn, "drop", None), getattr(bn, "act", None)) if isinstance(part, nn.Module)]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    if not rest:
        return nn.Identity()
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another one stands in a model: a shared module has several names.

    Args:
        model: the model.
        old: the module to replace.
        new: the module to put in its place.
    """
    for parent in list(model.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


def _fold_(conv: nn.Module, before: _BatchNorm | None, behind: _BatchNorm | None) -> None:
    if not isinstance(conv, nn.Conv2d):
        return _fold_behind_(conv, *bn_scale_shift(behind, torch.float64))
    folded = read_layer(conv, None, conv.weight.device)
    if before is not None:
        folded = compose_padded(affine_conv(*bn_scale_shift(before, torch.float64)), folded)
    if behind is not None:
        folded = after_affine(folded, *bn_scale_shift(behind, torch.float64))
    _set_(conv, folded.params.kernel, folded.params.bias)


def _fold_behind_(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.double()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (I, O / groups, ...), the inputs group by group
        rows = weight.view(layer.groups, -1, *weight.shape[1:])
        factor = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (rows * factor).view_as(weight)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    _set_(layer, weight, shift if layer.bias is None else layer.bias.double() * scale + shift)


def _set_(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)


def _leave_fixed(
    pairs: list[tuple[str, str, bool]], parts: list[TracedPart], fixed: Fixed
) -> tuple[list[tuple[str, str, bool]], list[str]]:
    """Return the pairs without those that must stay as they are, and a note on each of these."""

    def traced(name: str) -> bool:
        return any(part.holds(name) for part in parts)

    notes = {}
    for conv, bn, _ in pairs:
        why = fixed.why_not_folded(conv, traced, removed=False) or fixed.why_not_folded(bn, traced, removed=True)
        if why is not None:
            notes[conv, bn] = why
    left = {bn for _, bn in notes}  # in front of several convolutions a BN goes from all or from none
    texts = [f"{conv!r} and {bn!r} are not folded: {why}" for (conv, bn), why in notes.items() if why != UNSELECTED]
    return [pair for pair in pairs if pair[1] not in left], texts


@torch.no_grad()
def fold_conv_bn_(model: nn.Module, fixed: Fixed | None = None) -> tuple[list[tuple[str, str, bool]], list[str]]:
    """Fold every Conv-BN and every BN-Conv (unpadded) pair of an eval-mode model in place, in float64.

    The convolution keeps its place, with a bias; the BN's becomes Identity (or the activation it carried). Frozen BNs are
    folded too, and BNs behind Linear, Conv1d, Conv3d and transposed convolutions.

    Args:
        model: the model.
        fixed: what must stay as it is; by default it is found.

    Returns:
        The pairs, see :func:`find_pairs`, and notes: pairs that must stay as they are, and what torch.fx could not trace, see
        :func:`rep_plugin.reparam.fx_parts.trace_parts`.

    Raises:
        TrainModeError: a BN is in train mode. The model is then as it was.
    """
    thawed = _thaw_(model)
    parts, failures = trace_parts(model)
    pairs = [pair for part in parts for pair in find_pairs(model, part)]
    pairs, notes = _leave_fixed(pairs, parts, find_fixed(model) if fixed is None else fixed)
    for _, bn, _ in pairs:
        require_eval(model.get_submodule(bn), f"BN {bn!r}")
    sides: dict[str, dict[bool, nn.Module]] = {}
    for conv_name, bn_name, bn_first in pairs:
        sides.setdefault(conv_name, {})[bn_first] = model.get_submodule(bn_name)
    for conv_name, bns in sides.items():  # both sides at once: rounded once
        _fold_(model.get_submodule(conv_name), bns.get(True), bns.get(False))
    for bn_name in dict.fromkeys(bn for _, bn, _ in pairs):
        model.set_submodule(bn_name, _after_bn(model.get_submodule(bn_name)))
    for bn, frozen in thawed.items():  # those that were not folded
        replace_module_(model, bn, frozen)
    return pairs, notes + [f"not traced, only the parts inside: {failure}" for failure in failures]


@torch.no_grad()
def absorb_biases_(model: nn.Module, names: list[str], fixed: Fixed | None = None) -> list[str]:
    """Move the biases of convolutions into the running means of the BNs that follow, in place.

    ``BN(y + b)`` with mean m equals ``BN(y)`` with mean m - b, in eval mode and, batch means moving along, in train mode.

    Args:
        model: the model.
        names: names of the convolutions.
        fixed: what must stay as it is; by default it is found.

    Returns:
        Names of those that keep their bias: no BN with running statistics alone reads them, or it must stay as it is.
    """
    fixed = find_fixed(model) if fixed is None else fixed
    stays = fixed.forwards.keys() | fixed.weights.keys()
    pairs = {conv: bn for conv, bn in find_pairs_by_parts(model)[0] if bn not in stays} if names else {}
    for name in names:
        if name not in pairs:
            continue
        conv, bn = model.get_submodule(name), model.get_submodule(pairs[name])
        bn.running_mean.copy_(bn.running_mean.double() - conv.bias.double())
        conv.bias = None
    return [name for name in names if name not in pairs]
