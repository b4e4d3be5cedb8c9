"""Numbers in a model's code that follow its channels: attributes of its modules, and sizes that it takes from maps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.blocks.base import RepBlock

Place = tuple[str, str, int | None]  # of a number: module, attribute, and where in it, if that is a list
_SET_ELSEWHERE = (_ConvNd, nn.Linear, _BatchNorm, RepBlock, BilinearPooling)


class Written(int):
    """An attribute of a module, as ``num_heads``: what a view is made by, the attribute has to follow."""

    place: Place | None

    def __new__(cls, value: int, place: Place | None = None):
        self = super().__new__(cls, value)
        self.place = place
        return self


class Size(int):
    """The size of a map along a dimension, of which the code may make another view."""

    labels: Tensor | None
    dim: int

    def __new__(cls, value: int, labels: Tensor | None = None, dim: int = 0):
        self = super().__new__(cls, value)
        self.labels, self.dim = labels, dim
        return self

    def __floordiv__(self, other: int) -> "Share | int":
        value = int(self) // int(other)
        return Share(value, self, other) if value * int(other) == self else value


class Share(int):
    """An equal part of the size of a map: the channels of a head, say."""

    whole: Size | None
    parts: int

    def __new__(cls, value: int, whole: Size | None = None, parts: int = 1):
        self = super().__new__(cls, value)
        self.whole, self.parts = whole, parts
        return self


def _is_number(value: object) -> bool:
    return type(value) is int and value > 0


def note_attributes_(model: nn.Module) -> None:
    """Let the numbers that a model's modules keep remember where they stand.

    Args:
        model: Changed in place: a copy that is only traced.
    """
    for name, module in model.named_modules():
        if isinstance(module, _SET_ELSEWHERE) or type(module).__module__.startswith("torch."):
            continue
        for key, value in list(module.__dict__.items()):
            if key.startswith("_"):
                continue
            if _is_number(value):
                module.__dict__[key] = Written(value, (name, key, None))
            elif type(value) in (list, tuple) and value and all(map(_is_number, value)):
                numbers = [Written(number, (name, key, index)) for index, number in enumerate(value)]
                module.__dict__[key] = type(value)(numbers)


def noted_sizes(func: Callable, given: Sequence, labels: Tensor, out: object) -> object:
    """Return what a function says of a map's size, as numbers that remember the map.

    Args:
        func: A torch function that returns no tensor.
        given: Its arguments, the map first.
        labels: Of the map.
        out: What the function returned.

    Returns:
        The same numbers.
    """
    name = getattr(func, "__name__", "")
    is_shape = name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") == "shape"
    if not is_shape and name != "size":
        return out
    if isinstance(out, torch.Size):
        return torch.Size([Size(size, labels, dim) for dim, size in enumerate(out)])
    dim = given[1] if len(given) > 1 and isinstance(given[1], int) else None
    return out if dim is None else Size(out, labels, dim % labels.dim())


def set_attribute_(model: nn.Module, place: Place, old: int, new: int) -> None:
    """Set a number that a module keeps, where it has the value that it was traced with.

    Args:
        model: Changed in place.
        place: Of the number.
        old: Its value so far.
        new: The other value.
    """
    name, key, index = place
    module = model.get_submodule(name)
    value = module.__dict__.get(key)
    if index is None:
        if value == old:
            module.__dict__[key] = new
    elif isinstance(value, (list, tuple)) and len(value) > index and value[index] == old:
        module.__dict__[key] = type(value)([*value[:index], new, *value[index + 1 :]])
    # What a module has computed by such a number, and keeps for later, holds no longer.
    for other, kept in module.__dict__.items():
        if not other.startswith("_") and type(kept) is dict and all(isinstance(one, Tensor) for one in kept.values()):
            kept.clear()
