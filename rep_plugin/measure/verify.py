"""The one equivalence check: two models, the same inputs, in float64."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rep_plugin.errors import ArgumentError, EquivalenceError, InconclusiveWarning
from rep_plugin.measure.forward import run_model

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
    """What :func:`verify_equivalence` measured: end to end, for each named block, and the output's sensitivity.

    ``alone`` are blocks that no input runs and that were compared on random maps, ``not_run`` those that could not be.
    """

    total: Difference = field(default_factory=Difference)
    blocks: dict[str, Difference] = field(default_factory=dict)
    sensitivity: float = 0.0
    not_run: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @property
    def conclusive(self) -> bool:
        return self.sensitivity >= MIN_SENSITIVITY

    @property
    def notes(self) -> list[str]:
        """What a report says about blocks that the model does not run."""
        notes = [f"block {name!r} is not run by the model, and proven by itself" for name in self.alone]
        return notes + [f"block {name!r} was not run by any input and is not proven" for name in self.not_run]


def flatten_outputs(output: object) -> list[Tensor]:
    """Return the floating-point tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in flatten_outputs(item)]
    return []


def compare_outputs(reference: object, candidate: object) -> Difference:
    """Return the differences of two outputs of equal structure. Non-finite values count as an infinite difference.

    A tensor without elements (no detection, say) has no difference. Raises EquivalenceError where number or shapes of the
    tensors differ.
    """
    ours, theirs = flatten_outputs(reference), flatten_outputs(candidate)
    shapes = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes[0] != shapes[1] or not ours:
        raise EquivalenceError(f"output shapes differ: expected {shapes[0]}, got {shapes[1]}")
    result = Difference()
    for a, b in zip(ours, theirs):
        if not a.numel():
            continue
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Difference(math.inf, math.inf, math.inf, math.inf)
        gap = (a.double() - b.double()).abs()
        scale = max(a.abs().max().item(), torch.finfo(torch.float64).tiny)
        largest = gap.max().item()
        border, interior = largest, largest
        if gap.dim() == 4 and min(gap.shape[2:]) > 2:
            interior = gap[:, :, 1:-1, 1:-1].max().item()
            ring = torch.cat(
                [gap[:, :, 0].flatten(), gap[:, :, -1].flatten(), gap[..., 0].flatten(), gap[..., -1].flatten()]
            )
            border = ring.max().item()
        result.include(Difference(largest, largest / scale, border / scale, interior / scale))
    return result


def sensitivity_of(output: object, pictures: int) -> float:
    """Return how much the first picture's output and the last one's differ, relative to the largest value.

    ``output`` holds batches, or one dict for each picture, as detectors return them; another number of detections is a
    change of 1.
    """
    if isinstance(output, (list, tuple)) and len(output) == pictures and all(isinstance(one, dict) for one in output):
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


