"""Rules for arithmetic element by element, for pooling and for reductions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rep_plugin.pruning.tracing.graph import Mark
from rep_plugin.pruning.tracing.labels import FIXED, squeeze_constant
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules.registry import fixed_like, rule

# fmt: off
UNARY = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "silu", "mish", "gelu", "elu",
    "selu", "celu", "leaky_relu", "softplus", "softsign", "hardshrink", "softshrink", "tanhshrink", "threshold",
    "exp", "expm1", "log1p", "sqrt", "rsqrt", "abs", "neg", "square", "erf", "sin", "cos", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu", "clamp", "clip", "clamp_min",
    "clamp_max", "pow", "__pow__", "__neg__", "nan_to_num", "sign", "reciprocal", "log_sigmoid", "logsigmoid", "log",
    "log2", "log10", "exp2", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "sinc",
    "floor", "ceil", "round", "trunc", "frac",
)
SAME = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach", "data",
    "requires_grad", "cpu", "positive", "alias",
)
ADDITIVE = (
    "add", "sub", "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "rsub", "maximum",
    "minimum", "max", "min",
)
PRODUCT = (
    "mul", "multiply", "__mul__", "__rmul__", "__imul__",
)
QUOTIENT = (
    "div", "divide", "true_divide", "__truediv__", "__itruediv__", "__div__",
)
# fmt: on


@rule(*SAME, keeps_open=True)
def _same(recorder, out, input, *args, **kwargs):
    mark = recorder.mark_of(input)
    return mark if mark.labels.shape == out.shape else None


def _elementwise(name: str) -> Callable:
    def apply(recorder: Recorder, out, *args, **kwargs):
        maps = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
        if not isinstance(out, Tensor) or "out" in kwargs or not maps:
            return None
        if out.shape != torch.broadcast_shapes(*(value.shape for value in maps)):
            return None  # torch.max of one tensor is a reduction
        if len(maps) == 2:
            for parameter, other in (maps, maps[::-1]):
                _meet_heads(recorder, parameter, other)
                recorder.meet(parameter, other)
        marks = [recorder.mark_of(value) for value in maps]
        if len(marks) == 1:
            labels, zero = marks[0].labels.expand(out.shape), marks[0].zero
            if name in PRODUCT or (name in QUOTIENT and args and args[0] is maps[0]):
                return Mark(labels, zero)
            return Mark(labels, zero and _keeps_zero(recorder, args, kwargs, maps[0]))
        if len(marks) != 2 or name in UNARY:
            return None
        labels, follows = _join(recorder, marks[0].labels, marks[1].labels, out.shape)
        zeros = [mark.zero and own for mark, own in zip(marks, follows)]
        if name in PRODUCT:
            return Mark(labels, any(zeros))
        if name in QUOTIENT:
            by_zero = marks[1].zero and recorder.channels.varying(marks[1].labels)
            return None if by_zero else Mark(labels, zeros[0])
        return Mark(labels, all(zeros))

    return apply


def _meet_heads(recorder: Recorder, given: Tensor, heads: Tensor) -> None:
    """What is the same for all heads, as an angle or a gain for each channel of a head, keeps these channels.

    What is the same for all channels of a head, as a temperature, goes with whole heads.
    """
    if not recorder.is_open(heads) or recorder.is_open(given):
        return
    labels = recorder.mark_of(heads).labels
    lead = heads.dim() - given.dim()
    dims = recorder.channels.varying(labels)
    met = [dim for dim in dims if dim >= lead and given.shape[dim - lead] > 1]
    if not met or len(met) == len(dims):
        return
    if recorder.name_of(given) is not None and met == [heads.dim() - 1]:
        recorder.keep_whole(given, f"{recorder.operation()}, for each head,")
    elif recorder.channels.varying(recorder.mark_of(given).labels):
        met = [dim for dim in dims if dim not in met]
    for dim in met:
        recorder.channels.tie_along(labels, dim, recorder.operation())


def _keeps_zero(recorder: Recorder, args, kwargs, tensor: Tensor) -> bool:
    """Try the function on a zero, of as many dimensions as the map."""
    zero = torch.zeros((1,) * tensor.dim())
    args, kwargs = tree_map(lambda value: zero if value is tensor else value, (tuple(args), dict(kwargs)))
    result = recorder.function(*args, **kwargs)
    return bool((result == 0).all())


def _join(recorder: Recorder, first: Tensor, second: Tensor, shape: Sequence[int]) -> tuple[Tensor, tuple[bool, bool]]:
    """Tie the labels of two maps that meet element by element, broadcast to ``shape``.

    Returns the labels of the result, and which of the two follow them. One channel that meets many does not: it stays, and
    is no zero where one of these is removed.
    """
    both = []
    for labels, other in ((first, second), (second, first)):
        lead = len(shape) - labels.dim()
        other = other.expand(shape)
        stretched = [d for d in range(len(shape)) if (d < lead or labels.shape[d - lead] == 1) and shape[d] > 1]
        if any(recorder.channels.varies(other, d) for d in stretched):
            what = f"meets all channels of another map at once, by {recorder.operation()}"
            recorder.channels.freeze(labels, f"{what}: to prune it, let both have as many channels")
            both.append(None)
        else:
            both.append(labels.expand(shape))
    follows = both[0] is not None, both[1] is not None
    if both[0] is None or both[1] is None:
        kept = both[0] if both[0] is not None else both[1]
        return torch.tensor(FIXED).expand(shape) if kept is None else kept, follows
    tie_maps(recorder, both[0], both[1])
    return both[0], follows


def tie_maps(recorder: Recorder, first: Tensor, second: Tensor, what: str | None = None) -> None:
    """Let the channels of two maps stand or fall together; those that meet what stays are frozen.

    Args:
        recorder: Of the trace.
        first: Labels.
        second: Labels of the same shape, or one that broadcasts.
        what: The operation, in words (default: the function that runs).
    """
    what = recorder.operation() if what is None else what
    first, second = torch.broadcast_tensors(*squeeze_constant(first, second))
    known = (first != FIXED) & (second != FIXED)
    recorder.channels.tie(first[known], second[known], what)
    for labels, other in ((first, second), (second, first)):
        reason = f"meets channels that stay, by {what}: to prune it, let both come from layers that can be pruned"
        recorder.channels.freeze(labels[other == FIXED], reason)


for _name in (*UNARY, *ADDITIVE, *PRODUCT, *QUOTIENT):
    rule(_name, keeps_open=True)(_elementwise(_name))


@rule("masked_fill")
def _masked_fill(recorder, out, input, mask, value):
    if recorder.channels.varying(recorder.mark_of(mask).labels) or out.shape != input.shape:
        return None
    return Mark(recorder.mark_of(input).labels, False)


@rule(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate", "upsample",
)  # fmt: skip
def _pool(recorder, out, input, *args, **kwargs):
    mark = recorder.mark_of(input)
    if not isinstance(out, Tensor) or out.dim() != input.dim() or out.shape[:2] != input.shape[:2]:
        return None
    if any(recorder.channels.varies(mark.labels, dim) for dim in range(2, input.dim())):
        return None
    labels = mark.labels
    for dim in range(2, input.dim()):
        labels = labels.narrow(dim, 0, 1)
    return Mark(labels.expand(out.shape), mark.zero)


@rule("mean", "sum", "amax", "amin", "std", "var")
def _reduce(recorder, out, input, dim=None, keepdim=False, *, dtype=None, correction=1, unbiased=True, axis=None):
    mark = recorder.mark_of(input)
    dim = axis if dim is None else dim
    if not isinstance(out, Tensor) or isinstance(dim, bool):
        return None
    dims = range(input.dim()) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    dims = sorted(d % input.dim() for d in dims)
    labels = mark.labels
    if recorder.function_name == "mean" and id(input) in recorder.norm_maps and len(dims) == 1:
        channels, first_run = recorder.channels.along(labels, dims[0]), not recorder.trace.outputs
        recorder.means += first_run  # that is compared
        if channels is not None and recorder.channels.varies(labels, dims[0]) and recorder.makers is None:
            if first_run:
                recorder.trace.means[recorder.means - 1] = channels
            what = f"goes into a mean of norms {recorder.place()}, where two equal channels are not one"
            recorder.trace.counted.append((channels, f"{what}: PruneHook prunes it"))
            return fixed_like(out)
    for d in dims:
        recorder.channels.tie_along(labels, d, f"a reduction over channels {recorder.place()}")
        labels = labels.narrow(d, 0, 1)
    return Mark(labels.reshape(out.shape), mark.zero)


@rule("norm", "linalg_vector_norm")
def _norm(recorder, made, input, p=2, dim=None, keepdim=False, dtype=None, out=None):
    """The norm of each channel; of those that are zero it is zero."""
    mark = recorder.mark_of(input)
    dims = range(input.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    if p not in (2, 1, "fro", None) or any(recorder.channels.varies(mark.labels, d) for d in dims):
        return None
    labels = mark.labels
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    recorder.norm_maps.add(id(made))
    return Mark(labels.reshape(made.shape), mark.zero)


@rule("addcmul", keeps_open=True)
def _addcmul(recorder, out, input, tensor1, tensor2, value=1):
    marks = [recorder.mark_of(tensor) for tensor in (tensor1, tensor2)]
    shape = torch.broadcast_shapes(tensor1.shape, tensor2.shape)
    labels, follows = _join(recorder, marks[0].labels, marks[1].labels, shape)
    zero = any(mark.zero and own for mark, own in zip(marks, follows))
    labels, follows = _join(recorder, recorder.mark_of(input).labels, labels, out.shape)
    return Mark(labels, recorder.mark_of(input).zero and follows[0] and zero and follows[1])
