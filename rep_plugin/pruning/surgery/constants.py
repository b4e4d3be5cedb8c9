"""Channels that are constant: a gamma of zero leaves the beta, which the layers behind take into a bias."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from rep_plugin.arguments import checked
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import run_model
from rep_plugin.measure.randomness import private_random
from rep_plugin.pruning.tracing.graph import Layer, Trace
from rep_plugin.pruning.tracing.kept_channels import KeptChannels

SMALL = 1e-6  # of a gamma, and of what a constant map may vary


def _dead_units(model: nn.Module, trace: Trace, kept: KeptChannels) -> Tensor:
    """Roots of removed units whose every gamma is zero, where some beta is not."""
    roots, count = trace.channels.roots(), trace.channels.count
    gammas, betas = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    normed = torch.zeros(count, dtype=torch.bool)
    for name, labels in trace.norms.items():
        norm, own = model.get_submodule(name), roots[labels]
        gammas.scatter_reduce_(0, own, norm.weight.detach().abs().double().cpu(), "amax")
        if norm.bias is not None:
            betas.scatter_reduce_(0, own, norm.bias.detach().abs().double().cpu(), "amax")
        normed[own] = True
    removed = torch.zeros(count, dtype=torch.bool)
    removed[roots[~kept.mask]] = True
    return (normed & removed & (gammas <= SMALL) & (betas > SMALL)).nonzero().flatten()


def _inner_value(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of every channel the value in the middle, and whether it is the same around there."""
    rows = x.detach().movedim(dim, 0).double().cpu()
    if x.dim() == 4 and dim == 1:
        height, width = x.shape[2:]
        rows = rows[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4]
    rows = rows.flatten(1)
    middle = rows[:, rows.shape[1] // 2]
    return middle, (rows - middle[:, None]).abs().amax(1) <= SMALL * middle.abs().clamp_min(1.0)


def _constants(model: nn.Module, trace: Trace, readers: list[Layer]) -> dict[str, tuple[Tensor, Tensor]]:
    """What readers are given, {layer: (value of each input channel, whether it is constant)}; of one call alone."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for layer in readers:
        dim = -1 if layer.kind == "linear" else 1

        def note(module: nn.Module, args: tuple, name: str = layer.name, dim: int = dim) -> None:
            seen[name].append(_inner_value(args[0], dim % args[0].dim()))

        model.get_submodule(layer.name).register_forward_pre_hook(note)
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((max(2, trace.shape[0]), *trace.shape[1:]), generator=generator)
    with private_random():
        run_model(model, x.to(first.device, first.dtype))
    return {name: found[0] for name, found in seen.items() if len(found) == 1}


@checked
@torch.no_grad()
def fold_constants_(model: nn.Module, trace: Trace, kept: KeptChannels) -> list[str]:
    """Put what constant channels give into the biases of the layers that read them, before they are removed.

    That is exact where a layer sees no padding. Without a bias, the running mean of the batch norm behind takes it.

    Args:
        model: Changed in place, in new memory.
        trace: Of the model.
        kept: The channels that stay.

    Returns:
        What a report says of it, one line for what was folded and one for what could not be; none without such channels.

    Example:
        >>> from rep_plugin.pruning.surgery.constants import fold_constants_
        >>> from rep_plugin.pruning.tracing import KeptChannels, trace_channels
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> trace = trace_channels(net, (1, 3, 8, 8))
        >>> fold_constants_(net, trace, KeptChannels(trace, trace.layers["0"].labels[:3]))  # no batch norm, no gamma
        []
    """
    dead = _dead_units(model, trace, kept)
    if not len(dead):
        return []
    roots = trace.channels.roots()
    inputs = {layer.name: torch.isin(roots[layer.inputs], dead) for layer in trace.layers.values()}
    readers = [layer for layer in trace.layers.values() if not layer.groupwise and inputs[layer.name].any()]
    able = [
        layer for layer in readers if isinstance(model.get_submodule(layer.name), (nn.Conv1d, nn.Conv2d, nn.Linear))
    ]
    probe = copy_model(model, training=False).double()
    for name, labels in trace.norms.items():
        probe.get_submodule(name).weight.data[
            torch.isin(roots[labels], dead).to(probe.get_submodule(name).weight.device)
        ] = 0
    constants = _constants(probe, trace, able)
    norms = {conv: norm for norm, conv in trace.conv_of_norm.items()}
    folded, left = [], [layer.name for layer in readers if layer.name not in constants]
    for name, (values, constant) in constants.items():
        module = model.get_submodule(name)
        norm = model.get_submodule(norms[name]) if name in norms else None
        if not constant[inputs[name]].all() or (module.bias is None and getattr(norm, "running_mean", None) is None):
            left.append(name)
            continue
        weight = module.weight.detach().double().cpu()
        weight = weight.reshape(*weight.shape[:2], -1).sum(2)  # (O, I / groups)
        given = torch.where(inputs[name], values, 0.0).view(trace.layers[name].groups, -1)
        add = (weight.unflatten(0, (len(given), -1)) * given[:, None]).sum(2).flatten()
        if not add.any():
            continue
        if module.bias is not None:
            module.bias.data = module.bias.data + add.to(module.bias)
        else:
            norm.running_mean.data = norm.running_mean.data - add.to(norm.running_mean)
        folded.append(name)
    notes = []
    if folded:
        notes.append(
            f"{len(dead)} removed channels were constant (gamma 0, beta not): what they gave is now in the biases of "
            f"{', '.join(folded[:3])}{' ...' if folded[3:] else ''}; exact but where these layers see padding"
        )
    if left:
        notes.append(
            f"removed channels were constant (gamma 0, beta not), and what they gave {', '.join(left[:3])}"
            f"{' ...' if left[3:] else ''} is gone: fine-tune, or keep them (ignore)"
        )
    return notes
