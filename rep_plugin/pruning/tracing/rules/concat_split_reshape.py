"""Rules for functions that only move elements: the labels move likewise, and the map must stay a box."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Mark, tensors_in
from rep_plugin.pruning.tracing.labels import FIXED, compress
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules.elementwise_pooling_reduction import tie_maps
from rep_plugin.pruning.tracing.rules.registry import fixed_like, rule, spread


def _rectangular(recorder: Recorder, labels: Tensor) -> Tensor:
    """A map must stay a box when channels go: where they vary along several dimensions, only the longest gives way."""
    labels = compress(labels)
    dims = recorder.channels.varying(labels)
    if len(dims) > 1:
        longest = max(dims, key=lambda d: labels.shape[d])
        for dim in dims:
            if dim != longest:
                recorder.channels.tie_along(labels, dim, f"a reshape {recorder.place()}")
    return labels


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(recorder, out, input, *args, **kwargs):
    if not isinstance(out, Tensor) or any(isinstance(a, torch.dtype) for a in args):
        return None
    return Mark(_rectangular(recorder, recorder.mark_of(input).labels.reshape(out.shape)), recorder.mark_of(input).zero)


@rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "squeeze", "unsqueeze",
    "expand", "expand_as", "broadcast_to",
)  # fmt: skip
def _rearrange(recorder, out, input, *args, **kwargs):
    labels = recorder.mark_of(input).labels
    if recorder.function_name.startswith("expand") or recorder.function_name == "broadcast_to":
        return Mark(labels.expand(out.shape), recorder.mark_of(input).zero)
    return Mark(recorder.function(labels[...], *args, **kwargs), recorder.mark_of(input).zero)


@rule("cat", "concat", "concatenate", "stack")
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
    return Mark(_rectangular(recorder, joined), all(recorder.mark_of(tensor).zero for tensor in tensors))


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


@rule("chunk", "tensor_split")
def _chunk(recorder, out, input, chunks, dim=0):
    mark = recorder.mark_of(input)
    cut = mark.labels.chunk if recorder.function_name == "chunk" else mark.labels.tensor_split
    parts = cut(chunks, dim)
    if recorder.channels.varies(mark.labels, dim):
        if not isinstance(chunks, int) or len({part.shape[dim] for part in parts}) > 1:
            return None
        _tie_parts(recorder, mark.labels, dim, len(parts))
    return [Mark(part, mark.zero) for part in parts]


@rule("split", "split_with_sizes", "unbind", "narrow", "select")
def _split(recorder, out, input, *args, **kwargs):
    mark = recorder.mark_of(input)
    place = 1 if recorder.function_name.startswith("split") else 0
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    if recorder.function_name.startswith("split") and len(out) == 1:
        return [mark]
    if recorder.channels.varies(mark.labels, dim):
        equal = isinstance(out, (tuple, list)) and len({part.shape for part in out}) == 1
        if not recorder.function_name.startswith("split") or not equal:
            return None
        _tie_parts(recorder, mark.labels, dim, len(out))  # sizes that do not follow are found when planning
    parts = recorder.function(mark.labels, *args, **kwargs)
    return [Mark(part, mark.zero) for part in tensors_in(parts)]


@rule("__getitem__")
def _getitem(recorder, out, input, index):
    mark = recorder.mark_of(input)
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
