"""A pruning plan: which channels of which layer stay, as plain data. Planning touches no module."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from rep_plugin.pruning.graph import Trace
from rep_plugin.pruning.kept import Kept, count_costs, nothing_gone
from rep_plugin.pruning.latency import EagerTimer, Timer
from rep_plugin.pruning.latency_search import to_latency
from rep_plugin.pruning.options import check_fraction, check_options
from rep_plugin.pruning.scores import score_units
from rep_plugin.pruning.select import (
    Candidate,
    Choice,
    allowed,
    find_candidates,
    gone_of,
    in_order,
    match_layers,
    round_widths,
    take_units,
    to_budget,
    to_widths,
)
from rep_plugin.pruning.trace import trace_channels

VERSION = 2


@dataclass(frozen=True)
class PrunePlan:
    """What stays of a model.

    ``kept``: layer -> ascending indices of the output channels that stay, for every layer that loses some; ``widths``:
    layer -> (before, after) for every layer that makes channels; ``groups``: layers whose channels are coupled;
    ``frozen``: layer -> why it stays as it is; ``scores``: layer -> score of each channel (null: not scored); ``why``:
    what was asked for. ``params_*`` and ``macs_*`` (multiply-adds for one ``input_shape``) are exact; a block that
    deploys as one convolution counts as that one. ``units``: (number of units that could go, number that go), a unit
    being channels that only go together. ``latency_*``: milliseconds of the dense and of the pruned model as measured on
    the machine that planned by latency, else None.
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

    @classmethod
    def from_widths(
        cls,
        model: nn.Module,
        example_input: Tensor | Sequence[int],
        widths: Mapping[str, int],
        scores: str | Mapping[str, Sequence[float]] = "l1",
        prune_outputs: bool = False,
        seed: int = 0,
    ) -> "PrunePlan":
        """Return the plan that keeps these numbers of channels, as they are: no minimum, no rounding.

        ``widths``: layer name -> channels kept; layers coupled to it follow, others stay. ``scores`` choose which, see
        :func:`plan_pruning`. Raises ValueError for unknown layers, widths out of range or not reachable.
        """
        trace = trace_channels(model, example_input, prune_outputs)
        choice = find_candidates(trace, score_units(model, trace, scores, seed=seed), without=_without(scores))
        why = f"given widths of {len(widths)} layers, by {_label(scores)}"
        return make_plan(model, trace, choice, to_widths(choice, widths), why, prune_outputs)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the plan as JSON text, and write it to ``path`` where one is given (whole or not at all)."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            temporary = Path(f"{path}.tmp")
            temporary.write_text(text + "\n")
            temporary.replace(path)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "PrunePlan":
        """Return the plan of a JSON text or file; version 1 had no latency.

        Raises ValueError, in one line, for anything that is not a plan.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = source if is_text else Path(source).read_text()
        what = "the text" if is_text else str(source)
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{what} is not JSON: {error}") from None
        if isinstance(data, dict) and data.get("version") == 1:
            data = {"latency_before": None, "latency_after": None} | data | {"version": VERSION}
        fields = cls.__dataclass_fields__
        if not isinstance(data, dict) or set(data) != set(fields):
            odd = sorted(set(data) ^ set(fields)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{what} is not a pruning plan: missing or unknown {odd}")
        if data["version"] != VERSION:
            raise ValueError(f"{what} is a plan of version {data['version']}, expected {VERSION}")
        try:
            plan = cls(**{name: _plain(name, value) for name, value in data.items()})
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{what} is not a pruning plan: {error}") from None
        plan._check()
        return plan

    def _check(self) -> None:
        for name, indices in self.kept.items():
            before, after = self.widths.get(name, (0, 0))
            ascending = all(a < b for a, b in pairwise(indices))
            if not indices or not ascending or indices[0] < 0 or indices[-1] >= before or len(indices) != after:
                raise ValueError(
                    f"kept channels of {name!r} must ascend within 0..{before - 1} and be {after} in number"
                )


def _plain(name: str, value: object) -> object:
    """Give JSON's lists back their types."""
    if name in ("kept", "widths"):
        return {key: tuple(int(i) for i in items) for key, items in value.items()}
    if name == "scores":
        return {key: tuple(items) for key, items in value.items()}
    if name == "groups":
        return tuple(tuple(layers) for layers in value)
    return tuple(int(i) for i in value) if name in ("input_shape", "units") else value


