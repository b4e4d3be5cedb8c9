"""``plan_pruning``: from scores and a budget to a plan."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.planning.latency_search import to_latency
from rep_plugin.pruning.planning.latency_table import EagerTimer, Timer
from rep_plugin.pruning.planning.plan import PrunePlan, _label, _without, make_plan
from rep_plugin.pruning.planning.scores import score_units
from rep_plugin.pruning.planning.select import (
    Candidate,
    allowed,
    check_fraction,
    check_options,
    find_candidates,
    gone_of,
    in_order,
    match_layers,
    round_widths,
    take_units,
    to_budget,
)
from rep_plugin.pruning.tracing.kept import Kept, count_costs, nothing_gone
from rep_plugin.pruning.tracing.tracer import trace_channels


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
        raise ArgumentError(f"ignore must be a list of patterns, got {ignore!r}")
    trace = trace_channels(model, example_input, prune_outputs)
    own = match_layers(list(overrides), list(trace.layers))
    frozen = [pattern for pattern, value in overrides.items() if value == "frozen"]
    unit_scores = score_units(model, trace, scores, reduction, seed, loader, loss)
    choice = find_candidates(trace, unit_scores, [*ignore, *frozen], _without(scores))
    if not choice.units:
        name, reason = next(iter(choice.frozen.items()), ("it", "it has no layer that makes channels"))
        raise ArgumentError(f"nothing in {type(model).__name__} can be pruned: {name!r}: {reason}")

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
