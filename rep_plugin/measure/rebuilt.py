"""A model that is built again from what was written of it: does it compute the same, module by module?

Where it can be built at once, both run on the same inputs and every output of every module is compared bit by bit. Where
only the user's code can build it, a fingerprint is written: what decides each layer's function, and a few numbers of each
output, in float64.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rep_plugin.arguments import shown
from rep_plugin.attached import what_is_attached
from rep_plugin.checkpoints.plain import require_fields
from rep_plugin.errors import ArgumentError, CheckpointMismatchError, EquivalenceError, first_line
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.differences import TINY, tensor_paths
from rep_plugin.measure.forward import run_model
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.verify import SCALES, FastDepthwise

EXACT, SINGLE = 1e-6, 1e-3  # relative: what other machines may change in float64, and where a model computes in float32
LARGEST = 2**24  # numbers in an input of a fingerprint
# Constants of torch's layers that say nothing of their function in eval mode: sizes, which the weights tell, and what only
# training reads.
_SILENT = {
    "in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "inplace", "momentum",
    "p", "affine", "elementwise_affine", "in1_features", "in2_features",
}  # fmt: skip
Call = tuple[str, Any]  # name of a module, and what is known of its output


def require_identical(model: nn.Module, rebuilt: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Check that what a reader will build is the given model: outputs of all modules are equal, bit by bit, in eval mode.

    Args:
        model: the given model; it stays as it is.
        rebuilt: what the reader builds, with the weights that will be written. It is changed.
        inputs: images to run both on, at 1, 0.001 and 1000 times their values; those that the model refuses are left out.

    Raises:
        EquivalenceError: they differ, and it names the first module, and what differs in it; or the model takes none of the
            inputs.
        ArgumentError: the model cannot be copied.
    """
    copied = copy_model(model)
    _settle_(copied, like=dict(_tensors(rebuilt)))
    _settle_(rebuilt)
    mine, theirs = dict(copied.named_modules()), dict(rebuilt.named_modules())
    for name, module in mine.items():
        if name in theirs and (why := _static_difference(module, theirs[name])):
            raise EquivalenceError(_differs(name, module, why))
    strange = {name for name in mine if _attached(mine[name]) != _attached(theirs.get(name))}
    changing = _watch_hooks_(copied, strange)
    refused: Exception | None = None
    ran = False
    for x in inputs:
        for batches in _batches(_cast(x, copied)):
            try:
                expected = [_digests(copied, batch) for batch in batches]
            except Exception as error:  # a network refuses a size in as many ways as there are networks
                refused = refused or error
                continue
            for batch, calls in zip(batches, expected):
                _compare(copied, rebuilt, batch, calls)
            ran = True
            break
    if changing:
        name, why = next(iter(changing.items()))
        raise EquivalenceError(_differs(name, mine[name], f"it {why}, which is not written"))
    if not ran:
        reason = first_line(refused) if refused else "no input is known"
        raise EquivalenceError(
            f"{type(model).__name__} takes none of the inputs that it was tried on, so nothing can be compared: {reason}; "
            "give an example_input"
        )


def _compare(model: nn.Module, rebuilt: nn.Module, x: Tensor, calls: Sequence[Call]) -> None:
    try:
        found = _digests(rebuilt, x)
    except Exception as error:  # the given model ran on the same
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise EquivalenceError(f"what is built again does not run where the given model does: {reason}") from error
    if found == calls:
        return
    if calls != _digests(model, x):
        raise EquivalenceError(
            "the given model gives another output each time it runs on the same images, so nothing can be compared"
        )
    for (name, mine), (other, theirs) in zip(calls, found):
        if name != other:
            raise EquivalenceError(f"the given model runs {name!r} where the one that is built again runs {other!r}")
        if mine != theirs:
            module = model.get_submodule(name)
            raise EquivalenceError(_differs(name, module, difference_of(module, rebuilt.get_submodule(name))))
    raise EquivalenceError("the given model and the one that is built again do not run the same modules")


