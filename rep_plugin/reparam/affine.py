"""Which values of a traced forward are convolutions of others, whatever the code that computes them.

Every node is read as a convolution of a *source* (an input, or the output of what is not linear): convolutions, BNs,
counted averages, sums, differences, factors, padding with zeros, concatenations and slices of channels compose by the
algebra of :mod:`rep_plugin.functional.padded`, exact at the border. What is computed from weights alone is a constant. All
else is a new source.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.layers import Scale, channels_of, is_idle
from rep_plugin.errors import NotMergeableError, RepPluginError
from rep_plugin.functional.kernels import ConvParams, pair, regroup_kernel
from rep_plugin.functional.padded import PaddedConv, add_padded, compose_padded, scale_padded
from rep_plugin.reparam.linear_layers import affine_conv, after_affine, identity_conv, read_layer

READABLE = {"IdentityBasedConv1x1", "BNAndPadLayer"}  # of DiverseBranchBlock


@dataclass(frozen=True)
class Affine:
    """A value that is a convolution of another one.

    Args:
        source: the node that is convolved.
        channels: of the source, None where no layer that reads it tells.
        conv: the convolution; None: the source itself, padded and times a factor.
        padding: rows and columns of zeros round the source, where ``conv`` is None.
        factor: of the source, where ``conv`` is None.
        nodes: the nodes that compute it, without the source.
        costs: {node of a convolution: multiply-adds for each position of this value}.
        branches: how many branches meet in it, or 1.
        computed: a weight in it is computed in each call.
    """

    source: fx.Node
    channels: int | None = None
    conv: PaddedConv | None = None
    padding: tuple[int, int] = (0, 0)
    factor: float = 1.0
    nodes: frozenset[fx.Node] = frozenset()
    costs: Mapping[fx.Node, float] = field(default_factory=dict)
    branches: int = 1
    computed: bool = False

    @property
    def out_channels(self) -> int | None:
        """Channels of the value, where they are known."""
        return self.channels if self.conv is None else self.conv.params.out_channels

    @property
    def device(self) -> torch.device:
        """Where the convolution's numbers are."""
        return torch.device("cpu") if self.conv is None else self.conv.params.kernel.device

    @property
    def is_joined(self) -> bool:
        """Whether branches meet in it, or a weight is computed: one convolution in its place is less."""
        return self.conv is not None and (self.branches > 1 or self.computed)

    def through(self, node: fx.Node) -> "Affine":
        """The value as it is, behind a node that changes nothing."""
        return replace(self, nodes=self.nodes | {node})

    def written_out(self, channels: int, device: torch.device) -> PaddedConv:
        """The convolution, also where it is the source itself."""
        if self.conv is not None:
            return self.conv
        return scale_padded(identity_conv(channels, device), self.factor)._replace(padding=self.padding)

    def padded(self, padding: tuple[int, int]) -> tuple[int, int]:
        """The padding of the source and one more of its own round that."""
        (top, left), (more, wide) = self.padding, padding
        if (top < 0 < more) or (left < 0 < wide):
            raise NotAffineError("zeros round a map that was cropped stand where the map has values")
        return top + more, left + wide

    def then(self, conv: PaddedConv, node: fx.Node, cost: float = 0.0, computed: bool = False) -> "Affine":
        """The value behind one more convolution."""
        if self.conv is not None:
            whole = compose_padded(self.conv, conv)
        else:
            scaled = conv.params._replace(kernel=conv.params.kernel * self.factor)
            whole = PaddedConv(scaled, self.padded(conv.padding), conv.edge)
        area = conv.params.stride[0] * conv.params.stride[1]
        costs = {one: macs * area for one, macs in self.costs.items()}
        return replace(
            self, conv=whole, nodes=self.nodes | {node}, costs=costs | ({node: cost} if cost else {}),
            computed=self.computed or computed,
        )  # fmt: skip


@dataclass(frozen=True)
class _Several:
    """Values that a stack holds, or that a chunk gives."""

    kind: str
    values: tuple[Affine, ...]


class NotAffineError(NotMergeableError):
    """A node computes something else than the algebra knows."""