def _label(scores: str | Mapping) -> str:
    return scores if isinstance(scores, str) else "given scores"


def _without(scores: str | Mapping) -> str:
    return "it has no BN for bn_gamma: use scores='l1'" if scores == "bn_gamma" else f"not scored by {_label(scores)}"


def make_plan(
    model: nn.Module, trace: Trace, choice: Choice, taken: list[Candidate], why: str, prune_outputs: bool
) -> PrunePlan:
    """Return the plan that removes the ``taken`` candidates of a choice; ``why`` says what was asked for."""
    kept = Kept(trace, gone_of(trace, taken))
    layers = trace.layers
    params_before, macs_before = count_costs(trace, Kept(trace, nothing_gone(trace)))
    params_after, macs_after = count_costs(trace, kept)
    roots = trace.channels.roots()
    value = {unit: c.score for group in choice.candidates for c in group for unit in c.units}
    return PrunePlan(
        model=type(model).__name__,
        input_shape=trace.shape,
        kept={n: tuple(kept.index(layer.labels).tolist()) for n, layer in layers.items() if kept.changes(layer.labels)},
        widths={name: (len(layer.labels), kept.count(layer.labels)) for name, layer in layers.items()},
        groups=tuple(choice.layers),
        frozen=choice.frozen,
        scores={
            name: tuple(value.get(unit) for unit in roots[layer.labels].tolist())
            for name, layer in layers.items()
            if name not in choice.frozen
        },
        why=why,
        params_before=params_before,
        params_after=params_after,
        macs_before=macs_before,
        macs_after=macs_after,
        units=(choice.units, sum(len(c.units) for c in taken)),
        prune_outputs=prune_outputs,
    )


