"""Which runs of a network become one convolution where given activations go."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rep_plugin.blocks.layers import is_idle
from rep_plugin.errors import TraceError
from rep_plugin.functional.kernels import pair
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.forward import eval_mode, first_image, run_model
from rep_plugin.measure.randomness import private_random
from rep_plugin.reparam.fx_parts import TracedPart, trace_parts
from rep_plugin.reparam.merge_segments import find_block, inner_names, sum_of
from rep_plugin.reparam.runs import ACT, BN, CONV, SUM, Element, Run, common_block, find_runs, names_of
from rep_plugin.reparam.tracer import trace

MOST_CONVS, LARGEST = 6, 11  # of a segment: convolutions, and side of the merged kernel
Shape = tuple[int, int, int, int]  # (O, I / groups, kh, kw)
Geometry = tuple[Shape, int, tuple[int, int], tuple[int, int]]  # shape, groups, stride, padding


@dataclass(frozen=True)
class Segment:
    """Layers that become one convolution where their activations go, or none, as plain data.

    Args:
        name: ``first convolution..last convolution``, with `` skipped`` behind it where they become none.
        layers: names of its layers in order: convolutions, BNs, activations.
        activations: names of those that go.
        shapes: (O, I / groups, kh, kw) of each convolution.
        shortcut: it ends in a sum with its own input, or with a convolution of that.
        shortcut_layers: names of the layers of that other branch.
        block: the module whose output the segment is, '' where it is none's.
        merged: (O, I / groups, kh, kw) of the one convolution.
        groups: of it.
        stride: of it.
        padding: of it.
        macs_before: multiply-adds for one image of the layers as they are; 0 where no image was given.
        macs_after: of the one convolution.
        span: (number of the run, first, last place in it): segments of one run that overlap exclude each other.
        skip: the branch of a residual block goes, and the shortcut stays.
    """

    name: str
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    shapes: tuple[Shape, ...]
    shortcut: bool
    shortcut_layers: tuple[str, ...]
    block: str
    merged: Shape
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    macs_before: int = 0
    macs_after: int = 0
    span: tuple[int, int, int] = (0, 0, 0)
    skip: bool = False

    @property
    def data(self) -> dict:
        """What it takes to linearize it."""
        data = {"layers": list(self.layers), "shortcut": self.shortcut, "block": self.block}
        return data | ({"skip": True} if self.skip else {})

    def is_same(self, other: "Segment") -> bool:
        """Return whether two segments, of two models, are the same layers."""
        mine, theirs = ((s.layers, s.shapes, s.shortcut, s.merged, s.stride, s.padding, s.skip) for s in (self, other))
        return mine == theirs

    def overlaps(self, other: "Segment") -> bool:
        """Return whether two segments of one model share a layer."""
        (run, first, last), (other_run, start, stop) = self.span, other.span
        return run == other_run and first <= stop and start <= last


def shape_of(conv: nn.Module) -> Shape:
    """Return (O, I / groups, kh, kw) of a convolution."""
    outputs, inputs, height, width = conv.weight.shape
    return outputs, inputs, height, width


def _one(conv: Any) -> Geometry:
    outputs, inputs, height, width = shape_of(conv)
    (dh, dw), padding = pair(conv.dilation), pair(conv.padding)
    return (outputs, inputs, (height - 1) * dh + 1, (width - 1) * dw + 1), conv.groups, pair(conv.stride), padding


def _after(first: Geometry, second: Geometry) -> Geometry:
    """The geometry of one convolution behind another, dilations written out."""
    (_, ins, kh, kw), groups, stride, padding = first
    (outs, ins2, kh2, kw2), groups2, stride2, padding2 = second
    channels, diagonal = ins * groups, ins2 == 1 and groups2 == outs
    if diagonal:
        together = groups
    elif ins == 1 and groups == first[0][0]:
        together = groups2
    else:
        together = math.gcd(groups, groups2)
    size = kh + (kh2 - 1) * stride[0], kw + (kw2 - 1) * stride[1]
    return (
        (outs, channels // together, *size),
        together,
        (stride[0] * stride2[0], stride[1] * stride2[1]),
        (padding[0] + padding2[0] * stride[0], padding[1] + padding2[1] * stride[1]),
    )


def _with_shortcut(main: Geometry, element: Element) -> Geometry | None:
    """The geometry of a sum, None where the two are not centred on each other."""
    (outs, ins, kh, kw), groups, stride, padding = main
    convs = [module for _, module in element.shortcut if isinstance(module, nn.Conv2d)]
    channels = ins * groups
    other: Geometry = ((channels, 1, 1, 1), channels, (1, 1), (0, 0))
    for index, conv in enumerate(convs):
        if index and any(pair(conv.padding)):
            return None  # the border inside of a shortcut is not annealed
        other = _after(other, _one(conv)) if index else _one(conv)
    (outs2, ins2, kh2, kw2), groups2, stride2, padding2 = other
    if (outs2, ins2 * groups2, stride2) != (outs, channels, stride):
        return None
    sides = ((kh, kh2, padding[0], padding2[0]), (kw, kw2, padding[1], padding2[1]))
    if any(2 * (p - q) != k - m or k < m for k, m, p, q in sides):
        return None
    together = math.gcd(groups, groups2)
    return (outs, channels // together, kh, kw), together, stride, padding


def rings_of(convs: list[nn.Module]) -> list[tuple[int, int]]:
    """Return for each convolution of a segment what lies round its *output*: (rows, columns) that stock does not have."""
    ring, rings = (0, 0), []
    for conv in reversed(convs):
        rings.append(ring)
        (ph, pw), (sh, sw) = pair(conv.padding), pair(conv.stride)
        ring = ph + sh * ring[0], pw + sw * ring[1]
    return rings[::-1]


def _sizes(model: nn.Module, x: object) -> dict[str, int]:
    """Positions of each convolution's output for one image."""
    copied, sizes, handles = copy_model(model), {}, []
    for name, module in copied.named_modules():
        if isinstance(module, nn.Conv2d):

            def hook(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                sizes[name] = output.shape[2] * output.shape[3]

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        run_model(copied, copy_inputs(first_image(x)[0]))
    return sizes


@private_random()
def find_segments(model: nn.Module, x: Tensor | None = None, skip: bool = False) -> tuple[list[Segment], list[str]]:
    """Find what becomes one convolution where activations go.

    Args:
        model: the model; it stays as it is.
        x: images (N, C, H, W), to count multiply-adds.
        skip: residual blocks of which the shortcut alone may be left, too.

    Returns:
        The segments, in the order of the forward, and notes on activations that must stay.
    """
    copied = copy_model(model)
    with eval_mode(copied):
        parts, untraced = trace_parts(copied, nn.Conv2d)
        sizes = {} if x is None else _sizes(copied, x)
        found: list[Segment] = []
        number = 0
        for part in parts:
            for run in find_runs(copied, part):
                number += 1
                found += _segments_of(run, number, sizes, copied, skip)
        notes = [f"not traced, only the parts inside: {failure}" for failure in untraced]
        return found, notes + _notes_on_calls(copied, parts)


def _notes_on_calls(model: nn.Module, parts: list[TracedPart]) -> list[str]:
    """Activations that no name can stand for, because a forward calls a function, or one module several times."""
    functions, shared = 0, []
    for part in parts:
        modules, called = dict(part.module.named_modules()), {}
        for node in part.graph.nodes:
            name = getattr(node.target, "__name__", node.target)
            if node.op in ("call_function", "call_method") and str(name).rstrip("_") in FUNCTIONAL:
                functions += 1
            elif node.op == "call_module" and not isinstance(modules[node.target], nn.Conv2d):
                called.setdefault(modules[node.target], []).append(part.full_name(str(node.target)))
        shared += [names[0] for act, names in called.items() if len(names) > 1 and type(act).__name__ in SHARED]
    notes = []
    if functions:
        notes.append(f"{functions} activations are functions in a forward, not modules: they stay as they are")
    if shared:
        notes.append(
            f"{len(shared)} activations are called more than once, first {shared[0]!r}: they stay as they are; give each "
            "call a module of its own"
        )
    return notes


FUNCTIONAL = {"relu", "relu6", "silu", "hardswish", "gelu", "leaky_relu", "mish", "elu"}
SHARED = {"ReLU", "ReLU6", "SiLU", "Hardswish", "GELU", "LeakyReLU", "Mish", "ELU", "Swish", "HardSwish", "HSwish"}


def _ends(name: str, part: TracedPart, elements: list[Element]) -> bool:
    """Whether a block's output is what the last element gives."""
    modules = dict(part.module.named_modules())
    node = next(node for node in part.graph.nodes if node.op == "output").args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and is_idle(modules[node.target]):
        node = node.args[0]
    if elements[-1].kind == SUM:
        return node is sum_of(part, inner_names(name, elements))[1]
    return isinstance(node, fx.Node) and node.target == inner_names(name, elements)[-1]


def _segments_of(run: Run, number: int, sizes: dict[str, int], model: nn.Module, skip: bool) -> Iterator[Segment]:
    elements = run.elements
    convs = [index for index, element in enumerate(elements) if element.kind == CONV]
    if skip and (skipped := _make_skipped(elements, number, sizes, model)) is not None:
        yield skipped
    for place, first in enumerate(convs):
        whole = _one(elements[first].module)
        for last in convs[place + 1 : place + MOST_CONVS]:
            inside = elements[first : last + 1]
            if any(element.kind == SUM for element in inside):
                break
            whole = _after(whole, _one(elements[last].module))
            if max(whole[0][2:]) > LARGEST:
                break
            if not any(element.kind == ACT for element in inside):
                continue
            stop = last + 1
            while stop < len(elements) and elements[stop].kind == BN:
                after = elements[stop + 1 : stop + 2]
                if after and after[0].node is elements[stop].node:  # timm's BN that holds the activation, which stays
                    break
                stop += 1
            yield _make(elements, first, stop, whole, number, sizes, model)


def _make_skipped(elements: list[Element], number: int, sizes: dict[str, int], model: nn.Module) -> Segment | None:
    """A residual block of which the shortcut alone is left."""
    stop = next((index for index, element in enumerate(elements) if element.kind == SUM), None)
    if stop is None or elements[stop].shortcut or elements[stop - 1].kind not in (CONV, BN):
        return None
    if (found := find_block(model, elements[: stop + 1])) is None:
        return None
    convs = [element for element in elements[:stop] if element.kind == CONV]
    channels = shape_of(convs[-1].module)[0]
    return Segment(
        f"{convs[0].name}..{convs[-1].name} skipped",
        tuple(e.name for e in elements[:stop]),
        (),
        tuple(shape_of(e.module) for e in convs),
        True,
        (),
        found[0] if _ends(*found[:2], elements[: stop + 1]) else "",
        (channels, 1, 1, 1),
        channels,
        (1, 1),
        (0, 0),
        sum(e.module.weight.numel() * sizes.get(e.name, 0) for e in convs),
        0,
        (number, 0, stop),
        True,
    )


def _make(
    elements: list[Element],
    first: int,
    stop: int,
    whole: Geometry,
    number: int,
    sizes: dict[str, int],
    model: nn.Module,
) -> Segment:
    inside = elements[first:stop]
    after = elements[stop] if first == 0 and stop < len(elements) else None
    shortcut: tuple[str, ...] = ()
    block, adds = "", False
    both = _with_shortcut(whole, after) if after is not None and after.kind == SUM else None
    if after is not None and both is not None and (found := find_block(model, [*inside, after])) is not None:
        whole, adds = both, True
        inside, stop = [*inside, after], stop + 1
        shortcut = tuple(name for name, _ in after.shortcut)
        block = found[0] if _ends(found[0], found[1], inside) else ""
    if not adds and (name := common_block(names_of(inside))):
        with suppress(TraceError):
            block = (
                name if _ends(name, TracedPart("", child := model.get_submodule(name), trace(child)), inside) else ""
            )
    convs = [e for e in inside if e.kind == CONV]
    others = [(name, module) for name, module in inside[-1].shortcut if isinstance(module, nn.Conv2d)] if adds else []
    every = [*((e.name, e.module) for e in convs), *others]
    positions = sizes.get(convs[-1].name, 0)
    shape, groups, stride, padding = whole
    outputs, inputs, height, width = shape
    return Segment(
        f"{convs[0].name}..{convs[-1].name}",
        tuple(e.name for e in inside if e.name),
        tuple(e.name for e in inside if e.kind == ACT),
        tuple(shape_of(e.module) for e in convs),
        adds,
        shortcut,
        block,
        shape,
        groups,
        stride,
        padding,
        sum(module.weight.numel() * sizes.get(name, 0) for name, module in every),
        outputs * inputs * height * width * positions,
        (number, first, stop - 1),
    )
