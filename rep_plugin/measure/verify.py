"""The one equivalence check: two models, the same inputs, in float64."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rep_plugin.errors import ArgumentError, EquivalenceError, InconclusiveWarning
from rep_plugin.measure.copies import copy_model, copy_values
from rep_plugin.measure.forward import run_model
from rep_plugin.measure.progress import track

MIN_SENSITIVITY = 1e-3


@dataclass
class Difference:
    """Largest differences of two outputs; relative ones are divided by the largest value of the reference output."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    border_rel: float = 0.0
    interior_rel: float = 0.0

    def include(self, other: "Difference") -> None:
        for name in ("max_abs", "max_rel", "border_rel", "interior_rel"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs if math.isnan(theirs) else max(mine, theirs))

    def exceeds(self, tolerance: float) -> bool:
        return not self.max_rel <= tolerance  # NaN exceeds everything


@dataclass
class Equivalence:
    """The measurements of :func:`verify_equivalence`.

    Args:
        total: differences end to end.
        blocks: differences of each named block.
        sensitivity: how much another input changes the output, relative; None where no batch has a second image.
        not_run: blocks that no input runs and that cannot be compared alone.
        alone: blocks that no input runs and that were compared on random maps.

    Example:
        >>> Equivalence(sensitivity=1e-11).notes
        ['inconclusive: sensitivity 1.0e-11']
    """

    total: Difference = field(default_factory=Difference)
    blocks: dict[str, Difference] = field(default_factory=dict)
    sensitivity: float | None = 0.0
    not_run: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @property
    def conclusive(self) -> bool:
        """Whether equality proves something: the output depends on the input."""
        return self.sensitivity is None or self.sensitivity >= MIN_SENSITIVITY

    @property
    def notes(self) -> list[str]:
        """What a report says about blocks that the model does not run, and of an inconclusive proof."""
        notes = [f"block {name!r} is not run by the model, and proven by itself" for name in self.alone]
        notes += [f"block {name!r} was not run by any input and is not proven" for name in self.not_run]
        return notes if self.conclusive else [*notes, f"inconclusive: sensitivity {self.sensitivity:.1e}"]

    def warn(self, stacklevel: int = 3) -> None:
        """Warn, with InconclusiveWarning, of blocks that are not proven and of a sensitivity that proves little."""
        if self.not_run:
            first, count = self.not_run[0], len(self.not_run)
            text = f"inconclusive: no input runs block {first!r} ({count} such blocks)"
            warnings.warn(text, InconclusiveWarning, stacklevel=stacklevel)
        if not self.conclusive:
            warnings.warn(
                f"inconclusive: another input changes the output by {self.sensitivity:.1e} only (expected >= "
                f"{MIN_SENSITIVITY:.0e}), so equality proves little",
                InconclusiveWarning,
                stacklevel=stacklevel,
            )


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
    return [(path, tensor) for path, tensor in _tensor_paths(output) if tensor.is_floating_point()]


def _tensor_paths(output: object) -> list[tuple[tuple[str | int, ...], Tensor]]:
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
    return [((key, *path), tensor) for key, value in items for path, tensor in _tensor_paths(value)]


def flatten_outputs(output: object) -> list[Tensor]:
    """Return the floating-point tensors of a nested output, in order."""
    return [tensor for _, tensor in output_paths(output)]


def exact_outputs(output: object) -> list[Tensor]:
    """Return the integer and boolean tensors of a nested output, in order."""
    tensors = (tensor for _, tensor in _tensor_paths(output))
    return [tensor for tensor in tensors if not tensor.is_floating_point() and not tensor.is_complex()]