def _is_float(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def default_inputs(model: nn.Module, example_input: Tensor | None = None) -> list[Tensor]:
    """Return two inputs for ``model``: ``example_input`` or a random one, and a random pair of pictures of an odd size.

    The size is ``example_input``'s, else ``pretrained_cfg['input_size']`` (timm), else 3x64x64 with the first
    convolution's channels. Raises ValueError for an example that is not a (N, C, ...) float tensor.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example_input is not None:
        if not _is_float(example_input) or example_input.dim() < 2:
            raise ArgumentError(f"example_input must be a float tensor (N, C, ...), got {type(example_input).__name__}")
        shape = tuple(example_input.shape)
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = first.in_channels if first is not None else 3
        shape = (2, *(cfg.get("input_size") or (channels, 64, 64)))
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    first = example_input if example_input is not None else torch.randn(shape, generator=generator)
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
        (sh, sw), (ph, pw), (dh, dw) = (_pair(v) for v in (stride, padding, dilation))
        x = F.pad(input, (pw, pw, ph, ph))
        kh, kw = weight.shape[2:]
        rows, cols = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        out = (
            x.new_zeros(*x.shape[:2], rows, cols)
            if bias is None
            else bias.view(1, -1, 1, 1).expand(x.shape[0], -1, rows, cols).clone()
        )
        for a in range(kh):
            for b in range(kw):
                shifted = x[
                    :, :, a * dh : a * dh + sh * (rows - 1) + 1 : sh, b * dw : b * dw + sw * (cols - 1) + 1 : sw
                ]
                out.addcmul_(shifted, weight[:, 0, a, b].view(1, -1, 1, 1))
        return out


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _run(model: nn.Module, *args, **kwargs) -> object:
    with torch.no_grad(), _FastDepthwise():
        return model(*args, **kwargs)


def rounding_error(model: nn.Module, x: Tensor) -> float:
    """Return how far an eval-mode model's own output for ``x`` lies from that of the same model in float64, relative."""
    return compare_outputs(_run(copy.deepcopy(model).double(), x.double()), _run(model, x)).max_rel


def _run_whole(model: nn.Module, x: Tensor) -> object:
    with torch.no_grad(), _FastDepthwise():
        return run_model(model, x)


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
                self.calls[name] = copy.deepcopy((args, kwargs, output))

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
    """Check that two eval-mode models compute the same function on every input.

    Both are copied to float64 first, so they are left as they are; ``keep=False`` saves the copies of models that are not
    needed any more. Each named block is also compared alone: the candidate's (or what ``parts`` holds under that name) is
    given the reference's own input to it, or a random map where no input runs it. An input that the *reference* cannot take
    (an odd size, say) is left out, provided that the first one works.

    ``run_names`` are layers of the reference that are proven end to end alone, and so only if an input runs them.

    Raises EquivalenceError over ``tolerance`` (relative) or on a non-finite value, naming the first block that is off;
    warns with InconclusiveWarning where another input changes the output by less than 1e-3.
    """
    if keep:
        reference, candidate = copy.deepcopy(reference), copy.deepcopy(candidate)
    parts = {name: copy.deepcopy(part).double() for name, part in (parts or {}).items()}
    for model in (reference.double(), candidate.double(), *parts.values()):
        model.eval()  # not chained: mmpretrain's return None
    result = Equivalence(blocks={name: Difference() for name in block_names}, not_run=list(block_names))
    idle = set(run_names)
    for name in run_names:
        reference.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: idle.discard(name))
    for index, x in enumerate(inputs):
        recorder = _Recorder(reference, block_names)
        try:
            expected = _run_whole(reference, x.to(torch.float64, copy=True))
        except Exception:  # a size that a network does not take is refused in as many ways as there are networks
            if index == 0:
                raise
            continue
        finally:
            recorder.remove()
        if not all(torch.isfinite(out).all() for out in flatten_outputs(expected)):
            raise EquivalenceError("the given model's own output is not finite, so nothing can be compared")
        for name, (args, kwargs, output) in recorder.calls.items():
            try:
                found = compare_outputs(output, _run(parts.get(name) or candidate.get_submodule(name), *args, **kwargs))
            except EquivalenceError as error:
                raise EquivalenceError(f"block {name!r}: {error}") from None
            result.blocks[name].include(found)
            if name in result.not_run:
                result.not_run.remove(name)
        _raise_if_off(result.blocks, tolerance)
        total = compare_outputs(expected, _run_whole(candidate, x.to(torch.float64, copy=True)))
        result.total.include(total)
        if total.exceeds(tolerance):
            raise EquivalenceError(
                f"the whole model differs by {total.max_rel:.2e} relative (tolerance {tolerance:.0e}) although each of "
                f"{len(block_names)} blocks agrees"
            )
        if len(x) < 2 and index == 0:
            continue  # one picture says nothing about another
        result.sensitivity = max(result.sensitivity, sensitivity_of(expected, len(x)))
    _prove_alone(reference, candidate, parts, result, tolerance)
    result.not_run += [name for name in run_names if name in idle]
    if result.not_run:
        warnings.warn(
            f"inconclusive: no input runs block {result.not_run[0]!r} ({len(result.not_run)} such blocks)",
            InconclusiveWarning,
            stacklevel=2,
        )
    if not result.conclusive:
        warnings.warn(
            f"inconclusive: another input changes the output by {result.sensitivity:.1e} only (expected >= "
            f"{MIN_SENSITIVITY:.0e}), so equality proves little",
            InconclusiveWarning,
            stacklevel=2,
        )
    return result


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
