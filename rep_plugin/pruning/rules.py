"""What each torch function does to the channels of its maps.

A rule takes the tracer, the (valueless) output and the function's own arguments, and returns the mark of every output
tensor, or None where it cannot say: then the channels are frozen.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from rep_plugin.pruning.graph import Layer, Mark, owner_of, tensors_in, where
from rep_plugin.pruning.labels import FIXED, compress, squeeze_constant

if TYPE_CHECKING:
    from rep_plugin.pruning.trace import Tracer

RULES: dict[str, Callable] = {}


def find_rule(name: str) -> Callable | None:
    """Return the rule for a torch function by its plain name, None where there is none."""
    return RULES.get(name)


def rule(*names: str):
    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def fixed_like(out: Tensor) -> Mark:
    return Mark(torch.tensor(FIXED).expand(out.shape), False)


def spread(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Return labels (C,) as those of a whole map of ``shape`` with its channels along ``dim``."""
    view = [1] * len(shape)
    view[dim] = -1
    return labels.view(view).expand(tuple(shape))


# --- layers ---


def convolve(t: "Tracer", inputs: Tensor, weight: str, bias: str | None, groups: int, shape) -> tuple[Tensor, bool]:
    """Return the labels (O,) of a convolution's outputs, and whether it keeps or loses whole groups.

    ``inputs`` (I,), ``shape`` of the kernel. Other grouped convolutions keep their groups, and lose as many channels in
    each: the labels of their inputs are cut as (groups, I / groups).
    """
    outs, width = shape[:2]
    per_group = inputs.view(groups, width)
    groupwise = groups > 1 and not t.channels.varies(per_group, 1)
    if groupwise:
        t.trace.groupwise.add(weight)
        labels = per_group[:, 0].repeat_interleave(outs // groups)
    else:
        t.channels.balance(per_group)
        t.cut(weight, 1, per_group if groups > 1 else inputs)
        labels = t.trace.cuts[weight].get(0)
        if labels is None:
            labels = t.channels.fresh(outs)
            t.channels.balance(labels.view(groups, -1))
    t.cut(weight, 0, labels, maker=True)
    if bias is not None:
        t.cut(bias, 0, labels, maker=True)
    return labels, groupwise


@rule("conv1d", "conv2d", "conv3d")
def _conv(t, out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    mark, name = t.of(input), t.name(weight)
    inputs = t.channels.along(mark.labels, 1)
    if inputs is None or name is None or (bias is not None and t.name(bias) is None) or input.dim() != weight.dim():
        return None
    labels, groupwise = convolve(t, inputs, name, t.name(bias), groups, weight.shape)
    if not groupwise:
        t.see(name, 1, mark)
    elif not mark.zero:
        mark = Mark(mark.labels, True)  # the kernel's rows are set to zero, whatever it sees
    layer = owner_of(name)
    positions, taps = out.numel() // out.shape[1], weight[0, 0].numel()
    t.trace.layers.setdefault(layer, Layer(layer, "conv", labels, inputs, name, groupwise, groups, taps))
    if groupwise:
        width = weight.shape[1]
        t.cost([labels], lambda kept: positions * taps * width * kept)
    else:
        t.cost([labels, inputs[: weight.shape[1]]], lambda kept, seen: positions * taps * kept * seen)
    return Mark(spread(labels, 1, out.shape))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(t, out, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    mark, name = t.of(input), t.name(weight)
    inputs = t.channels.along(mark.labels, 1)
    if inputs is None or name is None or groups != 1 or (bias is not None and t.name(bias) is None):
        return None
    t.cut(name, 0, inputs)
    t.see(name, 0, mark)
    labels = t.trace.cuts[name].get(1)
    labels = t.channels.fresh(weight.shape[1]) if labels is None else labels
    t.cut(name, 1, labels, maker=True)
    if bias is not None:
        t.cut(t.name(bias), 0, labels, maker=True)
    layer = owner_of(name)
    t.trace.layers.setdefault(layer, Layer(layer, "conv_transpose", labels, inputs, name))
    positions, taps = input.numel() // input.shape[1], weight[0, 0].numel()
    t.cost([inputs, labels], lambda seen, kept: positions * taps * kept * seen)
    return Mark(spread(labels, 1, out.shape))


@rule("linear")
def _linear(t, out, input, weight, bias=None):
    mark, name = t.of(input), t.name(weight)
    inputs = t.channels.along(mark.labels, -1)
    if inputs is None or name is None or (bias is not None and t.name(bias) is None):
        return None
    t.cut(name, 1, inputs)
    t.see(name, 1, mark)
    labels = t.trace.cuts[name].get(0)
    labels = t.channels.fresh(weight.shape[0]) if labels is None else labels
    t.cut(name, 0, labels, maker=True)
    if bias is not None:
        t.cut(t.name(bias), 0, labels, maker=True)
    layer = owner_of(name)
    t.trace.layers.setdefault(layer, Layer(layer, "linear", labels, inputs, name))
    rows = out.numel() // out.shape[-1]
    t.cost([labels, inputs], lambda kept, seen: rows * kept * seen)
    return Mark(spread(labels, -1, out.shape))


def normalise(t: "Tracer", labels: Tensor, names: dict[str, str | None]) -> None:
    """A per-channel normalisation: ``names`` of its weight, bias, running_mean and running_var follow the channels."""
    for role, name in names.items():
        if name is not None:
            t.cut(name, 0, labels, maker=role in ("weight", "bias"))
    if names.get("weight") is not None and names.get("running_var") is not None:
        t.trace.norms.setdefault(owner_of(names["weight"]), labels)


@rule("batch_norm", "instance_norm")
def _batch_norm(
    t, out, input, running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    use_input_stats=True,
):  # fmt: skip
    mark = t.of(input)
    labels = t.channels.along(mark.labels, 1)
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    given = {role: tensor for role, tensor in given.items() if tensor is not None}
    if labels is None or any(t.name(tensor) is None for tensor in given.values()):
        return None
    normalise(t, labels, {role: t.name(tensor) for role, tensor in given.items()})
    affine = weight is not None and bias is not None
    return Mark(spread(labels, 1, out.shape), affine or (mark.zero and running_mean is None and bias is None))


@rule("prelu")
def _prelu(t, out, input, weight):
    mark = t.of(input)
    labels = t.channels.along(mark.labels, 1) if input.dim() > 1 else None
    if weight.numel() > 1:
        if labels is None or t.name(weight) is None:
            return None
        t.cut(t.name(weight), 0, labels)
    return mark


@rule("layer_norm", "rms_norm")
def _layer_norm(t, out, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    labels = t.of(input).labels
    for dim in range(input.dim() - len(normalized_shape), input.dim()):
        t.channels.tie_along(labels, dim, f"a layer norm over channels at {where()}")
    return Mark(labels, False)


@rule("group_norm")
def _group_norm(t, out, input, num_groups, weight=None, bias=None, eps=1e-5):
    labels = t.of(input).labels
    t.channels.tie_along(labels, 1, f"a group norm over channels at {where()}")
    return Mark(labels, False)


@rule("softmax", "log_softmax")
def _softmax(t, out, input, dim=None, _stacklevel=3, dtype=None):
    labels = t.of(input).labels
    if dim is None:
        return None
    t.channels.tie_along(labels, dim, f"a softmax over channels at {where()}")
    return Mark(labels, False)


@rule("normalize")
def _normalize(t, out, input, p=2.0, dim=1, eps=1e-12, out_=None):
    mark = t.of(input)
    if not mark.zero:  # zeros add nothing to a norm
        t.channels.tie_along(mark.labels, dim, f"a norm over channels at {where()}")
    return mark


# --- arithmetic, element by element ---

UNARY = """relu relu6 hardtanh hardswish hardsigmoid sigmoid tanh silu mish gelu elu selu celu leaky_relu softplus softsign
hardshrink softshrink tanhshrink threshold exp expm1 log1p sqrt rsqrt abs neg square erf sin cos dropout dropout1d dropout2d
dropout3d alpha_dropout feature_alpha_dropout rrelu clamp clip clamp_min clamp_max pow __pow__ __neg__ nan_to_num sign
reciprocal""".split()
SAME = """to type type_as float double half bfloat16 contiguous clone detach data requires_grad cpu
positive alias""".split()
ADDITIVE = "add sub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ rsub maximum minimum max min".split()
PRODUCT = "mul multiply __mul__ __rmul__ __imul__".split()
QUOTIENT = "div divide true_divide __truediv__ __itruediv__ __div__".split()


@rule(*SAME)
def _same(t, out, input, *args, **kwargs):
    mark = t.of(input)
    return mark if mark.labels.shape == out.shape else None


def elementwise(name: str) -> Callable:
    def apply(t: "Tracer", out, *args, **kwargs):
        maps = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
        if not isinstance(out, Tensor) or "out" in kwargs or not maps:
            return None
        if out.shape != torch.broadcast_shapes(*(value.shape for value in maps)):
            return None  # torch.max of one tensor is a reduction
        marks = [t.of(value) for value in maps]
        if len(marks) == 1:
            labels, zero = marks[0].labels.expand(out.shape), marks[0].zero
            if name in PRODUCT or (name in QUOTIENT and args and args[0] is maps[0]):
                return Mark(labels, zero)
            return Mark(labels, zero and _keeps_zero(t, args, kwargs, maps[0]))
        if len(marks) != 2 or name in UNARY:
            return None
        labels = join(t, marks[0].labels, marks[1].labels, out.shape)
        if name in PRODUCT:
            return Mark(labels, marks[0].zero or marks[1].zero)
        if name in QUOTIENT:
            return None if t.channels.varying(marks[1].labels) else Mark(labels, marks[0].zero)
        return Mark(labels, marks[0].zero and marks[1].zero)

    return apply


def _keeps_zero(t: "Tracer", args, kwargs, tensor: Tensor) -> bool:
    """Try the function on a zero."""
    zero = torch.zeros(1)
    args, kwargs = tree_map(lambda value: zero if value is tensor else value, (tuple(args), dict(kwargs)))
    result = t.function(*args, **kwargs)
    return bool((result == 0).all())


def join(t: "Tracer", first: Tensor, second: Tensor, shape: Sequence[int]) -> Tensor:
    """Tie the labels of two maps that meet element by element, broadcast to ``shape``; return those of the result."""
    both = []
    for labels, other in ((first, second), (second, first)):
        lead = len(shape) - labels.dim()
        other = other.expand(shape)
        stretched = [d for d in range(len(shape)) if (d < lead or labels.shape[d - lead] == 1) and shape[d] > 1]
        if any(t.channels.varies(other, d) for d in stretched):
            # One channel meets many: it is needed as long as any of them.
            t.channels.freeze(labels, f"broadcast over channels at {where()}")
            both.append(None)
        else:
            both.append(labels.expand(shape))
    if both[0] is None or both[1] is None:
        kept = both[0] if both[0] is not None else both[1]
        return torch.tensor(FIXED).expand(shape) if kept is None else kept
    _tie_maps(t, both[0], both[1])
    return both[0]


def _tie_maps(t: "Tracer", first: Tensor, second: Tensor) -> None:
    what = f"arithmetic at {where()}"
    first, second = torch.broadcast_tensors(*squeeze_constant(first, second))
    known = (first != FIXED) & (second != FIXED)
    t.channels.tie(first[known], second[known], what)
    for labels, other in ((first, second), (second, first)):
        t.channels.freeze(labels[other == FIXED], f"meets channels that stay in {what}")


for _name in (*UNARY, *ADDITIVE, *PRODUCT, *QUOTIENT):
    RULES[_name] = elementwise(_name)


# --- pooling and reductions ---


@rule(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate", "upsample",
)  # fmt: skip
def _pool(t, out, input, *args, **kwargs):
    mark = t.of(input)
    if not isinstance(out, Tensor) or out.dim() != input.dim() or out.shape[:2] != input.shape[:2]:
        return None
    if any(t.channels.varies(mark.labels, dim) for dim in range(2, input.dim())):
        return None
    labels = mark.labels
    for dim in range(2, input.dim()):
        labels = labels.narrow(dim, 0, 1)
    return Mark(labels.expand(out.shape), mark.zero)


@rule("mean", "sum", "amax", "amin", "std", "var")
def _reduce(t, out, input, dim=None, keepdim=False, *, dtype=None, correction=1, unbiased=True, axis=None):
    mark = t.of(input)
    dim = axis if dim is None else dim
    if not isinstance(out, Tensor) or isinstance(dim, bool):
        return None
    dims = range(input.dim()) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    dims = sorted(d % input.dim() for d in dims)
    labels = mark.labels
    for d in dims:
        t.channels.tie_along(labels, d, f"a reduction over channels at {where()}")
        labels = labels.narrow(d, 0, 1)
    return Mark(labels.reshape(out.shape), mark.zero)


# --- moving elements ---


def _all_zero(t: "Tracer", *values) -> bool:
    return all(t.of(value).zero for value in tensors_in(values))


def rectangular(t: "Tracer", labels: Tensor) -> Tensor:
    """A map must stay a box when channels go: where they vary along several dimensions, only the longest gives way."""
    labels = compress(labels)
    dims = t.channels.varying(labels)
    if len(dims) > 1:
        longest = max(dims, key=lambda d: labels.shape[d])
        for dim in dims:
            if dim != longest:
                t.channels.tie_along(labels, dim, f"a reshape at {where()}")
    return labels


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(t, out, input, *args, **kwargs):
    if not isinstance(out, Tensor) or any(isinstance(a, torch.dtype) for a in args):
        return None
    return Mark(rectangular(t, t.of(input).labels.reshape(out.shape)), t.of(input).zero)


@rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "squeeze", "unsqueeze",
    "expand", "expand_as", "broadcast_to",
)  # fmt: skip
def _rearrange(t, out, input, *args, **kwargs):
    labels = t.of(input).labels
    if t.name_now.startswith("expand") or t.name_now == "broadcast_to":
        return Mark(labels.expand(out.shape), t.of(input).zero)
    return Mark(t.function(labels[...], *args, **kwargs), t.of(input).zero)


@rule("cat", "concat", "concatenate", "stack")
def _cat(t, out, tensors, dim=0, axis=None, *, out_=None):
    dim = dim if axis is None else axis
    labels = [t.of(tensor).labels for tensor in tensors]
    if t.name_now == "stack":
        labels = [part.unsqueeze(dim) for part in labels]
    dim %= labels[0].dim()
    labels = [part for part in labels if part.dim() == out.dim()]  # torch lets an empty 1-d tensor pass
    joint = [d for d in range(out.dim()) if d != dim and all(part.stride(d) == 0 for part in labels)]
    for d in joint:
        labels = [part.narrow(d, 0, 1) for part in labels]
    joined = torch.cat(labels, dim).expand(out.shape)
    return Mark(rectangular(t, joined), _all_zero(t, *tensors))


@rule("repeat_interleave", "flip", "channel_shuffle")
def _move_whole(t, out, input, *args, **kwargs):
    mark = t.of(input)
    if t.name_now == "channel_shuffle":
        groups = args[0] if args else kwargs["groups"]
        rows = mark.labels.unflatten(1, (groups, -1))
        t.channels.tie_along(rows, 1, f"a channel shuffle at {where()}")
        return Mark(rows.transpose(1, 2).flatten(1, 2), mark.zero)
    if t.name_now == "repeat_interleave" and t.channels.varying(mark.labels) and not isinstance(args[0], int):
        return None
    return Mark(t.function(mark.labels[...], *args, **kwargs), mark.zero)


@rule("chunk", "tensor_split")
def _chunk(t, out, input, chunks, dim=0):
    mark = t.of(input)
    parts = mark.labels.chunk(chunks, dim) if t.name_now == "chunk" else mark.labels.tensor_split(chunks, dim)
    if t.channels.varies(mark.labels, dim):
        if not isinstance(chunks, int) or len({part.shape[dim] for part in parts}) > 1:
            return None
        for part in parts[1:]:  # the halves must stay halves
            rows = torch.stack([parts[0], part])
            t.channels.tie_along(rows, 0, f"a chunk at {where()}")
    return [Mark(part, mark.zero) for part in parts]


@rule("split", "split_with_sizes", "unbind", "narrow", "select")
def _split(t, out, input, *args, **kwargs):
    mark = t.of(input)
    place = 1 if t.name_now.startswith("split") else 0
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    if t.name_now.startswith("split") and len(out) == 1:
        return [mark]
    if t.channels.varies(mark.labels, dim):
        return None  # sizes in numbers, which would not shrink with the channels
    parts = t.function(mark.labels, *args, **kwargs)
    return [Mark(part, mark.zero) for part in tensors_in(parts)]


@rule("__getitem__")
def _getitem(t, out, input, index):
    mark = t.of(input)
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(out, Tensor) or any(isinstance(i, (Tensor, list, bool)) for i in items):
        return None
    taken = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (input.dim() - taken)
    dim = 0
    for item in items:
        if item is None:
            continue
        size = input.shape[dim]
        whole = isinstance(item, slice) and range(*item.indices(size)) == range(size)
        if not whole and t.channels.varies(mark.labels, dim):
            return None
        dim += 1
    return Mark(mark.labels[index], mark.zero)


@rule("pad")
def _pad(t, out, input, pad, mode="constant", value=None):
    mark = t.of(input)
    labels, zero = mark.labels, mark.zero and (mode != "constant" or not value)
    for position in range(len(pad) // 2):
        dim = input.dim() - 1 - position
        if t.channels.varies(labels, dim):
            if mode != "constant" or min(pad[2 * position : 2 * position + 2]) < 0:
                return None
            widths = [0] * (2 * position) + list(pad[2 * position : 2 * position + 2])
            labels = F.pad(labels, widths, value=FIXED)
        else:
            sizes = list(labels.shape)
            sizes[dim] = out.shape[dim]
            labels = labels.narrow(dim, 0, 1).expand(sizes)
    return Mark(compress(labels), zero)


@rule("pixel_shuffle")
def _pixel_shuffle(t, out, input, upscale_factor):
    mark = t.of(input)
    labels = t.channels.along(mark.labels, 1)
    if labels is None:
        return None
    rows = labels.view(-1, upscale_factor**2)
    t.channels.tie_along(rows, 1, f"a pixel shuffle at {where()}")
    return Mark(spread(rows[:, 0], 1, out.shape), mark.zero)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full",
      "new_empty", "new_tensor")  # fmt: skip
def _constant(t, out, *args, **kwargs):
    return fixed_like(out)