def compare_outputs(reference: object, candidate: object, ties: Sequence[Tensor] = ()) -> Difference:
    """Return the differences of two outputs of equal structure.

    Args:
        reference: a tensor, or nested mappings, lists, tuples and dataclasses of them.
        candidate: the output to compare with it.
        ties: of each integer or boolean tensor, where it may differ; without them nowhere.

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
    ours, theirs = ([tensor for _, tensor in _tensor_paths(output)] for output in (reference, candidate))
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1] or not ours:
        raise EquivalenceError(f"output shapes differ: expected {shapes[0]}, got {shapes[1]}")
    for number, (a, b) in enumerate(zip(exact_outputs(reference), exact_outputs(candidate))):
        off = a != b.to(a.device)
        if ties:
            off &= ~ties[number]
        if off.any():
            raise EquivalenceError(f"{int(off.sum())} of {off.numel()} values of an output of {a.dtype} differ")
    result = Difference()
    for a, b in zip(ours, theirs):
        if a.is_complex() and b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        if a.is_floating_point() != b.is_floating_point() or a.is_complex() != b.is_complex():
            raise EquivalenceError(f"output types differ: expected {a.dtype}, got {b.dtype}")
        if not a.numel() or not a.is_floating_point():
            continue
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Difference(math.inf, math.inf, math.inf, math.inf)
        gap = (a.double() - b.double()).abs()
        scale = max(a.abs().max().item(), torch.finfo(torch.float64).tiny)
        largest = gap.max().item()
        border, interior = largest, largest
        if gap.dim() == 4 and min(gap.shape[2:]) > 2:
            interior = gap[:, :, 1:-1, 1:-1].max().item()
            border = max(side.max().item() for side in (gap[:, :, 0], gap[:, :, -1], gap[..., 0], gap[..., -1]))
        result.include(Difference(largest, largest / scale, border / scale, interior / scale))
    return result


@torch.no_grad()
def _find_ties(model: nn.Module, x: Tensor, expected: object, amount: float) -> list[Tensor]:
    """Of each integer or boolean output: where a model's own value changes once numbers are moved by ``amount``, relative.

    They are moved forth and back: where a tie is broken by one, it is not by the other.
    """
    ties = [torch.zeros_like(tensor, dtype=torch.bool) for tensor in exact_outputs(expected)]
    for seed, sign in itertools.product(range(3), (1, -1)):
        generator, other = torch.Generator().manual_seed(seed), copy_model(model)
        moved = [x.to(torch.float64, copy=True), *other.parameters()]
        for tensor in moved:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            tensor.mul_(1 + sign * amount * noise)
        output = _run(run_model, other, moved[0])
        for tie, before, after in zip(ties, exact_outputs(expected), exact_outputs(output)):
            tie |= before != after if before.shape == after.shape else torch.ones_like(tie)
    return ties


def sensitivity_of(output: object, images: int) -> float:
    """Return how much the outputs of the first and the last image differ, relative to the largest value.

    Args:
        output: batches, or one dict for each image, as detectors return them.
        images: number of images.

    Returns:
        The largest relative change; another number of detections is a change of 1.
    """
    if isinstance(output, (list, tuple)) and len(output) == images and all(isinstance(one, dict) for one in output):
        found = zip(flatten_outputs(output[0]), flatten_outputs(output[-1]))
        trios = [(a, b, torch.cat([a.flatten(), b.flatten()])) for a, b in found]
    else:
        trios = [(out[0], out[-1], out) for out in flatten_outputs(output) if out.dim()]
    change = 0.0
    for a, b, both in trios:
        if a.shape != b.shape:
            return 1.0
        if a.numel():
            largest = max(both.abs().max().item(), torch.finfo(both.dtype).tiny)
            change = max(change, (a - b).abs().max().item() / largest)
    return change


def default_inputs(model: nn.Module, example_input: Tensor | None = None) -> list[Tensor]:
    """Return two inputs for a model: the example or two random images, and two random images of an odd size.

    Args:
        model: the model; where no example is given, the size is ``pretrained_cfg['input_size']`` (timm), else 64x64 with
            the first convolution's channels.
        example_input: images (N, C, ...), floating point.

    Returns:
        Two new tensors, on the model's device and in its dtype.

    Raises:
        ArgumentError: the example is not a float tensor (N, C, ...).

    Example:
        >>> from torch import nn
        >>> [tuple(x.shape) for x in default_inputs(nn.Conv2d(3, 8, 3))]
        [(2, 3, 64, 64), (2, 3, 63, 63)]
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example_input is not None:
        floats = isinstance(example_input, Tensor) and example_input.is_floating_point()
        if not floats or example_input.dim() < 2:
            raise ArgumentError(f"example_input must be a float tensor (N, C, ...), got {type(example_input).__name__}")
        shape = tuple(example_input.shape)
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = first.in_channels if first is not None else 3
        shape = (2, *(cfg.get("input_size") or (channels, 64, 64)))
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    first = example_input.detach() if example_input is not None else torch.randn(shape, generator=generator)
    first = first.to(device, dtype, copy=True)  # a model may work in place
    other = (2, *shape[1:])
    if len(shape) == 4:
        other = (2, shape[1], shape[2] - 1 + shape[2] % 2, shape[3] - 1 + shape[3] % 2)
    return [first, torch.randn(other, generator=generator).to(device, dtype)]


