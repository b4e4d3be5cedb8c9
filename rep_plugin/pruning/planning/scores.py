"""How much a channel matters: one number for every unit of channels that go together. High is kept.

Sources: Liu et al., "Network Slimming" (ICCV 2017, ``bn_gamma``); Li et al., "Pruning Filters" (ICLR 2017, ``l1``); He et
al., "Filter Pruning via Geometric Median" (CVPR 2019, ``fpgm``); Molchanov et al., "Importance Estimation" (CVPR 2019,
``taylor``). ``flow`` is ours: the variance of a channel, which its batch norm sets, times what the layers behind take of it,
their batch norms folded in. Both are in the units of what those layers give, so that layers compare without a normalisation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.forward import require_bare
from rep_plugin.measure.progress import track
from rep_plugin.pruning.planning.options import PruneOptions
from rep_plugin.pruning.tracing.graph import Layer, Trace, named_tensors
from rep_plugin.pruning.tracing.groups import frozen_roots

Members = list[tuple[Tensor, Tensor]]  # (labels, value of each)


def _kernel(model: nn.Module, layer: Layer) -> Tensor:
    """Return a layer's kernel with one row an output, (O, K); of a block, the merged one."""
    module = model.get_submodule(layer.name)
    if isinstance(module, RepBlock):
        if not module.deployed:
            module = copy_model(module, training=False)
        return module.merged_kernel()[0].detach().flatten(1)
    # A fixed kernel is a buffer, one that is computed is of no name.
    weight = module.weight.detach() if layer.weight is None else named_tensors(model)[layer.weight].detach()
    return (weight.transpose(0, 1) if layer.kind == "conv_transpose" else weight).flatten(1)


def _relative(values: Tensor) -> Tensor:
    """Kernels of different layers are compared by their share of the layer's mean."""
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def _kernel_members(model: nn.Module, trace: Trace, norm: Callable[[Tensor], Tensor]) -> Members:
    roots, frozen = trace.channels.roots(), frozen_roots(trace)
    members = []
    for layer in track(trace.layers.values(), "scoring"):
        kernel = _kernel(model, layer)
        if frozen[roots[layer.labels]].all():  # not compared: a classifier can have millions of weights
            _check_finite(kernel.sum(dtype=torch.float64))
        else:
            members.append((layer.labels, _relative(norm(kernel).cpu())))
    return members


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ArgumentError("scores must be finite numbers, got NaN or infinity")


def _norm(kernel: Tensor, order: int) -> Tensor:
    return torch.linalg.vector_norm(kernel, order, dim=1, dtype=torch.float64)


def _distances(kernel: Tensor) -> Tensor:
    kernel = kernel.double()
    return torch.cdist(kernel, kernel).sum(1)


KERNEL_SCORES = {"l1": partial(_norm, order=1), "l2": partial(_norm, order=2), "fpgm": _distances}


def _gamma_members(model: nn.Module, trace: Trace) -> Members:
    return [
        (labels, model.get_submodule(name).weight.detach().abs().double().cpu()) for name, labels in trace.norms.items()
    ]


def _folded(model: nn.Module, trace: Trace, layer: Layer) -> Tensor:
    """A layer's kernel (O, I / groups, K) with its batch norm in it: what its inputs add to what that gives."""
    module = model.get_submodule(layer.name)
    if isinstance(module, RepBlock):
        module = module if module.deployed else copy_model(module, training=False)
        return module.merged_kernel()[0].detach().double().flatten(2)
    weight = (module.weight if layer.weight is None else named_tensors(model)[layer.weight]).detach().double()
    weight = (weight.transpose(0, 1) if layer.kind == "conv_transpose" else weight).reshape(*weight.shape[:2], -1)
    norm = next((name for name, conv in trace.conv_of_norm.items() if conv == layer.name), None)
    bn = None if norm is None else model.get_submodule(norm)
    if getattr(bn, "running_var", None) is None or bn.weight is None:
        return weight
    return weight * (bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()).view(-1, 1, 1)


def _flow(model: nn.Module, trace: Trace) -> Tensor:
    """The variance that a unit has, times the share of it that the layers behind it take, (count,); NaN where it has none."""
    roots, count = trace.channels.roots(), trace.channels.count
    normed = set(trace.conv_of_norm.values())
    given, taken = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    read = torch.zeros(count, dtype=torch.bool)
    # Behind a depthwise convolution another batch norm sets the variance anew.
    again = {norm for norm, conv in trace.conv_of_norm.items() if trace.layers[conv].groupwise}
    anew = torch.cat([roots[trace.norms[norm]] for norm in again]) if again else roots[:0]
    for norm, labels in trace.norms.items():
        variance = model.get_submodule(norm).weight.detach().double().square().cpu()
        own = roots[labels]
        given.index_add_(0, own, variance if norm in again else variance * ~torch.isin(own, anew))

    def mean(values: Tensor, units: Tensor) -> Tensor:  # of a unit of many channels, as a head is
        return values / torch.bincount(units, minlength=count)[units]

    for layer in track(trace.layers.values(), "scoring"):
        kernel = _folded(model, trace, layer).square().cpu()
        _check_finite(kernel)
        if layer.name not in normed and layer.kind != "block":
            given.index_add_(0, roots[layer.labels], mean(kernel.sum((1, 2)), roots[layer.labels]))
        if not layer.groupwise:
            energy = kernel.unflatten(0, (layer.groups, -1)).sum((1, 3)).flatten()
            taken.index_add_(0, roots[layer.inputs], mean(energy, roots[layer.inputs]))
            read[roots[layer.inputs]] = True
    for start, first, second in trace.channels.products:
        energy = taken[roots[start : start + len(first)]]
        taken.index_add_(0, roots[first], energy)
        taken.index_add_(0, roots[second], energy)
        read[roots[first]] = read[roots[second]] = True
    return torch.where(given > 0, given * torch.where(read, taken, 1.0), torch.where(read, 0.0, torch.nan))


