"""Which channels go so that the model takes a given time, by the table of layers and by timing what is really pruned.

Multiply-adds are not time: a convolution with 61 channels can take longer than one with 64. The table is quick and
adds up to an estimate; what counts is the pruned model itself, timed in turns with the dense one. (Yang et al.,
"NetAdapt", ECCV 2018, choose widths by a table of measured layers too.)
"""

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.measure.progress import track
from rep_plugin.pruning.planning.latency_table import LatencyTable, Timer, timed_copy
from rep_plugin.pruning.planning.options import Budget
from rep_plugin.pruning.planning.select import Candidate, Finish, kept_without
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.kept_channels import KeptChannels

TOLERANCE = 0.10  # of the asked latency
_CLOSE = 0.04  # near enough to stop looking
_ATTEMPTS = 6
_NOISE = 0.1  # of the time between the narrowest width that is tried and the widest
_STEPS = (8, 16)  # channels that vector units take at once
_SECONDS = 3.0  # spent on timing two models


@dataclass(frozen=True)
class LatencyChoice:
    """Which of the candidates are removed, and the measured seconds of the dense model and of the pruned one."""

    chosen: list[Candidate]
    before: float
    after: float


@dataclass(frozen=True)
class Trial:
    """What was tried.

    Attributes:
        number: How many candidates of the order were asked for.
        counts: {group: how many of its candidates are removed}.
        share: Of the dense model's time, measured.
    """

    number: int
    counts: dict[int, int]
    share: float = 1.0


