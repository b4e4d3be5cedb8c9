"""How far two outputs lie apart: each channel of each image against its own size, never beside a larger one."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rep_plugin.errors import EquivalenceError

TINY = torch.finfo(torch.float64).tiny
ERRORS = ("max_abs", "max_rel", "border_rel", "interior_rel")


@dataclass
class Difference:
    """Largest differences of two outputs. Relative ones are divided by the size of the channel, image by image.

    Args:
        max_abs: largest absolute difference.
        max_rel: largest relative one, over all channels of all images.
        border_rel: of it, in the outermost pixels of maps.
        interior_rel: of it, in all other pixels.
        where: the place of ``max_rel``.
        rounding: the largest share of a channel that rounding alone may change, where only that explains the difference.
        rounding_where: its place.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    border_rel: float = 0.0
    interior_rel: float = 0.0
    where: str = ""
    rounding: float = 0.0
    rounding_where: str = ""

    def include(self, other: "Difference") -> None:
        """Take the larger of each difference."""
        for value, place in (("max_rel", "where"), ("rounding", "rounding_where")):
            if not getattr(other, value) <= getattr(self, value):
                setattr(self, place, getattr(other, place))
        for name in (*ERRORS, "rounding"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs if math.isnan(theirs) else max(mine, theirs))

    def exceeds(self, tolerance: float) -> bool:
        """Return whether it is over a relative tolerance."""
        return not self.max_rel <= tolerance  # NaN exceeds everything


def output_paths(output: object) -> list[tuple[tuple[str | int, ...], Tensor]]:
    """Return the floating-point tensors of a nested output in order, each with its path: keys, fields and places.

    Args:
        output: a tensor, or nested mappings, lists, tuples, dataclasses and what torch's pytree knows.

    Returns:
        (path, tensor) of each.

    Example:
        >>> import torch
        >>> [path for path, _ in output_paths({"maps": [torch.zeros(1), torch.zeros(2)], "count": 3})]
        [('maps', 0), ('maps', 1)]
    """
    return [(path, tensor) for path, tensor in tensor_paths(output) if tensor.is_floating_point()]


def tensor_paths(output: object) -> list[tuple[tuple[str | int, ...], Tensor]]:
    """Return all tensors of a nested output in order, each with its path, see :func:`output_paths`."""
    items: Iterable[tuple[Any, object]]
    if isinstance(output, Tensor):
        return [((), output)]
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (list, tuple)):
        items = zip(getattr(output, "_fields", range(len(output))), output)
    elif is_dataclass(output):
        items = ((entry.name, getattr(output, entry.name)) for entry in fields(output))
    else:
        leaves = tree_leaves(output)  # classes that are registered with torch
        items = enumerate(leaf for leaf in leaves if leaf is not output)
    return [((key, *path), tensor) for key, value in items for path, tensor in tensor_paths(value)]


def flatten_outputs(output: object) -> list[Tensor]:
    """Return the floating-point tensors of a nested output, in order."""
    return [tensor for _, tensor in output_paths(output)]


def shapes_of(output: object) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors of a nested output, in order."""
    return [tuple(tensor.shape) for _, tensor in tensor_paths(output)]


def _numbers(tensor: Tensor) -> Tensor:
    """Float64 numbers of a floating-point or complex tensor; others as they are."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double() if tensor.is_floating_point() else tensor


def _sizes(values: Tensor) -> list[Tensor]:
    """Largest magnitude of each channel of each image, channels first and channels last; of vectors, each value's own."""
    values = values.abs()
    if values.dim() < 3:
        return [values]
    first, last = range(2, values.dim()), range(1, values.dim() - 1)
    return [values.amax(tuple(dims), keepdim=True) for dims in (first, last)]


def _usual_sizes(values: Tensor, beside: Tensor | None) -> Tensor:
    """The share that columns of vectors (N, C) usually have of a row: what is near zero by chance is no small channel."""
    rows = values if beside is None or beside.shape[1:] != values.shape[1:] else torch.cat([values, beside])
    levels = rows.abs().mean(1, keepdim=True).clamp_min(TINY)
    return (rows.abs() / levels).median(0).values * levels[: len(values)]


def _place(path: tuple[str | int, ...], index: int, shape: torch.Size) -> str:
    """The words for one value of an output: its channel, its image and, where there are several, its tensor."""
    image, channel, *_ = (*(int(i) for i in torch.unravel_index(torch.tensor(index), shape)), 0, 0)
    where = f"channel {channel} of image {image}" if len(shape) > 1 else f"value {image}"
    return f"{where} of output {'.'.join(map(str, path))!r}" if path else where


@dataclass
class Floor:
    """What rounding may change in an output: what becomes of it when a model's numbers are moved a little.

    Args:
        tolerance: the relative one that a difference is held against.
        ties: where each integer or boolean tensor changed.
        sizes: how much the channels of each other tensor changed.
        stable: whether the shapes stayed.
    """

    tolerance: float
    ties: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, list[Tensor]] = field(default_factory=dict)
    stable: bool = True

    def include(self, output: object, moved: object) -> None:
        """Take a model's output, and what it makes of its moved numbers."""
        if shapes_of(output) != shapes_of(moved):
            self.stable = False
            return
        ours, theirs = ([tensor for _, tensor in tensor_paths(one)] for one in (output, moved))
        for number, (a, b) in enumerate(zip(map(_numbers, ours), map(_numbers, theirs))):
            if not a.is_floating_point():
                self.ties[number] = self.ties.get(number, torch.zeros_like(a, dtype=torch.bool)) | (a != b)
            elif a.numel():
                found = [size.nan_to_num(nan=math.inf) for size in _sizes(a - b)]
                self.sizes[number] = [*map(torch.maximum, found, self.sizes.get(number, found))]

    def of(self, number: int, sizes: list[Tensor]) -> list[Tensor]:
        """Return the sizes of channels, raised so far that the tolerance times them is what rounding may change."""
        moved = self.sizes.get(number)
        return sizes if moved is None else [torch.maximum(a, b / self.tolerance) for a, b in zip(sizes, moved)]