class Reading(NamedTuple):
    """What :func:`read_affine` has found.

    Args:
        values: {node: what it is}: :class:`Affine`, or a constant in float64. Nodes without an input, and those that are
            several values, are left out.
        refused: {node: why it is not a convolution of what it reads}, in order.
    """

    values: dict[fx.Node, Affine | Tensor | Any]
    refused: dict[fx.Node, RepPluginError]


def read_affine(
    graph: fx.Graph,
    module: nn.Module,
    constants: Mapping[str, Tensor],
    sources: Collection[fx.Node] = (),
    joints: Collection[fx.Node] | None = None,
) -> Reading:
    """Read every node of a graph.

    Args:
        graph: of the module's forward.
        module: the module, in eval mode.
        constants: {target: tensor} of what no module holds.
        sources: values that are not to be read through.
        joints: where branches may meet; what leads to none of these is not read, as a dense kernel of a depthwise window and
            what widens its channels is large. None: all is read.

    Returns:
        The reading.
    """
    reader = _Reader(graph, module, constants, sources, joints)
    return Reading(reader.values, reader.refused)


class _Reader:
    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        constants: Mapping[str, Tensor],
        sources: Collection[fx.Node],
        joints: Collection[fx.Node] | None,
    ):
        self.module, self.constants = module, constants
        self.modules = dict(module.named_modules())
        self.values: dict[fx.Node, Any] = {}
        self.refused: dict[fx.Node, RepPluginError] = {}
        wanted = None if joints is None else self._leading_to(graph, joints)
        for node in graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder" or node in sources or (wanted and self._is_useless(node, wanted)):
                value: Any = self._source(node)
            else:
                value = self._read(node)
            if value is not None:
                self.values[node] = value

    def _leading_to(self, graph: fx.Graph, joints: Collection[fx.Node]) -> set[fx.Node]:
        """The nodes from which linear ones lead to one of these."""
        found: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node in joints or any(user in found and self._may_be_linear(user) for user in node.users):
                found.add(node)
        return found

    def _may_be_linear(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            layer = self.modules[node.target]
            return is_idle(layer) or isinstance(layer, nn.ZeroPad2d) or _is_linear(layer)
        return str(node.target if node.op == "call_method" else _name_of(node.target)) in RULES

    def _is_useless(self, node: fx.Node, wanted: set[fx.Node]) -> bool:
        """Whether a node reads maps of which none is a sum, and leads to none."""
        given = [self.values.get(one) for one in node.all_input_nodes]
        joined = any(isinstance(one, _Several) or (isinstance(one, Affine) and one.is_joined) for one in given)
        return node not in wanted and not joined and any(isinstance(one, Affine) for one in given)

    def _source(self, node: fx.Node) -> Affine:
        """A value that is nothing but itself; the layers that read it tell how many channels it has."""
        return Affine(node, next(self._channels_of(node), None))

    def _channels_of(self, node: fx.Node) -> Iterator[int]:
        for user in node.users:
            layer = self.modules.get(user.target) if user.op == "call_module" else None
            if isinstance(layer, (nn.Conv2d, _BatchNorm)) and (channels := channels_of(layer)):
                yield channels[0]
            elif isinstance(layer, nn.AvgPool2d):  # keeps them
                yield from self._channels_of(user)

    def _read(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._constant(node.target)
        if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
            value = self._value(node.args[0])
            try:
                return self._call(node, self.modules[node.target], value) if isinstance(value, Affine) else None
            except RepPluginError as error:
                return self._refuse(node, error)
        if node.op not in ("call_function", "call_method"):
            return self._source(node)
        try:
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), self._known)
        except NotAffineError:
            return self._source(node)
        values = _flat((args, kwargs))
        several = any(isinstance(value, _Several) for value in values)
        if not several and not any(isinstance(value, Affine) for value in values):
            return self._compute(node, args, kwargs)
        name = node.target if node.op == "call_method" else _name_of(node.target)
        rule = RULES.get(str(name))
        if rule is None or (several and rule not in (_sum_of_stack, _slice)):
            return self._source(node)
        try:
            return rule(node, *args, **kwargs)
        except RepPluginError as error:
            return self._refuse(node, error)
        except TypeError:  # called in a way that the rule does not take
            return self._source(node)

    def _refuse(self, node: fx.Node, why: RepPluginError) -> Affine:
        why.__traceback__ = why.__context__ = None  # whose frames hold all kernels that were composed
        self.refused[node] = why if str(why) else NotAffineError(f"{node.name!r} is no convolution of one value")
        return self._source(node)

    def _known(self, value: Any) -> Any:
        return self._value(value) if isinstance(value, fx.Node) else value

    def _value(self, node: Any) -> Any:
        if node not in self.values:
            raise NotAffineError
        return self.values[node]

    def _constant(self, target: str) -> Tensor | None:
        value: Any = self.constants.get(target, self.module)
        for part in [] if target in self.constants else target.split("."):
            value = getattr(value, part, None)
        if not isinstance(value, Tensor):
            return None
        return value.detach().double() if value.is_floating_point() else value.detach()

    def _compute(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """What is computed from weights."""
        try:
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)
        except Exception:  # torch's: a type that is none of float64's
            return None

    def _call(self, node: fx.Node, layer: nn.Module, value: Affine) -> Affine:
        if is_idle(layer):
            return value.through(node)
        if isinstance(layer, nn.ZeroPad2d) and type(layer).forward is nn.ZeroPad2d.forward:
            return _pad(node, value, layer.padding)
        if not _is_linear(layer):
            raise NotAffineError(f"{type(layer).__name__} is not linear")
        tensors = [*layer.parameters(), *layer.buffers()]
        conv = read_layer(layer, value.out_channels, tensors[0].device if tensors else value.device)
        return value.then(conv, node, layer.weight.numel() if isinstance(layer, nn.Conv2d) else 0.0)


