"""A pruning plan: which channels of which layer stay, as plain data. Planning touches no module."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rep_plugin.arguments import Seed, Shape, checked
from rep_plugin.checkpoints.files import write_atomic, write_text
from rep_plugin.checkpoints.plain import read_json_source, tuples_of
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.costs import count_params
from rep_plugin.measure.tables import new_table
from rep_plugin.pruning.planning.options import PruneOptions, Scores, Widths
from rep_plugin.pruning.planning.rehearsal import bound_groups, reason_of
from rep_plugin.pruning.planning.scores import score_units
from rep_plugin.pruning.planning.select import Candidate, Choice, find_candidates, kept_without, tied_layers, to_widths
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.kept_channels import count_costs
from rep_plugin.pruning.tracing.tracer import trace_channels

if TYPE_CHECKING:  # imported where something is printed
    from rich.console import Console
    from rich.table import Table

VERSION = 3
_LATER = {2: {"latency_before": None, "latency_after": None}, 3: {"notes": ()}}  # fields that a version brought
_QUOTED = re.compile(r"'[^']*'|\d+")
LOSS = "layers lose more than 90 %"
MERGED = (
    "costs count a re-parameterizable block as the one convolution that it deploys as; its training form costs more"
)


@checked
@dataclass(frozen=True, repr=False)
class PrunePlan:
    """What stays of a model, as plain data. A unit are channels that are only removed together.

    ``print(plan)`` gives a few lines, ``plan.print()`` a table of the layers, ``plan.plot("widths.png")`` a plot of them.

    Args:
        model: Its class, for messages.
        input_shape: Of the example, (N, C, ...).
        kept: {layer: ascending indices of the output channels that stay}, of every layer that loses some.
        widths: {layer: (channels before, after)}, of every layer that makes channels.
        groups: Layers whose channels are coupled.
        frozen: {layer: why it stays as it is}.
        scores: {layer: the score of each channel, None where it has none}.
        why: What was asked for.
        params_before: Parameters; a block that deploys as one convolution counts as that one.
        params_after: The same, pruned.
        macs_before: Multiply-adds for one image.
        macs_after: The same, pruned.
        units: (number of units that could be removed, number that are).
        prune_outputs: Output maps may lose channels as well.
        latency_before: Milliseconds, measured on the machine that planned by latency.
        latency_after: The same, pruned.
        version: Of the format.
        notes: What a user should know, one sentence each.

    Example:
        >>> import torch
        >>> from rep_plugin import PrunePlan, plan_pruning
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> plan = plan_pruning(net, (1, 3, 8, 8), "l1", 0.5)
        >>> plan.widths, PrunePlan.from_json(plan.to_json()) == plan
        ({'0': (8, 4), '1': (4, 4)}, True)
    """

    model: str
    input_shape: tuple[int, ...]
    kept: dict[str, tuple[int, ...]]
    widths: dict[str, tuple[int, int]]
    groups: tuple[tuple[str, ...], ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    scores: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    why: str = ""
    params_before: int = 0
    params_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    units: tuple[int, int] = (0, 0)
    prune_outputs: bool = False
    latency_before: float | None = None
    latency_after: float | None = None
    version: int = VERSION
    notes: tuple[str, ...] = ()

    @classmethod
    @checked
    def from_widths(
        cls,
        model: nn.Module,
        example_input: Tensor | Shape,
        widths: Widths,
        scores: Scores = "l1",
        prune_outputs: bool = False,
        seed: Seed = 0,
    ) -> "PrunePlan":
        """Return the plan that keeps these numbers of channels, as they are: no minimum, no rounding.

        Args:
            model: Left as it is.
            example_input: A tensor (N, C, ...) or its shape.
            widths: {layer: channels kept}; layers coupled to it follow, others stay.
            scores: Choose which channels, see :func:`rep_plugin.plan_pruning`.
            prune_outputs: Output maps may lose channels as well.
            seed: Of ``scores='random'``.

        Returns:
            The plan.

        Raises:
            ArgumentError: A layer is unknown, or a width is out of range or not reachable.
            TraceError: The model cannot be traced.
        """
        options = PruneOptions(scores, prune_outputs=prune_outputs, seed=seed)
        trace = trace_channels(model, example_input, prune_outputs)
        choice = find_candidates(trace, score_units(model, trace, options), without=options.reason_without_score)
        why = f"given widths of {len(widths)} layers, by {options.score_name}"
        taken = to_widths(choice, widths)
        for group, where in bound_groups(model, trace, taken).items():
            raise ArgumentError(f"the widths cannot be met: {reason_of(choice.layers[group], where)}")
        return make_plan(model, trace, choice, taken, why, prune_outputs)

    def __repr__(self) -> str:
        changed = sum(before != after for before, after in self.widths.values())
        costs = f"parameters {self.params_before:,} -> {self.params_after:,}, multiply-adds {self.macs_before:,} -> "
        return (
            f"PrunePlan({self.model}, {self.why}: {changed} of {len(self.widths)} layers narrower, {len(self.frozen)} "
            f"frozen, {costs}{self.macs_after:,})"
        )

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"note: {note}" for note in self.notes)])

    def table(self) -> "Table":
        """Return a rich table of the layers that can lose channels, and of the costs."""
        from rich.text import Text

        columns = ("layer", "before", "after", "removed", "note")
        table = new_table(f"{self.model}: {self.why}", columns, left=["note"])
        ends = {name: "" for name in self.widths if name not in self.frozen}
        for layers in self.groups:
            first = next((name for name in layers if name in ends), None)
            ends |= {name: f"goes with {first}" for name in layers if name in ends and name != first}
        for name, note in ends.items():
            before, after = self.widths[name]
            loud = "more than 90 % go" if _is_heavy(before, after) else note
            table.add_row(Text(name), str(before), str(after), _share(before, after), Text(loud))
        table.add_section()
        table.add_row("parameters", f"{self.params_before:,}", f"{self.params_after:,}", *self._removed("params"))
        table.add_row(
            "multiply-adds, one image", f"{self.macs_before:,}", f"{self.macs_after:,}", *self._removed("macs")
        )
        if self.latency_before is not None:
            pair = self.latency_before, self.latency_after
            table.add_row("milliseconds", *(f"{ms:.2f}" for ms in pair), _share(*pair))
        return table

    def _removed(self, cost: str) -> tuple[str, str]:
        counted = "each block as one convolution" if MERGED in self.notes else ""
        return _share(getattr(self, f"{cost}_before"), getattr(self, f"{cost}_after")), counted

    def print(self, console: "Console | None" = None) -> None:
        """Print the table, why other layers stay as they are, and the notes."""
        from rich.console import Console

        console = console or Console()
        console.print(self.table())
        for line in frozen_notes(self.frozen):
            console.print(line, markup=False, highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", markup=False)

    @checked
    def plot(self, path: str | Path) -> None:
        """Write a plot of the widths before and after, as PNG.

        Args:
            path: Of the file.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from rep_plugin.measure.plots import draw_widths  # matplotlib need not be installed to plan

        write_atomic(path, lambda file: draw_widths(self.widths, file, f"{self.model}: {self.why}", self.frozen))

    @checked
    def to_json(self, path: str | Path | None = None) -> str:
        """Return the plan as JSON text, and write it to ``path`` where one is given (whole or not at all)."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    @checked
    def from_json(cls, source: str | Path) -> "PrunePlan":
        """Return the plan of a JSON text or file, of this version or an older one.

        Raises:
            ArgumentError: It is no plan; the message is one line.
        """
        data, what = read_json_source(source)
        if isinstance(data, dict) and data.get("version") in range(1, VERSION):
            for version in range(data["version"] + 1, VERSION + 1):
                data = _LATER[version] | data
            data["version"] = VERSION
            _count_one_image_(data)
        fields = cls.__dataclass_fields__
        if not isinstance(data, dict) or set(data) != set(fields):
            odd = sorted(set(data) ^ set(fields)) if isinstance(data, dict) else type(data).__name__
            raise ArgumentError(f"{what} is not a pruning plan: missing or unknown {odd}")
        if data["version"] != VERSION:
            raise ArgumentError(f"{what} is a plan of version {data['version']}, expected {VERSION}")
        try:
            plan = cls(**{name: tuples_of(value) for name, value in data.items()})
        except ArgumentError as error:
            raise ArgumentError(f"{what} is not a pruning plan: {error}") from None
        for name, indices in plan.kept.items():
            if len(indices) != (after := plan.widths[name][1]):
                raise ArgumentError(
                    f"kept channels of {name!r} must be {after} in number, as widths say, got {len(indices)}"
                )
        return plan

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise ArgumentError, naming the field, where one is of another kind or out of its range."""
        for name, (is_right, expected) in _KINDS.items():
            if not is_right(value := getattr(self, name)):
                raise ArgumentError(f"{name} of a pruning plan must be {expected}, got {_short(value)}")
        if (self.latency_before is None) != (self.latency_after is None):
            raise ArgumentError("latency_before and latency_after of a pruning plan must both be given, or none")
        for name, (before, after) in self.widths.items():
            if not 1 <= after <= before:
                raise ArgumentError(
                    f"widths of {name!r} must be (before, after), 1 <= after <= before, got {before, after}"
                )
        for name, indices in self.kept.items():
            if name not in self.widths:
                raise ArgumentError(f"widths of a pruning plan must have all layers of kept, {name!r} is missing")
            before, _ = self.widths[name]
            if not indices or not all(a < b for a, b in pairwise(indices)) or indices[-1] >= before:
                raise ArgumentError(
                    f"kept channels of {name!r} must ascend within 0..{before - 1}, got {_short(indices)}"
                )