def compare_outputs(
    reference: object, candidate: object, floor: Floor | None = None, beside: object = None
) -> Difference:
    """Return the differences of two outputs of equal structure.

    Relative is a difference to the largest value of its channel, image by image: of maps (N, C, H, W) the one of
    ``reference[n, c]``, of sequences and maps with the channels last also the one of ``reference[n, ..., c]``, of vectors
    (N, C) each value itself, or what its column usually is where that is more.

    Args:
        reference: a tensor, or nested mappings, lists, tuples and dataclasses of them.
        candidate: the output to compare with it.
        floor: what rounding may change; without it integer and boolean tensors differ nowhere.
        beside: the reference's output for other images, which tells how large columns usually are.

    Returns:
        The largest differences. Non-finite values count as infinite; a tensor without elements (no detection, say) has
        none.

    Raises:
        EquivalenceError: number, shapes or types of the tensors differ, or an integer or boolean one does.

    Example:
        >>> import torch
        >>> compare_outputs(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 3.0])).max_rel
        0.25
    """
    shapes = shapes_of(reference), shapes_of(candidate)
    if shapes[0] != shapes[1] or not shapes[0]:
        raise EquivalenceError(f"output shapes differ: expected {shapes[0]}, got {shapes[1]}")
    ours = tensor_paths(reference)
    theirs, others = ([tensor for _, tensor in tensor_paths(one)] for one in (candidate, beside))
    result = Difference()
    for number, ((path, a), b) in enumerate(zip(ours, theirs)):
        if a.is_floating_point() != b.is_floating_point() or a.is_complex() != b.is_complex():
            raise EquivalenceError(f"output types differ: expected {a.dtype}, got {b.dtype}")
        dtype, a, b = a.dtype, _numbers(a), _numbers(b).to(a.device)
        if not a.is_floating_point():
            off = a != b
            if floor is not None and number in floor.ties:
                off &= ~floor.ties[number]
            if off.any():
                raise EquivalenceError(f"{int(off.sum())} of {off.numel()} values of an output of {dtype} differ")
        elif a.numel():
            other = _numbers(others[number]).to(a.device) if len(others) == len(ours) else None
            result.include(_compare(path if len(ours) > 1 else (), a, b, floor, number, other))
    return result


def _compare(
    path: tuple[str | int, ...], a: Tensor, b: Tensor, floor: Floor | None, number: int, beside: Tensor | None
) -> Difference:
    if not (finite := torch.isfinite(a) & torch.isfinite(b)).all():
        where = _place(path, int((~finite).flatten().nonzero()[0]), finite.shape)
        return Difference(math.inf, math.inf, math.inf, math.inf, where)
    sizes, gap = _sizes(a), (a - b).abs()
    largest = gap.max().item()
    if not largest:
        return Difference()
    if a.dim() == 2:
        sizes = [torch.maximum(sizes[0], _usual_sizes(a, beside))]
    own = reduce(torch.minimum, sizes).clamp_min(TINY)
    scale = own if floor is None else reduce(torch.minimum, floor.of(number, sizes)).clamp_min(TINY)
    off = gap / scale
    index = int(off.argmax())
    worst = off.flatten()[index].item()
    found = Difference(largest, worst, worst, worst, _place(path, index, off.shape))
    if off.dim() == 4 and min(off.shape[2:]) > 2:
        found.interior_rel = off[:, :, 1:-1, 1:-1].max().item()
        found.border_rel = max(side.max().item() for side in (off[:, :, 0], off[:, :, -1], off[..., 0], off[..., -1]))
    if floor is not None:
        excused = (gap > floor.tolerance * own) & (off <= floor.tolerance)
        usual = own.amax(0, keepdim=True)  # zero for one image, the channel of a ReLU say, is no small channel
        usual = usual.where(usual > TINY, own.max())
        shares = (floor.tolerance * scale / usual).expand_as(gap).where(excused, gap.new_zeros(()))
        index = int(shares.argmax())
        found.rounding = shares.flatten()[index].item()
        found.rounding_where = _place(path, index, shares.shape)
    return found


def sensitivity_of(output: object, images: int, other: int = -1) -> float:
    """Return how much the outputs of the first and another image differ, relative to the largest value.

    Args:
        output: batches, or one dict for each image, as detectors return them.
        images: number of images.
        other: number of the other image; the last by default.

    Returns:
        The largest relative change; another number of detections is a change of 1.
    """
    if isinstance(output, (list, tuple)) and len(output) == images and all(isinstance(one, dict) for one in output):
        return change_of(output[0], output[other])
    batches = [tensor for tensor in flatten_outputs(output) if tensor.dim() and -len(tensor) <= other < len(tensor)]
    return change_of([tensor[0] for tensor in batches], [tensor[other] for tensor in batches])


def change_of(first: object, second: object) -> float:
    """Return how much two outputs differ, relative to the largest value of both.

    Args:
        first: nested tensors.
        second: of the same structure.

    Returns:
        The largest relative change, over all tensors; 1 where shapes differ.
    """
    change = 0.0
    for a, b in zip(flatten_outputs(first), flatten_outputs(second)):
        if a.shape != b.shape:
            return 1.0
        if a.numel():
            largest = max(a.abs().max().item(), b.abs().max().item(), torch.finfo(a.dtype).tiny)
            change = max(change, (a - b).abs().max().item() / largest)
    return change