def _is_linear(layer: nn.Module) -> bool:
    known = isinstance(layer, (nn.Conv2d, _BatchNorm, nn.AvgPool2d, Scale)) or type(layer).__name__ in READABLE
    return known and not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm3d))


def _name_of(function: Any) -> str | None:
    """The name of a function of torch or Python; None of others."""
    module = getattr(function, "__module__", None) or ""
    known = function is getattr(operator, getattr(function, "__name__", ""), None)
    known = known or module.startswith("torch") or isinstance(function, type(torch.conv2d))
    return function.__name__ if known else None


def _flat(values: Any) -> list:
    found: list = []
    fx.node.map_aggregate(values, found.append)
    return found


RULES: dict[str, Callable] = {}


def _rule(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _vector(value: Any, channels: int) -> Tensor | None:
    """A constant that is one number, or one for each channel, as (C,) in float64; None: another shape."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    shape = tensor.shape
    each = tensor.dim() >= 3 and shape[-1] == shape[-2] == 1 and tensor.numel() == shape[-3] == channels
    return tensor.reshape(-1).expand(channels) if tensor.numel() == 1 or each else None


def _is_constant(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dtype != torch.bool)


@_rule("add", "iadd", "add_")
def _add(node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Affine:
    if _is_constant(a):
        if alpha != 1:
            raise NotAffineError
        a, b = b, a
    if _is_constant(b):
        if isinstance(b, (int, float)) and b == 0:  # sum() begins with it
            return a.through(node)
        conv = _known_conv(a)
        if (shift := _vector(b, conv.params.out_channels)) is None:
            raise NotAffineError
        shift = shift.to(conv.params.kernel.device) * alpha
        return replace(a, conv=after_affine(conv, torch.ones_like(shift), shift), nodes=a.nodes | {node})
    if not isinstance(a, Affine) or not isinstance(b, Affine):
        raise NotAffineError
    return _sum(node, a, _times(b, alpha))


@_rule("sub", "isub", "sub_")
def _subtract(node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Affine:
    if isinstance(a, Affine):
        return _add(node, a, b, alpha=-alpha)
    return _add(node, _times(b, -alpha), a)


@_rule("neg")
def _negate(node: fx.Node, a: Affine) -> Affine:
    return _times(a, -1.0).through(node)


@_rule("mul", "imul", "mul_")
def _multiply(node: fx.Node, a: Any, b: Any) -> Affine:
    value, factor = (a, b) if isinstance(a, Affine) else (b, a)
    if not _is_constant(factor):
        raise NotAffineError
    if isinstance(factor, Tensor) and factor.numel() > 1 and value.conv is None and not any(value.padding):
        each = _vector(factor, factor.numel())
        if each is None:
            raise NotAffineError
        return value.then(affine_conv(each, torch.zeros_like(each)), node)
    return _times(value, factor).through(node)


@_rule("truediv", "div", "itruediv", "div_")
def _divide(node: fx.Node, a: Affine, b: Any) -> Affine:
    if not _is_constant(b) or (isinstance(b, (int, float)) and b == 0):
        raise NotAffineError
    return _multiply(node, a, 1.0 / b)


def _times(value: Affine, factor: Any) -> Affine:
    if value.conv is None:
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise NotAffineError
        return replace(value, factor=value.factor * float(factor))
    if (each := _vector(factor, value.conv.params.out_channels)) is None:
        raise NotAffineError
    return replace(value, conv=scale_padded(value.conv, each.to(value.conv.params.kernel.device)))


def _known_conv(value: Affine) -> PaddedConv:
    if value.conv is None:
        raise NotAffineError
    return value.conv


def _joined(node: fx.Node, values: list[Affine]) -> Affine:
    """What several values have in common; their convolution is to be set."""
    if not all(isinstance(value, Affine) for value in values) or len({value.source for value in values}) > 1:
        raise NotAffineError
    costs: dict[fx.Node, float] = {}
    for value in values:
        costs |= value.costs
    nodes = frozenset().union(*(value.nodes for value in values)) | {node}
    branches = sum(value.branches for value in values)
    return Affine(
        values[0].source,
        values[0].channels,
        None,
        nodes=nodes,
        costs=costs,
        branches=branches,
        computed=any(v.computed for v in values),
    )


def _sum(node: fx.Node, a: Affine, b: Affine) -> Affine:
    whole = _joined(node, [a, b])
    if a.conv is None and b.conv is None:
        if a.padding != b.padding:
            raise NotAffineError
        return replace(whole, padding=a.padding, factor=a.factor + b.factor)
    known = a.conv or b.conv
    assert known is not None
    channels, device = known.params.in_channels, known.params.kernel.device
    return replace(whole, conv=add_padded([value.written_out(channels, device) for value in (a, b)]))


@_rule("sum")
def _sum_of_stack(node: fx.Node, values: Any, dim: Any = None, axis: Any = None) -> Affine:
    if not isinstance(values, _Several) or values.kind != "stack" or 0 not in (dim, axis, *(dim or ())[:1]):
        raise NotAffineError
    whole = values.values[0]
    for value in values.values[1:]:
        whole = _sum(node, whole, value)
    return whole


@_rule("stack")
def _stack(node: fx.Node, values: Any, dim: int = 0) -> _Several:
    if dim != 0 or not all(isinstance(value, Affine) for value in values):
        raise NotAffineError
    return _Several("stack", tuple(value.through(node) for value in values))


@_rule("cat", "concat", "concatenate")
def _concatenate(node: fx.Node, values: Any, dim: int = 0) -> Affine:
    if dim not in (1, -3):
        raise NotAffineError
    whole = _joined(node, list(values))
    known = next((value.conv for value in values if value.conv is not None), None)
    if known is None:
        raise NotAffineError
    channels, device = known.params.in_channels, known.params.kernel.device
    convs = [value.written_out(channels, device) for value in values]
    total, start, placed = sum(conv.params.out_channels for conv in convs), 0, []
    for conv in convs:
        kernel = regroup_kernel(conv.params.kernel, conv.params.groups, 1)
        rows = slice(start, start := start + len(kernel))
        placed.append(
            PaddedConv(
                conv.params._replace(
                    kernel=_in_rows(kernel, rows, total), bias=_in_rows(conv.params.bias, rows, total), groups=1
                ),
                conv.padding,
                None if conv.edge is None else _in_rows(conv.edge, rows, total),
            )
        )
    return replace(whole, conv=add_padded(placed))


def _in_rows(part: Tensor, rows: slice, total: int) -> Tensor:
    whole = part.new_zeros(total, *part.shape[1:])
    whole[rows] = part
    return whole


@_rule("getitem")
def _slice(node: fx.Node, value: Any, index: Any) -> Affine:
    if isinstance(value, _Several) and value.kind == "chunks" and isinstance(index, int):
        return value.values[index].through(node)
    if not isinstance(value, Affine) or not isinstance(index, tuple):
        raise NotAffineError
    if index[0] is Ellipsis and len(index) == 3:
        index = (slice(None), slice(None), *index[1:])
    if not 2 <= len(index) <= 4 or not isinstance(index[1], slice):
        raise NotAffineError
    if index[0] != slice(None):
        raise NotAffineError
    if index[1] != slice(None):
        value = _rows(node, value, index[1])
    rows, columns = (_cropped(part) for part in [*index[2:], slice(None), slice(None)][:2])
    return _pad(node, value, (-columns, -columns, -rows, -rows)) if rows or columns else value.through(node)


def _cropped(part: Any) -> int:
    """How much ``[c:-c]`` takes off on both sides."""
    if part == slice(None):
        return 0
    crop = part.start if isinstance(part, slice) else None
    if not isinstance(crop, int) or crop <= 0 or part != slice(crop, -crop):
        raise NotAffineError
    return crop


def _rows(node: fx.Node, value: Affine, rows: slice) -> Affine:
    conv = _known_conv(value)
    kernel = regroup_kernel(conv.params.kernel, conv.params.groups, 1)[rows]
    params = ConvParams(kernel, conv.params.bias[rows], 1, conv.params.stride, conv.params.dilation)
    edge = None if conv.edge is None else conv.edge[rows]
    return replace(value, conv=PaddedConv(params, conv.padding, edge), nodes=value.nodes | {node})


@_rule("chunk")
def _chunk(node: fx.Node, value: Affine, chunks: int, dim: int = 0) -> _Several:
    if dim not in (1, -3):
        raise NotAffineError
    total = _known_conv(value).params.out_channels
    size = -(-total // chunks)
    parts = (slice(start, start + size) for start in range(0, total, size))
    return _Several("chunks", tuple(_rows(node, value, rows) for rows in parts))


@_rule("conv2d")
def _conv2d(
    node: fx.Node, value: Affine, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Affine:
    if not isinstance(weight, Tensor) or isinstance(padding, str) or not isinstance(value, Affine):
        raise NotAffineError
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    params = ConvParams(weight, bias, groups, pair(stride), pair(dilation))
    return value.then(PaddedConv(params, pair(padding)), node, weight.numel(), computed=True)


@_rule("batch_norm")
def _batch_norm(
    node: fx.Node, value: Affine, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Affine:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise NotAffineError
    scale = torch.rsqrt(running_var + eps) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - running_mean * scale
    return value.then(affine_conv(scale, shift), node)


@_rule("avg_pool2d")
def _average(
    node: fx.Node, value: Affine, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Affine:  # fmt: skip
    pool = nn.AvgPool2d(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override).eval()
    return value.then(read_layer(pool, value.out_channels, value.device), node)


@_rule("pad")
def _pad(node: fx.Node, inner: Affine, sides: Any, mode: str = "constant", value: float | None = None) -> Affine:
    left, right, top, bottom, *others = *sides, *([0] * (4 - len(sides)))
    if mode != "constant" or value or left != right or top != bottom or any(others):
        raise NotAffineError
    if inner.conv is None:
        return replace(inner, padding=inner.padded((top, left)), nodes=inner.nodes | {node})
    conv, params = inner.conv, inner.conv.params
    if max(top, left) <= 0:  # what is cropped off is not computed
        (above, beside), (down, right) = conv.padding, params.stride
        fewer = conv._replace(padding=(above + top * down, beside + left * right))
        return replace(inner, conv=fewer, nodes=inner.nodes | {node})
    eye = identity_conv(params.out_channels, params.kernel.device)._replace(padding=(top, left))
    return inner.then(eye, node)


@_rule("dropout", "dropout2d")
def _dropout(node: fx.Node, value: Affine, p: float = 0.5, training: bool = True, inplace: bool = False) -> Affine:
    if training:
        raise NotAffineError
    return value.through(node)


@_rule("contiguous", "clone", "detach")
def _same(node: fx.Node, value: Affine) -> Affine:
    return value.through(node)
