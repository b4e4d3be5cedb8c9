"""Blocks that are merged by what their forward computes, without an adapter for their class.

A block is taken where a convolution of its own input, in which branches meet or whose weights are computed, is all that the
rest of its forward reads. See :mod:`rep_plugin.reparam.affine`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.conv_like import ConvLike
from rep_plugin.blocks.layers import is_idle
from rep_plugin.errors import TraceError
from rep_plugin.reparam.affine import Affine, read_affine
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.tracer import trace

KIND = "branches read from the forward"
MOST = 32  # convolutions and averages of a module that is still looked at as one block
NAME = "reparam_conv"
_ACTIVATIONS: Mapping[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU, torch.nn.functional.relu: nn.ReLU, torch.nn.functional.relu6: nn.ReLU6,
    torch.nn.functional.silu: nn.SiLU, torch.nn.functional.hardswish: nn.Hardswish, torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh, "relu": nn.ReLU, "relu_": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip


@dataclass
class LinearPart:
    """What of a block's forward is one convolution of its input.

    Args:
        module: the block.
        graph: its forward.
        sink: the value that the rest of the forward reads.
        value: how it is computed.
        constants: {target: tensor} of the graph's tensors that the block does not hold.
    """

    module: nn.Module
    graph: fx.Graph
    sink: fx.Node
    value: Affine
    constants: Mapping[str, torch.Tensor]


def may_hold(module: nn.Module) -> bool:
    """Return whether a module is looked at: one with a forward of its own round layers that are not ours."""
    kind = type(module)
    if (not module._modules and not module._parameters) or isinstance(module, (RepBlock, ConvLike, nn.Conv2d)):
        return False
    if kind.forward in (nn.Module.forward, nn.Sequential.forward) or kind.__module__.startswith("torch."):
        return False
    convs = sum(isinstance(part, (nn.Conv2d, nn.AvgPool2d)) for part in module.modules())
    own = any(p is not None and p.dim() == 4 for p in module._parameters.values())
    return 0 < convs + own <= MOST


def find_part(module: nn.Module, borders: bool = False, root: bool = False) -> LinearPart | str | None:
    """Find what of a block's forward is one convolution of its input.

    Args:
        module: the block, in eval mode.
        borders: take those too whose bias depends on the position, near the border.
        root: it is a whole model, whose class should stay.

    Returns:
        The part; the reason where branches meet but cannot be merged; None where there is nothing of the kind.
    """
    try:
        graph = trace(module, constants := {})
    except TraceError:
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        return None
    values = read_affine(graph, module, constants)
    why = None
    for node in reversed(graph.nodes):
        value = values.get(node)
        if not isinstance(value, Affine) or value.source is not inputs[0] or value.conv is None:
            continue
        if value.branches < 2 and not value.computed:
            continue
        if not _is_all_that_is_read(inputs[0], node, value):
            why = why or f"its input, or a value inside, is read beside the sum {node.name!r} too"
            continue
        if (kept := value.conv.params.kernel.numel()) > (cost := sum(value.costs.values())):
            costs = f"one convolution would take {kept:,} multiply-adds for a position, its branches take {cost:,.0f}"
            why = why or costs
            continue
        if value.conv.edge is not None and not borders:
            why = why or "its bias would depend on the position near the border: merge_linear=True merges it"
            continue
        part = LinearPart(module, graph, node, value, constants)
        if not root or _layers_behind(part) is not None:
            return part
        why = why or f"the sum {node.name!r} stands in the forward of the whole model: put it into a module of its own"
    return why


def _is_all_that_is_read(source: fx.Node, sink: fx.Node, value: Affine) -> bool:
    inside = value.nodes - {sink}
    return all(user in value.nodes for node in (source, *inside) for user in node.users)


def _result_of(graph: fx.Graph) -> Any:
    return next(node for node in graph.nodes if node.op == "output").args[0]


def merge_part(part: LinearPart, name: str = NAME) -> nn.Module:
    """Return the module that takes a block's place.

    Args:
        part: the part of the block.
        name: name of the convolution, where other layers follow it.

    Returns:
        The convolution, a Sequential of it and the layers behind it or, where the rest is not one layer after the other, a
        ``torch.fx.GraphModule``.
    """
    assert part.value.conv is not None
    conv = build_conv(part.value.conv, _sources_of(part))
    rest = _layers_behind(part)
    if rest is None:
        merged: nn.Module = _graph_module(part, conv, name)
    elif rest:
        merged = nn.Sequential()
        merged.add_module(name, conv)
        for key, layer in rest.items():
            merged.add_module(key, layer)
    else:
        merged = conv
    merged.training = part.module.training
    return merged


def _sources_of(part: LinearPart) -> list[nn.Module]:
    modules = dict(part.module.named_modules())
    return [modules[node.target] for node in part.value.nodes if node.op == "call_module"] or [part.module]


def _layers_behind(part: LinearPart) -> dict[str, nn.Module] | None:
    """The layers that run one after the other behind the part, by name; None where they do not."""
    layers: dict[str, nn.Module] = {}
    node, modules = part.sink, dict(part.module.named_modules())
    while (users := list(node.users)) and users[0].op != "output":
        if len(users) > 1 or [*users[0].all_input_nodes] != [node]:
            return None
        node = users[0]
        if node.op == "call_module" and node.args == (users[0].all_input_nodes[0],) and not node.kwargs:
            layer, name = modules[node.target], node.target.replace(".", "_")
        elif node.target in _ACTIVATIONS and len(node.args) == 1:
            layer = _ACTIVATIONS[node.target]()
            name = "act" if "act" not in layers else f"act{len(layers)}"
        else:
            return None
        if is_idle(layer):
            continue
        if name in layers or name == NAME:
            return None
        layers[name] = layer
    return layers if _result_of(part.graph) is node else None


def _graph_module(part: LinearPart, conv: nn.Module, name: str) -> nn.Module:
    graph, copies = fx.Graph(), {}
    needed = {node for node in part.graph.nodes if node.op in ("placeholder", "output")} | {part.sink}
    for node in reversed(part.graph.nodes):
        if node in needed and node is not part.sink:
            needed.update(node.all_input_nodes)
    for node in part.graph.nodes:
        if node is part.sink:
            copies[node] = graph.call_module(name, (copies[part.value.source],))
        elif node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    used = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
    root = nn.Module()
    setattr(root, name, conv)
    for target in used - {name}:
        _set(root, target, part.constants[target] if target in part.constants else _get(part.module, target))
    return fx.GraphModule(root, graph, type(part.module).__name__)


def _get(module: nn.Module, target: str) -> Any:
    value: Any = module
    for key in target.split("."):
        value = getattr(value, key)
    return value


def _set(root: nn.Module, target: str, value: Any) -> None:
    *path, last = target.split(".")
    for key in path:
        if not hasattr(root, key):
            root.add_module(key, nn.Module())
        root = getattr(root, key)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)
