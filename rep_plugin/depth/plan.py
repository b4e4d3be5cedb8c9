"""A depth plan: which runs of a network become one convolution, as plain data, with what it was chosen from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rep_plugin.arguments import checked
from rep_plugin.checkpoints.files import write_text
from rep_plugin.checkpoints.plain import read_json_source, tuples_of
from rep_plugin.depth.segments import Segment
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.tables import new_table

if TYPE_CHECKING:  # imported where something is printed
    from rich.console import Console
    from rich.table import Table

VERSION = 1


@checked
@dataclass(frozen=True)
class Candidate(Segment):
    """A segment with what it costs and what it gives.

    Args:
        ms_before: milliseconds of its layers, BNs folded; None: not measured.
        ms_after: milliseconds of the one convolution.
        loss: what it is expected to cost, in the units of ``DepthPlan.importance``; None: not estimated.
        pays: one convolution is cheaper, in what the budget counts.
        loss_untrained: the same before the training steps, where there were some.
    """

    ms_before: float | None = None
    ms_after: float | None = None
    loss: float | None = None
    pays: bool = False
    loss_untrained: float | None = None


@checked
@dataclass(frozen=True)
class Point:
    """One choice of the frontier: no other is as fast and costs less.

    Args:
        latency: predicted milliseconds, None where none were measured.
        macs: multiply-adds for one image.
        loss: the sum of its segments' losses.
        chosen: names of its segments.
    """

    latency: float | None
    macs: int
    loss: float
    chosen: tuple[str, ...]


@checked
@dataclass(frozen=True, repr=False)
class DepthPlan:
    """What of a network becomes one convolution, as plain data.

    ``print(plan)`` gives a few lines, ``plan.print()`` the table of all segments, ``plan.plot("frontier.png")`` a plot of all
    budgets.

    Args:
        model: its class, for messages.
        input_shape: of the example, (N, C, ...).
        segments: all that were looked at, in the order of the forward.
        chosen: names of those that are merged.
        runtime: where times were measured.
        importance: what ``loss`` is: ``training`` (by ``evaluate``, after training steps), ``evaluate``, ``calibration`` or
            ``batch norms``.
        why: what was asked for.
        latency_before: milliseconds of the whole network with its BNs folded, None where none were measured.
        latency_after: milliseconds that the segments' own times predict.
        latency_measured: milliseconds of the whole network, merged.
        macs_before: multiply-adds for one image.
        macs_after: the same, merged.
        score_before: what ``evaluate`` gave for the network.
        score_after: what it gave with the chosen segments linear, before any training.
        act_after: activation behind each merged segment that is a block's output, or None.
        frontier: the best choice for every budget.
        notes: what a user should know, one sentence each.
        version: of the format.
        correlation: Spearman's, of the losses before training steps with those after, where there were some.

    Example:
        >>> import torch
        >>> from rep_plugin import DepthPlan, plan_depth
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.ReLU(), torch.nn.Conv2d(64, 4, 1)).eval()
        >>> plan = plan_depth(net, torch.zeros(1, 3, 8, 8), macs=0.5)
        >>> plan.chosen, DepthPlan.from_json(plan.to_json()) == plan
        (('0..2',), True)
    """

    model: str
    input_shape: tuple[int, ...]
    segments: tuple[Candidate, ...]
    chosen: tuple[str, ...] = ()
    runtime: str = "eager"
    importance: str = "batch norms"
    why: str = ""
    latency_before: float | None = None
    latency_after: float | None = None
    latency_measured: float | None = None
    macs_before: int = 0
    macs_after: int = 0
    score_before: float | None = None
    score_after: float | None = None
    act_after: str | None = None
    frontier: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    version: int = VERSION
    correlation: float | None = None

    def __post_init__(self):
        names = [segment.name for segment in self.segments]
        if unknown := [name for name in self.chosen if name not in names]:
            raise ArgumentError(f"chosen of a depth plan must name its segments, got {unknown[0]!r}")
        taken = self.chosen_segments
        for place, segment in enumerate(taken):
            for other in taken[:place]:
                if segment.overlaps(other):
                    raise ArgumentError(f"chosen segments of a depth plan must not share layers, got {segment.name!r} and "
                                        f"{other.name!r}")  # fmt: skip

    @property
    def chosen_segments(self) -> list[Candidate]:
        """The segments that are merged, in the order of the forward."""
        return [segment for segment in self.segments if segment.name in self.chosen]

    @property
    def activations(self) -> list[str]:
        """Names of the activations that go."""
        return [name for segment in self.chosen_segments for name in segment.activations]

    def __repr__(self) -> str:
        costs = f"multiply-adds {self.macs_before:,} -> {self.macs_after:,}"
        if self.latency_before is not None and self.latency_after is not None:
            measured = "" if self.latency_measured is None else f" (measured {self.latency_measured:.2f})"
            costs = f"{self.latency_before:.2f} -> {self.latency_after:.2f} ms{measured} in {self.runtime}, {costs}"
        return (
            f"DepthPlan({self.model}, {self.why}: {len(self.chosen)} of {len(self.segments)} segments merged, {costs})"
        )

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        if self.correlation is not None:
            notes.append(f"rank correlation of losses before and after training: {self.correlation:.2f}")
        return "\n".join([repr(self), *notes])

    def table(self) -> "Table":
        """Return a rich table of all segments."""
        from rich.text import Text

        timed = any(one.ms_before is not None for one in self.segments)
        columns = ("segment", "becomes", *(("ms", "ms, merged") if timed else ()), "multiply-adds", "merged")
        table = new_table(
            f"{self.model}: {self.why}", (*columns, f"loss ({self.importance})", ""), left=["becomes", ""]
        )
        for one in self.segments:
            outputs, inputs, height, width = one.merged
            becomes = f"{height}x{width}, {inputs * one.groups} -> {outputs}" + (", sum" if one.shortcut else "")
            becomes = "its shortcut" if one.skip else becomes
            say = "merged" if one.name in self.chosen else "" if one.pays else "costs more merged"
            times = (_number(one.ms_before), _number(one.ms_after)) if timed else ()
            macs = (f"{one.macs_before:,}", f"{one.macs_after:,}")
            table.add_row(Text(one.name), becomes, *times, *macs, _number(one.loss), say)
        return table

    def print(self, console: "Console | None" = None) -> None:
        """Print the table and the notes."""
        from rich.console import Console

        console = console or Console()
        console.print(self.table())
        console.print(str(self), markup=False, highlight=False)

    @checked
    def plot(self, path: str | Path) -> None:
        """Write a plot of the frontier, loss by latency (or multiply-adds), as PNG.

        Args:
            path: of the file.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from rep_plugin.checkpoints.files import write_atomic
        from rep_plugin.measure.plots import draw_frontier  # matplotlib need not be installed to plan

        timed = self.latency_before is not None
        points = [(p.latency if timed else p.macs, p.loss) for p in self.frontier]
        here = next(
            ((x, loss) for (x, loss), p in zip(points, self.frontier) if set(p.chosen) == set(self.chosen)), None
        )
        label = f"milliseconds in {self.runtime}" if timed else "multiply-adds"
        write_atomic(
            path, lambda file: draw_frontier(points, here, label, f"loss ({self.importance})", self.model, file)
        )

    @checked
    def to_json(self, path: str | Path | None = None) -> str:
        """Return the plan as JSON text, and write it to ``path`` where one is given (whole or not at all)."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    @checked
    def from_json(cls, source: str | Path) -> "DepthPlan":
        """Return the plan of a JSON text or file.

        Raises:
            ArgumentError: it is no depth plan; the message is one line.
        """
        data, what = read_json_source(source)
        if not isinstance(data, dict) or data.get("version") != VERSION:
            got = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise ArgumentError(f"{what} is no depth plan of version {VERSION}, got {got!r}")
        try:
            plan = _built(cls, data)
        except ArgumentError as error:
            raise ArgumentError(f"{what} is not a depth plan: {error}") from None
        return plan


def _built(kind: Any, data: Any) -> Any:
    """A dataclass from JSON's dict."""
    names = {field.name for field in fields(kind)}
    later = {"skip", "loss_untrained", "correlation"}  # than the first plans
    if not isinstance(data, Mapping) or (set(data) ^ names) - later:
        odd = sorted(set(data) ^ names) if isinstance(data, Mapping) else type(data).__name__
        raise ArgumentError(f"missing or unknown {odd} of a {kind.__name__}")
    parts = {"segments": Candidate, "frontier": Point} if kind is DepthPlan else {}
    values = {name: tuples_of(value) for name, value in data.items()}
    for name, part in parts.items():
        if not isinstance(values[name], tuple):
            raise ArgumentError(f"{name} must be a list, got {type(data[name]).__name__}")
        values[name] = tuple(_built(part, one) for one in values[name])
    return kind(**values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def as_depth_plan(plan: DepthPlan | Mapping | str | Path) -> DepthPlan:
    """Return a plan that is given as such, as its plain data, as JSON text, or as the path of a JSON file.

    Raises:
        ArgumentError: it is none of these.
        FileNotFoundError: the path does not exist.
    """
    if isinstance(plan, DepthPlan):
        return plan
    if isinstance(plan, (Mapping, str, Path)):
        return DepthPlan.from_json(json.dumps(plan) if isinstance(plan, Mapping) else plan)
    raise ArgumentError(f"plan must be a DepthPlan, its data, JSON text or a path, got {type(plan).__name__}")