def _taylor_members(model: nn.Module, trace: Trace, loader: Iterable, loss: Callable) -> Members:
    """|sum of weight * gradient| of every output, averaged over the batches; of a block, over its output BNs."""
    if loader is None or loss is None:
        raise ArgumentError("scores='taylor' needs loader (batches of (inputs, targets)) and loss (outputs, targets)")
    copied = copy_model(model, training=False).requires_grad_(True)
    totals: dict[str, Tensor] = {}
    batches = 0
    for inputs, targets in track(loader, "scoring"):
        copied.zero_grad(set_to_none=True)
        loss(copied(copy_inputs(inputs)), targets).backward()
        for layer in trace.layers.values():
            trained = [p for p in _taylor_parameters(copied, layer) if p.grad is not None]
            products = [_per_output(p.detach() * p.grad, layer) for p in trained]
            if products:
                value = torch.stack(products).sum(0).abs().double().cpu()
                totals[layer.name] = totals.get(layer.name, 0) + value
        batches += 1
    if not batches:
        raise ArgumentError("scores='taylor' got a loader without any batch")
    return [(trace.layers[name].labels, total / batches) for name, total in totals.items()]


def _per_output(values: Tensor, layer: Layer) -> Tensor:
    if values.dim() == 1:
        return values
    return (values.transpose(0, 1) if layer.kind == "conv_transpose" else values).flatten(1).sum(1)


def _taylor_parameters(model: nn.Module, layer: Layer) -> list[Tensor]:
    module = model.get_submodule(layer.name)
    if not isinstance(module, RepBlock):
        return (
            [p for p in (module.weight,) if p.is_leaf] if layer.weight is None else [named_tensors(model)[layer.weight]]
        )
    if module.deployed:
        return [module.reparam_conv.weight]
    return [p for bn in module.output_bns() for p in (bn.weight, bn.bias)] or [*module.output_gains()]


def _given_members(trace: Trace, given: Mapping[str, Sequence[float]]) -> Members:
    members = []
    for name, values in given.items():
        if name not in trace.layers:
            raise ArgumentError(f"scores name a layer {name!r} that the model does not have")
        labels, score = trace.layers[name].labels, torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
        if len(score) != len(labels):
            raise ArgumentError(f"scores of {name!r} hold {len(score)} numbers, the layer has {len(labels)} channels")
        members.append((labels, score))
    return members


def score_units(
    model: nn.Module, trace: Trace, options: PruneOptions, loader: Iterable | None = None, loss: Callable | None = None
) -> Tensor:
    """Return the score of every unit by its root; NaN where nothing scores it.

    Args:
        model: Left as it is.
        trace: Of the model.
        options: ``scores``, and ``reduction``, which joins the members of a unit; ``seed``.
        loader: Batches of (inputs, targets), for ``taylor``.
        loss: Of (outputs, targets), for ``taylor``.

    Returns:
        (count,) float64.

    Raises:
        ArgumentError: A score is not finite, scores name another model's layers, or ``bn_gamma`` finds no BN.
    """
    scores, reduction = options.scores, options.reduction
    roots = trace.channels.roots()
    require_bare(model, data=isinstance(scores, str) and scores != "random")
    if isinstance(scores, Mapping):
        members = _given_members(trace, scores)
    elif scores == "random":
        generator = torch.Generator().manual_seed(options.seed)
        return torch.rand(trace.channels.count, generator=generator, dtype=torch.float64)
    elif scores == "flow":
        return _flow(model, trace)
    elif scores == "bn_gamma":
        members = _gamma_members(model, trace)
        if not members:
            raise ArgumentError(f"{type(model).__name__} has no BN for scores='bn_gamma': use scores='l1'")
    elif scores in KERNEL_SCORES:
        members = _kernel_members(model, trace, KERNEL_SCORES[scores])
    else:
        members = _taylor_members(model, trace, loader, loss)
    total = torch.zeros(trace.channels.count, dtype=torch.float64)
    number = torch.zeros_like(total)
    for labels, values in members:
        _check_finite(values)
        units = roots[labels]
        if reduction == "max":
            total.scatter_reduce_(0, units, values, "amax")
        else:
            total.index_add_(0, units, values)
        number.index_add_(0, units, torch.ones_like(values))
    if reduction == "mean":
        total = total / number
    return torch.where(number > 0, total, torch.nan)
