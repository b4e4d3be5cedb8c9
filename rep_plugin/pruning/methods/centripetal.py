"""Centripetal SGD: the filters of a cluster are trained to be equal, and are then one filter; nothing is lost.

Source: Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure" (CVPR 2019).
"""

import time
from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
from torch import Tensor, nn

from rep_plugin.arguments import In, checked
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import require_bare
from rep_plugin.measure.verify import Equivalence, require_castable, require_rounded, verify_equivalence
from rep_plugin.pruning.apply import TOLERANCE, PruneReport, apply_plan, kept_by, proof_inputs
from rep_plugin.pruning.methods.clusters import Alignment, Clusters, leads_of
from rep_plugin.pruning.methods.sparsity import trained_parameters, was_skipped
from rep_plugin.pruning.surgery.remove import keep_filters_, measure_filters, remove_channels_
from rep_plugin.pruning.tracing.graph import Trace, named_tensors
from rep_plugin.pruning.tracing.groups import find_groups
from rep_plugin.pruning.tracing.kept_channels import KeptChannels
from rep_plugin.pruning.tracing.tracer import trace_channels


class Members:
    """The places of clusters in a model's tensors.

    Args:
        model: That the clusters are for.
        clusters: Of its channels.

    Attributes:
        rows: {tensor name: (dimension, target (C,))}, for all that makes channels or goes along with them: kernels and
            biases, gammas, betas and running statistics.
        columns: The same, or targets (groups, width), for kernels that read channels.
        groups: {tensor name: number of the group (C,) of each place, in ``names``}; -1 outside of clusters.
        names: The first layer of each group.

    Raises:
        ArgumentError: The clusters are not for this model.
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
    """Return a tensor whose entries along a dimension are the means over the places of one cluster.

    Args:
        tensor: Of any shape.
        dim: The dimension of the clusters, of length C.
        target: The place that stays for each place (C,); a cluster has one.

    Returns:
        A tensor of the same shape.
    """
    rows = tensor.movedim(dim, 0)
    flat = rows.reshape(len(target), -1)  # torch adds rows of a matrix ten times faster than those of a kernel
    sizes = torch.bincount(target, minlength=len(target)).clamp_min_(1).to(flat.dtype)
    sums = torch.zeros_like(flat).index_add_(0, target, flat).div_(sizes[:, None])
    return sums.index_select(0, target).view(rows.shape).movedim(0, dim)


@checked
class Centripetal:
    """Draws the filters of each cluster together, at every real step of an optimizer.

    With SGD, before the step each filter's gradient becomes its cluster's mean, plus ``strength`` times the filter's
    distance from the cluster's mean. This is after gradients are accumulated, averaged over processes, unscaled (also where
    a fused optimizer does that itself) and clipped: the pull is never clipped, and is there once a step. A step that mixed
    precision leaves out leaves it out. Gammas, betas, biases and depthwise kernels likewise. Momentum and weight decay are
    the optimizer's: linear, so alike for all members. Decay shrinks distances as well, in all by about
    ``exp(-(strength + weight_decay) * sum(lr) / (1 - momentum))``, and by no more than sqrt(momentum) a step.

    Optimizers that divide by second moments would divide each member's pull by something else, and remember it. So with
    any other than SGD the gradient is the mean alone, and after the step each filter is moved to the mean by ``lr *
    strength`` of its distance, which falls as ``exp(-strength * sum(lr))``: take a larger strength.

    Args:
        model: In training.
        clusters: Of its channels.
        strength: The paper's epsilon.

    Raises:
        ArgumentError: The clusters are not for this model; on attaching, a parameter of a cluster is in no optimizer.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import Centripetal, plan_clusters
        >>> from rep_plugin.pruning.planning import Budget
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> pull = Centripetal(net, plan_clusters(net, (1, 3, 8, 8), Budget(0.5)))
        >>> pull.attach([torch.optim.SGD(net.parameters(), 0.1)])
    """

    def __init__(self, model: nn.Module, clusters: Clusters, strength: Annotated[float, In("(0, 1000]")] = 3e-3):
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
        for p, group in trained_parameters(optimizer):
            if p in self._places:
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
        if was_skipped(optimizer):
            return
        for p, dim, target, group in self._each(optimizer):
            p.lerp_(cluster_means(p, dim, target), min(1.0, float(group["lr"]) * self.strength))


def _cluster_tensors(model: nn.Module, members: Members) -> Iterator[tuple[str, Tensor, int, Tensor]]:
    tensors = named_tensors(model)
    for name, (dim, target) in members.rows.items():
        yield name, tensors[name], dim, target.to(tensors[name].device)


@torch.no_grad()
def cluster_distances(model: nn.Module, clusters: Clusters | Members) -> dict[str, tuple[float, float]]:
    """Return how far the filters of each group are from the means of their clusters.

    Args:
        model: In training.
        clusters: Of its channels.

    Returns:
        {first layer of a group: (max, relative)}, over all parameters of the group's clusters: the largest difference, and
        the norm of all differences divided by that of the parameters.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import plan_clusters
        >>> from rep_plugin.pruning.methods.centripetal import cluster_distances
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> torch.nn.init.ones_(net[0].weight), torch.nn.init.zeros_(net[0].bias)  # doctest: +ELLIPSIS
        (...
        >>> cluster_distances(net, plan_clusters(net, (1, 3, 8, 8), {"0": 4}))
        {'0': (0.0, 0.0)}
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


@checked
@torch.no_grad()
def snap_clusters_(model: nn.Module, clusters: Clusters) -> dict[str, tuple[float, float]]:
    """Set every filter, gamma, beta and running statistic to its cluster's mean.

    Args:
        model: Changed in place.
        clusters: Of its channels.

    Returns:
        The distances before, as :func:`cluster_distances`.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import plan_clusters, snap_clusters_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> clusters = plan_clusters(net, (1, 3, 8, 8), {"0": 1})
        >>> list(snap_clusters_(net, clusters)), bool((net[0].weight == net[0].weight[0]).all())
        (['0'], True)
    """
    require_bare(model)
    members = Members(model, clusters)
    distances = cluster_distances(model, members)
    for _, tensor, dim, target in _cluster_tensors(model, members):
        means = cluster_means(tensor.double(), dim, target)
        tensor.copy_(means.index_select(dim, target))  # the very same number for all
    return distances


@checked
def merge_clusters_(
    model: nn.Module, clusters: Clusters, *, verify: bool = True, example_input: Tensor | None = None
) -> PruneReport:
    """Make every cluster one channel, in place, after :func:`snap_clusters_`.

    The layers that read a cluster's channels read their one channel by the sum of their columns.

    Args:
        model: Of which the members of each cluster are equal.
        clusters: Of its channels.
        verify: First compare the model with its merged form, in float64 and on copies, at a relative tolerance of 1e-9.
        example_input: For that, (N, C, H, W); random by default. Another size is tried as well.

    Returns:
        The report of the removal.

    Raises:
        ArgumentError: Members of a cluster are not equal, or the clusters are not for this model. It is then as it was.
        EquivalenceError: The proof fails. The model is then as it was.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import merge_clusters_, plan_clusters, snap_clusters_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)).eval()
        >>> clusters = plan_clusters(net, (1, 3, 8, 8), {"0": 5})
        >>> distances = snap_clusters_(net, clusters)
        >>> merge_clusters_(net, clusters).max_rel_error < 1e-9, net[1].weight.shape
        (True, torch.Size([4, 5, 1, 1]))
    """
    started = time.perf_counter()
    require_bare(model)
    members = Members(model, clusters)
    for name, tensor, dim, target in _cluster_tensors(model, members):
        if not torch.equal(tensor, tensor.index_select(dim, target)):
            raise ArgumentError(f"the filters of a cluster in {name!r} are not equal: call snap_clusters_ first")
    proof = exact = None
    if verify:
        exact, proof = _prove(model, members, proof_inputs(model, clusters.plan.input_shape, example_input))
    _sum_columns_(model, members)
    report = apply_plan(model, clusters.plan, verify=False)
    if exact is not None and proof is not None:
        model.load_state_dict(exact.state_dict())  # rounded once
        require_rounded(model, exact)
        report.add_proof(proof)
    report.seconds = time.perf_counter() - started
    return report


def _prove(model: nn.Module, members: Members, inputs: list[Tensor]) -> tuple[nn.Module, Equivalence]:
    """Return the merged float64 copy, compared with the model."""
    merged = copy_model(model).double()  # from the start: a sum in float32 would be rounded
    _sum_columns_(merged, members)
    remove_channels_(merged, members.trace, members.kept)
    proof = verify_equivalence(copy_model(model), merged, inputs, tolerance=TOLERANCE, keep=False, name="example_input")
    require_castable(merged, model)  # before the given one is changed
    return merged, proof


@torch.no_grad()
def _sum_columns_(model: nn.Module, members: Members) -> None:
    """Set the column of the channel that stays to the sum over its cluster, the others to zero."""
    trace: Trace = members.trace
    filters, tensors = measure_filters(model, trace), named_tensors(model)
    for name, (dim, target) in members.columns.items():
        kernel = tensors[name]
        parts = kernel.unflatten(0, (len(target), -1)) if target.dim() == 2 else kernel[None]
        for part, own in zip(parts, target.view(-1, target.shape[-1]).to(kernel.device), strict=True):
            whole = part.double()
            part.copy_(torch.zeros_like(whole).index_add_(dim, own, whole))
    keep_filters_(model, trace, KeptChannels(trace), filters)