def plan_pruning(
    model: nn.Module,
    example_input: Tensor | Sequence[int],
    scores: str | Mapping[str, Sequence[float]] = "bn_gamma",
    prune_fraction: float | None = None,
    *,
    params: int | float | None = None,
    macs: int | float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    scope: str = "global",
    min_channels: int = 1,
    round_to: int = 1,
    overrides: Mapping[str, float | str] | None = None,
    ignore: Sequence[str] = (),
    reduction: str = "mean",
    prune_outputs: bool = False,
    seed: int = 0,
    loader: Iterable | None = None,
    loss: Callable | None = None,
    timer: Timer | None = None,
) -> PrunePlan:
    """Return a plan that removes the channels with the lowest scores. The model is not touched.

    ``example_input``: a tensor (N, C, ...) or its shape. ``scores``: ``bn_gamma``, ``l1``, ``l2``, ``fpgm``, ``taylor``
    (needs ``loader`` of (inputs, targets) and ``loss(outputs, targets)``), ``random`` (``seed``), or {layer: a number for
    each channel}; ``reduction`` ``mean``, ``sum`` or ``max`` joins those of coupled layers.

    One of: ``prune_fraction`` in [0, 1), the share of prunable channels that goes, coupled ones counted once; ``params``
    or ``macs``, what may remain: a whole number, or a float as a share; ``latency``, a share in (0, 1] of the time that
    this model takes on this machine, or ``latency_ms``, milliseconds, within 10 %: eager calls on a batch as large as
    ``example_input``, by ``timer`` (default ``EagerTimer(threads=1)``), every block as one convolution. Planning by
    latency takes a minute or two, and moves widths a little up or down to those that are really faster.

    ``scope`` ``global`` compares scores over all layers, ``layer`` takes an equal share of each. ``overrides``: name
    pattern -> a fraction of its own, or ``'frozen'``, for the groups of the matching layers; ``ignore``: patterns to
    freeze. No layer falls below ``min_channels``; widths that shrink are rounded up to multiples of ``round_to`` where
    coupling lets them. ``prune_outputs`` also frees the channels of output maps (a bare backbone's).

    Raises ValueError for numbers out of range, patterns that match no layer, a budget that cannot be met (saying what
    can) and a model without anything to prune; TraceError where the model cannot be traced.
    """
    budgets = {"prune_fraction": prune_fraction, "params": params, "macs": macs, "latency": latency}
    check_options({**budgets, "latency_ms": latency_ms}, min_channels, round_to)
    overrides = dict(overrides or {})
    for pattern, value in overrides.items():
        if value != "frozen":
            check_fraction(f"overrides[{pattern!r}]", value)
    if isinstance(ignore, str):
        raise ValueError(f"ignore must be a list of patterns, got {ignore!r}")
    trace = trace_channels(model, example_input, prune_outputs)
    own = match_layers(list(overrides), list(trace.layers))
    frozen = [pattern for pattern, value in overrides.items() if value == "frozen"]
    unit_scores = score_units(model, trace, scores, reduction, seed, loader, loss)
    choice = find_candidates(trace, unit_scores, [*ignore, *frozen], _without(scores))
    if not choice.units:
        name, reason = next(iter(choice.frozen.items()), ("it", "it has no layer that makes channels"))
        raise ValueError(f"nothing in {type(model).__name__} can be pruned: {name!r}: {reason}")

    common, taken = [], []
    for layers, group in zip(choice.layers, choice.candidates):
        pattern = next((own[name] for name in layers if name in own), None)
        if pattern is None:
            common.append(group)
        elif group:
            order = allowed(in_order([group], scope), choice.widths, min_channels)
            taken += take_units(order, round(overrides[pattern] * sum(len(c.units) for c in group)))
    order = allowed(in_order(common, scope), choice.widths, min_channels)

    def finish(chosen: list[Candidate]) -> list[Candidate]:
        return round_widths([*taken, *chosen], choice.widths, round_to)

    times = {}
    if prune_fraction is not None:
        chosen = take_units(order, round(prune_fraction * sum(len(c.units) for group in common for c in group)))
        why = f"prune_fraction={prune_fraction}"
    elif latency is not None or latency_ms is not None:
        x, timer = _batch(model, example_input), timer or EagerTimer()
        found = to_latency(model, trace, x, order, finish, latency, latency_ms, timer)
        chosen = found.chosen
        times = {"latency_before": found.before * 1e3, "latency_after": found.after * 1e3}
        why = f"latency={latency}" if latency is not None else f"latency_ms={latency_ms}"
        why += " (measured: {latency_after:.4g} of {latency_before:.4g} ms)".format(**times)
    else:
        which, what, budget = (0, "params", params) if params is not None else (1, "macs", macs)
        before = count_costs(trace, Kept(trace, nothing_gone(trace)))[which]
        limit = int(budget * before) if isinstance(budget, float) else budget
        chosen = to_budget(
            order, lambda some: count_costs(trace, Kept(trace, gone_of(trace, finish(some))))[which], limit, what
        )
        why = f"{what}={budget}"
    why += f" by {_label(scores)}, scope {scope}, min_channels {min_channels}, round_to {round_to}"
    return replace(make_plan(model, trace, choice, finish(chosen), why, prune_outputs), **times)


def _batch(model: nn.Module, example_input: Tensor | Sequence[int]) -> Tensor:
    """Return the example, or a random one of its shape, where and as the parameters are."""
    first = next(model.parameters())
    if not isinstance(example_input, Tensor):
        example_input = torch.randn(tuple(example_input), generator=torch.Generator().manual_seed(0))
    return example_input.to(first.device, first.dtype)
