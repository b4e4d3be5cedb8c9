"""Where a forward decides by values or sizes: found by watching which operations it runs, and in which line.

The model runs on the ``meta`` device, where nothing is computed. A forward whose code asks no map for its size takes one
path for all sizes; that of another runs at twenty shapes more. What cannot run there is watched on random images, at the
smaller of these shapes.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.forward import arguments_of, run_model
from rep_plugin.measure.randomness import private_random

SIDES = (32, 48, 64, 96, 112, 128, 192, 224, 256, 384, 512, 1024)
BATCHES = (1, 2, 3, 5, 8, 16, 64)
LARGEST = 640  # side of the largest image that a proof runs unasked
SMALL = 128  # side of one that is run only to be watched
_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parents[1]
_OPERATORS = {str(_TORCH / "_tensor.py"), str(_TORCH / "overrides.py")}  # between ``len(x)`` and what asks for it
# What a tensor answers when it becomes a value of Python, on the meta device: something, so that the forward goes on.
_READS = {
    "__bool__": bool, "is_nonzero": bool, "equal": bool, "allclose": bool, "__contains__": bool, "__int__": int,
    "__index__": int, "__float__": float, "__complex__": complex, "item": None, "tolist": None, "numpy": None,
}  # fmt: skip
# What a tensor answers that is the same for all sizes.
_NO_SIZES = {
    "dim",
    "ndim",
    "dtype",
    "device",
    "layout",
    "requires_grad",
    "grad",
    "grad_fn",
    "get_device",
    "element_size",
}


class Place(NamedTuple):
    """A line of a forward.

    Args:
        module: name of the module that runs, empty for the root.
        line: file and line, empty where they are torch's or ours.
        kind: class of the module.
    """

    module: str
    line: str
    kind: str = ""

    def __str__(self) -> str:
        name = repr(self.module) if self.module else self.kind or "the model"
        return f"{name} ({self.line})" if self.line else name


def place_of(modules: Mapping[int, str], stop: CodeType | None = None) -> Place:
    """Return which module of a model is running, and the line, where that is no code of ours or of torch.

    Args:
        modules: {id of a module: its name, empty for the root}.
        stop: the code of the function that has called the model.

    Returns:
        The place.
    """
    name, line, kind = None, "", ""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not stop and (name is None or not line):
        path = frame.f_code.co_filename
        if name is None and id(owner := frame.f_locals.get("self")) in modules:
            name, kind = modules[id(owner)], type(owner).__name__
        if not line and not is_quiet(path):
            line = f"{short_path(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return Place(name or "", line, kind)


@lru_cache
def is_quiet(filename: str) -> bool:
    """Return whether a file is torch's or ours, or none."""
    return filename.startswith("<") or any(Path(filename).is_relative_to(folder) for folder in (_TORCH, _OURS))


def short_path(path: str) -> str:
    """Return of an installed file the path inside of site-packages, of others the name."""
    parts = Path(path).parts
    return "/".join(parts[parts.index("site-packages") + 1 :]) if "site-packages" in parts else parts[-1]


