"""``plan_pruning``: from scores and a budget to a plan."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Count, Fraction, Positive, Seed, Shape, checked
from rep_plugin.errors import ArgumentError
from rep_plugin.history import history_of
from rep_plugin.measure.copies import copy_inputs
from rep_plugin.measure.forward import Example, takes_examples
from rep_plugin.measure.progress import working
from rep_plugin.pruning.planning.latency_search import to_latency
from rep_plugin.pruning.planning.latency_table import EagerTimer, Timer
from rep_plugin.pruning.planning.options import Budget, Cost, Latency, Overrides, PruneOptions, Reduction, Scope, Scores
from rep_plugin.pruning.planning.plan import PrunePlan, as_plan, make_plan
from rep_plugin.pruning.planning.rehearsal import bound_groups, reason_of
from rep_plugin.pruning.planning.scores import score_units
from rep_plugin.pruning.planning.select import (
    Candidate,
    Choice,
    above_floors,
    find_candidates,
    in_order,
    match_layers,
    nothing_to_prune,
    round_widths,
    take_units,
    tied_layers,
    to_budget,
)
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.tracer import trace_channels

_FRESH = (
    " (a fresh batch norm's gammas all are): train first, with SparsityHook for example, or use scores='flow' or 'l1'"
)


@checked
@takes_examples
def plan_pruning(
    model: nn.Module,
    example_input: Example | Shape,
    scores: Scores = "bn_gamma",
    prune_fraction: Fraction | None = None,
    *,
    params: Cost | None = None,
    macs: Cost | None = None,
    latency: Latency | None = None,
    latency_ms: Positive | None = None,
    scope: Scope = "global",
    min_channels: Count | None = None,
    max_prune_fraction: Fraction | None = None,
    round_to: Count | None = None,
    overrides: Overrides | None = None,
    ignore: Sequence[str] = (),
    reduction: Reduction = "mean",
    prune_outputs: bool = False,
    seed: Seed = 0,
    loader: Iterable | None = None,
    loss: Callable | None = None,
    timer: Timer | None = None,
) -> PrunePlan:
    """Return a plan that removes the channels with the lowest scores. The model is not touched.

    Exactly one of ``prune_fraction``, ``params``, ``macs``, ``latency`` and ``latency_ms`` is given. Latency is that of eager
    calls on a batch as large as ``example_input`` on this machine, every block as one convolution, and is met within 10 %.
    Planning by it takes a minute or two, and moves widths a little up or down to those that are really faster.

    Args:
        model: Left as it is.
        example_input: A tensor (N, C, ...) or its shape; or a tuple or a dict of all that the model is called with.
        scores: ``bn_gamma``, ``flow``, ``l1``, ``l2``, ``fpgm``, ``taylor``, ``random``, or {layer: a number for each of its
            channels}.
        prune_fraction: Share of the prunable channels that is removed, in [0, 1); coupled channels count once.
        params: Parameters that may remain: a share as a float (0.5 keeps half), or their number (300_000).
        macs: Multiply-adds for one image that may remain: a share as a float, or their number.
        latency: Share of the model's own time that may remain, in (0, 1].
        latency_ms: Milliseconds that may remain.
        scope: ``global`` compares scores over all layers, ``layer`` takes an equal share of each.
        min_channels: No layer falls below this width. Default: 8, half of narrower layers; where the budget cannot be met
            otherwise it gives way as little as needed, and ``plan.notes`` say so.
        max_prune_fraction: No layer loses more than this share of its channels. Default: 0.9, which gives way likewise.
        round_to: Widths that shrink are rounded up to multiples of this, where coupling lets them. Default: 8 (4 below 16
            channels) with ``params`` and ``macs``, as runtimes are much slower at others; 1 where such a budget would be
            missed by more than 5 %, and with the other budgets.
        overrides: {layer pattern: a fraction of its own, or ``'frozen'``}, for the groups of the matching layers.
        ignore: Layer patterns whose groups stay as they are.
        reduction: Joins the scores of coupled layers: ``mean``, ``sum`` or ``max``.
        prune_outputs: Output maps may lose channels as well, a bare backbone's for example.
        seed: Of ``scores='random'``.
        loader: Batches of (inputs, targets), for ``taylor``.
        loss: Of (outputs, targets), for ``taylor``.
        timer: Of budgets of latency (default ``EagerTimer()``).

    Returns:
        The plan.

    Raises:
        ArgumentError: A number is out of range, a pattern matches no layer, the budget cannot be met (the message contains
            what can), nothing of the model can be pruned, or the scores are equal in every layer (``bn_gamma`` of a fresh
            network).
        TraceError: The model cannot be traced.

    Example:
        >>> import torch
        >>> from rep_plugin import plan_pruning
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> plan_pruning(net, (1, 3, 8, 8), "l1", macs=0.5).widths
        {'0': (8, 4), '1': (4, 4)}
    """
    budget = Budget(prune_fraction, params, macs, latency, latency_ms)
    options = PruneOptions(
        scores, scope, min_channels, round_to, overrides, ignore, reduction, prune_outputs, seed, max_prune_fraction
    )
    return plan_to_budget(model, example_input, budget, options, loader=loader, loss=loss, timer=timer)


@checked
@takes_examples
@working("planning")
def plan_to_budget(
    model: nn.Module,
    example_input: Example | Shape,
    budget: Budget,
    options: PruneOptions | None = None,
    *,
    loader: Iterable | None = None,
    loss: Callable | None = None,
    timer: Timer | None = None,
) -> PrunePlan:
    """Return the plan that meets a budget: :func:`plan_pruning`, with its arguments in two objects.

    Args:
        model: Left as it is.
        example_input: A tensor (N, C, ...) or its shape; or a tuple or a dict of all that the model is called with.
        budget: How much is removed, or may remain.
        options: How channels are chosen.
        loader: Batches of (inputs, targets), for ``taylor``.
        loss: Of (outputs, targets), for ``taylor``.
        timer: Of budgets of latency (default ``EagerTimer()``).

    Returns:
        The plan.

    Raises:
        ArgumentError: As :func:`plan_pruning`.
        TraceError: The model cannot be traced.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.planning import Budget, PruneOptions, plan_to_budget
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> plan_to_budget(net, (1, 3, 8, 8), Budget(0.5), PruneOptions("l1")).widths
        {'0': (8, 4), '1': (4, 4)}
    """
    options = options or PruneOptions()
    trace = trace_channels(model, example_input, options.prune_outputs)
    match_layers(list(options.overrides), list(trace.layers))  # a wrong pattern is told before scores are taken
    scores = score_units(model, trace, options, loader, loss)
    choice = find_candidates(trace, scores, options.frozen_patterns, options.reason_without_score)
    if not choice.units:
        raise nothing_to_prune(model, choice.frozen)
    if budget != Budget(0.0) and isinstance(options.scores, str) and tied_layers(choice)[1]:
        raise ArgumentError(
            f"scores={options.scores!r} say nothing about this {type(model).__name__}: within every layer they are equal"
            f"{_FRESH if options.scores == 'bn_gamma' else ': use other scores'}"
        )

    if budget.latency is not None or budget.latency_ms is not None:  # candidates are run on the way
        _freeze_bound(model, trace, choice, [group[0] for group in choice.candidates if group])
    while True:
        chosen, why, times, notes = _choose(model, trace, choice, budget, options, example_input, timer)
        if not _freeze_bound(model, trace, choice, chosen):
            break
    why += f" by {options.score_name}, scope {options.scope}, {options}"
    plan = make_plan(model, trace, choice, chosen, why, options.prune_outputs, _floors(model, choice, options))
    return replace(plan, notes=(*notes, *plan.notes), **times)


def _freeze_bound(model: nn.Module, trace: Trace, choice: Choice, chosen: list[Candidate]) -> bool:
    """Let groups stay whose widths are written out in the model's code; return whether there are any."""
    bound = bound_groups(model, trace, chosen)
    reasons = {group: reason_of(choice.layers[group], where) for group, where in bound.items()}
    for group, reason in reasons.items():
        choice.freeze(group, reason)
    if not choice.units:
        raise nothing_to_prune(model, {choice.layers[group][0]: reason for group, reason in reasons.items()})
    return bool(bound)


