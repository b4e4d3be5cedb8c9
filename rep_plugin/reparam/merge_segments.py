"""Merging what was annealed to one convolution, however much it costs: the plan has decided."""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from rep_plugin.blocks.annealed_layers import Gate, Place, finish_, require_finished
from rep_plugin.errors import NotMergeableError, TraceError
from rep_plugin.reparam.affine import Affine
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.fx_parts import TracedPart, trace_parts
from rep_plugin.reparam.linear_layers import flatten_layers
from rep_plugin.reparam.linear_parts import LinearPart, merge_part
from rep_plugin.reparam.merge_blocks import carry_over_
from rep_plugin.reparam.runs import (
    ACT,
    BN,
    CONV,
    SUM,
    Element,
    Run,
    common_block,
    compose_elements,
    find_runs,
    names_of,
)
from rep_plugin.reparam.tracer import trace


def place_of(element: Element) -> Place | None:
    """Return where a convolution of a run stands, None for one of no segment, and for what is none."""
    return getattr(element.module, "segment", None) if element.kind == CONV else None


def cut_out(run: Run, name: str) -> list[Element] | None:
    """Return the elements of a segment, from its head to the BN or sum at its end.

    Args:
        run: a run of a finished model.
        name: of the segment.

    Returns:
        The elements; None where the run does not hold them one after the other.
    """
    places = [
        (index, place) for index, e in enumerate(run.elements) if (place := place_of(e)) and place.segment == name
    ]
    if not places or [place.index for _, place in places] != list(range(places[0][1].count)):
        return None
    first, last, shortcut = places[0][0], places[-1][0], places[0][1].shortcut
    if sum(e.kind == CONV for e in run.elements[first : last + 1]) != len(places):
        return None
    stop = last + 1
    while stop < len(run.elements) and run.elements[stop].kind == BN and not _holds_act(run, stop):
        stop += 1
    if shortcut:
        if first or stop == len(run.elements) or run.elements[stop].kind != SUM:
            return None
        stop += 1
    return run.elements[first:stop]


def _holds_act(run: Run, index: int) -> bool:
    """Whether a BN and the activation behind it are one module."""
    after = run.elements[index + 1 : index + 2]
    return bool(after) and after[0].kind == ACT and after[0].node is run.elements[index].node


@torch.no_grad()
def merge_segments_(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Merge each finished segment of an eval-mode model into one convolution, or take it away, in place.

    A segment that ends in a sum takes the place of the block whose forward adds: its class becomes a convolution, or a
    Sequential of that and what follows.

    Args:
        model: the model.

    Returns:
        (name of what now computes the segment, names of all its layers).

    Raises:
        AnnealError: an alpha is below 1.
        NotMergeableError: the layers of a segment do not run one after the other any more.
    """
    require_finished(model)
    gates = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    finish_(model)
    left: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and hasattr(module, "segment"):
            left[module.segment.segment].append(name)  # type: ignore[union-attr]
    left |= {name: [name] for name in gates}
    merged: list[tuple[str, list[str]]] = []
    found: dict[str, list[Element]] = {}
    for part in trace_parts(model, nn.Conv2d)[0] if left else ():
        for run in find_runs(model, part):
            for stop, element in enumerate(run.elements):
                if element.kind == SUM and (name := run.elements[stop - 1].name) in gates:
                    found[name] = run.elements[: stop + 1]
            for name in {place.segment for e in run.elements if (place := place_of(e)) is not None}:
                if (elements := cut_out(run, name)) is not None:
                    found[name] = elements
    if lost := [name for name in left if name not in found]:
        raise NotMergeableError(
            f"the segment of {', '.join(map(repr, left[lost[0]]))} does not run as it did when it was linearized: its layers "
            "were changed or are read from elsewhere"
        )
    for key, elements in found.items():
        names = names_of(elements)
        if elements[-1].kind == SUM:
            merged.append((_merge_block_(model, elements, skip=key in gates), names))
            continue
        conv = build_conv(
            compose_elements(elements), flatten_layers([e.module for e in elements if e.module is not None])
        )
        model.set_submodule(names[0], conv)
        for name in names[1:]:
            model.set_submodule(name, nn.Identity())
        merged.append((names[0], names))
    return merged


def _merge_block_(model: nn.Module, elements: list[Element], skip: bool) -> str:
    """Merge the block whose forward adds, or leave its shortcut alone; return its name."""
    found = find_block(model, elements)
    if found is None:
        raise NotMergeableError(f"no module's forward holds the sum behind {elements[-2].name!r}")
    name, part, constants = found
    run, sink = sum_of(part, inner_names(name, elements))
    value = Affine(run.source, conv=None if skip else compose_elements(elements))
    value = replace(value, nodes=frozenset(e.node for e in run.elements if e.node.op == "call_module"))
    new = merge_part(LinearPart(part.module, part.graph, {sink: value}, constants))
    carry_over_(part.module, new)
    model.set_submodule(name, new)
    return name


def inner_names(block: str, elements: list[Element]) -> list[str]:
    """Return the names of a run's layers inside of a block.

    Args:
        block: its name.
        elements: of the run.

    Returns:
        The names, without the block's.
    """
    return [element.name[len(block) + 1 :] for element in elements if element.name]


def find_block(model: nn.Module, elements: list[Element]) -> tuple[str, TracedPart, dict[str, Tensor]] | None:
    """Find the innermost module whose forward takes a run from its input to a sum.

    Args:
        model: the model; it is no such block itself.
        elements: the run, with its sum at the end.

    Returns:
        (name, its graph, {target: tensor} of what it does not hold), or None.
    """
    name = common_block(names_of(elements))
    while name:
        block, constants = model.get_submodule(name), {}
        try:
            part = TracedPart("", block, trace(block, constants))
            sum_of(part, inner_names(name, elements))
            return name, part, constants
        except (TraceError, NotMergeableError):
            name = name.rpartition(".")[0]
    return None


def sum_of(part: TracedPart, names: list[str]) -> tuple[Run, fx.Node]:
    """Return the run in a traced block that goes from its input through these layers to a sum, and the sum.

    Args:
        part: the block.
        names: of the layers, inside of it.

    Returns:
        The run up to the sum, and the node of the sum.

    Raises:
        NotMergeableError: there is none.
    """
    for run in find_runs(part.module, part):
        if run.source.op != "placeholder":
            continue
        for index, element in enumerate(run.elements):
            if element.kind == SUM and [e.name for e in run.elements[:index]] == names:
                return replace(run, elements=run.elements[: index + 1]), element.node
    raise NotMergeableError(f"{type(part.module).__name__} adds no shortcut to what {', '.join(names)} compute")