def _count_one_image_(data: dict) -> None:
    """Before version 3 multiply-adds were those of the whole example."""
    shape = data.get("input_shape")
    for name in ("macs_before", "macs_after"):
        if isinstance(shape, list) and shape and _is_count(shape[0], 1) and _is_count(data.get(name)):
            data[name] //= shape[0]


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _tuple_of(is_right: Callable[[Any], bool], number: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and number in (None, len(value)) and all(map(is_right, value))


def _by_layer(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(is_right, value.values()))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]}..."


_WORDS, _COUNT = (_is_text, "text"), (_is_count, "a whole number >= 0")
_TIME = (lambda value: value is None or (_is_number(value) and value > 0), "a number > 0 or None")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": _WORDS,
    "input_shape": (
        lambda value: bool(value) and _tuple_of(lambda size: _is_count(size, 1))(value),
        "a tuple of whole numbers >= 1",
    ),
    "kept": (_by_layer(_tuple_of(_is_count)), "a dict of layer: tuple of channel indices"),
    "widths": (_by_layer(_tuple_of(_is_count, 2)), "a dict of layer: (channels before, after)"),
    "groups": (_tuple_of(_tuple_of(_is_text)), "a tuple of tuples of layer names"),
    "frozen": (_by_layer(_is_text), "a dict of layer: reason"),
    "scores": (
        _by_layer(_tuple_of(lambda score: score is None or _is_number(score))),
        "a dict of layer: tuple of finite numbers or None",
    ),
    "why": _WORDS,
    "params_before": _COUNT,
    "params_after": _COUNT,
    "macs_before": _COUNT,
    "macs_after": _COUNT,
    "units": (_tuple_of(_is_count, 2), "(units, units removed)"),
    "prune_outputs": (lambda value: isinstance(value, bool), "True or False"),
    "latency_before": _TIME,
    "latency_after": _TIME,
    "version": (lambda value: value == VERSION and _is_count(value), f"{VERSION}"),
    "notes": (_tuple_of(_is_text), "a tuple of sentences"),
}


