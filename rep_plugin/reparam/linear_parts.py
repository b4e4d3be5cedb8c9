"""Blocks that are merged by what their forward computes, whatever they are called.

What is taken of a block are values that are one convolution of another, in which branches meet or whose weights are computed,
where the rest of the forward reads nothing between the two. See :mod:`rep_plugin.reparam.affine`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.conv_like import ConvLike
from rep_plugin.blocks.layers import is_idle
from rep_plugin.errors import NotMergeableError
from rep_plugin.reparam.affine import READABLE, Affine, read_affine
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.layouts import Layout
from rep_plugin.reparam.linear_layers import CONV_NORM_CLASSES
from rep_plugin.reparam.tracer import CALLS, Called, trace

KIND = "branches read from the forward"
MOST = 32  # convolutions and averages of a module that is still looked at as one block
NAME = "reparam_conv"
MERGE_METHODS = ("fuse", "reparameterize", "switch_to_deploy", "merge_kernel", "local_inject", "fuse_convs")
_ACTIVATIONS: Mapping[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU, torch.nn.functional.relu: nn.ReLU, torch.nn.functional.relu6: nn.ReLU6,
    torch.nn.functional.silu: nn.SiLU, torch.nn.functional.hardswish: nn.Hardswish, torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh, "relu": nn.ReLU, "relu_": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip


@dataclass
class LinearPart:
    """What of a block's forward is convolutions.

    Args:
        module: the block.
        graph: its forward.
        sums: {value that the rest of the forward reads: how it is computed}, in the order of the forward; one without a
            convolution is its source.
        constants: {target: tensor} of the graph's tensors that the block does not hold.
        called: the modules inside that have a forward of their own.
        layout: the block's deployed form, where it is known.
        left: why other sums are left.
    """

    module: nn.Module
    graph: fx.Graph
    sums: dict[fx.Node, Affine]
    constants: Mapping[str, torch.Tensor]
    called: Sequence[Called] = ()
    layout: Layout | None = None
    left: str | None = None

    @property
    def value(self) -> Affine:
        """How the first of the sums is computed."""
        return next(iter(self.sums.values()))

    @property
    def conv_name(self) -> str:
        """Name of the convolution where other layers follow it."""
        return NAME if self.layout is None else self.layout.conv or NAME


def _is_leaf(module: nn.Module) -> bool:
    kind = type(module)
    if isinstance(module, fx.GraphModule):
        return False
    if (not module._modules and not module._parameters) or isinstance(module, (RepBlock, ConvLike, nn.Conv2d)):
        return True
    return kind.forward in (nn.Module.forward, nn.Sequential.forward) or kind.__module__.startswith("torch.")


def _layers_in(module: nn.Module) -> int:
    convs = sum(isinstance(part, (nn.Conv2d, nn.AvgPool2d)) for part in module.modules())
    return convs + any(p is not None and p.dim() == 4 for p in module._parameters.values())


def may_hold(module: nn.Module) -> bool:
    """Return whether a module is looked at: one with a forward of its own round layers that are not ours."""
    return not _is_leaf(module) and 0 < _layers_in(module) <= MOST


def looks_branched(module: nn.Module) -> bool:
    """Return whether branches seem to meet in a module: it has a BN and several convolutions, or a method that merges it."""
    if _is_leaf(module) or type(module).__name__ in CONV_NORM_CLASSES:
        return False
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return False
    return _layers_in(module) > 1 or can_merge_itself(module)


def can_merge_itself(module: nn.Module) -> bool:
    """Return whether a module has a method by which projects merge their blocks."""
    return any(callable(getattr(type(module), method, None)) for method in MERGE_METHODS)


def find_part(
    module: nn.Module,
    borders: bool = False,
    root: bool = False,
    layout: Layout | None = None,
    kept: Collection[str] = (),
) -> LinearPart | str | None:
    """Find what of a block's forward is convolutions.

    Args:
        module: the block, in eval mode.
        borders: take those too whose bias depends on the position, near the border.
        root: it is a whole model, whose class should stay.
        layout: its deployed form, where that is known: then one convolution of its input is looked for.
        kept: names of modules inside that are not looked into.

    Returns:
        The part; the reason where branches meet but cannot be merged; None where there is nothing of the kind.

    Raises:
        TraceError: the forward cannot be traced.
        RepPluginError: the children's names say without doubt what the block is, and a layer of it computes something else.
    """
    graph = trace(module, constants := {}, called := [], READABLE, kept)
    joints = [node for node in graph.nodes if len(node.all_input_nodes) > 1 and node.op != "output"]
    if layout is None and not joints:
        return None
    values, refused = read_affine(graph, module, constants, joints=joints if layout is None else None)
    part = LinearPart(module, graph, {}, constants, called, layout)
    known, why, sums = layout is not None and layout.certain, None, {}
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if layout is not None and len(inputs) != 1:
        return None
    forks = {node for node, value in values.items() if isinstance(value, Affine) and len(node.users) > 1}
    nearer: dict[fx.Node, Any] = {}
    if layout is None and any(_why_not(node, values.get(node), borders) for node in joints):
        nearer = read_affine(graph, module, constants, forks, joints).values
    for node in reversed(graph.nodes):
        if any(node in taken.nodes for taken in sums.values()):
            continue
        if layout is not None:
            options = [] if sums else [value for value in [values.get(node)] if _is_of(value, inputs[0], known)]
        else:
            options = [value for value in (values.get(node), nearer.get(node)) if getattr(value, "is_joined", False)]
            options = [value for value in options if value.branches > 1 or not _is_fixed(module, value)]
            if options and _is_of_one_call(options[-1]):
                options = []
        reasons = [_why_not(node, value, borders, layout is not None) for value in options]
        if None in reasons:
            sums[node] = options[reasons.index(None)]
        elif reasons:
            why = why or reasons[0]
    part.sums, part.left = dict(reversed(sums.items())), why
    stays = root and layout is None and not isinstance(module, fx.GraphModule)
    if sums and not (stays and _layers_behind(part) is None):
        return part
    if sums and why is None:
        sink = next(reversed(part.sums))
        why = f"the sum {sink.name!r} stands in the forward of the whole model: put it into a module of its own"
    if known and refused and why is None:
        raise next(iter(refused.values()))
    return why


def _is_of(value: Any, source: fx.Node, known: bool) -> bool:
    """Whether a value is what a known block computes: a sum or, where its names leave no doubt, a single branch."""
    if not isinstance(value, Affine) or value.conv is None or value.source is not source:
        return False
    return value.is_joined or (known and all(user in value.nodes for user in source.users))


def _is_fixed(module: nn.Module, value: Affine) -> bool:
    """Whether the kernels that a forward gives to conv2d are buffers as they are, as those of a blur: nothing is computed."""
    called = [node for node in value.nodes if node.op == "call_function" and len(node.args) > 1]
    kernels = [node.args[1] for node in called if getattr(node.target, "__name__", "") == "conv2d"]
    buffers = dict(module.named_buffers())
    return bool(kernels) and all(isinstance(k, fx.Node) and k.op == "get_attr" and k.target in buffers for k in kernels)


def _is_of_one_call(value: Affine) -> bool:
    """Whether branches meet in the forward of one module inside, which is looked at for itself."""
    inside = {value.source, *value.nodes}
    joints = [node for node in value.nodes if len(inside & {*node.all_input_nodes}) > 1] or [*value.nodes]
    calls = {node.meta[CALLS][:1] for node in joints}
    return len(calls) == 1 and calls != {()}


def _why_not(node: fx.Node, value: Any, borders: bool, known: bool = False) -> str | None:
    """Why a value is not taken as one convolution, None where it is."""
    if not isinstance(value, Affine) or value.conv is None:
        return f"{node.name!r} is no convolution of one value"
    inside = value.nodes - {node} | ({value.source} if known else set())
    if any(user not in value.nodes for one in inside for user in one.users):
        return f"{'its input, or ' if known else ''}a value inside the sum {node.name!r} is read beside it too"
    if not known and (kept := value.conv.params.kernel.numel()) > (cost := sum(value.costs.values())):
        return f"one convolution would take {kept:,} multiply-adds for a position, its branches take {cost:,.0f}"
    if min(value.conv.padding) < 0:
        return f"the sum {node.name!r} is of a map that is cropped"
    if value.conv.edge is not None and not borders:
        return "its bias would depend on the position near the border: merge_linear=True merges it"
    return None


def _result_of(graph: fx.Graph) -> Any:
    return next(node for node in graph.nodes if node.op == "output").args[0]


def merge_part(part: LinearPart) -> nn.Module:
    """Return the module that takes a block's place.

    Args:
        part: the part of the block.

    Returns:
        The convolution, a Sequential of it and the layers behind it or, where the rest is not one layer after the other, a
        ``torch.fx.GraphModule``.
    """
    convs = build_sums(part)
    conv, rest = convs[0], _layers_behind(part)
    if rest is None:
        merged: nn.Module = _graph_module(part, convs)
    elif rest or (part.layout is not None and part.layout.conv):
        merged = nn.Sequential()
        for key, layer in (({} if conv is None else {part.conv_name: conv}) | rest).items():
            merged.add_module(key, layer)
    else:
        merged = nn.Identity() if conv is None else conv
    merged.training = part.module.training
    return merged


def read_sum(module: nn.Module, children: str) -> LinearPart:
    """Read what some children of a block compute together, as a convolution of what they are given.

    Args:
        module: the block, in eval mode.
        children: their names.

    Returns:
        The part.

    Raises:
        NotMergeableError: it is no convolution.
        TraceError: the forward cannot be traced.
    """
    graph, names = trace(module, constants := {}, leaves=READABLE), set(children.split())

    def is_theirs(node: fx.Node) -> bool:
        return node.op == "call_module" and node.target.split(".")[0] in names

    modules = dict(module.named_modules())
    theirs = [node for node in graph.nodes if is_theirs(node)]
    inside: set[fx.Node] = set(theirs)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and inside & set(node.all_input_nodes):
            inside.add(node)
    given = {node for one in theirs for node in one.all_input_nodes if node not in inside}
    values, refused = read_affine(graph, module, constants, given)
    for node in reversed(graph.nodes):
        value = values.get(node)
        if not isinstance(value, Affine) or value.conv is None or value.source not in given:
            continue
        called = [one for one in value.nodes if one.op == "call_module"]
        alone = all(one.target is not torch.cat for one in value.nodes)  # with nothing beside it
        only = all(is_theirs(one) or is_idle(modules[one.target]) for one in called)
        if alone and only and value.nodes.issuperset(theirs):
            return LinearPart(module, graph, {node: value}, constants)
    raise next(iter(refused.values()), NotMergeableError(f"{children!r} compute no convolution"))


def build_sum(part: LinearPart) -> nn.Conv2d:
    """Return the layer that computes the one sum of a part."""
    (conv,) = build_sums(part)
    assert conv is not None
    return conv


def build_sums(part: LinearPart) -> list[nn.Conv2d | None]:
    """Return the layers that compute the sums of a part, None for what is its source."""
    modules = dict(part.module.named_modules())
    convs: list[nn.Conv2d | None] = []
    for value in part.sums.values():
        if value.conv is None:
            convs.append(None)
            continue
        called = [node for node in part.graph.nodes if node.op == "call_module" and node in value.nodes]
        sources = [one for one in (modules[node.target] for node in called) if any(True for _ in one.parameters())]
        convs.append(build_conv(value.conv, sources or [part.module]))
    return convs


def _layers_behind(part: LinearPart) -> dict[str, nn.Module] | None:
    """The layers that run one after the other behind the part, by name; None where they do not."""
    (node, value), *others = part.sums.items()
    if others or value.source.op != "placeholder":
        return None
    layers: dict[str, nn.Module] = {}
    result, modules = _result_of(part.graph), dict(part.module.named_modules())
    while node is not result:
        users = list(node.users)
        called = next((one for one in reversed(part.called) if one.given is node and one.is_closed()), None)
        if called is not None:
            node, layer, name = called.result, modules[called.target], called.target.replace(".", "_")
        elif len(users) != 1 or [*users[0].all_input_nodes] != [node]:
            return None
        elif users[0].op == "call_module" and users[0].args == (node,) and not users[0].kwargs:
            node = users[0]
            layer, name = modules[node.target], node.target.replace(".", "_")
        elif users[0].target in _ACTIVATIONS and len(users[0].args) == 1:
            node = users[0]
            layer = _ACTIVATIONS[node.target]()
            name = "act" if "act" not in layers else f"act{len(layers)}"
        else:
            return None
        if is_idle(layer):
            continue
        if name in layers or name == part.conv_name:
            return None
        layers[name] = layer
    return layers


def _graph_module(part: LinearPart, convs: Sequence[nn.Module | None]) -> nn.Module:
    graph, copies = fx.Graph(), {}
    names = [part.conv_name + (str(index) if index else "") for index in range(len(convs))]
    sinks = {sink: name if conv is not None else None for sink, name, conv in zip(part.sums, names, convs)}
    needed = {node for node in part.graph.nodes if node.op in ("placeholder", "output")}
    for node in reversed(part.graph.nodes):
        if node in needed:
            needed.update([part.sums[node].source] if node in sinks else node.all_input_nodes)
    for node in part.graph.nodes:
        if node in sinks and node in needed:
            source = copies[part.sums[node].source]
            copies[node] = source if sinks[node] is None else graph.call_module(sinks[node], (source,))
        elif node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    used = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
    root = nn.Module()
    for name, conv in zip(names, convs):
        if conv is not None:
            setattr(root, name, conv)
    for target in used - {*names}:
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
