"""Groups of layers whose channels are coupled, made of units: sets of channels that only go together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rep_plugin.pruning.tracing.graph import OUTPUT, Layer, Trace
from rep_plugin.pruning.tracing.labels import FIXED, connected


@dataclass(frozen=True)
class Group:
    """Coupled ``layers``, the ``units`` that may be removed (roots of labels, ascending), and why if there are none.

    The reason names one of the layers, what holds it, and what can be done about it.
    """

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


def name_layer(name: str) -> str:
    """Return how a layer is named in a reason; the root has no name."""
    return repr(name) if name else "the model itself"


def _reason(trace: Trace, group: list[Layer]) -> str:
    roots = trace.channels.roots()
    units = [roots[layer.labels].unique() for layer in group]
    reasons = [
        f"{name_layer(layer.name)} {reason}"
        for labels, reason in trace.channels.frozen
        for layer, own in zip(group, units)
        if torch.isin(own, roots[labels]).any()
    ]
    if (output := next((reason for reason in reasons if OUTPUT in reason), None)) is not None:
        return output
    name, number = name_layer(group[0].name), len(group[0].labels)
    for labels, what in trace.channels.mixed:
        if len(units[0]) == 1 < number and torch.isin(units[0], roots[labels]).any():
            return f"{name} loses all of its {number} channels or none, by {what}: take a narrower network for that"
    if reasons:
        return reasons[0]
    if number == 1:
        return f"{name} has a single channel, which has to stay"
    return f"{name} is coupled to channels that stay, as the model's input does: nothing to do"


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
        reason = None if len(units) else _reason(trace, group)
        groups.append(Group(tuple(layer.name for layer in group), units, reason))
    return groups
