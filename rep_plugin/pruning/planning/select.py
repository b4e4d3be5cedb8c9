"""Which units to remove: the lowest scores, as far as widths allow, by share, by budget, or to given widths."""

import bisect
import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.planning.balance import bundle_units
from rep_plugin.pruning.planning.options import Budget, PruneOptions
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.groups import find_groups, name_layer
from rep_plugin.pruning.tracing.kept_channels import KeptChannels, count_costs


@dataclass(frozen=True, slots=True)
class Candidate:
    """Units that may go together: their mean ``score``, the ``group`` they are in, and what each layer would lose."""

    units: tuple[int, ...]
    score: float
    group: int
    losses: tuple[tuple[str, int], ...]


_CLOSE = 0.95  # of a budget is used at least where widths are rounded by default
_NOISE = 1e-6  # scores that differ relatively by less are equal
Finish = Callable[[list[Candidate]], list[Candidate]]  # what is really removed when these candidates are chosen


@dataclass
class Choice:
    """All candidates of a model, by group and with ascending scores.

    Attributes:
        layers: Of each group.
        candidates: Of each group.
        frozen: {layer: why it stays as it is}.
        widths: {layer: channels}.
    """

    layers: list[tuple[str, ...]]
    candidates: list[list[Candidate]]
    frozen: dict[str, str]
    widths: dict[str, int]

    @property
    def units(self) -> int:
        """How many units could go: what ``prune_fraction`` is a share of."""
        return sum(len(c.units) for group in self.candidates for c in group)

    def freeze(self, group: int, reason: str) -> None:
        """Let a group stay, for a reason."""
        self.candidates[group] = []
        self.frozen |= dict.fromkeys(self.layers[group], reason)

    def reason(self, layer: str) -> str:
        return self.frozen.get(layer, f"none of the channels of {name_layer(layer)} can go")


