"""Runs of convolutions, BNs and activations in a traced model: each is read by the next one alone."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.attached import what_is_attached
from rep_plugin.blocks.annealed_layers import InnerActivation, why_not_annealed
from rep_plugin.blocks.layers import is_idle
from rep_plugin.functional.padded import PaddedConv, add_padded
from rep_plugin.reparam.fx_parts import Readers, TracedPart
from rep_plugin.reparam.linear_layers import flatten_layers, identity_conv, is_plain_bn, is_plain_conv
from rep_plugin.reparam.merge_sequence import compose_run

CONV, BN, ACT, SUM = "conv", "bn", "act", "sum"
_SUMS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Element:
    """One step of a run.

    Args:
        kind: CONV, BN, ACT or SUM.
        node: that computes it.
        name: of the module in the model, '' of a sum.
        module: the module.
        shortcut: of a sum: the layers of the other branch, (name, module) each; none: the identity.
    """

    kind: str
    node: fx.Node
    name: str = ""
    module: nn.Module | None = None
    shortcut: tuple[tuple[str, nn.Module], ...] = ()


@dataclass
class Run:
    """Elements one after the other; the first is a convolution of ``source``."""

    source: fx.Node
    elements: list[Element] = field(default_factory=list)


def _called(readers: Readers, node: fx.Node) -> nn.Module | None:
    one = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return readers.module(node) if one else None


def _elements_of(readers: Readers, part: TracedPart, node: fx.Node) -> list[Element]:
    """What a node computes: a layer, or timm's BN that holds its activation; nothing for what a run cannot hold."""
    module = _called(readers, node)
    if module is None or what_is_attached(module) is not None:
        return []
    name = part.full_name(str(node.target))
    if is_plain_conv(module) and "weight" in module._parameters:
        return [Element(CONV, node, name, module)]
    if is_plain_bn(module):
        return [Element(BN, node, name, module)]
    act = getattr(module, "act", None)
    if isinstance(module, _BatchNorm) and isinstance(act, nn.Module) and type(module).__name__ == "BatchNormAct2d":
        usable = is_idle(getattr(module, "drop", None)) and what_is_attached(act) is None
        if not usable or isinstance(act, InnerActivation) or why_not_annealed(act) is not None:
            return []
        return [Element(BN, node, name, module), Element(ACT, node, f"{name}.act", act)]
    if not isinstance(module, (nn.Conv2d, _BatchNorm)) and why_not_annealed(module) is None:
        return [Element(ACT, node, name, module)]
    return []


def find_runs(model: nn.Module, part: TracedPart) -> list[Run]:
    """Find the longest runs of a traced part.

    Args:
        model: the whole model, in eval mode.
        part: the traced part.

    Returns:
        The runs, in the order of the forward.
    """
    readers = Readers(model, part)
    runs: list[Run] = []
    ends: dict[fx.Node, Run] = {}

    def alone(node: fx.Node) -> fx.Node:
        """The value that idle modules pass on, as far back as nothing else reads it."""
        while _is_idle_call(readers, node) and len(node.args[0].users) == 1:
            node = node.args[0]
        return node

    def behind(node: fx.Node) -> fx.Node:
        """The value that idle modules pass on."""
        while _is_idle_call(readers, node):
            node = node.args[0]
        return node

    for node in part.graph.nodes:
        if node.op == "call_module":
            elements = _elements_of(readers, part, node)
            if not elements:
                continue
            given = alone(node.args[0])
            run = ends.pop(given, None) if len(given.users) == 1 else None
            if run is None:
                if elements[0].kind != CONV:
                    continue
                run = Run(behind(node.args[0]))
                runs.append(run)
            run.elements += elements
            ends[node] = run
        elif node.op in ("call_function", "call_method") and node.target in _SUMS:
            if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
                continue
            both = [alone(arg) for arg in node.args]
            found = [ends.get(arg) if len(arg.users) == 1 else None for arg in both]
            order = sorted((0, 1), key=lambda i: -_convs(found[i]))  # the longer one is the run
            main, other = found[order[0]], both[order[1]]
            if main is None or any(e.kind == SUM for e in main.elements):
                continue
            shortcut = _shortcut(found[order[1]], behind(other), main.source, behind)
            if shortcut is None:
                continue
            main.elements.append(Element(SUM, node, shortcut=shortcut))
            ends.pop(both[order[0]])
            ends[node] = main
    return runs


def _convs(run: Run | None) -> int:
    return 0 if run is None else sum(element.kind == CONV for element in run.elements)


def _is_idle_call(readers: Readers, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    return is_idle(readers.modules[node.target])


def _shortcut(run: Run | None, value: fx.Node, source: fx.Node, behind: Any) -> tuple | None:
    if value is source:
        return ()
    if run is None or behind(run.source) is not source:
        return None
    if any(element.kind not in (CONV, BN) for element in run.elements):
        return None
    return tuple((element.name, element.module) for element in run.elements)


def compose_elements(elements: list[Element]) -> PaddedConv:
    """Return the one convolution that elements without activations are.

    Args:
        elements: of a run, the first a convolution; a sum comes last of what begins at the run's source.

    Returns:
        Convolution in float64.

    Raises:
        ArgumentError: they are not one convolution at the border.
        NotMergeableError: a layer is not linear.
    """
    whole: PaddedConv | None = None
    layers: list[nn.Module] = []
    for element in [*elements, None]:
        if element is not None and element.kind != SUM:
            layers.append(element.module)  # type: ignore[arg-type]
            continue
        if layers:
            whole = compose_run(flatten_layers(layers), whole)
            layers = []
        if element is not None:
            assert whole is not None
            kernel = whole.params.kernel
            other = identity_conv(whole.params.in_channels, kernel.device)
            if element.shortcut:
                other = compose_run(flatten_layers([module for _, module in element.shortcut]))
            whole = add_padded([whole, other])
    assert whole is not None
    return whole


def names_of(elements: list[Element]) -> list[str]:
    """Return the names of all layers, those of shortcuts too."""
    found: list[str] = []
    for element in elements:
        found += [element.name] if element.name else [name for name, _ in element.shortcut]
    return found


def common_block(names: list[str] | Mapping[str, Any]) -> str:
    """Return the name of the innermost module that holds all of these, '' for the model."""
    paths = [name.split(".")[:-1] for name in names]
    common = paths[0]
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common)