class Search:
    """Widths, their estimated and their measured times.

    Args:
        model: Left as it is.
        trace: Of the model.
        x: The input that is timed, (N, C, ...).
        order: Candidates, the first to be removed first.
        finish: What is really removed when some of them are chosen.
        timer: Measures seconds.
    """

    def __init__(self, model, trace: Trace, x: Tensor, order: list[Candidate], finish: Finish, timer: Timer):
        self.model, self.trace, self.x, self.order, self.finish, self.timer = model, trace, x, order, finish, timer
        self.groups: dict[int, list[Candidate]] = {}
        for candidate in order:
            self.groups.setdefault(candidate.group, []).append(candidate)
        self.widths = {group: self._widths(members) for group, members in self.groups.items()}
        self.dense = timed_copy(model, trace, KeptChannels(trace))
        self.table = LatencyTable(timer)
        self.sums: dict[tuple[int, ...], float] = {}  # by how many of each group are removed: what is asked twice
        self.dense_seconds = timer({"dense": (self.dense, (x,))}, _SECONDS)["dense"]
        (layers,) = self.table.add_up([self.dense], x)
        self.rest = self.dense_seconds - layers  # additions, Python: taken to stay

    def _widths(self, members: list[Candidate]) -> list[int]:
        """Channels of the layer that could lose most once the first 0, 1, 2 ... of a group are removed."""
        total: Counter[str] = Counter()
        for candidate in members:
            total.update(dict(candidate.losses))
        layer = max(total, key=total.__getitem__)
        widths = [len(self.trace.layers[layer].labels)]
        for candidate in members:
            widths.append(widths[-1] - dict(candidate.losses).get(layer, 0))
        return widths

    def wanted(self, number: int) -> dict[int, int]:
        """How many of each group are among the first ``number``."""
        return dict.fromkeys(self.groups, 0) | Counter(candidate.group for candidate in self.order[:number])

    def chosen(self, counts: Mapping[int, int]) -> list[Candidate]:
        """Return the candidates that are removed."""
        return [c for group, members in self.groups.items() for c in members[: counts[group]]]

    def build(self, counts: Mapping[int, int]) -> nn.Module:
        """Return a copy without them, as it is deployed."""
        return timed_copy(self.model, self.trace, kept_without(self.trace, self.finish(self.chosen(counts))))

    def estimate(self, *several: Mapping[int, int]) -> list[float]:
        """Return the share of the dense model's time, by the table."""
        keys = [tuple(counts[group] for group in self.groups) for counts in several]
        new = {key: counts for key, counts in zip(keys, several) if key not in self.sums}
        sums = self.table.add_up((self.build(counts) for counts in new.values()), self.x)
        self.sums |= zip(new, sums)
        return [(self.rest + self.sums[key]) / self.dense_seconds for key in keys]

    def measure(self, counts: Mapping[int, int]) -> float:
        """Return the share of the dense model's time that the pruned one takes."""
        seconds = self.timer({"dense": (self.dense, (self.x,)), "pruned": (self.build(counts), (self.x,))}, _SECONDS)
        return seconds["pruned"] / seconds["dense"]

    def near(self, group: int, count: int) -> list[int]:
        """Return counts that leave a multiple of 8 or 16 channels, a little more or fewer than ``count`` does; nearest first.

        Args:
            group: Number of the group.
            count: How many of its candidates are removed.
        """
        widths = self.widths[group]
        width, distances = widths[count], {}
        for step in _STEPS:
            for goal in (width // step * step, -(-width // step) * step):
                place = bisect.bisect_left(widths, -goal, key=lambda w: -w)
                if goal > 0 and 3 * abs(goal - width) <= width and place < len(widths) and widths[place] == goal:
                    distances[place] = abs(goal - width)
        return sorted(distances, key=distances.__getitem__)

    def plain(self, number: int) -> dict[int, int]:
        """The first ``number``, every group to the nearest multiple of 8."""
        return {group: next(iter(self.near(group, n)), n) for group, n in self.wanted(number).items()}

    def snap(self, wanted: Mapping[int, int], counts: Mapping[int, int]) -> dict[int, int]:
        """Return ``counts`` with every group at the width, about as wide as wanted, that is fastest for what it keeps.

        Fastest: the most below the straight line from the narrowest width to the widest, the nearest of those about as
        much. A width that is no faster than a wider one is never taken.

        Args:
            wanted: {group: how many of its candidates shall be removed}.
            counts: The same, of all groups.
        """
        counts = dict(counts)
        for group, count in track(wanted.items(), "timing widths"):
            options = sorted({count, *self.near(group, count)})  # the widest first
            if len(options) < 2:
                continue
            times = self.estimate(*({**counts, group: option} for option in options))
            widths = [self.widths[group][option] for option in options]
            span = max(0.0, times[0] - times[-1])
            gains = [span / max(1, widths[0] - widths[-1]) * width - t for width, t in zip(widths, times)]
            good = [i for i, gain in enumerate(gains) if gain >= max(gains) - _NOISE * span]
            best = min(good, key=lambda i: abs(options[i] - count))
            counts[group] = options[next(i for i in range(best + 1) if times[i] <= times[best])]
        return counts

    def first_below(self, aim: float, asked: float) -> Trial:
        """Return the trial in which the estimate falls to ``aim``, to 1/256 of the candidates; of all where it never does.

        Args:
            aim: A share of the dense model's time.
            asked: The share that must be met.

        Raises:
            ArgumentError: Without all candidates the model is slower than the asked share.
        """
        low, high = 0, len(self.order)
        while high - low > max(1, len(self.order) // 256):
            middle = (low + high) // 2
            low, high = (low, middle) if self.estimate(self.plain(middle))[0] <= aim else (middle, high)
        if high == len(self.order):
            return Trial(high, self.all_gone(asked))
        return Trial(high, self.snap(self.wanted(high), self.plain(high)))

    def between(self, tried: Sequence[Trial], goal: float) -> Trial | None:
        """Return a trial between the slowest that is fast enough and the fastest that is not, None without these.

        Far apart: the number of candidates on the line between the two. Near: some groups are as in the one, the others
        as in the other, by the table.

        Args:
            tried: The trials so far.
            goal: The share of the time to meet.
        """
        slow = min((t for t in tried if t.share > goal), key=lambda t: t.share, default=None)
        fast = max((t for t in tried if t.share <= goal), key=lambda t: t.share, default=None)
        if slow is None or fast is None:
            return None
        part = (slow.share - goal) / (slow.share - fast.share)
        number = round(slow.number + (fast.number - slow.number) * part)
        if abs(fast.number - slow.number) > len(self.order) // 16:
            return Trial(number, self.snap(self.wanted(number), self.plain(number)))
        steps = [slow.counts]
        for group, count in fast.counts.items():
            if steps[-1][group] != count:
                steps.append({**steps[-1], group: count})
        times = self.estimate(*steps)
        wanted = times[0] + (times[-1] - times[0]) * part
        place = min(range(len(steps)), key=lambda i: abs(times[i] - wanted))
        return Trial(number, steps[place]) if 0 < place < len(steps) - 1 else None

    def all_gone(self, asked: float) -> dict[int, int]:
        """Return the counts when all candidates are removed.

        Raises:
            ArgumentError: That is slower than the ``asked`` share.
        """
        counts = {group: len(members) for group, members in self.groups.items()}
        if (least := self.measure(counts)) > asked:
            raise ArgumentError(f"{self.cannot_meet(asked)}: the least that remains is {self.describe(least)}")
        return counts

    def describe(self, share: float) -> str:
        """Return a share of the dense model's time, and its milliseconds, as text."""
        return f"{share:.3g} ({share * self.dense_seconds * 1e3:.3g} ms)"

    def cannot_meet(self, asked: float) -> str:
        """Return the beginning of a refusal."""
        return f"latency (={self.describe(asked)} of {self.dense_seconds * 1e3:.3g} ms) cannot be met"


def to_latency(
    model: nn.Module, trace: Trace, x: Tensor, order: list[Candidate], finish: Finish, budget: Budget, timer: Timer
) -> LatencyChoice:
    """Return what is removed so that the pruned model meets a budget of latency.

    Widths come from the order and the table; a copy that is really pruned is then timed in turns with the dense model, and
    the choice is corrected by its time, until that is within 4 %, six times at most.

    Args:
        model: Left as it is.
        trace: Of the model.
        x: The input that is timed, (N, C, ...).
        order: Candidates, the first to be removed first.
        finish: What is really removed when some of them are chosen.
        budget: Of latency.
        timer: Measures seconds.

    Returns:
        The candidates, and the measured times.

    Raises:
        ArgumentError: Nothing within 10 % (or below) is found, or nothing faster than the dense model.
    """
    search = Search(model, trace, x, order, finish, timer)
    dense_ms = search.dense_seconds * 1e3
    asked = budget.limit(dense_ms) / dense_ms
    if asked >= 1:
        return LatencyChoice([], search.dense_seconds, search.dense_seconds)
    aim, goal, tried = asked, asked * (1 - _CLOSE / 2), []
    for _ in track(range(_ATTEMPTS), "timing pruned copies (often fewer)"):
        trial = search.between(tried, goal) or search.first_below(aim, asked)
        share = search.measure(trial.counts)
        if close := abs(share / goal - 1) <= _CLOSE:
            share = (share + search.measure(trial.counts)) / 2  # was it luck?
            close = abs(share / goal - 1) <= _CLOSE
        tried.append(replace(trial, share=share))
        if close:
            break
        aim *= goal / share
    met = [trial for trial in tried if trial.share <= min(1.0, asked * (1 + TOLERANCE))]
    best = min(met or tried, key=lambda trial: abs(trial.share / goal - 1))
    if not met:
        raise ArgumentError(f"{search.cannot_meet(asked)}: the nearest plan takes {search.describe(best.share)}")
    return LatencyChoice(search.chosen(best.counts), search.dense_seconds, best.share * search.dense_seconds)
