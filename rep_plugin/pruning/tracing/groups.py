"""Groups of layers whose channels are coupled, made of units: sets of channels that only go together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Layer, Trace
from rep_plugin.pruning.tracing.labels import FIXED, connected


@dataclass(frozen=True)
class Group:
    """Coupled ``layers``, the ``units`` that may be removed (roots of labels, ascending), and why if there are none."""

    layers: tuple[str, ...]
    units: Tensor
    reason: str | None = None


def frozen_roots(trace: Trace) -> Tensor:
    """Return which roots must stay: (count,) bool. A layer whose channels are all one unit keeps it."""
    roots = trace.channels.roots()
    frozen = torch.zeros(trace.channels.count, dtype=torch.bool)
    frozen[roots[FIXED]] = True
    for labels, _ in trace.channels.frozen:
        frozen[roots[labels]] = True
    for layer in trace.layers.values():
        units = roots[layer.labels].unique()
        if len(units) == 1:
            frozen[units] = True
    return frozen


def _reason(trace: Trace, layer: Layer) -> str:
    roots = trace.channels.roots()
    units = roots[layer.labels].unique()
    for labels, reason in trace.channels.frozen:
        if torch.isin(units, roots[labels]).any():
            return reason
    for labels, what in trace.channels.mixed:
        if len(units) == 1 and torch.isin(units, roots[labels]).any():
            return f"its {len(layer.labels)} channels go together: {what}"
    return "it has a single channel" if len(layer.labels) == 1 else "coupled to channels that stay"


def find_groups(trace: Trace) -> list[Group]:
    """Return the groups in order of execution; one without units has a reason."""
    roots, frozen = trace.channels.roots(), frozen_roots(trace)
    layers = list(trace.layers.values())
    edges = []
    for index, layer in enumerate(layers):
        units = roots[layer.labels].unique()
        units = units[units != roots[FIXED]] + len(layers)
        edges.append((torch.full_like(units, index), units))
    owner = connected(len(layers) + trace.channels.count, edges)
    members: dict[int, list[Layer]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(int(owner[index]), []).append(layer)
    groups = []
    for group in members.values():
        units = torch.cat([roots[layer.labels] for layer in group]).unique()
        units = units[~frozen[units]]
        reason = None if len(units) else _reason(trace, group[0])
        groups.append(Group(tuple(layer.name for layer in group), units, reason))
    return groups