def _floors(model: nn.Module, choice: Choice, options: PruneOptions) -> dict[str, tuple[int, int]]:
    first = _first_widths(model)
    return {name: options.floors(width, first.get(name, 0)) for name, width in choice.widths.items()}


def _choose(
    model: nn.Module,
    trace: Trace,
    choice: Choice,
    budget: Budget,
    options: PruneOptions,
    example_input: Tensor | Shape,
    timer: Timer | None,
) -> tuple[list[Candidate], str, dict[str, float], list[str]]:
    """Return what is removed, why, the milliseconds where those were asked for, and notes."""
    own, floors = match_layers(list(options.overrides), list(trace.layers)), _floors(model, choice, options)
    common, taken = [], []
    for layers, group in zip(choice.layers, choice.candidates):
        pattern = next((own[name] for name in layers if name in own), None)
        if pattern is None:
            common.append(group)
        elif group:
            order = above_floors(in_order([group], options.scope), choice.widths, floors)
            taken += take_units(order, round(options.overrides[pattern] * sum(len(c.units) for c in group)))
    order = above_floors(in_order(common, options.scope), choice.widths, floors)

    def finish(chosen: list[Candidate]) -> list[Candidate]:
        return round_widths([*taken, *chosen], choice.widths, options.multiples(choice.widths))

    why, times, notes = str(budget), {}, []
    if budget.prune_fraction is not None:
        number = budget.limit(sum(len(c.units) for group in common for c in group))
        chosen = take_units(order, number)
        removed = finish(chosen)
        if chosen == order and (possible := sum(len(c.units) for c in order)) < number:
            notes.append(
                f"{budget} asks for {number:,} channels, {possible:,} can go with {options.limits or 'grouping'}"
            )
    elif budget.params is not None or budget.macs is not None:
        removed, notes = to_budget(trace, order, choice.widths, budget, options, taken)
    else:
        x = _batch(model, example_input)
        timed = to_latency(model, trace, x, order, finish, budget, timer or EagerTimer())
        removed = finish(timed.chosen)
        times = {"latency_before": timed.before * 1e3, "latency_after": timed.after * 1e3}
        why += " (measured: {latency_after:.4g} of {latency_before:.4g} ms)".format(**times)
    return removed, why, times, notes


def _first_widths(model: nn.Module) -> dict[str, int]:
    """Widths of before the first pruning, as far as the model's history knows them."""
    widths: dict[str, int] = {}
    for step in history_of(model):
        if step["step"] == "prune":
            own = as_plan(step["plan"]).widths
            widths = {f"{step.get('part', '')}.{name}".strip("."): before for name, (before, _) in own.items()} | widths
    return widths


def _batch(model: nn.Module, example_input: Tensor | Shape) -> Tensor:
    """Return the example, or a random one of its shape, where and as the parameters are."""
    first = next(model.parameters())
    if not isinstance(example_input, Tensor):
        example_input = torch.randn(tuple(example_input), generator=torch.Generator().manual_seed(0))
    return copy_inputs(example_input.to(first.device, first.dtype))