def _differs(name: str, module: nn.Module, why: str) -> str:
    why = f": {why}" if why else ""
    return f"{_word(name, module)} would compute something else once it is built again{why}; nothing was written"


def difference_of(module: nn.Module, other: nn.Module) -> str:
    """Return what differs between two modules of one name, their parts left aside; '' where that is not seen.

    Args:
        module: one of the given model.
        other: the one in its place.

    Returns:
        As ``eps is 0.001, in its place 1e-05``.
    """
    if type(module) is not type(other):
        return f"it is a {type(module).__name__}, in its place a {type(other).__name__}"
    if why := _static_difference(module, other):
        return why
    if (mine := _attached(module)) != (theirs := _attached(other)):
        return f"it {mine or 'has nothing attached'}, in its place {theirs or 'it has nothing attached'}"
    ours, others = vars(module), vars(other)
    for name in ours.keys() & others.keys():
        if not name.startswith("_") and (a := _plain(ours[name])) != (b := _plain(others[name])) and None not in (a, b):
            return f"{name} is {a}, in its place {b}"
    for name, tensor in (*module._buffers.items(), *_plain_tensors(module)):
        there = other._buffers.get(name, others.get(name))
        if tensor is not None and not (isinstance(there, Tensor) and _digest(tensor) == _digest(there)):
            return f"{name!r}, which is not among the weights, holds other values"
    return ""


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in vars(module).items() if isinstance(value, Tensor))


def _plain(value: object) -> str | None:
    """A value of an attribute as text, None for what has no text of its own."""
    if isinstance(value, (bool, int, float, str, torch.dtype, torch.Size)):
        return repr(value)
    if isinstance(value, (tuple, list)) and all(isinstance(one, (bool, int, float, str)) for one in value):
        return repr(value)
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", value))
    return None


def _static_difference(module: nn.Module, other: nn.Module) -> str:
    """What decides the function of torch's own layers, and differs; a replaced forward too."""
    ours, others = constants_of(module), constants_of(other)
    for name in (name for name in ours if name in others and ours[name] != others[name]):
        return f"{name} is {_say(ours[name])}, in its place {_say(others[name])}"
    if (what := _own_forward(module)) and what != _own_forward(other):
        return f"it {what}, which is not written"
    return ""


def _say(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value)


def _attached(module: nn.Module | None) -> str | None:
    what = None if module is None else what_is_attached(module)
    return None if what and "backward" in what else what


def _own_forward(module: nn.Module) -> str | None:
    return "has a forward of its own" if "forward" in vars(module) else None


def constants_of(module: nn.Module) -> dict[str, Any]:
    """Return what decides what a layer of torch, or of a class derived from one, computes: ``eps``, ``stride`` ...

    Args:
        module: any module.

    Returns:
        Name -> plain value; empty where torch names none.
    """
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    names = [name for kind in kinds for name in vars(kind).get("__constants__", ()) if name not in _SILENT]
    found = {name: _listed(getattr(module, name, None)) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _listed(value: Any) -> Any:
    """A plain value as JSON gives it back; None for others."""
    if isinstance(value, (tuple, list)):
        return [*map(_listed, value)]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from (*model.named_parameters(), *model.named_buffers())


def _settle_(model: nn.Module, like: Mapping[str, Tensor] | None = None) -> None:
    """Bring a model to where files are read: the CPU, eval mode, all tensors laid out alike, for that changes bits."""
    model.eval()  # not chained: mmpretrain's return None
    model.cpu()
    for name, tensor in _tensors(model):
        if tensor.layout is torch.strided and not tensor.is_quantized:
            dtype = like[name].dtype if like is not None and name in like else tensor.dtype
            tensor.data = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.data)


def _cast(x: Tensor, model: nn.Module) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return x.detach().to("cpu", dtype, copy=True)


