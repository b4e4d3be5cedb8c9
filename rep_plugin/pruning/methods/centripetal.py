"""Centripetal SGD: the filters of a cluster are trained to be equal, and are then one filter; nothing is lost.

Source: Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure" (CVPR 2019).
"""

import copy
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.measure.verify import verify_equivalence
from rep_plugin.pruning.apply import TOLERANCE, PruneReport, apply_plan, kept_by, proof_inputs
from rep_plugin.pruning.methods.clusters import Alignment, Clusters, leads_of
from rep_plugin.pruning.surgery.remove import keep_filters_, measure_filters, remove_channels_
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.groups import find_groups
from rep_plugin.pruning.tracing.kept_channels import KeptChannels
from rep_plugin.pruning.tracing.tracer import trace_channels


class Members:
    """The places of clusters in a model's tensors.

    ``rows``: tensor name -> (dimension, target (C,)), for all that makes channels or goes along with them: kernels and
    biases, gammas, betas and running statistics; ``columns``: the same, or (groups, width), for kernels that read them.
    ``groups``: tensor name -> number of the group (C,) of each place, in ``names``; -1 outside of clusters.

    Raises ValueError where the clusters are not for this model.
    """

    def __init__(self, model: nn.Module, clusters: Clusters):
        self.trace = trace_channels(model, clusters.plan.input_shape)
        self.kept = kept_by(clusters.plan, model, self.trace)
        leads, aligned = leads_of(clusters, self.trace), Alignment(self.trace)
        inside = {unit: (unit in leads) for unit in {*leads, *leads.values()}}
        self.names, group_of = [], {}
        for group in find_groups(self.trace):
            if units := [unit for unit in group.units.tolist() if unit in inside]:
                group_of |= dict.fromkeys(units, len(self.names))
                self.names.append(group.layers[0])
        self.rows: dict[str, tuple[int, Tensor]] = {}
        self.columns: dict[str, tuple[int, Tensor]] = {}
        self.groups: dict[str, Tensor] = {}
        roots = self.trace.channels.roots()
        for name, dims in self.trace.slices.items():
            for dim, labels in dims.items():
                target = aligned.targets(labels, leads)
                if torch.equal(target, torch.arange(labels.shape[-1]).expand_as(target)):
                    continue
                if aligned.is_input(name, dim):
                    self.columns[name] = (dim, target)
                else:
                    self.rows[name] = (dim, target)
                    self.groups[name] = torch.tensor([group_of.get(unit, -1) for unit in roots[labels].tolist()])


def cluster_means(tensor: Tensor, dim: int, target: Tensor) -> Tensor:
    """Return a tensor whose entries along ``dim`` are the means over places with the same ``target`` (C,)."""
    rows = tensor.movedim(dim, 0)
    flat = rows.reshape(len(target), -1)  # torch adds rows of a matrix ten times faster than those of a kernel
    sizes = torch.bincount(target, minlength=len(target)).clamp_min_(1).to(flat.dtype)
    sums = torch.zeros_like(flat).index_add_(0, target, flat).div_(sizes[:, None])
    return sums.index_select(0, target).view(rows.shape).movedim(0, dim)


