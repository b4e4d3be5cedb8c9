"""``plan_pruning``: from scores and a budget to a plan."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rep_plugin.pruning.planning.latency_search import to_latency
from rep_plugin.pruning.planning.latency_table import EagerTimer, Timer
from rep_plugin.pruning.planning.options import Budget, PruneOptions
from rep_plugin.pruning.planning.plan import PrunePlan, make_plan, not_scored
from rep_plugin.pruning.planning.scores import score_units
from rep_plugin.pruning.planning.select import (
    Candidate,
    allowed,
    find_candidates,
    in_order,
    match_layers,
    nothing_to_prune,
    round_widths,
    take_units,
    to_budget,
)
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
    budget = Budget(prune_fraction, params, macs, latency, latency_ms)
    options = PruneOptions(scores, scope, min_channels, round_to, overrides, ignore, reduction, prune_outputs, seed)
    return plan_to_budget(model, example_input, budget, options, loader=loader, loss=loss, timer=timer)


def plan_to_budget(
    model: nn.Module,
    example_input: Tensor | Sequence[int],
    budget: Budget,
    options: PruneOptions | None = None,
    *,
    loader: Iterable | None = None,
    loss: Callable | None = None,
    timer: Timer | None = None,
) -> PrunePlan:
    """Return the plan that meets a budget: :func:`plan_pruning` with its arguments in two objects.

    Args:
        model: Left as it is.
        example_input: A tensor (N, C, ...) or its shape.
        budget: How much goes, or may remain.
        options: How the channels are chosen.
        loader: Batches of (inputs, targets), for ``taylor``.
        loss: Of (outputs, targets), for ``taylor``.
        timer: Of budgets of latency (default ``EagerTimer()``).

    Returns:
        The plan.

    Raises:
        ArgumentError: See :func:`plan_pruning`.
        TraceError: The model cannot be traced.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rep_plugin.pruning.planning import Budget, PruneOptions, plan_to_budget
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> plan_to_budget(net, (1, 3, 8, 8), Budget(0.5), PruneOptions("l1")).widths
        {'0': (8, 4), '1': (4, 4)}
    """
    options = options or PruneOptions()
    trace = trace_channels(model, example_input, options.prune_outputs)
    own = match_layers(list(options.overrides), list(trace.layers))
    scores = score_units(model, trace, options, loader, loss)
    choice = find_candidates(trace, scores, options.frozen_patterns, not_scored(options))
    if not choice.units:
        raise nothing_to_prune(model, choice.frozen)

    common, taken = [], []
    for layers, group in zip(choice.layers, choice.candidates):
        pattern = next((own[name] for name in layers if name in own), None)
        if pattern is None:
            common.append(group)
        elif group:
            order = allowed(in_order([group], options.scope), choice.widths, options.min_channels)
            taken += take_units(order, round(options.overrides[pattern] * sum(len(c.units) for c in group)))
    order = allowed(in_order(common, options.scope), choice.widths, options.min_channels)

    def finish(chosen: list[Candidate]) -> list[Candidate]:
        return round_widths([*taken, *chosen], choice.widths, options.round_to)

    why, times = str(budget), {}
    if budget.prune_fraction is not None:
        chosen = take_units(order, budget.limit(sum(len(c.units) for group in common for c in group)))
    elif budget.params is not None or budget.macs is not None:
        chosen = to_budget(trace, order, finish, budget)
    else:
        x = _batch(model, example_input)
        found = to_latency(model, trace, x, order, finish, budget, timer or EagerTimer())
        chosen = found.chosen
        times = {"latency_before": found.before * 1e3, "latency_after": found.after * 1e3}
        why += " (measured: {latency_after:.4g} of {latency_before:.4g} ms)".format(**times)
    why += f" by {options.score_name}, scope {options.scope}, {options}"
    return replace(make_plan(model, trace, choice, finish(chosen), why, options.prune_outputs), **times)


def _batch(model: nn.Module, example_input: Tensor | Sequence[int]) -> Tensor:
    """Return the example, or a random one of its shape, where and as the parameters are."""
    first = next(model.parameters())
    if not isinstance(example_input, Tensor):
        example_input = torch.randn(tuple(example_input), generator=torch.Generator().manual_seed(0))
    return example_input.to(first.device, first.dtype)