class _FastDepthwise(TorchFunctionMode):
    """Computes float64 depthwise convolutions as sums of shifted maps: on CPU torch loops over the groups, 100x slower."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.conv2d:
            return self._conv2d(func, *args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _conv2d(func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        plain = not isinstance(padding, str) and input.dim() == 4 and groups == input.shape[1] == weight.shape[0] > 1
        if not plain or input.dtype != torch.float64 or input.is_cuda:
            return func(input, weight, bias, stride, padding, dilation, groups)
        (sh, sw), (ph, pw), (dh, dw) = (
            (v, v) if isinstance(v, int) else (v[0], v[-1]) for v in (stride, padding, dilation)
        )
        x = F.pad(input, (pw, pw, ph, ph))
        kh, kw = weight.shape[2:]
        rows, cols = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        shape = (*x.shape[:2], rows, cols)
        out = x.new_zeros(shape) if bias is None else bias.view(1, -1, 1, 1).expand(shape).clone()
        for a in range(kh):
            for b in range(kw):
                shifted = x[
                    :, :, a * dh : a * dh + sh * (rows - 1) + 1 : sh, b * dw : b * dw + sw * (cols - 1) + 1 : sw
                ]
                out.addcmul_(shifted, weight[:, 0, a, b].view(1, -1, 1, 1))
        return out


@torch.no_grad()
def _run(forward: Callable, *args, **kwargs) -> object:
    with _FastDepthwise():
        return forward(*args, **kwargs)


def rounding_error(model: nn.Module, x: Tensor) -> float:
    """Return how far a model's own output lies from that of the same model in float64, relative.

    Args:
        model: the model, in eval mode.
        x: images (N, C, H, W).

    Returns:
        The largest relative error.
    """
    return compare_outputs(_run(copy_model(model).double(), x.double()), _run(model, x.clone())).max_rel


class _Recorder:
    """Keeps the first call's inputs and output of chosen modules, as copies: a later layer may work in place."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.calls = {}
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True) for name in names
        ]

    def _hook(self, name: str):
        def keep(module, args, kwargs, output):
            if name not in self.calls:
                self.calls[name] = copy_values((args, kwargs, output))

        return keep

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def verify_equivalence(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Sequence[Tensor],
    block_names: Sequence[str] = (),
    tolerance: float = 1e-9,
    parts: Mapping[str, nn.Module] | None = None,
    keep: bool = True,
    run_names: Sequence[str] = (),
) -> Equivalence:
    """Check that two models compute the same function in eval mode, in float64.

    Args:
        reference: the model to compare with.
        candidate: the model that must compute the same.
        inputs: images (N, C, H, W). One that the reference cannot take (an odd size, say) is left out, but the first.
        block_names: modules that are also compared alone: the candidate's is given the reference's own input to it, or a
            random map where no input runs it.
        tolerance: largest allowed difference, relative to the largest value.
        parts: modules to compare in the place of the candidate's, by name.
        keep: copy the models first; False converts the given ones to float64.
        run_names: modules of the reference that are proven end to end alone, and so only where an input runs them.

    Returns:
        The measurements. InconclusiveWarning is given where another input changes the output by less than 1e-3.

    Raises:
        EquivalenceError: over the tolerance, or a value is not finite; names the first block that is off.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(3, 8, 3)
        >>> verify_equivalence(conv, conv, [torch.randn(2, 3, 8, 8)]).total.max_rel
        0.0
    """
    if keep:
        reference, candidate = copy_model(reference), copy_model(candidate)
    parts = {name: copy_model(part).double() for name, part in (parts or {}).items()}
    for model in (reference.double(), candidate.double(), *parts.values()):
        model.eval()  # not chained: mmpretrain's return None
    result = Equivalence(blocks={name: Difference() for name in block_names}, not_run=list(block_names))
    idle = set(run_names)
    for name in run_names:
        reference.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: idle.discard(name))
    for index, x in enumerate(track(inputs, "comparing whole models")):
        recorder = _Recorder(reference, block_names)
        try:
            expected = _run(run_model, reference, x.to(torch.float64, copy=True))
        except Exception:  # a size that a network does not take is refused in as many ways as there are networks
            if index == 0:
                raise
            continue
        finally:
            recorder.remove()
        if not all(torch.isfinite(out).all() for out in flatten_outputs(expected)):
            raise EquivalenceError("the given model's own output is not finite, so nothing can be compared")
        for name, (args, kwargs, output) in track(recorder.calls.items(), "comparing blocks"):
            try:
                found = compare_outputs(output, _run(parts.get(name) or candidate.get_submodule(name), *args, **kwargs))
            except EquivalenceError as error:
                raise EquivalenceError(f"block {name!r}: {error}") from None
            result.blocks[name].include(found)
            if name in result.not_run:
                result.not_run.remove(name)
        _raise_if_off(result.blocks, tolerance)
        found = _run(run_model, candidate, x.to(torch.float64, copy=True))
        same = all(map(torch.equal, exact_outputs(expected), exact_outputs(found)))
        ties = [] if same else _find_ties(reference, x, expected, tolerance / 10)
        total = compare_outputs(expected, found, ties)
        result.total.include(total)
        if total.exceeds(tolerance):
            agree = f" although each of {len(block_names)} blocks agrees" if block_names else ""
            raise EquivalenceError(
                f"the whole model differs by {total.max_rel:.2e} relative (tolerance {tolerance:.0e}){agree}"
            )
        if len(x) < 2 and index == 0:
            continue  # one image says nothing about another
        result.sensitivity = max(result.sensitivity, sensitivity_of(expected, len(x)))
    _prove_alone(reference, candidate, parts, result, tolerance)
    result.not_run += [name for name in run_names if name in idle]
    result.warn()
    return result