def make_plan(
    model: nn.Module,
    trace: Trace,
    choice: Choice,
    taken: list[Candidate],
    why: str,
    prune_outputs: bool,
    floors: Mapping[str, tuple[int, int]] | None = None,
) -> PrunePlan:
    """Return the plan that removes some candidates.

    Args:
        model: For its name.
        trace: Of the model.
        choice: All candidates.
        taken: Those that are removed.
        why: What was asked for.
        prune_outputs: As the trace was made.
        floors: {layer: (least width, the default one)}; the notes name layers that fall below the default.

    Returns:
        The plan.
    """
    kept = kept_without(trace, taken)
    layers = trace.layers
    before, after = count_costs(trace), count_costs(trace, kept)
    roots = trace.channels.roots()
    value = {unit: c.score for group in choice.candidates for c in group for unit in c.units}
    widths = {name: (len(layer.labels), kept.count(layer.labels)) for name, layer in layers.items()}
    unreached = [f"{name!r} ({takes} channels)" for name, takes in trace.unreached.items()]
    notes = (
        [f"not reached by the example's forward: {listed(unreached)}; layers that may feed it stay"]
        if unreached
        else []
    )
    notes += [*_tie_notes(tied_layers(choice)[0], widths), *_floor_notes(widths, floors or {}), *_loss_notes(widths)]
    if trace.block_parameters and before.params != count_params(model):
        notes.append(MERGED)
    return PrunePlan(
        model=type(model).__name__,
        input_shape=trace.shape,
        kept={n: tuple(kept.index(layer.labels).tolist()) for n, layer in layers.items() if kept.changes(layer.labels)},
        widths=widths,
        groups=tuple(choice.layers),
        frozen=choice.frozen,
        scores={
            name: tuple(value.get(unit) for unit in roots[layer.labels].tolist())
            for name, layer in layers.items()
            if name not in choice.frozen
        },
        why=why,
        params_before=before.params,
        params_after=after.params,
        macs_before=before.macs,
        macs_after=after.macs,
        units=(choice.units, sum(len(c.units) for c in taken)),
        prune_outputs=prune_outputs,
        notes=tuple(notes),
    )


