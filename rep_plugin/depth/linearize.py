"""``linearize``: give chosen activations of any network an annealed form, so that what lies between them merges later."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import OneOf, That, checked
from rep_plugin.blocks.activations import FUNCTIONS
from rep_plugin.blocks.annealed_layers import (
    InnerActivation,
    Place,
    anneal_conv_,
    anneal_in_,
    anneal_norm_,
    anneal_out_,
    in_segments,
    why_not_annealed,
)
from rep_plugin.depth.plan import DepthPlan, as_depth_plan
from rep_plugin.depth.segments import Segment, find_segments, rings_of
from rep_plugin.errors import AnnealError, ArgumentError, did_you_mean
from rep_plugin.functional.kernels import pair
from rep_plugin.history import before_step, layer_named, record_, replays
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import Example, require_bare, takes_examples
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.report import BlockReport, Report
from rep_plugin.measure.undo import undone_on_error
from rep_plugin.measure.verify import default_inputs, require_rounded, verify_equivalence

TOLERANCE = 1e-9  # relative, in float64
KIND, SKIPPED = "annealed to one convolution", "annealed away, the shortcut stays"
Plan = Annotated[
    DepthPlan | Mapping | str | Sequence[str],
    That(lambda plan: True, "a DepthPlan, its data, JSON text or a path, or a list of names of activations"),
]


@checked
@takes_examples
@working("linearizing")
@private_random()
def linearize(
    model: nn.Module,
    plan: Plan,
    inplace: bool = False,
    act_after: Annotated[str, OneOf(FUNCTIONS)] | None = None,
    example_input: Example | None = None,
) -> tuple[nn.Module, Report]:
    """Put an annealed form in the place of activations; return the model, still the same function, and a report.

    Every activation of a segment becomes ``(1 - alpha) * act(x) + alpha * x``, and the zeros that its convolutions pad move
    to its head, see :mod:`rep_plugin.blocks.annealed_layers`. ``alpha`` is a buffer, 0 at first: the output in eval mode is
    proven unchanged in float64 (relative tolerance 1e-9), borders included, and batch statistics in train mode are stock's.
    Lead it to 1 with :func:`rep_plugin.set_alpha_` while training, or with ``rep_plugin.LinearizeHook``; then
    :func:`rep_plugin.reparameterize` merges each segment into one convolution.

    Parameters and their keys stay, so that optimizers stay attached and stock checkpoints load. The mode is kept.

    Args:
        model: the model; it stays as it was where an error is raised.
        plan: what :func:`rep_plugin.plan_depth` returns, its data or its file; or names of activations (modules).
        inplace: linearize the given model, not a copy.
        act_after: an activation that is annealed in behind each segment that is a block's whole output, or None; by default
            the plan's own.
        example_input: images (N, C, H, W) for the proof, which also runs random images; or a tuple or a dict of all that the
            model is called with.

    Returns:
        The linearized model and the report.

    Raises:
        ArgumentError: the plan is of another model, or chooses nothing; an activation has parameters, is called more than
            once, or stands between no two layers that could merge.
        AnnealError: the model is linearized already.
        EquivalenceError: the proof fails.

    Example:
        >>> import rep_plugin
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
        >>> annealed, report = linearize(model, ["1"])
        >>> rep_plugin.set_alpha_(annealed, 1.0)
        >>> rep_plugin.reparameterize(annealed)[0][0]
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    started = time.perf_counter()
    require_bare(model)
    before = before_step(model)
    if any(True for _ in in_segments(model)):
        raise AnnealError("the model is linearized already: merge it first, or linearize all in one call")
    segments, act = chosen_segments(model, plan)
    act_after = act_after or act
    steps = [segment.data for segment in segments]
    inputs = default_inputs(model, example_input)
    report = Report(
        "linearize", count_params(model), 0, count_macs(model, inputs[0]), input_shape=tuple(inputs[0].shape)
    )
    exact = copy_model(model).double()
    exact.eval()  # not chained: mmpretrain's return None
    linearize_(exact, steps, act_after)
    report.add_proof(verify_equivalence(model, exact, inputs, (), TOLERANCE))
    report.blocks = [BlockReport(segment.name, SKIPPED if segment.skip else KIND) for segment in segments]
    if act_after and (without := [segment.name for segment in segments if not (segment.block or segment.skip)]):
        report.notes.append(f"no activation after {len(without)} segments, first {without[0]!r}: no module's output")
    with undone_on_error(*([model] if inplace else [])):
        done = linearize_(model if inplace else copy_model(model), steps, act_after)
        require_rounded(done, exact)
        report.params_after, report.macs_after = count_params(done), count_macs(done, inputs[0])
        record_(done, before, step="linearize", segments=steps, act_after=act_after)
    report.seconds = time.perf_counter() - started
    return done, report


