"""Bundles of units that are removed together, so that the groups of a convolution stay equally wide."""

from collections import defaultdict

import torch
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Trace

_MOST_STEPS = 20_000


def _counts(trace: Trace, units: Tensor) -> list[Tensor]:
    """For every balanced layer that holds any unit unevenly: how many channels of each unit lie in each of its groups."""
    roots = trace.channels.roots()
    place = torch.full((trace.channels.count,), -1)
    place[units] = torch.arange(len(units))
    uneven = []
    for rows in trace.channels.balanced:
        where = place[roots[rows]]  # (groups, width)
        if not (where >= 0).any():
            continue
        counts = torch.zeros(len(units), len(rows), dtype=torch.long)
        group = torch.arange(len(rows))[:, None].expand_as(where)
        inside = where >= 0
        counts.index_put_((where[inside], group[inside]), torch.tensor(1), accumulate=True)
        if (counts != counts[:, :1]).any():
            uneven.append(counts)
    return uneven


Vectors = tuple[tuple[int, ...], ...]  # of one unit: its channels in each group of each balanced layer


def _combination(
    cells: dict[Vectors, list[int]], sums: Vectors, chosen: list[Vectors], lead: int, level: int, steps: list[int]
) -> list[Vectors] | None:
    """Choose one unit of each of several cells that fill every group of layer ``lead`` to ``level``, and others evenly."""
    steps[0] += 1
    if steps[0] > _MOST_STEPS:
        return None
    lacking = next((group for group, number in enumerate(sums[lead]) if number < level), None)
    if lacking is None:
        return list(chosen) if all(len(set(total)) == 1 for total in sums) else None
    for vectors in sorted(cells, key=lambda key: -len(cells[key])):
        if vectors[lead][lacking] == 0 or chosen.count(vectors) >= len(cells[vectors]):
            continue
        added = tuple(tuple(map(sum, zip(a, b))) for a, b in zip(sums, vectors))
        if max(added[lead]) > level:
            continue
        combination = _combination(cells, added, [*chosen, vectors], lead, level, steps)
        if combination is not None:
            return combination
    return None


def bundle_units(trace: Trace, units: Tensor, scores: Tensor) -> tuple[list[list[int]], list[int]]:
    """Return lists of units to remove together, and the units that fit in none.

    Most bundles are single units. In a grouped convolution a bundle takes one channel, the lowest that is left, from each
    of its groups.

    Args:
        trace: Of the model.
        units: Roots of the units of one group (U,).
        scores: Of the units (U,).

    Returns:
        (bundles, lowest scores first; units that are left).
    """
    counts = _counts(trace, units)
    order = torch.argsort(scores, stable=True)
    if not counts:
        return units[order][:, None].tolist(), []
    cells: dict[Vectors, list[int]] = defaultdict(list)
    bundles = []
    for i in order.tolist():
        vectors = tuple(tuple(c[i].tolist()) for c in counts)
        if all(len(set(vector)) == 1 for vector in vectors):
            bundles.append([int(units[i])])
        else:
            cells[vectors].append(int(units[i]))
    for lead in range(len(counts)):
        for level in sorted({max(key[lead]) for key in cells if len(set(key[lead])) > 1}):
            while True:
                usable = {key: members for key, members in cells.items() if members and len(set(key[lead])) > 1}
                start = tuple((0,) * c.shape[1] for c in counts)
                chosen = _combination(usable, start, [], lead, level, [0])
                if chosen is None:
                    break
                while all(len(cells[key]) >= chosen.count(key) for key in chosen):
                    bundles.append([cells[key].pop(0) for key in chosen])
    return bundles, [unit for members in cells.values() for unit in members]