def require_rounded(converted: nn.Module, proven: nn.Module) -> None:
    """Check that a model holds the numbers of the float64 model that was proven, rounded once.

    Args:
        converted: the model that is handed out.
        proven: the same in float64.

    Raises:
        EquivalenceError: a tensor differs, is out of its type's range, or vanishes in it; names the tensor.
    """
    for (name, ours), theirs in zip(converted.state_dict().items(), proven.state_dict().values(), strict=True):
        if not torch.equal(ours, theirs.to(ours.dtype)):
            raise EquivalenceError(f"{name!r} is not the rounded value of the proven float64 merge")
        if ours.is_floating_point() and not torch.isfinite(ours).all():
            raise EquivalenceError(f"{name!r} of the merged model is out of the range of {ours.dtype}, or not a number")
        if ours.is_floating_point() and (lost := (theirs - ours.double()).abs().max()) > 0.01 * theirs.abs().max():
            raise EquivalenceError(f"{name!r} of the merged model loses {lost:.1e} in {ours.dtype}: values underflow")


def _prove_alone(
    reference: nn.Module, candidate: nn.Module, parts: Mapping[str, nn.Module], result: Equivalence, tolerance: float
) -> None:
    """Compare blocks that the model has but does not run (a classifier's last layer, in a detector) on random maps."""
    for name in list(result.not_run):
        block, other = reference.get_submodule(name), parts.get(name) or candidate.get_submodule(name)
        first = next((module for module in other.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None:
            continue
        x = torch.randn(2, first.in_channels, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        try:
            expected = _run(block, x.to(first.weight.device))
        except Exception:  # it takes something else than one map: what it does then stays unproven, and is said to be
            continue
        try:
            result.blocks[name].include(compare_outputs(expected, _run(other, x.to(first.weight.device))))
        except EquivalenceError as error:
            raise EquivalenceError(f"block {name!r}: {error}") from None
        result.not_run.remove(name)
        result.alone.append(name)
    _raise_if_off(result.blocks, tolerance)


def _raise_if_off(blocks: dict[str, Difference], tolerance: float) -> None:
    for name, difference in blocks.items():
        if difference.exceeds(tolerance):
            raise EquivalenceError(
                f"block {name!r} differs by {difference.max_rel:.2e} relative (tolerance {tolerance:.0e}); border "
                f"{difference.border_rel:.2e}, interior {difference.interior_rel:.2e}"
            )