def match_layers(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the first pattern that fits each layer.

    Args:
        patterns: As in :mod:`fnmatch`.
        names: Of the layers.

    Returns:
        {layer: pattern}, of layers that one fits.

    Raises:
        ArgumentError: A pattern fits no layer.
    """
    matches = {}
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            known = f"expected one of {', '.join(list(names)[:5])} ..." if names else "the model has none with channels"
            raise ArgumentError(f"no layer is named like {pattern!r}, {known}")
        for name in fitting:
            matches.setdefault(name, pattern)
    return matches


def _total(several: Iterable[list[tuple[str, int]]]) -> list[tuple[str, int]]:
    total: Counter[str] = Counter()
    for losses in several:
        total.update(dict(losses))
    return list(total.items())


def find_candidates(trace: Trace, scores: Tensor, ignore: Sequence[str] = (), without: str = "has no score") -> Choice:
    """Return what may be removed.

    Args:
        trace: Of the model.
        scores: Of the units by root, (count,).
        ignore: Layer patterns whose groups are frozen.
        without: What is said of the layer of a group without scores, which is frozen as well.

    Returns:
        The candidates.

    Raises:
        ArgumentError: A pattern fits no layer.
    """
    ignored = match_layers(ignore, list(trace.layers))
    roots, values = trace.channels.roots(), scores.tolist()
    shared: dict[tuple, tuple] = {}
    choice = Choice([], [], {}, {name: len(layer.labels) for name, layer in trace.layers.items()})
    for group in find_groups(trace):
        units, reason = group.units, group.reason
        hit = next((name for name in group.layers if name in ignored), None)
        if reason is None and hit is not None:
            units, reason = units[:0], f"{name_layer(hit)} is ignored by {ignored[hit]!r}"
        if reason is None and scores[units].isnan().any():
            units = units[~scores[units].isnan()]
            reason = None if len(units) else f"{name_layer(group.layers[0])} {without}"
        bundles, _ = bundle_units(trace, units, scores[units]) if len(units) else ([], [])
        if reason is None and not bundles:
            reason = (
                f"{name_layer(group.layers[0])} has groups that cannot lose as many channels each: change their number"
            )
        losses: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name in group.layers:
            roots_of_layer, numbers = roots[trace.layers[name].labels].unique(return_counts=True)
            for unit, number in zip(roots_of_layer.tolist(), numbers.tolist()):
                losses[unit].append((name, number))
        candidates = []
        for bundle in bundles:
            total = losses[bundle[0]] if len(bundle) == 1 else _total(losses[unit] for unit in bundle)
            score = sum([values[unit] for unit in bundle]) / len(bundle)
            same = shared.setdefault(same := tuple(total), same)  # most units lose alike: one object
            candidates.append(Candidate(tuple(bundle), score, len(choice.layers), same))
        if reason is not None:
            choice.frozen |= dict.fromkeys(group.layers, reason)
        choice.layers.append(group.layers)
        choice.candidates.append(sorted(candidates, key=lambda c: c.score))
    return choice


def in_order(groups: Sequence[Sequence[Candidate]], scope: str) -> list[Candidate]:
    """Return candidates, the first to be removed first.

    Args:
        groups: Candidates of each group, with ascending scores.
        scope: ``global``, by score over all groups; or ``layer``, every group losing an equal share.

    Returns:
        All of them.
    """
    if scope == "global":
        return sorted((c for group in groups for c in group), key=lambda c: c.score)
    ranked = [((place + 0.5) / len(group), c) for group in groups for place, c in enumerate(group)]
    return [c for _, c in sorted(ranked, key=lambda pair: pair[0])]


def above_floors(
    order: Sequence[Candidate], widths: Mapping[str, int], floors: Mapping[str, tuple[int, int]]
) -> list[Candidate]:
    """Leave out the candidates that would bring a layer below its floor, and put last those that go below the default one.

    Of these the first are those that use up the smallest part of what lies between the two floors: all layers give way
    alike, and as little as needed.

    Args:
        order: Candidates, the first to be removed first.
        widths: {layer: channels}.
        floors: {layer: (the floor, the default one)}.

    Returns:
        The others.
    """
    left, kept, low, last = Counter(widths), [], [], []
    for candidate in order:
        if all(left[name] - number >= floors[name][1] for name, number in candidate.losses):
            left.subtract(dict(candidate.losses))
            kept.append(candidate)
        else:
            low.append(candidate)
    for candidate in low:
        if all(left[name] - number >= floors[name][0] for name, number in candidate.losses):
            left.subtract(dict(candidate.losses))
            last.append((max(_below(left[name], *floors[name]) for name, _ in candidate.losses), candidate))
    return kept + [candidate for _, candidate in sorted(last, key=lambda pair: pair[0])]


def _below(width: int, least: int, default: int) -> float:
    return (default - width) / (default - least) if width < default else 0.0


def tied_layers(choice: Choice) -> tuple[list[tuple[str, ...]], bool]:
    """Return the layers of each group within which all scores are equal, and whether none of the groups has others.

    Args:
        choice: All candidates.

    Returns:
        (groups of layers, True where the scores say nothing about any channel).
    """
    several = [(layers, group) for layers, group in zip(choice.layers, choice.candidates) if len(group) > 1]
    tied = []
    for layers, group in several:
        lowest, highest = group[0].score, group[-1].score
        if highest - lowest <= _NOISE * max(abs(lowest), abs(highest)):
            tied.append(layers)
    return tied, bool(tied) and len(tied) == len(several)


def take_units(order: Sequence[Candidate], number: int) -> list[Candidate]:
    """Return the first candidates that together hold a number of units, or the nearest to it.

    Args:
        order: Candidates, the first to be removed first.
        number: Of units.

    Returns:
        The candidates.
    """
    taken, total = [], 0
    for candidate in order:
        if total + len(candidate.units) / 2 > number:
            break
        taken.append(candidate)
        total += len(candidate.units)
    return taken


def round_widths(
    taken: Sequence[Candidate], widths: Mapping[str, int], multiples: Mapping[str, int]
) -> list[Candidate]:
    """Give back the best candidates until all widths that shrink are multiples, or nothing shrinks.

    Args:
        taken: Candidates that are removed.
        widths: {layer: channels}.
        multiples: {layer: the number of which its width is a multiple}.

    Returns:
        The candidates that are still removed.
    """
    if set(multiples.values()) == {1}:
        return list(taken)
    by_group: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in taken:
        by_group[candidate.group].append(candidate)
    kept = []
    for members in by_group.values():
        members = sorted(members, key=lambda c: c.score)
        left = Counter(widths)
        for candidate in members:
            left.subtract(dict(candidate.losses))
        while members and any(left[n] % multiples[n] and left[n] < widths[n] for c in members for n, _ in c.losses):
            left.update(dict(members.pop().losses))
        kept += members
    return kept


def to_budget(
    trace: Trace,
    order: list[Candidate],
    widths: Mapping[str, int],
    budget: Budget,
    options: PruneOptions,
    taken: Sequence[Candidate] = (),
) -> tuple[list[Candidate], list[str]]:
    """Return what is removed when the fewest first candidates go that meet a budget, with rounded widths where that can be.

    Args:
        trace: Of the model.
        order: Candidates, the first to be removed first.
        widths: {layer: channels}.
        budget: Of params or macs.
        options: Of these ``round_to`` counts; the limits are for the message.
        taken: Candidates that are removed in any case.

    Returns:
        (the candidates, notes).

    Raises:
        ArgumentError: Removing all of them does not meet it.
    """
    name, _ = budget.item

    def removed(number: int, multiples: Mapping[str, int]) -> list[Candidate]:
        return round_widths([*taken, *order[:number]], widths, multiples)

    def cost(number: int, multiples: Mapping[str, int]) -> int:
        return getattr(count_costs(trace, kept_without(trace, removed(number, multiples))), name)

    before = getattr(count_costs(trace), name)
    limit = budget.limit(before)

    def fewest(multiples: Mapping[str, int]) -> int:
        return bisect.bisect_left(range(len(order) + 1), -limit, key=lambda number: -cost(number, multiples))

    rounded, own, notes = options.multiples(widths, by_cost=True), options.multiples(widths), []
    if rounded != own:
        if cost(len(order), rounded) <= limit:
            number = fewest(rounded)
            if cost(number, rounded) >= _CLOSE * min(before, limit):
                return removed(number, rounded), []
        notes.append(f"widths are not rounded: {budget} would be missed by more than 5 %")
    least = cost(len(order), own)
    if least > limit:
        within = f" with {options.limits}" if options.limits else ""
        raise ArgumentError(f"{name} (={limit:,}) cannot be met{within}: the least that remains is {least:,}")
    return removed(fewest(own), own), notes


def to_widths(choice: Choice, widths: Mapping[str, int]) -> list[Candidate]:
    """Return the lowest candidates that bring layers to given widths.

    Args:
        choice: All candidates.
        widths: {layer: channels kept}.

    Returns:
        The candidates.

    Raises:
        ArgumentError: A name or a number does not exist, or coupled layers are given different widths.
    """
    left = Counter(choice.widths)
    taken: dict[Candidate, None] = {}
    for name, width in widths.items():
        if name not in left:
            near = difflib.get_close_matches(str(name), left, 3, 0) or list(left)[:3]
            raise ArgumentError(
                f"the model has no layer {name!r} that makes channels, expected one as {', '.join(near)}"
            )
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= choice.widths[name]:
            raise ArgumentError(f"width of {name!r} must lie in 1..{choice.widths[name]}, got {width!r}")
        index = next(i for i, layers in enumerate(choice.layers) if name in layers)
        if width < left[name] and not choice.candidates[index]:
            raise ArgumentError(f"{name!r} cannot go from {left[name]} to {width} channels: {choice.reason(name)}")
        for candidate in choice.candidates[index]:
            loss = dict(candidate.losses).get(name, 0)
            if candidate not in taken and 0 < loss <= left[name] - width:
                taken[candidate] = None
                left.subtract(dict(candidate.losses))
    for name, width in widths.items():
        if left[name] != width:
            tied = next(layers for layers in choice.layers if name in layers)
            others = [other for other in tied if other != name]
            raise ArgumentError(
                f"{name!r} cannot keep {width} of {choice.widths[name]} channels (nearest: {left[name]}), coupled to "
                f"{others[:3]}"
            )
    empty = [name for name, number in left.items() if number < 1]
    if empty:
        raise ArgumentError(f"the widths would leave {empty[0]!r} without channels")
    return list(taken)


def kept_without(trace: Trace, taken: Iterable[Candidate]) -> KeptChannels:
    """Return what stays once candidates are removed.

    Args:
        trace: Of the model.
        taken: The candidates.

    Returns:
        The channels that stay.
    """
    return KeptChannels(trace, [unit for candidate in taken for unit in candidate.units])


def nothing_to_prune(model: nn.Module, reasons: Mapping[str, str], what: str = "pruned") -> ArgumentError:
    """Return the error for a model without candidates.

    Args:
        model: For its name.
        reasons: {frozen layer: why}; the first is told.
        what: Was asked for.

    Returns:
        The error.
    """
    reason = next(iter(reasons.values()), "it has no layer that makes channels")
    return ArgumentError(f"nothing in {type(model).__name__} can be {what}: {reason}")
