"""The one equivalence check: two models, the same inputs, in float64."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rep_plugin.arguments import Positive, That, checked, shown
from rep_plugin.errors import ArgumentError, EquivalenceError, InconclusiveWarning, did_you_mean, first_line
from rep_plugin.measure.branches import Branches, find_branches
from rep_plugin.measure.copies import copy_inputs, copy_model, copy_values
from rep_plugin.measure.differences import (
    Difference,
    Floor,
    change_of,
    compare_outputs,
    flatten_outputs,
    sensitivity_of,
    shapes_of,
)
from rep_plugin.measure.forward import of_user, require_numbers, run_model
from rep_plugin.measure.progress import track
from rep_plugin.measure.randomness import private_random

MIN_SENSITIVITY = 1e-3
SCALES = (1e-3, 1e3)
ROUNDING = 1e-13  # relative: what sums of float64 numbers may lose, some hundred units in the last place
ILL_CONDITIONED = 1e-6  # the share of a channel that rounding may change


@dataclass
class Equivalence:
    """The measurements of :func:`verify_equivalence`.

    Args:
        total: differences end to end.
        blocks: differences of each named block.
        sensitivity: how much another input changes the output, relative; None where no batch has a second image.
        not_run: blocks that no input runs and that cannot be compared alone.
        alone: blocks that no input runs and that were compared on random maps.
        left_out: what was not compared, and why.

    Example:
        >>> Equivalence(sensitivity=1e-11).notes
        ['inconclusive: sensitivity 1.0e-11']
    """

    total: Difference = field(default_factory=Difference)
    blocks: dict[str, Difference] = field(default_factory=dict)
    sensitivity: float | None = 0.0
    not_run: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def conclusive(self) -> bool:
        """Whether equality proves something: the output depends on the input."""
        return self.sensitivity is None or self.sensitivity >= MIN_SENSITIVITY

    @property
    def ill_conditioned(self) -> list[str]:
        """What is ill-conditioned: the model or a block, and where; equality proves little there."""
        parts = {"the model": self.total, **{f"block {name!r}": found for name, found in self.blocks.items()}}
        return [
            f"{part} is ill-conditioned: rounding alone may change {found.rounding_where} by {min(found.rounding, 1):.0e} "
            "of its size, so equality proves little there"
            for part, found in parts.items()
            if found.rounding > ILL_CONDITIONED
        ]

    @property
    def notes(self) -> list[str]:
        """What a report says about what the model does not run, about what is left out, and of an inconclusive proof."""
        notes = [f"block {name!r} is not run by the model, and proven by itself" for name in self.alone]
        notes += [f"block {name!r} was not run by any input and is not proven" for name in self.not_run]
        notes += [*self.left_out, *self.ill_conditioned]
        return notes if self.conclusive else [*notes, f"inconclusive: sensitivity {self.sensitivity:.1e}"]

    def warn(self, stacklevel: int = 3) -> None:
        """Warn, with InconclusiveWarning, of blocks that are not proven and of what proves little."""
        texts = [f"inconclusive: {text}" for text in self.ill_conditioned[:1]]
        if self.not_run:
            first, count = self.not_run[0], len(self.not_run)
            texts.append(f"inconclusive: no input runs block {first!r} ({count} such blocks)")
        if not self.conclusive:
            texts.append(
                f"inconclusive: another input changes the output by {self.sensitivity:.1e} only (expected >= "
                f"{MIN_SENSITIVITY:.0e}), so equality proves little"
            )
        for text in texts:
            warnings.warn(text, InconclusiveWarning, stacklevel=stacklevel)


def default_inputs(model: nn.Module, example_input: Tensor | None = None) -> list[Tensor]:
    """Return two inputs for a model: the example or one random image, and one random image of an odd size.

    Args:
        model: the model; where no example is given, the size is ``pretrained_cfg['input_size']`` (timm), else 64x64 with
            the first convolution's channels.
        example_input: images (N, C, ...), floating point.

    Returns:
        Two new tensors, on the model's device and in its dtype. :func:`verify_equivalence` adds images at other scales.

    Raises:
        ArgumentError: the example is not a float tensor (N, C, ...), or holds values that are not finite.

    Example:
        >>> from torch import nn
        >>> [tuple(x.shape) for x in default_inputs(nn.Conv2d(3, 8, 3))]
        [(1, 3, 64, 64), (1, 3, 63, 63)]
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example_input is not None:
        floats = isinstance(example_input, Tensor) and example_input.is_floating_point()
        if not floats or example_input.dim() < 2 or example_input.is_meta or not example_input.numel():
            raise ArgumentError(f"example_input must be a float tensor (N, C, ...), got {shown(example_input)}")
        require_numbers("example_input", example_input)
        shape = tuple(example_input.shape)
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = first.in_channels if first is not None else 3
        shape = (1, *(cfg.get("input_size") or (channels, 64, 64)))
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    first = example_input.detach() if example_input is not None else torch.randn(shape, generator=generator)
    first = first.to(device, dtype, copy=True)  # a model may work in place
    other = (1, *shape[1:])
    if len(shape) == 4:
        other = (1, shape[1], shape[2] - 1 + shape[2] % 2, shape[3] - 1 + shape[3] % 2)
    return [first, torch.randn(other, generator=generator).to(device, dtype)]


