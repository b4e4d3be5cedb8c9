"""Removing channels from a model: tensors are resized in place, so that every parameter stays the same object."""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from rep_plugin.arguments import That, checked
from rep_plugin.bilinear.methods import LowRank
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.layers import NormedConv2d
from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.tracing.features import describe_features_
from rep_plugin.pruning.tracing.graph import Trace, member, tensors_in
from rep_plugin.pruning.tracing.kept_channels import KeptChannels, slice_tensor
from rep_plugin.pruning.tracing.numbers import set_attribute_

Notes = Annotated[list, That(lambda _: True, "a list")]
_IN, _OUT = ("in_channels", "in_chs", "in_features"), ("out_channels", "out_chs")


def _like(tensor: Tensor, sliced: Tensor) -> Tensor:
    """Keep the memory format."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return sliced.contiguous(memory_format=torch.channels_last)
    return sliced.contiguous()


def _state_dims(value: Tensor, shape: torch.Size, dims: dict[int, Tensor]) -> dict[int, Tensor] | None:
    """Which dimensions of a tensor of an optimizer's state follow channels; None where that cannot be told.

    Besides those of the parameter's shape there are means along some of its dimensions, kept as 1 or left out.
    """
    if value.numel() == 1:
        return {}
    if value.dim() == len(shape) and all(size in (1, own) for size, own in zip(value.shape, shape)):
        return {dim: labels for dim, labels in dims.items() if value.shape[dim] == shape[dim]}
    found: list[dict[int, Tensor]] = []
    for out in range(len(shape)):
        if value.shape == shape[:out] + shape[out + 1 :]:
            found.append({dim - (dim > out): labels for dim, labels in dims.items() if dim != out})
    same = all(one.keys() == found[0].keys() and all(one[d] is found[0][d] for d in one) for one in found)
    return found[0] if found and same else None


def require_sliceable(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose state is of no single parameter.

    Args:
        optimizers: To be sliced along.

    Raises:
        ArgumentError: There is one.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError(
                "optimizer (LBFGS) keeps one history of all parameters together, which cannot become narrower: prune "
                "without it, and make a new one"
            )


def _slice_state(state: dict, old: torch.Size, dims: dict, kept: KeptChannels) -> bool:
    """Slice what an optimizer keeps of one parameter; False where something cannot be sliced."""
    sliced = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            own = _state_dims(value, old, dims)
            if own is None or (value.dim() != len(old) and any(labels.dim() > 1 for labels in own.values())):
                return False
            sliced[key] = _like(value, slice_tensor(value, own, kept)) if own else value
        elif tensors_in(value):
            return False
    state.update(sliced)
    return True


def _slice_parameter(parameter: nn.Parameter, dims: dict, kept: KeptChannels, optimizers: Iterable) -> list[Optimizer]:
    """Slice a parameter with all that belongs to it; return the optimizers that begin anew with it."""
    old, anew = parameter.shape, []
    for optimizer in optimizers:
        if (state := optimizer.state.get(parameter)) and not _slice_state(state, old, dims, kept):
            state.clear()
            anew.append(optimizer)
    grad, parameter.grad = parameter.grad, None
    data = _like(parameter.data, slice_tensor(parameter.data, dims, kept))
    # Autograd keeps a node with the old shape as long as somebody (DDP's reducer) holds it; another dtype makes it drop it.
    parameter.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    parameter.data = data
    if grad is not None:
        parameter.grad = _like(grad, slice_tensor(grad, dims, kept))
    return anew


def require_same_layers(model: nn.Module, trace: Trace) -> None:
    """Raise ArgumentError for a model without the layers of a trace.

    Args:
        model: Any.
        trace: Of a model.
    """
    names = {name for name, _ in model.named_modules()}
    if missing := [name for name in trace.layers if name not in names]:
        raise ArgumentError(f"the trace is of another model: {type(model).__name__} has no layer {missing[0]!r}")


@checked
@torch.no_grad()
def remove_channels_(
    model: nn.Module,
    trace: Trace,
    kept: KeptChannels,
    optimizers: Iterable[Optimizer] = (),
    notes: Notes | None = None,
) -> nn.Module:
    """Slice every tensor, gradient and optimizer state that follows a removed channel, and set the modules' numbers.

    Args:
        model: Changed in place; parameters stay the same objects.
        trace: Of the model, or of one that it is a copy of.
        kept: The channels that stay.
        optimizers: Whose state is sliced along.
        notes: A list, to which is added what could not be sliced along.

    Returns:
        The model.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.surgery import remove_channels_
        >>> from rep_plugin.pruning.tracing import KeptChannels, trace_channels
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> trace = trace_channels(net, (1, 3, 8, 8))
        >>> remove_channels_(net, trace, KeptChannels(trace, trace.layers["0"].labels[:3]))[1].weight.shape
        torch.Size([4, 5, 1, 1])
    """
    require_same_layers(model, trace)
    before = {module: _numbers(module) for module in model.modules()}
    filters = measure_filters(model, trace)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    anew: dict[str, list[str]] = {}
    for name, dims in trace.slices.items():
        if not any(kept.changes(labels) for labels in dims.values()):
            continue
        if name in parameters:
            for optimizer in _slice_parameter(parameters[name], dims, kept, optimizers):
                anew.setdefault(type(optimizer).__name__, []).append(name)
        else:
            buffers[name].data = slice_tensor(buffers[name].data, dims, kept)
    keep_filters_(model, trace, kept, filters)
    for name, (given, pooled) in trace.pools.items():
        _shrink_pool(model.get_submodule(name), given, pooled, kept)
    owners = {id(tensor): name for name, tensor in (parameters | buffers).items()}  # of tied ones, the first
    for name, module in model.named_modules(remove_duplicate=False):
        _set_numbers(name, module, before[module], trace, kept, owners)
    _set_owners(model, before)
    for place, labels in trace.numbers.items():
        if kept.changes(labels):
            set_attribute_(model, place, len(labels), kept.count(labels))
    describe_features_(model, {key: kept.count(labels) for key, labels in trace.described.items()})
    if notes is not None:
        notes += [
            f"{optimizer} begins anew with {len(names)} parameters ({names[0]!r} is the first): what it keeps of them "
            "cannot be sliced"
            for optimizer, names in anew.items()
        ]
    return model


def _numbers(module: nn.Module) -> dict:
    names = (*_IN, *_OUT, "groups", "num_features", "head_hidden_size")
    return {name: value for name in names if isinstance(value := module.__dict__.get(name), (int, tuple))}


def _shrink_pool(
    neck: BilinearPooling, given: tuple[Tensor, ...], pooled: tuple[Tensor, ...], kept: KeptChannels
) -> None:
    widths = tuple(kept.count(labels) for labels in given)
    neck.in_channels = widths[0] if neck.symmetric else widths
    if isinstance(neck.pool, LowRank) or not any(kept.changes(labels) for labels in pooled):
        return  # its factors are parameters like others
    device = next((b.device for b in neck.pool.buffers()), None)
    neck.pool.keep_(kept.index(pooled[0]).to(device), kept.index(pooled[-1]).to(device))


def _set_numbers(
    name: str, module: nn.Module, old: dict, trace: Trace, kept: KeptChannels, owners: dict[int, str]
) -> None:
    kernel = owners.get(id(getattr(module, "weight", None)), "")
    if isinstance(module, _ConvNd) and kernel in trace.slices:
        outs, width = module.weight.shape[:2]
        if isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = outs, width * module.groups
            return
        if kernel in trace.groupwise:
            module.groups = outs // (old["out_channels"] // old["groups"])
        module.in_channels, module.out_channels = width * module.groups, outs
    elif isinstance(module, (_ConvNd, nn.Linear)) and name in trace.layers and trace.layers[name].weight is None:
        setattr(
            module,
            "out_features" if isinstance(module, nn.Linear) else "out_channels",
            kept.count(trace.layers[name].labels),
        )
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        sized = module.weight if module.weight is not None else module.running_mean
        if sized is not None:
            module.num_features = len(sized)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif member(name, "weight") in trace.layer_norms and hasattr(module, "normalized_shape"):
        shape = module.normalized_shape
        module.normalized_shape = (
            type(shape)(module.weight.shape) if isinstance(shape, (tuple, list)) else len(module.weight)
        )
    elif member(name, "weight") in trace.group_norms and hasattr(module, "num_channels"):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, RepBlock) and name in trace.layers:
        layer = trace.layers[name]
        module.in_channels, module.out_channels = kept.count(layer.inputs), kept.count(layer.labels)
        if layer.groupwise:
            module.groups = module.in_channels // len(layer.inputs_per_group)


def _set_owners(model: nn.Module, before: dict[nn.Module, dict]) -> None:
    """Numbers that other modules keep of their layers (and build from, when they deploy) follow, where they agreed."""
    for owner in model.modules():
        mine = before[owner]
        if not mine or isinstance(owner, (_ConvNd, _BatchNorm, nn.Linear, RepBlock, BilinearPooling)):
            continue
        ins, outs = (next((n for n in names if n in mine), None) for names in (_IN, _OUT))
        inside = [module for module in owner.modules() if module is not owner]
        convs = (m for m in inside if isinstance(m, _ConvNd) and _agrees(mine, before[m], ins, outs))
        if ((ins and outs) or "groups" in mine) and (conv := next(convs, None)) is not None:
            now = {ins: conv.in_channels, outs: conv.out_channels, "groups": conv.groups}
            for name in mine.keys() & now.keys():
                setattr(owner, name, now[name])
            continue
        for module in inside:
            if isinstance(module, nn.Linear) and not outs:
                _follow(owner, mine, before[module]["in_features"], module.in_features)
            elif isinstance(module, BilinearPooling):
                _follow(owner, mine, before[module]["in_channels"], module.in_channels)


def _agrees(mine: dict, conv: dict, ins: str | None, outs: str | None) -> bool:
    pairs = ((ins, "in_channels"), (outs, "out_channels"), ("groups", "groups"))
    return all(name not in mine or mine[name] == conv[other] for name, other in pairs)


def _follow(owner: nn.Module, mine: dict, old: int | tuple, new: int | tuple) -> None:
    for name in ("in_channels", "in_features", "num_features", "head_hidden_size"):
        if mine.get(name) == old:
            setattr(owner, name, new)


def _squared_norms(conv: NormedConv2d) -> Tensor:
    return conv.weight.double().square().sum((1, 2, 3)) + conv.eps


def measure_filters(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Return the squared norms of the filters of normalised convolutions.

    Args:
        model: Left as it is.
        trace: Of the model.

    Returns:
        {name: |w|^2 + eps of each filter (O,)}.
    """
    return {
        name: _squared_norms(module)
        for name, module in model.named_modules()
        if isinstance(module, NormedConv2d) and member(name, "weight") in trace.slices
    }


@torch.no_grad()
def keep_filters_(model: nn.Module, trace: Trace, kept: KeptChannels, before: dict[str, Tensor]) -> None:
    """Give the gains what the norms have lost, by inputs that were removed or set to zero.

    ``kernel = weight * gain / sqrt(|w|^2 + eps)`` is then what it was, on the inputs that stay.

    Args:
        model: Changed in place.
        trace: Of the model.
        kept: The channels that stay.
        before: Of :func:`measure_filters`, before anything was removed.
    """
    for name, old in before.items():
        conv = model.get_submodule(name)
        if len(old) != len(conv.weight):
            labels = trace.slices[member(name, "weight")][0]
            old = old[kept.index(labels).to(old.device)]
        new = _squared_norms(conv)
        conv.gain.data = conv.gain.data * torch.where(new == old, 1.0, (new / old).sqrt()).to(conv.gain.dtype)
