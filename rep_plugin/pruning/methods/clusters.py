"""Clusters of channels that training draws together until each is one channel, found on a trace: coupled layers share them.

Source: Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure" (CVPR 2019).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from rep_plugin.arguments import OneOf, Shape, checked
from rep_plugin.checkpoints.plain import parse_json, require_fields
from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.apply import kept_by
from rep_plugin.pruning.planning.options import Budget, PruneOptions, Widths
from rep_plugin.pruning.planning.plan import PrunePlan
from rep_plugin.pruning.planning.planner import plan_to_budget
from rep_plugin.pruning.planning.select import nothing_to_prune
from rep_plugin.pruning.tracing.graph import Trace, named_tensors
from rep_plugin.pruning.tracing.groups import find_groups, name_layer
from rep_plugin.pruning.tracing.kept_channels import KeptChannels
from rep_plugin.pruning.tracing.labels import squeeze_constant
from rep_plugin.pruning.tracing.tracer import trace_channels

METHODS = ("kmeans", "even")
_LAST = 2.0  # the score of units that stay, above any rank
_ROUNDS = 30


@dataclass(frozen=True)
class Clusters:
    """Which channels shall become one.

    Args:
        plan: Keeps the first channel of every cluster.
        stands_for: {layer: for each of its channels, the one that stays for it}.

    Example:
        >>> from rep_plugin.pruning.methods import plan_clusters
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1))
        >>> plan_clusters(net, (1, 3, 8, 8), {"0": 2}, clusters="even").stands_for
        {'0': (0, 0, 2, 2)}
    """

    plan: PrunePlan
    stands_for: dict[str, tuple[int, ...]]

    def to_json(self) -> str:
        """Return the clusters, with their plan, as JSON text."""
        return json.dumps({"plan": asdict(self.plan), "stands_for": self.stands_for})

    @classmethod
    def from_json(cls, text: str) -> "Clusters":
        """Return the clusters of a JSON text.

        Raises:
            ArgumentError: It is no such text.
        """
        data = parse_json(text, "the text of clusters")
        require_fields(data, {"plan": dict, "stands_for": dict[str, tuple[int, ...]]}, "the text holds no clusters")
        plan = PrunePlan.from_json(json.dumps(data["plan"]))
        stands_for = {name: tuple(places) for name, places in data["stands_for"].items()}
        for name in {**plan.kept, **stands_for}:
            if tuple(sorted(set(stands_for.get(name, ())))) != plan.kept.get(name):
                raise ArgumentError(f"the clusters of {name!r} do not stand for the channels that the plan keeps")
        return cls(plan, stands_for)


class Alignment:
    """Which place of a unit answers to which place of another one, in every tensor.

    The *kind* of a label is where it occurs: in which dimensions of which tensors, in which groups of convolutions, how
    often. Units whose labels are of the same kinds, each kind once, are of one class: what the network does to one it does
    to the other, with other numbers. Only such units can become equal, and then be one.
    """

    def __init__(self, trace: Trace):
        self.trace, self.roots = trace, trace.channels.roots().tolist()
        slices = [(f"{name}.{dim}", labels) for name, dims in trace.slices.items() for dim, labels in dims.items()]
        balanced = [(f"balance {place}", rows) for place, rows in enumerate(trace.channels.balanced)]
        occurrences: list[list] = [[] for _ in self.roots]
        for key, labels in (*slices, *balanced):
            for row, own in enumerate(labels.view(-1, labels.shape[-1])):
                for label, number in zip(*(t.tolist() for t in own.unique(return_counts=True))):
                    occurrences[label].append((key, row, number))
        numbers: dict[tuple, int] = {}
        self._kinds = [numbers.setdefault(tuple(places), len(numbers)) if places else None for places in occurrences]

    def classes(self) -> tuple[list[tuple[str, list[int]]], dict[str, str]]:
        """Return [(a layer, its units of one class)], at least two each, and {layer: why none of its channels merge}."""
        kinds: dict[int, list[int]] = {}
        for root, kind in zip(self.roots, self._kinds):
            if kind is not None:
                kinds.setdefault(root, []).append(kind)
        counted = {
            self.roots[label]: what
            for labels, what in self._counted()
            for label in squeeze_constant(labels)[0].unique().tolist()
        }
        classes, reasons = [], {}
        for group in find_groups(self.trace):
            by_kinds: dict[tuple, list[int]] = {}
            layer, reason = (
                name_layer(group.layers[0]),
                "has no two channels that do the same work: PruneHook prunes it",
            )
            for unit in group.units.tolist():
                if unit in counted:
                    reason = counted[unit]
                elif len(set(kinds[unit])) < len(kinds[unit]):
                    reason = "has channels that go together, none answers to another: PruneHook prunes it"
                else:
                    by_kinds.setdefault(tuple(sorted(kinds[unit])), []).append(unit)
            alike = [(group.layers[0], units) for units in by_kinds.values() if len(units) > 1]
            classes += alike
            if not alike:
                reasons |= dict.fromkeys(group.layers, group.reason or f"{layer} {reason}")
        return classes, reasons

    def _counted(self) -> list[tuple[Tensor, str]]:
        """Channels whose number matters: two equal ones are not one of twice the weight."""
        what = "which multiplies its channels: two equal ones are not one: PruneHook prunes it"
        pools = [(labels, f"feeds {n!r}, {what}") for n, (_, ends) in self.trace.pools.items() for labels in ends]
        return [*self.trace.counted, *pools]

    def places(self, labels: Tensor) -> dict[int, list[int]]:
        """Return {unit: its places among ``labels`` (C,)}, in an order that all units of a class have."""
        places: dict[int, list[int]] = {}
        labels = labels.tolist()
        for place in sorted(range(len(labels)), key=lambda p: (self._kinds[labels[p]] or 0, p)):
            places.setdefault(self.roots[labels[place]], []).append(place)
        return places

    def targets(self, labels: Tensor, leads: Mapping[int, int]) -> Tensor:
        """Return the place that stays for each place, like ``labels`` ((C,), or (groups, width)); ``leads``: unit -> unit."""
        rows = []
        for own in labels.view(-1, labels.shape[-1]):
            places, row = self.places(own), list(range(len(own)))
            for unit in places.keys() & leads.keys():
                for place, target in zip(places[unit], places[leads[unit]], strict=True):
                    row[place] = target
            rows.append(row)
        return torch.tensor(rows).view(labels.shape)

    def is_input(self, name: str, dim: int) -> bool:
        """True for the columns of a kernel, which read channels; all else makes them or goes along."""
        return (name, dim) not in self.trace.makers and len(self.trace.sizes.get(name, ())) > 1


def leads_of(clusters: Clusters, trace: Trace) -> dict[int, int]:
    """Return the units that go, with the unit that stays for each.

    Args:
        clusters: Of a model.
        trace: Of the same model.

    Returns:
        {unit: the unit that stays for it}.
    """
    roots, leads = trace.channels.roots(), {}
    for name, stands_for in clusters.stands_for.items():
        units = roots[trace.layers[name].labels]
        leads |= {u: t for u, t in zip(units.tolist(), units[list(stands_for)].tolist()) if u != t}
    return leads


def cluster_points(points: Tensor, number: int, method: str, seed: int = 0) -> list[int]:
    """Return the cluster of each point: exactly ``number`` clusters, none empty.

    Args:
        points: (N, D).
        number: Of the clusters, N at most.
        method: ``even``, runs of equal length; or ``kmeans``, Lloyd's rounds from k-means++ starts (Arthur and
            Vassilvitskii, SODA 2007).
        seed: Of the starts.

    Returns:
        The cluster of each point, N numbers.
    """
    # scipy's k-means may leave clusters empty, where points are equal for example; a plan needs all of them.
    if method == "even":
        return [place * number // len(points) for place in range(len(points))]
    if points.shape[1] > len(points):
        points = torch.linalg.qr(points.T, mode="r").R.T  # fewer numbers, the same distances
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    gaps = torch.full((len(points),), torch.inf, dtype=points.dtype)
    while len(chosen) < number:
        gaps = torch.minimum(gaps, (points - points[chosen[-1]]).square().sum(1))
        gaps[chosen] = 0
        # Where none is left the others are equal to chosen ones.
        weights = gaps if gaps.any() else torch.ones_like(gaps).index_fill_(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    centres, owner = points[chosen], None
    for _ in range(_ROUNDS):
        distances = torch.cdist(points, centres)
        nearest = _fill_empty(distances.argmin(1), distances, number)
        if owner is not None and torch.equal(owner, nearest):
            break
        owner = nearest
        sizes = torch.bincount(owner, minlength=number)[:, None]
        centres = torch.zeros_like(centres).index_add_(0, owner, points) / sizes
    return owner.tolist()


def _fill_empty(nearest: Tensor, distances: Tensor, number: int) -> Tensor:
    """Give every empty cluster the point that lies farthest from its own centre, of those that are not alone."""
    for empty in (torch.bincount(nearest, minlength=number) == 0).nonzero().flatten().tolist():
        own = distances.gather(1, nearest[:, None])[:, 0].clone()
        own[torch.bincount(nearest, minlength=number)[nearest] == 1] = -1
        nearest[own.argmax()] = empty
    return nearest


def _kernels(model: nn.Module, aligned: Alignment, units: list[int]) -> Tensor:
    """Return the kernels that make the channels of units of one class, all layers side by side: (U, K)."""
    parts = []
    for name, dims in aligned.trace.slices.items():
        if len(aligned.trace.sizes.get(name, ())) < 2:
            continue
        for dim, labels in dims.items():
            if aligned.is_input(name, dim):
                continue
            of_unit = aligned.places(labels)
            if units[0] in of_unit:
                places = torch.tensor([of_unit[unit] for unit in units])
                rows = named_tensors(model)[name].detach().movedim(dim, 0).cpu().float()
                parts.append(rows[places].reshape(len(units), -1))
    return torch.cat(parts, 1)


@checked
def plan_clusters(
    model: nn.Module,
    example_input: Tensor | Shape,
    budget: Budget | Widths,
    options: PruneOptions | None = None,
    clusters: Annotated[str, OneOf(METHODS)] = "kmeans",
) -> Clusters:
    """Return the clusters that each shall become one channel. The model is not touched.

    Layers that feed a bilinear pooling, or a norm over channels, stay as they are: there two equal channels are not the
    same as one with summed weights.

    Args:
        model: Left as it is.
        example_input: A tensor (N, C, ...) or its shape.
        budget: How many channels remain, every group of coupled layers losing an equal share; or {layer: the number of
            its clusters}.
        options: Of these count ``min_channels``, ``max_prune_fraction``, ``round_to``, ``overrides``, ``ignore`` and
            ``seed``.
        clusters: ``kmeans`` of the kernels, those of coupled layers side by side, or ``even``.

    Returns:
        The clusters, with the plan that keeps the first channel of each.

    Raises:
        ArgumentError: The method is unknown, or as :func:`rep_plugin.plan_pruning` says.
        TraceError: The model cannot be traced.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import plan_clusters
        >>> from rep_plugin.pruning.planning import Budget
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> plan_clusters(net, (1, 3, 8, 8), Budget(prune_fraction=0.5)).plan.widths["0"]
        (8, 4)
    """
    options = options or PruneOptions()
    trace = trace_channels(model, example_input)
    aligned = Alignment(trace)
    classes, reasons = aligned.classes()
    if not classes:
        raise nothing_to_prune(model, reasons, "merged")
    scores = _ranks(trace, classes, reasons)
    if isinstance(budget, Mapping):
        for name, width in budget.items():
            if name in reasons and width != len(trace.layers[name].labels):
                raise ArgumentError(f"{name!r} cannot be merged to {width} channels: {reasons[name]}")
        plan = PrunePlan.from_widths(model, example_input, budget, scores)
    else:
        plan = plan_to_budget(model, example_input, budget, replace(options, scores=scores, scope="layer"))

    mask, leads = kept_by(plan, model, trace).mask, {}
    for layer, units in classes:
        number = int(mask[units].sum())
        if number == 0:
            raise ArgumentError(f"{plan.why} leaves no channel of a kind that {layer!r} has: remove less")
        if number == len(units):
            continue
        points = _kernels(model, aligned, units) if clusters == "kmeans" else torch.empty(len(units), 0)
        first: dict[int, int] = {}
        for unit, cluster in zip(units, cluster_points(points, number, clusters, options.seed)):
            leads[unit] = first.setdefault(cluster, unit)
    kept = KeptChannels(trace, [unit for unit, lead in leads.items() if unit != lead])
    changed = {name: layer.labels for name, layer in trace.layers.items() if kept.changes(layer.labels)}
    what = budget if isinstance(budget, Budget) else f"widths of {len(budget)} layers"
    plan = replace(
        plan,
        kept={name: tuple(kept.index(labels).tolist()) for name, labels in changed.items()},
        frozen={name: reasons.get(name, reason) for name, reason in plan.frozen.items()},
        scores={},
        why=f"{what}, in {clusters} clusters, {options}",
    )
    return Clusters(plan, {name: tuple(aligned.targets(labels, leads).tolist()) for name, labels in changed.items()})


def _ranks(trace: Trace, classes: list[tuple[str, list[int]]], reasons: Mapping[str, str]) -> dict[str, list[float]]:
    """Return scores by which every class loses an equal share; one unit of each, and those of no class, come last."""
    scores = torch.full((trace.channels.count,), _LAST, dtype=torch.float64)
    for _, units in classes:
        scores[units[:-1]] = (torch.arange(len(units) - 1) + 0.5).double() / len(units)
    roots = trace.channels.roots()
    return {name: scores[roots[la.labels]].tolist() for name, la in trace.layers.items() if name not in reasons}