class FastDepthwise(TorchFunctionMode):
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


class _InDouble(TorchFunctionMode):
    """Keeps a float64 run in float64 where the forward names or makes float32: ``x.float()``, a grid of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        out = func(*args, **kwargs)
        return out.double() if isinstance(out, Tensor) and out.dtype == torch.float32 else out


class _Moving(TorchDispatchMode):
    """Moves the results of all operations by a random relative amount, as rounding does by less."""

    def __init__(self, seed: int, amount: float):
        super().__init__()
        self.generator, self.amount = torch.Generator().manual_seed(seed), amount

    def noise(self, tensor: Tensor) -> Tensor:
        noise, most = torch.empty(tensor.shape, dtype=torch.float64), abs(self.amount)
        noise.uniform_(1 - most, 1 + most, generator=self.generator)
        return (noise if self.amount > 0 else 2 - noise).to(tensor.device, tensor.dtype)

    def move(self, tensor: Tensor) -> Tensor:
        return tensor * self.noise(tensor) if tensor.is_floating_point() else tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if any(one.alias_info is not None for one in func._schema.returns):  # a view, or what was given: moved already
            return output.mul_(self.noise(output)) if func._schema.is_mutable and _is_float(output) else output
        return tree_map_only(Tensor, self.move, output)


def _is_float(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


@torch.no_grad()
def _run(forward: Callable, *args, **kwargs) -> object:
    with FastDepthwise(), private_random():  # each run from the same state: noise is the same on both sides
        return forward(*args, **kwargs)


class Call(NamedTuple):
    """What a module is run on: copies each time, for a module may work in place."""

    forward: Callable
    args: tuple
    kwargs: Mapping[str, Any] = {}

    def run(self, module: nn.Module) -> object:
        args, kwargs = copy_values((self.args, self.kwargs))
        with _InDouble():
            return _run(self.forward, module, *args, **kwargs)

    @torch.no_grad()
    def run_moved(self, module: nn.Module, seed: int, amount: float) -> object:
        """Run a copy whose weights, buffers, inputs and results in between are moved by a random relative amount."""
        mode, module = _Moving(seed, amount), copy_model(module)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = mode.move(tensor.data)
        args, kwargs = tree_map_only(Tensor, mode.move, (self.args, dict(self.kwargs)))
        with mode:
            return self._replace(args=args, kwargs=kwargs).run(module)


class UnstableError(Exception):
    """Rounding decides the shapes of an output."""


def measure_floor(
    call: Call, outputs: Sequence[tuple[nn.Module, object]], tolerance: float, amount: float
) -> Iterator[Floor]:
    """Yield what rounding may change in the outputs of models, each time after one more try.

    Numbers are moved forth and back: where a tie is broken, or a limit passed, by one, it is not by the other.

    Args:
        call: what the models are run on.
        outputs: (model, its output) of each, of equal shapes.
        tolerance: the relative one that differences are held against.
        amount: how much each number is moved, relative.

    Returns:
        The floor, as it grows.
    """
    floor = Floor(tolerance)
    for seed in range(3):
        for module, output in outputs:
            for sign in (1, -1):
                floor.include(output, call.run_moved(module, seed, sign * amount))
            yield floor


def compare_call(
    call: Call,
    reference: nn.Module,
    candidate: nn.Module,
    expected: object,
    tolerance: float,
    beside: object = None,
) -> Difference:
    """Compare a candidate's output with the expected one of the reference.

    A difference over the tolerance is no fault where rounding makes one as large in one of the two models.

    Args:
        call: what both are run on.
        reference: the one that is right, in float64.
        candidate: the other.
        expected: the output of the reference.
        tolerance: the relative one that differences are held against.
        beside: output of the reference for other images.

    Returns:
        The differences.

    Raises:
        EquivalenceError: the outputs cannot be compared, or the candidate does not run.
        UnstableError: rounding decides the shapes of the output.
    """
    try:
        found = call.run(candidate)
    except Exception as error:  # the model's own code, of which a part reads a layer that is no longer there
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise EquivalenceError(f"the changed model does not run where the given one does: {reason}") from error

    def judge(output: object, floor: Floor | None = None) -> Difference | EquivalenceError:
        try:
            return compare_outputs(expected, output, floor, beside)
        except EquivalenceError as error:
            return error

    def passes(judged: Difference | EquivalenceError) -> TypeGuard[Difference]:
        return isinstance(judged, Difference) and not judged.exceeds(tolerance)

    strict = judge(found)
    if passes(strict):
        return strict
    if not passes(judge(call.run(reference))):
        raise EquivalenceError(
            "the given model gives another output each time it runs on the same images, so nothing can be compared"
        )
    both = [(reference, expected), (candidate, found)][: 1 + (shapes_of(expected) == shapes_of(found))]
    for floor in measure_floor(call, both, tolerance, min(ROUNDING, tolerance / 1e4)):
        if not floor.stable:
            raise UnstableError
        if passes(judged := judge(found, floor)):
            break
    if isinstance(judged, EquivalenceError):
        raise judged
    return judged  # what rounding explains is not what is named


def run_exact(forward: Callable, *args, **kwargs) -> object:
    """Return ``forward(*args, **kwargs)`` in float64, without gradients; depthwise convolutions take the fast way."""
    with _InDouble():
        return _run(forward, *args, **kwargs)


def rounding_error(model: nn.Module, x: object) -> float:
    """Return how far a model's own output lies from that of the same model in float64, relative.

    Args:
        model: the model, in eval mode.
        x: images (N, C, H, W), or all arguments, as :func:`~rep_plugin.measure.forward.run_model` takes them.

    Returns:
        The largest relative error.
    """
    exact = _run(run_model, copy_model(model).double(), doubled(x))
    return compare_outputs(exact, _run(run_model, model, copy_inputs(x))).max_rel


def doubled(example: Any) -> Any:
    """Return an example in float64: a tensor, or tuples, lists and dicts of tensors, of which those of integers stay."""
    return tree_map_only(Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, example)


class _Recorder:
    """Keeps the first call's inputs and output of chosen modules, as copies: a later layer may work in place."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.calls: dict[str, tuple] = {}
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