class Centripetal:
    """Draws the filters of each cluster together, at every real step of an optimizer.

    With SGD, before the step each filter's gradient becomes its cluster's mean, plus ``strength`` (the paper's epsilon)
    times the filter's distance from the cluster's mean: after gradients are accumulated, averaged over processes, unscaled
    (also where a fused optimizer does that itself) and clipped, so that the pull is never clipped and is there once a step;
    a step that mixed precision leaves out leaves it out. Gammas, betas, biases and depthwise kernels likewise. Momentum and
    weight decay are the optimizer's: linear, so alike for all members, and decay shrinks distances as well, in all by
    about ``exp(-(strength + weight_decay) * sum(lr) / (1 - momentum))``, and by no more than sqrt(momentum) a step.

    Optimizers that divide by second moments would divide each member's pull by something else, and remember it. So with
    any other than SGD the gradient is the mean alone, and after the step each filter is moved to the mean by ``lr *
    strength`` of its distance, which falls as ``exp(-strength * sum(lr))``: take a larger strength.

    Raises ValueError, on attaching, where a parameter of a cluster is in none of the optimizers.
    """

    def __init__(self, model: nn.Module, clusters: Clusters, strength: float = 3e-3):
        self.strength, self.members = strength, Members(model, clusters)
        parameters = dict(model.named_parameters())
        self._names = {parameters[name]: name for name in self.members.rows if name in parameters}
        self._places = {
            p: (self.members.rows[name][0], self.members.rows[name][1].to(p.device)) for p, name in self._names.items()
        }
        self._handles: list = []

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Act on the steps of these optimizers."""
        optimizers = list(optimizers)
        held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"] if p.requires_grad}
        if left := [name for p, name in self._names.items() if id(p) not in held]:
            raise ArgumentError(
                f"{left[0]!r} ({len(left)} of {len(self._names)} such tensors) is not trained, so that its filters cannot "
                "become equal: ignore its layer"
            )
        for one in optimizers:
            strength = self.strength if isinstance(one, torch.optim.SGD) else 0.0
            self._handles.append(
                one.register_step_pre_hook(lambda optimizer, *_, strength=strength: self._pull(optimizer, strength))
            )
            if not strength:
                self._handles.append(one.register_step_post_hook(lambda optimizer, *_: self._draw(optimizer)))

    def detach(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _each(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, int, Tensor, dict]]:
        # Groups are looked at anew: loading an optimizer's state replaces them.
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in self._places and p.grad is not None:
                    yield p, *self._places[p], group

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, strength: float) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler where the optimizer unscales on its own
        for p, dim, target, _ in self._each(optimizer):
            pull = p * strength if scale is None else p * (strength * scale.to(p.device, p.dtype))
            # mean(gradient) + pull - mean(pull), in one mean
            p.grad.copy_(cluster_means(p.grad - pull, dim, target).add_(pull))

    @torch.no_grad()
    def _draw(self, optimizer: torch.optim.Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # the optimizer was called, and has done nothing
        for p, dim, target, group in self._each(optimizer):
            p.lerp_(cluster_means(p, dim, target), min(1.0, float(group["lr"]) * self.strength))


def _cluster_tensors(model: nn.Module, members: Members) -> Iterator[tuple[str, Tensor, int, Tensor]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, (dim, target) in members.rows.items():
        yield name, tensors[name], dim, target.to(tensors[name].device)


@torch.no_grad()
def cluster_distances(model: nn.Module, clusters: Clusters | Members) -> dict[str, tuple[float, float]]:
    """Return {first layer of a group: (max, relative)}, how far filters are from the means of their clusters.

    Over all parameters of the group's clusters: the largest difference, and the norm of all differences divided by that of
    the parameters.
    """
    members = clusters if isinstance(clusters, Members) else Members(model, clusters)
    largest, gaps, norms = torch.zeros(3, len(members.names), dtype=torch.float64)
    for name, tensor, dim, target in _cluster_tensors(model, members):
        if not isinstance(tensor, nn.Parameter):
            continue
        inside = members.groups[name] >= 0
        rows = tensor.double().movedim(dim, 0).reshape(len(target), -1)
        gap = (rows - cluster_means(rows, 0, target)).cpu()[inside]
        rows, own = rows.cpu()[inside], members.groups[name][inside]
        largest.scatter_reduce_(0, own, gap.abs().amax(1), "amax")
        gaps.index_add_(0, own, gap.square().sum(1))
        norms.index_add_(0, own, rows.square().sum(1))
    relative = (gaps / norms.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return {name: (a, b) for name, a, b in zip(members.names, largest.tolist(), relative.tolist())}


@torch.no_grad()
def snap_clusters_(model: nn.Module, clusters: Clusters) -> dict[str, tuple[float, float]]:
    """Set every filter, gamma, beta and running statistic to its cluster's mean; return the distances before."""
    members = Members(model, clusters)
    distances = cluster_distances(model, members)
    for _, tensor, dim, target in _cluster_tensors(model, members):
        means = cluster_means(tensor.double(), dim, target)
        tensor.copy_(means.index_select(dim, target))  # the very same number for all
    return distances


def merge_clusters_(
    model: nn.Module,
    clusters: Clusters,
    *,
    verify: bool = True,
    example_input: Tensor | None = None,
) -> PruneReport:
    """Make every cluster one channel, in place, after :func:`snap_clusters_`, and return the report of the removal.

    The layers that read a cluster's channels read their one channel by the sum of their columns. ``verify`` first compares
    the model with its merged form, in float64 and on copies, on ``example_input`` (default: random) and on another size;
    relative tolerance 1e-9.

    Raises ValueError where members of a cluster are not equal, or the clusters are not for this model, and
    :class:`rep_plugin.errors.EquivalenceError` where the proof fails. The model is then as it was.
    """
    started = time.perf_counter()
    members = Members(model, clusters)
    for name, tensor, dim, target in _cluster_tensors(model, members):
        if not torch.equal(tensor, tensor.index_select(dim, target)):
            raise ArgumentError(f"the filters of a cluster in {name!r} are not equal: call snap_clusters_ first")
    found = _prove(model, members, proof_inputs(model, clusters.plan.input_shape, example_input)) if verify else None
    _sum_columns_(model, members)
    report = apply_plan(model, clusters.plan, verify=False)
    if found is not None:
        report.add_proof(found)
    report.seconds = time.perf_counter() - started
    return report


def _prove(model: nn.Module, members: Members, inputs: list[Tensor]):
    merged = copy.deepcopy(model).double()  # from the start: a sum in float32 would be rounded
    _sum_columns_(merged, members)
    remove_channels_(merged, members.trace, members.kept)
    return verify_equivalence(copy.deepcopy(model), merged, inputs, tolerance=TOLERANCE, keep=False)


@torch.no_grad()
def _sum_columns_(model: nn.Module, members: Members) -> None:
    """The column of the channel that stays becomes the sum over its cluster, the others zero."""
    trace: Trace = members.trace
    filters = measure_filters(model, trace)
    for name, (dim, target) in members.columns.items():
        kernel = model.get_parameter(name)
        parts = kernel.unflatten(0, (len(target), -1)) if target.dim() == 2 else kernel[None]
        for part, own in zip(parts, target.view(-1, target.shape[-1]).to(kernel.device), strict=True):
            whole = part.double()
            part.copy_(torch.zeros_like(whole).index_add_(dim, own, whole))
    keep_filters_(model, trace, KeptChannels(trace), filters)