class _Watch(TorchFunctionMode):
    """Notes every operation on what depends on the input, and every value that Python reads of it."""

    def __init__(self, model: nn.Module, x: Any, own: Mapping[int, Tensor]):
        super().__init__()
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.tensors = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.own = own
        self.steps: Counter[tuple[Place, str, tuple[str, ...]]] = Counter()
        self.reads: dict[Place, None] = {}
        self.asks_size = False
        self.stop = sys._getframe(1).f_code
        # What depends on the input; held, so that no other tensor takes its id.
        self.held = {id(leaf): leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        depends, name = any(id(t) in self.held for t in given), getattr(func, "__name__", "")
        if name in _READS:
            if depends:
                self.reads.setdefault(place_of(self.modules, self.stop))
            if any(t.is_meta for t in given):
                return self._answer(func, name, given, args, kwargs)
        out = _shape_only(name, *args, **kwargs) if given and given[0].is_meta else None
        out = func(*args, **kwargs) if out is None else out
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if depends and made:
            self.held.update((id(t), t) for t in made)
            names = tuple(self.tensors[id(t)] for t in given if id(t) in self.tensors)
            self.steps[place_of(self.modules, self.stop), name, names] += 1
        if depends and not self.asks_size and not isinstance(out, Tensor):
            self.asks_size = _may_tell_size(func, name) and _is_called_by_model()
        return out

    def _answer(self, func, name: str, given: list[Tensor], args: tuple, kwargs: dict) -> Any:
        if all(id(t) in self.own for t in given):  # a parameter's own value
            return func(*(self.own.get(id(a), a) for a in args), **kwargs)
        if name in ("tolist", "numpy"):
            return getattr(torch.ones(given[0].shape, dtype=given[0].dtype), name)()
        kind = _READS[name] or (
            bool if given[0].dtype == torch.bool else float if given[0].is_floating_point() else int
        )
        return kind(name not in ("__bool__", "is_nonzero", "equal", "allclose", "__contains__") and kind is not bool)


def _may_tell_size(func, name: str) -> bool:
    """Whether an answer that is no tensor may differ between sizes: a size, or a tuple of as many maps."""
    name = func.__self__.__name__ if name == "__get__" else name
    return name not in _NO_SIZES and not name.startswith("is_")


def _is_called_by_model() -> bool:
    """Whether the function that runs is called by code that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _OPERATORS:
        frame = frame.f_back
    return frame is not None and not any(Path(frame.f_code.co_filename).is_relative_to(f) for f in (_TORCH, _OURS))


_KEEP_SHAPE = {
    "batch_norm", "relu", "relu_", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "mish",
    "leaky_relu", "prelu", "dropout", "layer_norm",
}  # fmt: skip
_BROADCAST = {"add", "sub", "mul"}


def _shape_only(name: str, *args, **kwargs) -> Tensor | None:
    """The output of the commonest operations on the meta device, for which torch takes up to 7 ms; None for others."""
    if name in _KEEP_SHAPE and isinstance(args[0], Tensor):
        return torch.empty_like(args[0])
    if name in _BROADCAST and len(args) == 2 and not kwargs and all(isinstance(a, Tensor) and a.is_meta for a in args):
        a, b = args
        return a.new_empty(torch.broadcast_shapes(a.shape, b.shape)) if a.dtype == b.dtype else None
    if name != "conv2d" or len(args) != 7 or kwargs or args[0].dim() != 4 or isinstance(args[4], str):
        return None
    x, weight, _, stride, padding, dilation, _ = args
    pairs = [pair if isinstance(pair, tuple) else (pair, pair) for pair in (padding, dilation, stride)]
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, d, s in zip(x.shape[2:], weight.shape[2:], *pairs)]
    return x.new_empty((x.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


@dataclass
class Branches:
    """Where a forward decides by values or sizes.

    Args:
        values: where a value of a tensor becomes one of Python.
        sizes: {input shape: where the forward takes another path than for the shapes before it}.

    Example:
        >>> from torch import nn
        >>> find_branches(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
        Branches(values=[], sizes={})
    """

    values: list[Place] = field(default_factory=list)
    sizes: dict[tuple[int, ...], Place] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a report says of decisions by values, one line for each place."""
        shown, more = self.values[:3], len(self.values) - 3
        notes = [
            f"the forward decides by a value in {place}: only the path of the given inputs is proven" for place in shown
        ]
        return [*notes, f"and by values in {more} more places"] if more > 0 else notes

    def input_of(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Return random images of a shape.

        Args:
            shape: one of :attr:`sizes`.
            like: images, whose device and dtype are taken.

        Returns:
            The images; one where a size matters. None where they are too large to run unasked, in float64.
        """
        number = shape[0] if shape[1:] == tuple(like.shape[1:]) else 1
        if number * shape[-1] * shape[-2] > LARGEST**2:
            return None
        generator = torch.Generator().manual_seed(0)
        return torch.randn((number, *shape[1:]), generator=generator).to(like.device, like.dtype)

    def inside(self, name: str) -> str | None:
        """Return what is decided in a module or in its parts, None for nothing.

        Args:
            name: name of the module.
        """
        for place in self.values:
            if _is_inside(place.module, name):
                return f"its forward decides by a value in {place}"
        for shape, place in self.sizes.items():
            if _is_inside(place.module, name):
                return f"its forward takes another path for an input {shape}, in {place}"
        return None


def _is_inside(module: str, name: str) -> bool:
    return not name or module == name or module.startswith(f"{name}.")


def find_branches(model: nn.Module, x: object, other_sizes: bool = True, other_batches: bool = True) -> Branches:
    """Return where the forward of a model decides by values, sizes or the number of images.

    Args:
        model: a model in eval mode. It is not changed.
        x: images (N, C, H, W); of another kind of input no other shape is tried.
        other_sizes: try other heights and widths.
        other_batches: try other numbers of images.

    Returns:
        The places.
    """
    found = Branches()
    watched = _Watched(model)
    base = watched.run(x)
    device = "meta" if base is not None else getattr(x, "device", None)
    if base is None and (base := watched.run_real(x)) is None:
        return found
    found.values = list(base.reads)
    if not isinstance(x, Tensor) or x.dim() != 4 or not base.asks_size:
        return found
    seen = [base.steps]
    for shape in _other_shapes(tuple(x.shape), other_sizes, other_batches):
        if device == "meta":
            watch = watched.run(torch.empty(shape, dtype=x.dtype, device=device))
        elif shape[0] * shape[2] * shape[3] <= max(SMALL**2, 4 * x[:, 0].numel()):
            watch = watched.run_real(torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(x))
        else:
            continue
        if watch is None:
            continue
        found.values += [place for place in watch.reads if place not in found.values]
        if watch.steps not in seen:
            seen.append(watch.steps)
            found.sizes[shape] = _first_difference(watch, base)
    return found


def _other_shapes(shape: tuple[int, ...], sizes: bool, batches: bool) -> Iterator[tuple[int, ...]]:
    number, channels, height, width = shape
    if sizes:
        odd = (height - 1 + height % 2, width - 1 + width % 2)
        sides = [odd, *((side, side) for side in SIDES), (96, 160), (160, 96), (97, 129)]
        yield from ((number, channels, *pair) for pair in dict.fromkeys(sides) if pair != (height, width))
    if batches:
        yield from ((other, channels, height, width) for other in BATCHES if other != number)


def _first_difference(one: "_Watch", other: "_Watch") -> Place:
    """The first step that two runs do not take equally often."""
    return next(step for step in (*one.steps, *other.steps) if one.steps[step] != other.steps[step])[0]


class _Watched:
    """A model of which copies are run, in eval mode."""

    def __init__(self, model: nn.Module):
        self.model, self.own = model, {}
        shared: dict[int, Any] = {}
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            empty = torch.empty_like(tensor, device="meta")
            shared[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
            self.own[id(shared[id(tensor)])] = tensor
        self.copied = copy_model(model, shared, training=False)

    def run(self, x: Any) -> _Watch | None:
        """Run on the meta device; None where the model does not run there, or takes no such shape."""
        x = tree_map(
            lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf, _whole(x)
        )
        return _run(self.copied, x, self.own)

    def run_real(self, x: Any) -> _Watch | None:
        """Run on values."""
        return _run(copy_model(self.model, training=False), copy_inputs(_whole(x)), {})


def _whole(x: Any) -> Any:
    """All arguments, taken together before a run is watched: the watch is to see what the model does with each."""
    return arguments_of(x) if isinstance(x, Tensor) else x


def _run(copied: nn.Module, x: Any, own: Mapping[int, Tensor]) -> _Watch | None:
    watch = _Watch(copied, x, own)
    try:
        with torch.no_grad(), private_random(), watch:
            run_model(copied, x)
    except Exception:  # a model refuses shapes, and the meta device, in as many ways as there are models
        return None
    return watch