class _Compared(NamedTuple):
    """Which batch was compared (None: none), the reference's output, and why the one before it was not."""

    number: int | None
    expected: object
    refused: Exception | None


@dataclass
class _Proof:
    """Two models that are compared, input by input."""

    reference: nn.Module
    candidate: nn.Module
    parts: Mapping[str, nn.Module]
    tolerance: float
    result: Equivalence
    beside: object = None

    def part(self, name: str) -> nn.Module:
        return self.parts.get(name) or self.candidate.get_submodule(name)

    def run_reference(self, x: Tensor) -> tuple[Call, object, dict[str, tuple]]:
        """Return how the models are run on images, the reference's output, and the calls of its blocks."""
        recorder, call = _Recorder(self.reference, [*self.result.blocks]), Call(run_model, (x,))
        try:
            expected = call.run(self.reference)
        finally:
            recorder.remove()
        return call, expected, recorder.calls

    def compare(self, call: Call, expected: object, calls: Mapping[str, tuple]) -> None:
        """Compare the blocks that ran, then the whole models."""
        for name, (args, kwargs, output) in track(calls.items(), "comparing blocks"):
            self.compare_block(name, Call(nn.Module.__call__, args, kwargs), output)
        self.raise_if_off()
        total = compare_call(call, self.reference, self.candidate, expected, self.tolerance, self.beside)
        self.result.total.include(total)
        if total.exceeds(self.tolerance):
            agree = f", although each of {len(calls)} blocks agrees" if calls else ""
            raise EquivalenceError(
                f"the whole model differs by {total.max_rel:.2e} relative (tolerance {self.tolerance:.0e}) in "
                f"{total.where}{agree}"
            )

    def compare_block(self, name: str, call: Call, output: object) -> None:
        block = self.reference.get_submodule(name)
        try:
            found = compare_call(call, block, self.part(name), output, self.tolerance)
        except EquivalenceError as error:
            raise EquivalenceError(f"block {name!r}: {error}") from None
        self.result.blocks[name].include(found)
        if name in self.result.not_run:
            self.result.not_run.remove(name)

    def raise_if_off(self) -> None:
        for name, difference in self.result.blocks.items():
            if difference.exceeds(self.tolerance):
                raise EquivalenceError(
                    f"block {name!r} differs by {difference.max_rel:.2e} relative (tolerance {self.tolerance:.0e}) in "
                    f"{difference.where}; border {difference.border_rel:.2e}, interior {difference.interior_rel:.2e}"
                )

    def compare_first(self, *batches: Tensor) -> _Compared:
        """Compare on the first of some batches that the reference takes, with finite outputs of shapes that are no chance."""
        refused: Exception | None = None
        for number, x in enumerate(batches):
            try:
                call, expected, calls = self.run_reference(x)
            except (
                Exception
            ) as error:  # a size that a network does not take is refused in as many ways as there are networks
                refused = error
                continue
            if not all(torch.isfinite(out).all() for out in flatten_outputs([expected, *calls.values()])):
                refused = EquivalenceError("the given model's own output is not finite, so nothing can be compared")
                continue
            try:
                self.compare(call, expected, calls)
            except UnstableError:
                refused = EquivalenceError(
                    "rounding decides the shapes of the given model's output, so nothing can be compared"
                )
                continue
            self.beside = expected
            return _Compared(number, expected, refused)
        return _Compared(None, None, refused)

    def compare_images(self, x: Tensor, scales: Sequence[float], name: str) -> None:
        """Compare on given images, and on the first one, mirrored, at other scales: in one batch where the model takes it."""
        x = x.to(torch.float64, copy=True)
        scaled = [scale * x[:1].flip(-1) for scale in scales]
        batches = [torch.cat([x, *scaled[:count]]) for count in range(len(scales), -1, -1)]
        done = self.compare_first(*batches)
        if done.number is None:
            with of_user(self.reference, x, name):
                raise done.refused
        for scale in scales[len(scales) - done.number :]:
            refused = done.refused
            if not isinstance(refused, EquivalenceError):  # the number of images is the model's: as many at this scale
                other = self.compare_first(scale * x.flip(-1))
                if other.number is not None:
                    self.sensitive(change_of(done.expected, other.expected))
                    continue
                refused = other.refused
            reason = "the given model does not take them"
            if isinstance(refused, EquivalenceError):
                reason = str(refused).removesuffix(", so nothing can be compared")
            self.result.left_out.append(f"images at {scale:g} times their values are not compared: {reason}")
        images = len(batches[done.number])
        if images > 1:
            self.sensitive(sensitivity_of(done.expected, images, max(len(x) - 1, 1)))

    def compare_size(self, x: Tensor, image: Tensor) -> None:
        """Compare on images of another size; where the reference does not take it, on one given image alone."""
        done = self.compare_first(x.double())
        if isinstance(done.refused, EquivalenceError):
            raise done.refused
        if done.number is None:
            self.compare_first(image.double())
        elif len(x) > 1:
            self.sensitive(sensitivity_of(done.expected, len(x)))

    def sensitive(self, change: float) -> None:
        self.result.sensitivity = max(self.result.sensitivity or 0.0, change)

    def compare_alone(self) -> None:
        """Compare blocks that the model has but does not run (a classifier's last layer, in a detector) on random maps."""
        for name in list(self.result.not_run):
            block, other = self.reference.get_submodule(name), self.part(name)
            first = next((module for module in other.modules() if isinstance(module, nn.Conv2d)), None)
            if first is None:
                continue
            x = torch.randn(
                2, first.in_channels, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
            call = Call(nn.Module.__call__, (x.to(first.weight.device),))
            try:
                expected = call.run(block)
            except (
                Exception
            ):  # it takes something else than one map: what it does then stays unproven, and is said to be
                continue
            self.compare_block(name, call, expected)
            self.result.alone.append(name)
        self.raise_if_off()


def _require_modules(argument: str, names: Sequence[str], model: nn.Module) -> None:
    known = dict(model.named_modules())
    if unknown := [name for name in names if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ArgumentError(f"{argument} names {unknown[0]!r}, which the {type(model).__name__} does not have{hint}")


Inputs = Annotated[
    Sequence[Tensor], That(lambda inputs: inputs and min(x.dim() for x in inputs) > 1, "a list of tensors (N, C, ...)")
]


@checked
def verify_equivalence(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Inputs,
    block_names: Sequence[str] = (),
    tolerance: Positive = 1e-9,
    parts: Mapping[str, nn.Module] | None = None,
    keep: bool = True,
    run_names: Sequence[str] = (),
    scales: Sequence[float] = SCALES,
    branches: Branches | None = None,
    name: str = "inputs[0]",
) -> Equivalence:
    """Check that two models compute the same function in eval mode, in float64.

    Every channel of every image is held against its own size. Where a difference is over the tolerance, the reference runs
    again with all numbers moved by 1e-13, and the candidate too: what that changes is rounding, and allowed.

    Args:
        reference: the model to compare with.
        candidate: the model that must compute the same.
        inputs: images (N, C, H, W). One that the reference cannot take (an odd size, say) is left out, but the first; then
            one image runs alone. Where the forward takes another path at another size or number of images, see
            :mod:`rep_plugin.measure.branches`, random images of that shape are compared too.
        block_names: modules that are also compared alone: the candidate's is given the reference's own input to it, or a
            random map where no input runs it.
        tolerance: largest allowed difference, relative to the channel's largest value.
        parts: modules to compare in the place of the candidate's, by name.
        keep: copy the models first; False converts the given ones to float64.
        run_names: modules of the reference that are proven end to end alone, and so only where an input runs them.
        scales: the first batch also holds its first image, mirrored, times each of these, where that stays finite.
        branches: what :func:`~rep_plugin.measure.branches.find_branches` has found in the reference; None: it is called.
        name: of the first input, for the message that the reference does not take it.

    Returns:
        The measurements. InconclusiveWarning is given where another input changes the output by less than 1e-3, and where
        rounding may change a channel by more than 1e-6 of its size.

    Raises:
        EquivalenceError: over the tolerance, or a value is not finite; names the first block that is off.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(3, 8, 3)
        >>> verify_equivalence(conv, conv, [torch.randn(2, 3, 8, 8)]).total.max_rel
        0.0
    """
    _require_modules("block_names", block_names, reference)
    _require_modules("block_names", [name for name in block_names if name not in (parts or {})], candidate)
    _require_modules("run_names", run_names, reference)
    if keep:
        reference, candidate = copy_model(reference), copy_model(candidate)
    parts = {name: copy_model(part).double() for name, part in (parts or {}).items()}
    for model in (reference.double(), candidate.double(), *parts.values()):
        model.eval()  # not chained: mmpretrain's return None
    result = Equivalence(blocks={name: Difference() for name in block_names}, not_run=list(block_names))
    branches = find_branches(reference, inputs[0].double()) if branches is None else branches
    proof = _Proof(reference, candidate, parts, tolerance, result)
    idle = set(run_names)
    for name in run_names:
        reference.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: idle.discard(name))
    for index, x in enumerate(track(inputs, "comparing whole models")):
        if index == 0:
            proof.compare_images(x, scales, name)
        else:
            proof.compare_size(x, inputs[0][:1])
    for shape, place in branches.sizes.items():
        x = branches.input_of(shape, inputs[0])
        if x is None or proof.compare_first(x.double()).number is None:
            result.left_out.append(
                f"for inputs {shape} the forward takes another path in {place}, which is not compared"
            )
    result.left_out += branches.notes
    proof.compare_alone()
    result.not_run += [name for name in run_names if name in idle]
    result.warn()
    return result


def require_castable(proven: nn.Module, given: nn.Module) -> None:
    """Check that the numbers of a proven float64 model can be those of one in the type of the given model.

    Args:
        proven: in float64.
        given: the model that it was made of.

    Raises:
        EquivalenceError: a tensor is out of its type's range, or a channel vanishes in it; names tensor and channel.
    """
    state = given.state_dict()
    usual = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    numbers = proven.state_dict()
    _require_kept(
        {
            name: tensor.to(state[name].dtype if name in state else usual) if tensor.is_floating_point() else tensor
            for name, tensor in numbers.items()
        },
        numbers,
    )


def require_rounded(converted: nn.Module, proven: nn.Module) -> None:
    """Check that a model holds the numbers of the float64 model that was proven, rounded once.

    Args:
        converted: the model that is handed out.
        proven: the same in float64.

    Raises:
        EquivalenceError: a tensor differs, or as :func:`require_castable`.
    """
    ours, theirs = converted.state_dict(), proven.state_dict()
    for (name, tensor), exact in zip(ours.items(), theirs.values(), strict=True):
        if not torch.equal(tensor, exact.to(tensor.dtype)):
            raise EquivalenceError(f"{name!r} is not the rounded value of the proven float64 merge")
    _require_kept(ours, dict(zip(ours, theirs.values())))


def _require_kept(rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Check that no channel of a layer is lost: a weight that vanishes beside a bias is not."""
    sizes: dict[tuple[str, int], Tensor] = {}
    lost: dict[str, Tensor] = {}
    for name, tensor in rounded.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not (finite := torch.isfinite(tensor)).all():
            index = (~finite).nonzero()[0].tolist()
            what = f"channel {index[0]} of {name!r}" if index else repr(name)
            raise EquivalenceError(f"{what} is out of the range of {tensor.dtype}, or not a number")
        rows = exact[name].reshape(len(tensor) if tensor.dim() else 1, -1).double()
        key = name.rpartition(".")[0], len(rows)
        sizes[key] = torch.maximum(size := rows.abs().amax(1), sizes.get(key, size))
        lost[name] = (rows - tensor.reshape(rows.shape).double()).abs().amax(1)
    for name, amounts in lost.items():
        size = sizes[name.rpartition(".")[0], len(amounts)]
        if (vanish := amounts > 0.01 * size).any():
            channel = int(vanish.nonzero()[0])
            raise EquivalenceError(
                f"channel {channel} of {name!r} ({size[channel]:.1e}) loses {amounts[channel]:.1e} in "
                f"{rounded[name].dtype}: values underflow; set the channel to zero if it is dead, or convert the model to "
                "a wider type first"
            )