def frozen_notes(frozen: Mapping[str, str]) -> list[str]:
    """Return one line for each kind of reason why layers stay as they are, with the first reason of the kind.

    Args:
        frozen: {layer: why it stays as it is}.

    Returns:
        The lines.
    """
    kinds: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        kinds.setdefault(_QUOTED.sub("", reason), []).append(name)
    several = {names[0]: f"stay as they are: {listed(names)}: " for names in kinds.values() if len(names) > 1}
    return [several.get(names[0], "stays as it is: ") + frozen[names[0]] for names in kinds.values()]


def _share(before: float, after: float) -> str:
    return f"{1 - after / before:.1%}" if before and after != before else ""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few of several names, and how many more there are.

    Args:
        names: In order.
        most: How many are named.

    Returns:
        One line.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _tie_notes(tied: Sequence[Sequence[str]], widths: Mapping[str, tuple[int, int]]) -> list[str]:
    names = [layers[0] for layers in tied if any(widths[name][0] > widths[name][1] for name in layers)]
    return [f"equal scores within {listed(names)}: which of its channels go is chance"] if names else []


def _floor_notes(widths: Mapping[str, tuple[int, int]], floors: Mapping[str, tuple[int, int]]) -> list[str]:
    low = [
        f"{name} keeps {after} of {before} (default floor {floors[name][1]})"
        for name, (before, after) in widths.items()
        if name in floors and after < min(before, floors[name][1])
    ]
    advice = "ask for less, or give min_channels or max_prune_fraction to refuse it"
    return [f"only met below the default floors: {listed(low)}; {advice}"] if low else []


def _loss_notes(widths: Mapping[str, tuple[int, int]]) -> list[str]:
    names = [f"{name} ({before} -> {after})" for name, (before, after) in widths.items() if _is_heavy(before, after)]
    advice = "fine-tuning seldom repairs that, ask for less or raise min_channels"
    return [f"{LOSS} of their channels: {listed(names)}; {advice}"] if names else []


def _is_heavy(before: int, after: int) -> bool:
    return 10 * after < before


def compose_plans(plans: Sequence[PrunePlan]) -> PrunePlan:
    """Return the plan that removes at once what ``plans``, each made for the result of the one before, remove in turn.

    Scores are dropped: they belong to different weights.

    Raises:
        ArgumentError: There are no plans, or one does not follow the other.
    """
    if not plans:
        raise ArgumentError("got no plans, expected at least 1")
    whole = replace(plans[0], scores={})
    for plan in plans[1:]:
        ends = {name: after for name, (_, after) in whole.widths.items()}
        starts = {name: before for name, (before, _) in plan.widths.items()}
        if ends != starts:
            name = next(n for n in (*ends, *starts) if ends.get(n) != starts.get(n))
            raise ArgumentError(
                f"plans do not follow each other: {name!r} ends with {ends.get(name)} channels, the next plan begins "
                f"with {starts.get(name)}"
            )
        kept = {}
        for name, (before, _) in whole.widths.items():
            if name in whole.kept or name in plan.kept:
                first = whole.kept.get(name, tuple(range(before)))
                kept[name] = tuple(first[i] for i in plan.kept.get(name, range(len(first))))
        whole = replace(
            whole,
            kept=kept,
            widths={name: (before, plan.widths[name][1]) for name, (before, _) in whole.widths.items()},
            why=f"{whole.why}; then {plan.why}",
            params_after=plan.params_after,
            macs_after=plan.macs_after,
            units=(whole.units[0], whole.units[1] + plan.units[1]),
        )
    notes = dict.fromkeys(note for plan in plans for note in plan.notes if not note.startswith(LOSS))
    return replace(whole, notes=(*notes, *_loss_notes(whole.widths)))


def as_plan(plan: PrunePlan | Mapping | str) -> PrunePlan:
    """Return a plan that is given as such, as its plain data, as JSON text, or as the path of a JSON file.

    Raises:
        ArgumentError: It is none of these.
        FileNotFoundError: The path does not exist.
    """
    if isinstance(plan, PrunePlan):
        return plan
    if isinstance(plan, (Mapping, str)):
        return PrunePlan.from_json(plan if isinstance(plan, str) else json.dumps(plan))
    raise ArgumentError(f"plan must be a PrunePlan, its data, JSON text or a path, got {type(plan).__name__}")