def _batches(x: Tensor) -> Iterator[list[Tensor]]:
    """Images at several scales, in one batch where a model takes it."""
    if not x.is_floating_point():
        yield [x]
        return
    yield [torch.cat([x[:2], *(scale * x[:1] for scale in SCALES)])]
    yield [x, *(scale * x for scale in SCALES)]
    yield [x]


def _watch_hooks_(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Note in the returned dict which of some modules have a hook that puts something in the place of what it is given."""
    changing: dict[str, str] = {}
    for name in names:
        module = model.get_submodule(name)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                what = what_is_attached(module) or ""
                hooks[key] = _noting(hook, lambda name=name, what=what: changing.setdefault(name, what))
    return changing


def _noting(hook: Callable, note: Callable[[], object]) -> Callable:
    def call(*args, **kwargs):
        result = hook(*args, **kwargs)
        if result is not None:
            note()
        return result

    call.__name__ = getattr(hook, "__name__", type(hook).__name__)
    return call


@torch.no_grad()
def _trace(model: nn.Module, x: Tensor, summary: Callable[[object], Any]) -> list[Call]:
    """What is known of the output of each module, in the order of their calls, and last of the whole model."""
    calls: list[Call] = []

    def note(name: str) -> Callable:
        return lambda module, args, output: calls.append((name, summary(output)))

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        calls.append(("", summary(run_model(model, x.clone()))))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _digests(model: nn.Module, x: Tensor) -> list[Call]:
    with private_random():  # each run from the same state
        return _trace(model, x, _digest)


def _digest(output: object) -> str:
    """A digest of all tensors of an output, bit by bit."""
    found = hashlib.blake2b(digest_size=16)
    for _, tensor in tensor_paths(output):
        tensor = tensor.detach()
        if tensor.layout is not torch.strided or tensor.is_quantized:
            tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        values = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).resolve_neg()
        if values.numel():
            found.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint_of(model: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Any]:
    """Return, as plain data, by what :func:`check_fingerprint` knows a model that is built again later, on any machine.

    Args:
        model: any model; it stays as it is.
        inputs: images; the shape of the first that the model takes in float64 is used. Where it takes none, or draws random
            numbers, no outputs are noted.

    Returns:
        The constants of layers, what is attached to modules, and a few numbers of outputs.
    """
    model = copy_model(model)
    model.eval()
    model.cpu()
    layers = {name: constants for name, module in model.named_modules() if (constants := constants_of(module))}
    attached = {name: _attached(module) for name, module in model.named_modules() if _own_forward(module)}
    changing = _watch_hooks_(model, [name for name, module in model.named_modules() if _attached(module)])
    model.double()
    shapes = ([1, *x.shape[1:]] for x in inputs)
    measured = ((shape, _measure(model, shape)) for shape in shapes if 0 < math.prod(shape) <= LARGEST)
    shape, outputs = next(((shape, outputs) for shape, outputs in measured if outputs), ([], []))
    return {"layers": layers, "attached": attached | changing, "shape": shape, "outputs": outputs}


def _measure(model: nn.Module, shape: Sequence[int]) -> list:
    """[module, tolerance, numbers of its output] of a float64 model for one image at three scales; [] where it has none."""
    pixels = torch.arange(math.prod(shape), dtype=torch.float64)
    image = torch.sin(pixels * 1.7).reshape(shape) * 2  # the same on every machine
    try:
        with FastDepthwise(), private_random() as random:
            calls = _trace(model, torch.cat([image, *(scale * image for scale in SCALES)]), _numbers)
    except Exception:  # another size, or no float64, refused in as many ways as there are networks
        return []
    found, tolerance = [], EXACT
    for name, (single, numbers) in calls:
        tolerance = SINGLE if single else tolerance  # what follows is as inexact
        found.append([name, tolerance, numbers])
    return [] if random.drew else found


def _numbers(output: object) -> tuple[bool, list[float | None]]:
    """Whether an output is less exact than float64; and of each image the root mean square and a weighted mean."""
    tensors = [t for _, t in tensor_paths(output) if t.is_floating_point() and t.numel()]
    numbers: list[float | None] = []
    for tensor in tensors:
        rows = tensor.double().reshape(len(tensor) if tensor.dim() and len(tensor) == 1 + len(SCALES) else 1, -1)
        weights = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64) * 2.3)
        both = torch.stack([rows.square().mean(1).sqrt(), (rows * weights).mean(1)], 1).flatten()
        numbers += [float(f"{value:.10g}") if math.isfinite(value) else None for value in both.tolist()]
    return any(tensor.dtype != torch.float64 for tensor in tensors), numbers


FINGERPRINT = {
    "layers": dict[str, dict[str, Any]],
    "attached": dict[str, str],
    "shape": list[int],
    "outputs": list[tuple[str, float, list[float | None]]],
}


def check_fingerprint(model: nn.Module, fingerprint: Mapping[str, Any]) -> None:
    """Check that a model is the one that a fingerprint was taken of.

    Args:
        model: with its weights. It is put in eval mode, and in float64.
        fingerprint: what :func:`fingerprint_of` returned.

    Raises:
        ArgumentError: it is none.
        CheckpointMismatchError: another model. It names the first module, and what differs in it.
    """
    require_fields(fingerprint, FINGERPRINT, "the fingerprint")
    shape, outputs = fingerprint["shape"], fingerprint["outputs"]
    if outputs and not (len(shape) > 1 and min(shape) > 0 and math.prod(shape) <= LARGEST):
        raise ArgumentError(f"the fingerprint's shape is {shown(shape)}, expected that of an image")
    model.eval()
    modules = dict(model.named_modules())
    for name, constants in fingerprint["layers"].items():
        own = constants_of(modules[name]) if name in modules else {}
        for key in (key for key in constants if key in own and own[key] != constants[key]):
            what = f"{key} is {_say(own[key])}, in the saved one {_say(constants[key])}"
            raise CheckpointMismatchError(f"{_word(name, modules[name])}: {what}")
    for name, what in fingerprint["attached"].items():
        if name in modules and not _attached(modules[name]):
            raise CheckpointMismatchError(f"{_word(name, modules[name])}: in the saved one it {what}")
    found = _measure(model.double(), shape) if outputs else []
    if outputs and not found:
        raise CheckpointMismatchError(f"it does not run on an input {tuple(shape)}, as the saved one did")
    moved: list = []
    for place, (saved, mine) in enumerate(zip(outputs, found)):
        if saved[0] != mine[0]:
            raise CheckpointMismatchError(f"it runs {mine[0]!r} where the saved one ran {saved[0]!r}")
        if _is_off(saved, mine):
            moved = moved or _measure(_moved(model), shape)
            if not moved or not _is_off(mine, moved[place]):  # else rounding alone does that
                module = _word(mine[0], modules[mine[0]])
                raise CheckpointMismatchError(f"{module} computes something else than the saved one did")
    if len(outputs) != len(found):
        raise CheckpointMismatchError("it runs another number of modules than the saved one did")


def _is_off(saved: Sequence, found: Sequence) -> bool:
    (_, tolerance, one), (*_, other) = saved, found
    if len(one) != len(other):
        return True
    for place, (a, b) in enumerate(zip(one, other)):
        size = one[place - place % 2]  # its root mean square
        if (a is None) != (b is None) or (a is not None and abs(a - b) > tolerance * (size or 0) + TINY):
            return True
    return False


def _moved(model: nn.Module) -> nn.Module:
    """A copy whose weights are moved by more than rounding does."""
    moved, generator = copy_model(model), torch.Generator().manual_seed(0)
    for _, tensor in _tensors(moved):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = tensor.data * (1 + 1e-12 * noise)
    return moved


def _word(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
