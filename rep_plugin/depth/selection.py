"""Exact selection of segments that share no layer: the least loss for each budget, by dynamic programming."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rep_plugin.depth.segments import Segment

TICKS = 4000  # all that could be saved, in steps
BEST = 5  # choices kept for each budget


class Item(NamedTuple):
    """A segment that may be chosen: what it saves, and what it costs."""

    segment: Segment
    saving: float
    loss: float


class Choice(NamedTuple):
    """Items that share no layer."""

    saving: float
    loss: float
    items: tuple[Item, ...]


State = dict[int, list[Choice]]


def _kept(state: State) -> State:
    """Without choices that ``BEST`` others beat in both respects: none of these is ever among the best."""
    kept: State = {}
    best: list[tuple[float, float]] = []  # of all that save as much or more
    for ticks in sorted(state, reverse=True):
        choices = sorted(state[ticks], key=_rank)[:BEST]
        choices = [choice for choice in choices if len(best) < BEST or _rank(choice) < best[-1]]
        if choices:
            kept[ticks] = choices
            best = sorted([*best, *map(_rank, choices)])[:BEST]
    return kept


def _rank(choice: Choice) -> tuple[float, float]:
    """The least loss comes first, then what takes away no more than is needed."""
    return choice.loss, choice.saving


def _joined(*states: State) -> State:
    whole: State = {}
    for state in states:
        for ticks, choices in state.items():
            whole[ticks] = whole.get(ticks, []) + choices
    return _kept(whole)


def best_choices(items: Sequence[Item]) -> State:
    """Return the best choices for each saving, in whole ticks, rounded down.

    Exact: of all sets of items that share no layer none saves as many ticks at less loss, up to ``BEST`` of them.

    Args:
        items: what may be chosen.

    Returns:
        {ticks: choices, the least loss first}.
    """
    unit = tick_of(items)
    start: State = {0: [Choice(0.0, 0.0, ())]}
    for run in sorted({item.segment.span[0] for item in items}):
        inside = sorted((item for item in items if item.segment.span[0] == run), key=lambda item: item.segment.span[2])
        states = [start]  # after the first n of the run
        for number, item in enumerate(inside):
            before = sum(other.segment.span[2] < item.segment.span[1] for other in inside[:number])
            taken: State = {}
            for ticks, choices in states[before].items():
                more = [Choice(c.saving + item.saving, c.loss + item.loss, (*c.items, item)) for c in choices]
                taken[ticks + math.floor(item.saving / unit)] = more
            states.append(_joined(states[-1], taken))
        start = states[-1]
    return start


def tick_of(items: Sequence[Item]) -> float:
    """Return the saving that counts as one tick."""
    return max(sum(item.saving for item in items), 1e-12) / TICKS


def most_saving(state: State) -> Choice:
    """Return the choice that saves most."""
    return max((choice for choices in state.values() for choice in choices), key=lambda choice: choice.saving)


def frontier(state: State) -> list[Choice]:
    """Return the choices that no other beats, the one that saves least first."""
    found: list[Choice] = []
    for ticks in sorted(state, reverse=True):
        best = state[ticks][0]
        if not found or best.loss < found[-1].loss:
            found.append(best)
    return found[::-1]


def choices_for(state: State, saving: float) -> list[Choice]:
    """Return the best choices that save as much.

    Args:
        state: of :func:`best_choices`.
        saving: what must be saved.

    Returns:
        Up to ``BEST`` of them, the least loss first; none where that cannot be.
    """
    enough = [choice for choices in state.values() for choice in choices if choice.saving >= saving - 1e-12]
    return sorted(enough, key=_rank)[:BEST]