def chosen_segments(model: nn.Module, plan: Any) -> tuple[list[Segment], str | None]:
    """Return the segments of a model that a plan chooses, and its activation after them.

    Args:
        model: the model.
        plan: as for :func:`linearize`.

    Returns:
        The segments, in the order of the forward, and the name of the activation, or None.

    Raises:
        ArgumentError: as for :func:`linearize`.
    """
    found, notes = find_segments(model, skip=True)
    if isinstance(plan, Sequence) and not isinstance(plan, str):
        return by_activations(model, plan, found, notes), None
    plan = as_depth_plan(plan)
    if not plan.chosen:
        raise ArgumentError(f"the plan chooses nothing to linearize ({plan.why})")
    own = {segment.name: segment for segment in found}
    for wanted in plan.chosen_segments:
        if wanted.name not in own or not own[wanted.name].is_same(wanted):
            there = "has other layers there" if wanted.name in own else "has no such layers"
            raise ArgumentError(
                f"the plan is of another model, a {plan.model}: it merges {wanted.name!r}, and this {type(model).__name__} "
                f"{there}"
            )
    return [own[segment.name] for segment in plan.chosen_segments], plan.act_after


def by_activations(
    model: nn.Module, names: Iterable[str], found: Sequence[Segment], notes: Sequence[str] = ()
) -> list[Segment]:
    """Return segments in which exactly these activations go: as many as possible in each, with the fewest layers.

    Args:
        model: the model.
        names: of the activations.
        found: its segments.
        notes: on what is in none.

    Returns:
        The segments, in the order of the forward.

    Raises:
        ArgumentError: one of them is in none; the message says why.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ArgumentError("plan names no activation, expected a DepthPlan or names of activations")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ArgumentError(f"the {type(model).__name__} has no activation {name!r}{did_you_mean(name, modules)}")
        if (why := why_not_annealed(modules[name])) is not None:
            raise ArgumentError(f"{name!r} {why}: it cannot be annealed away")
    usable = [segment for segment in found if segment.activations and set(segment.activations) <= set(names)]
    taken: list[Segment] = []
    for segment in sorted(usable, key=lambda s: (-len(s.activations), len(s.shapes))):
        if not any(segment.overlaps(other) for other in taken):
            taken.append(segment)
    covered = {name for segment in taken for name in segment.activations}
    if missing := [name for name in names if name not in covered]:
        why = "it is read by more than one layer, or called more than once, or stands between no two convolutions in a row"
        more = "".join(f" ({note})" for note in notes[:1])
        raise ArgumentError(f"nothing merges where {missing[0]!r} goes: {why}{more}")
    return sorted(taken, key=lambda segment: segment.span)


@torch.no_grad()
def linearize_(model: nn.Module, segments: Sequence[Mapping], act_after: str | None = None) -> nn.Module:
    """Put annealed layers in the place of those of segments; nothing is proven.

    Args:
        model: the model, changed in place.
        segments: :attr:`rep_plugin.depth.segments.Segment.data` of each.
        act_after: name of the activation behind them.

    Returns:
        The model.
    """
    for segment in segments:
        layers = [(name, layer_named(model, name)) for name in segment["layers"]]
        if segment.get("skip"):
            anneal_out_(layers[-1][1], next(layers[-1][1].parameters()).device)
            continue
        convs = [layer for _, layer in layers if isinstance(layer, nn.Conv2d)]
        if len(convs) < 2 or layers[0][1] is not convs[0]:
            raise ArgumentError(f"the history is of another model: {segment['layers'][0]!r} is no convolution")
        names = [name for name, layer in layers if isinstance(layer, nn.Conv2d)]
        rings = rings_of(convs)
        padded = [pair(conv.padding) for conv in convs]
        ring = (0, 0)
        count = 0
        for name, layer in layers:
            if isinstance(layer, nn.Conv2d):
                head, (sh, sw), own = count == 0, pair(layer.stride), padded[count]
                whole = (own[0] + sh * rings[0][0], own[1] + sw * rings[0][1]) if head else (0, 0)
                place = Place(f"{names[0]}..{names[-1]}", count, len(convs), bool(segment["shortcut"]))
                anneal_conv_(layer, whole, ring if any(own) and not head else None, place)
                ring, count = rings[count], count + 1
            elif isinstance(layer, _BatchNorm):
                if any(ring):
                    anneal_norm_(layer, ring)
            else:
                model.set_submodule(name, InnerActivation(layer, convs[0].weight.device))
        if act_after and segment["block"]:
            anneal_in_(layer_named(model, segment["block"]), act_after, convs[0].weight.device)
    return model


@replays("linearize", "segments", "act_after")
def _replay(model: nn.Module, segments: Sequence[Mapping], act_after: str | None) -> nn.Module:
    for segment in segments:
        kinds = {"layers": (list, tuple), "shortcut": bool, "block": str} | (
            {"skip": bool} if "skip" in segment else {}
        )
        if segment.keys() != kinds.keys() or not all(isinstance(segment[k], kind) for k, kind in kinds.items()):
            raise ArgumentError(f"a segment of the history must have {', '.join(kinds)}, got {dict(segment)}")
    return linearize_(model, segments, act_after)
