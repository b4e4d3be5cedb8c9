"""Rules for functions that only move elements: the labels move likewise, and the map must stay a box."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Mark, tensors_in
from rep_plugin.pruning.tracing.labels import FIXED, compress
from rep_plugin.pruning.tracing.numbers import Share, Size, Written
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules.elementwise_pooling_reduction import tie_maps
from rep_plugin.pruning.tracing.rules.registry import fixed_like, rule, spread


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", keeps_open=True)
def _reshape(recorder, out, input, *args, **kwargs):
    """What is split into heads may lose heads, or the same of each head: the next steps tell."""
    if not isinstance(out, Tensor) or any(isinstance(a, torch.dtype) for a in args):
        return None
    labels = compress(recorder.mark_of(input).labels.reshape(out.shape))
    if recorder.is_open(input) and len(recorder.channels.varying(labels)) < len(
        recorder.channels.varying(recorder.mark_of(input).labels)
    ):
        recorder.close(input)  # the parts are joined again
    if recorder.function_name in ("view", "reshape", "unflatten"):
        sizes = next((a for a in (*args, *kwargs.values()) if isinstance(a, (tuple, list))), args)
        first = args[0] % input.dim() if recorder.function_name == "unflatten" and isinstance(args[0], int) else 0
        _follow_numbers(recorder, labels, {first + place: size for place, size in enumerate(sizes)})
    return Mark(labels, recorder.mark_of(input).zero)


def _follow_numbers(recorder: Recorder, labels: Tensor, sizes: dict[int, object]) -> None:
    """Numbers by which a view is made follow its channels; those of another map are as many, and go with them."""
    channels = recorder.channels
    what = f"a view of as many channels {recorder.place()}"
    for dim, size in sizes.items():
        varies = channels.varies(labels, dim)
        if isinstance(size, Size) and size.labels is not None and (varies or channels.varies(size.labels, size.dim)):
            _tie_numbers(recorder, channels.along(size.labels, size.dim), channels.along(labels, dim), what)
        elif not varies:
            continue
        elif isinstance(size, Written) and size.place is not None:
            recorder.note_number(size.place, labels, dim)
        elif isinstance(size, Share) and size.whole is not None:
            heads = [d for d, n in sizes.items() if d != dim and n == size.parts and channels.varies(labels, d)]
            if not heads:
                continue
            heads = next(
                (d for d in heads if sizes[d] is size.parts), heads[-1]
            )  # q, k and v are often as many as heads
            rows = labels.movedim((heads, dim), (-2, -1))
            for _ in range(rows.dim() - 2):
                rows = rows[0]
            whole = channels.along(size.whole.labels, size.whole.dim)
            _tie_numbers(recorder, whole, rows.flatten(), what)


def _tie_numbers(recorder: Recorder, first: Tensor | None, second: Tensor | None, what: str) -> None:
    if first is None or second is None or len(first) != len(second):
        return
    roots = recorder.channels.roots()
    if not torch.equal(roots[first].sort()[0], roots[second].sort()[0]):  # else the same channels, if in another order
        tie_maps(recorder, first, second, what)


@rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "squeeze", "unsqueeze",
    "expand", "expand_as", "broadcast_to", keeps_open=True,
)  # fmt: skip
def _rearrange(recorder, out, input, *args, **kwargs):
    labels = recorder.mark_of(input).labels
    if recorder.function_name.startswith("expand") or recorder.function_name == "broadcast_to":
        return _expand(recorder, labels, recorder.mark_of(input).zero, out, args)
    return Mark(recorder.function(labels[...], *args, **kwargs), recorder.mark_of(input).zero)


def _expand(recorder: Recorder, labels: Tensor, zero: bool, out: Tensor, args: tuple) -> Mark:
    """What is repeated as often as there are channels of some kind, so many times the number of heads, goes with them."""
    sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
    repeated = [size == 1 for size in ((1,) * (out.dim() - labels.dim()) + tuple(labels.shape))]
    labels = labels.expand(out.shape)
    for dim, size in enumerate(sizes if len(sizes) == out.dim() else ()):
        if not repeated[dim] or out.shape[dim] == 1:
            continue
        if isinstance(size, Written) and size.place is not None:
            several = recorder.channels_of(size.place)
        elif isinstance(size, Size) and size.labels is not None and recorder.channels.varies(size.labels, size.dim):
            several = [recorder.channels.along(size.labels, size.dim)]
        else:
            continue
        own = next((one for one in several if one is not None and len(one) == out.shape[dim]), None)
        if own is not None and not recorder.channels.varying(labels):
            return Mark(spread(own, dim, out.shape), False)
    return Mark(labels, zero)


@rule("cat", "concat", "concatenate", "stack", keeps_open=True)
def _cat(recorder, out, tensors, dim=0, axis=None, *, out_=None):
    dim = dim if axis is None else axis
    labels = [recorder.mark_of(tensor).labels for tensor in tensors]
    if recorder.function_name == "stack":
        labels = [part.unsqueeze(dim) for part in labels]
    dim %= labels[0].dim()
    labels = [part for part in labels if part.dim() == out.dim()]  # torch lets an empty 1-d tensor pass
    if len(labels) > 1 and not any(recorder.channels.varies(part, dim) for part in labels):  # tokens, not channels
        for part in labels[1:]:
            tie_maps(recorder, labels[0].narrow(dim, 0, 1), part.narrow(dim, 0, 1))
    joint = [d for d in range(out.dim()) if d != dim and all(part.stride(d) == 0 for part in labels)]
    for d in joint:
        labels = [part.narrow(d, 0, 1) for part in labels]
    joined = torch.cat(labels, dim).expand(out.shape)
    if not any(map(recorder.is_open, tensors)):
        joined = recorder.make_box(joined, f"a concatenation {recorder.place()}")
    return Mark(compress(joined), all(recorder.mark_of(tensor).zero for tensor in tensors))


@rule("roll", keeps_open=True)
def _roll(recorder, out, input, shifts, dims=None):
    mark = recorder.mark_of(input)
    dims = range(input.dim()) if dims is None else (dims,) if isinstance(dims, int) else dims
    return None if any(recorder.channels.varies(mark.labels, dim) for dim in dims) else mark


@rule("repeat_interleave", "flip", "channel_shuffle")
def _move_whole(recorder, out, input, *args, **kwargs):
    mark = recorder.mark_of(input)
    if recorder.function_name == "channel_shuffle":
        groups = args[0] if args else kwargs["groups"]
        rows = mark.labels.unflatten(1, (groups, -1))
        recorder.channels.tie_along(rows, 1, f"a channel shuffle {recorder.place()}")
        return Mark(rows.transpose(1, 2).flatten(1, 2), mark.zero)
    repeats = recorder.function_name == "repeat_interleave"
    if repeats and recorder.channels.varying(mark.labels) and not isinstance(args[0], int):
        return None
    return Mark(recorder.function(mark.labels[...], *args, **kwargs), mark.zero)


@rule("repeat", "tile", keeps_open=True)
def _repeat(recorder, out, input, *args):
    repeats = args[0] if args and isinstance(args[0], (tuple, list)) else args
    mark, lead = recorder.mark_of(input), out.dim() - input.dim()
    repeats = (1,) * (out.dim() - len(repeats)) + tuple(repeats)
    if any(n > 1 and recorder.channels.varies(mark.labels, d - lead) for d, n in enumerate(repeats) if d >= lead):
        return Mark(mark.labels.repeat(repeats), mark.zero)
    once = mark.labels[(None,) * lead]
    for dim, number in enumerate(repeats):
        once = once.narrow(dim, 0, 1) if number > 1 else once
    return _expand(recorder, once, mark.zero, out, repeats)


def _tie_parts(recorder: Recorder, labels: Tensor, dim: int, number: int) -> None:
    """Halves must stay halves, thirds thirds."""
    parts = labels.chunk(number, dim)
    for part in parts[1:]:
        recorder.channels.tie_along(torch.stack([parts[0], part]), 0, f"equal parts {recorder.place()}")


@rule("glu")
def _glu(recorder, out, input, dim=-1):
    mark = recorder.mark_of(input)
    _tie_parts(recorder, mark.labels, dim, 2)
    return Mark(mark.labels.chunk(2, dim)[0], mark.zero)


def _part(recorder: Recorder, input: Tensor, dim: int) -> None:
    """Of heads, or of what is in each, parts are taken: whatever goes, goes from all along that dimension."""
    if recorder.is_open(input):
        recorder.channels.tie_along(recorder.mark_of(input).labels, dim, f"parts of heads {recorder.place()}")


@rule("chunk", "tensor_split", keeps_open=True)
def _chunk(recorder, out, input, chunks, dim=0):
    mark = recorder.mark_of(input)
    _part(recorder, input, dim)
    cut = mark.labels.chunk if recorder.function_name == "chunk" else mark.labels.tensor_split
    parts = cut(chunks, dim)
    if recorder.channels.varies(mark.labels, dim):
        if not isinstance(chunks, int) or len({part.shape[dim] for part in parts}) > 1:
            return None
        _tie_parts(recorder, mark.labels, dim, len(parts))
    return [Mark(part, mark.zero) for part in parts]


@rule("split", "split_with_sizes", "unbind", "narrow", "select", keeps_open=True)
def _split(recorder, out, input, *args, **kwargs):
    mark = recorder.mark_of(input)
    place = 1 if recorder.function_name.startswith("split") else 0
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    if recorder.function_name.startswith("split") and len(out) == 1:
        return [mark]
    _part(recorder, input, dim)
    if recorder.channels.varies(mark.labels, dim) and _follow_sizes(recorder, mark.labels, dim, args, kwargs):
        return [Mark(part, mark.zero) for part in recorder.function(mark.labels, *args, **kwargs)]
    if recorder.channels.varies(mark.labels, dim):
        equal = isinstance(out, (tuple, list)) and len({part.shape for part in out}) == 1
        if not recorder.function_name.startswith("split") or not equal:
            return None
        _tie_parts(recorder, mark.labels, dim, len(out))  # sizes that do not follow are found when planning
    parts = recorder.function(mark.labels, *args, **kwargs)
    return [Mark(part, mark.zero) for part in tensors_in(parts)]


def _follow_sizes(recorder: Recorder, labels: Tensor, dim: int, args: tuple, kwargs: dict) -> bool:
    """Let numbers of the model by which a map is split follow the parts; return False where the sizes are none of these."""
    sizes = next((a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))), ())
    if not sizes or any(not isinstance(size, Written) or size.place is None for size in sizes):
        return False
    for size, part in zip(sizes, labels.split([int(size) for size in sizes], dim)):
        recorder.note_number(size.place, part, dim)
    return True


def _look_up(recorder: Recorder, input: Tensor, items: list) -> Mark | None:
    """Rows of a table, as of position biases: the table keeps its rows, and may lose of its columns."""
    places = [place for place, item in enumerate(items) if not (isinstance(item, slice) and item == slice(None))]
    if len(places) != 1 or not isinstance(items[places[0]], Tensor) or items[places[0]].dtype == torch.bool:
        return None
    dim, index = places[0], items[places[0]]
    recorder.mark_table(input, dim)
    mark = recorder.mark_of(input)
    if recorder.channels.varies(mark.labels, dim):
        return None
    labels = mark.labels.select(dim, 0)
    shape = (*labels.shape[:dim], *index.shape, *labels.shape[dim:])
    for _ in range(index.dim()):
        labels = labels.unsqueeze(dim)
    return Mark(labels.expand(shape), mark.zero)


@rule("__getitem__", keeps_open=True)
def _getitem(recorder, out, input, index):
    items = list(index) if isinstance(index, tuple) else [index]
    if isinstance(out, Tensor) and any(isinstance(i, Tensor) for i in items):
        return _look_up(recorder, input, items)
    mark = recorder.mark_of(input)
    if not isinstance(out, Tensor) or any(isinstance(i, (list, bool)) for i in items):
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
        if not whole:
            _part(recorder, input, dim)
        if not whole and recorder.channels.varies(mark.labels, dim):
            half = (
                isinstance(item, slice)
                and size % 2 == 0
                and item.indices(size) in ((0, size // 2, 1), (size // 2, size, 1))
            )
            if not half:
                return None
            _tie_parts(recorder, mark.labels, dim, 2)
        dim += 1
    return Mark(mark.labels[index], mark.zero)


@rule("__setitem__")
def _setitem(recorder, out, input, index, value):
    """Values are written to some positions of all channels."""
    items = list(index) if isinstance(index, tuple) else [index]
    mark = recorder.mark_of(input)
    if any(not isinstance(item, (slice, int)) or isinstance(item, bool) for item in items):
        return None
    partial = [
        dim
        for dim, item in enumerate(items)
        if not isinstance(item, slice) or range(*item.indices(input.shape[dim])) != range(input.shape[dim])
    ]
    if not isinstance(value, Tensor) or any(recorder.channels.varies(mark.labels, dim) for dim in partial):
        return None
    given = recorder.mark_of(value)
    target = mark.labels[tuple(items)]
    if given.labels.shape != target.shape:
        return None
    tie_maps(recorder, target, given.labels)
    recorder.set_mark(input, Mark(mark.labels, mark.zero and given.zero))
    return []


@rule("pad")
def _pad(recorder, out, input, pad, mode="constant", value=None):
    mark = recorder.mark_of(input)
    labels, zero = mark.labels, mark.zero and (mode != "constant" or not value)
    for position in range(len(pad) // 2):
        dim = input.dim() - 1 - position
        if recorder.channels.varies(labels, dim):
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
def _pixel_shuffle(recorder, out, input, upscale_factor):
    mark = recorder.mark_of(input)
    labels = recorder.channels.along(mark.labels, 1)
    if labels is None:
        return None
    rows = labels.view(-1, upscale_factor**2)
    recorder.channels.tie_along(rows, 1, f"a pixel shuffle {recorder.place()}")
    return Mark(spread(rows[:, 0], 1, out.shape), mark.zero)


@rule("pixel_unshuffle")
def _pixel_unshuffle(recorder, out, input, downscale_factor):
    mark = recorder.mark_of(input)
    labels = recorder.channels.along(mark.labels, 1)
    return (
        None if labels is None else Mark(spread(labels.repeat_interleave(downscale_factor**2), 1, out.shape), mark.zero)
    )


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full",
      "new_empty", "new_tensor")  # fmt: skip
def _constant(recorder, out, *args, **kwargs):
    return fixed_like(out)
