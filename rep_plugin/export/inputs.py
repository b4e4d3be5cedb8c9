"""What a model is called with when it is exported: every tensor of it is an input of the file, with a name."""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten_with_path, tree_leaves, tree_map

from rep_plugin.arguments import shown
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_inputs
from rep_plugin.measure.differences import tensor_paths
from rep_plugin.measure.forward import arguments_of, require_numbers, run_model

INPUT = "input"  # the name of images alone


@dataclass(frozen=True, eq=False)
class Feed:
    """One call of a model.

    Args:
        images: images (N, C, H, W).
        arguments: what the model is called with: the images alone, or a tuple or a dict with them.
        names: the name in the file of each tensor of the arguments, in order.
    """

    images: Tensor
    arguments: Any
    names: Sequence[str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(zip(self.names, tensors_of(self.arguments), strict=True))

    @property
    def image_name(self) -> str:
        """Name of the images."""
        return next(name for name, tensor in self.tensors.items() if tensor is self.images)

    def with_images(self, x: Tensor) -> "Feed":
        """Return the call on other images, with all else as it goes with them."""
        return Feed(x, arguments_of(x), self.names)

    def run(self, model: nn.Module) -> object:
        """Return a model's output; the tensors are copied, as it may work in place."""
        return call(model, copy_inputs(self.arguments))

    def __str__(self) -> str:
        if isinstance(self.arguments, Tensor):
            return f"an input of shape {tuple(self.images.shape)}"
        return "inputs " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())


def call(model: nn.Module, arguments: Any) -> object:
    """Return a model's own output, whatever :class:`~rep_plugin.measure.forward.Forward` is registered for its kind.

    Args:
        model: the model.
        arguments: images alone, or a tuple or a dict of what it is called with.

    Returns:
        The output.
    """
    return model(arguments) if isinstance(arguments, Tensor) else run_model(model, arguments)


def feed_of(model: nn.Module, x: Tensor) -> Feed:
    """Return what a model is called with for images: they alone, or all of the example of the verb that runs.

    Args:
        model: the model, whose forward names the inputs.
        x: images (N, C, H, W).

    Returns:
        The call. Images alone are named ``input``, others by the parameters of the forward, with numbers and keys of what is
        nested: ``maps_0``, ``extra_mask``.

    Raises:
        ArgumentError: a tensor is inside of an object that torch cannot look into.
    """
    arguments = arguments_of(x)
    if isinstance(arguments, Tensor):
        return Feed(x, x, [INPUT])
    names = []
    for path, leaf in tree_flatten_with_path(arguments)[0]:
        if isinstance(leaf, Tensor):
            names.append("_".join([_parameter(model, path[0]), *(_word(key) for key in path[1:])]))
        elif tensor_paths(leaf):
            raise ArgumentError(f"example_input holds {shown(leaf)}: give its tensors in tuples, lists and dicts")
    return Feed(x, arguments, unique_names(names, INPUT))


def _parameter(model: nn.Module, key: Any) -> str:
    """The name of the parameter that takes an argument."""
    if not isinstance(key, SequenceKey):
        return _word(key)
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if key.idx < len(plain):
        return plain[key.idx]
    rest = next((one.name for one in parameters if one.kind is one.VAR_POSITIONAL), INPUT)
    return f"{rest}_{key.idx - len(plain)}"


def _word(key: Any) -> str:
    return str(key.idx if isinstance(key, SequenceKey) else key.key if isinstance(key, MappingKey) else key.name)


def unique_names(keys: Sequence[str], prefix: str, taken: Collection[str] = ()) -> list[str]:
    """Return keys as names that are valid in ONNX, none twice: torch refuses numbers.

    Args:
        keys: any words.
        prefix: what a name begins with where its key begins with no letter.
        taken: names that are not free.

    Returns:
        The names, in order.
    """
    names: list[str] = []
    for key in keys:
        name = re.sub(r"\W+", "_", key, flags=re.ASCII)
        name = name if name[:1].isalpha() else f"{prefix}_{name}".rstrip("_")
        used = {*taken, *names}
        names.append(next(one for one in chain([name], (f"{name}_{n}" for n in count(2))) if one not in used))
    return names


def tensors_of(arguments: Any) -> list[Tensor]:
    """Return the tensors of what a model is called with, in order."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def with_tensors(arguments: Any, tensors: Sequence[Tensor]) -> Any:
    """Return arguments with other tensors.

    Args:
        arguments: what a model is called with.
        tensors: the others, in the order of :func:`tensors_of`.

    Returns:
        The same structure.
    """
    left = iter(tensors)
    return tree_map(lambda leaf: next(left) if isinstance(leaf, Tensor) else leaf, arguments)


def constants_of(arguments: Any) -> list[str]:
    """Return what of the arguments is no tensor, and so a constant of the file, in words; nothing of None."""
    found = tree_flatten_with_path(arguments)[0]
    return [
        f"{'.'.join(_word(key) for key in path)} = {shown(leaf)}"
        for path, leaf in found
        if leaf is not None and not isinstance(leaf, Tensor)
    ]


def require_data(feed: Feed) -> None:
    """Refuse inputs that hold no numbers. Raises ArgumentError, which names the input."""
    for name, tensor in feed.tensors.items():
        alone = isinstance(feed.arguments, Tensor)
        require_numbers("example_input" if alone else f"example_input, {name},", tensor, tensor is feed.images)


def other_values(feed: Feed) -> Feed:
    """Return a call with other values of the same shapes: maps are random at their own scale, other numbers in their own
    range, truth values as they are.
    """
    generator = torch.Generator().manual_seed(1)
    tensors = [_redrawn(tensor, generator) for tensor in tensors_of(feed.arguments)]
    images = tensors[list(feed.names).index(feed.image_name)]
    return Feed(images, with_tensors(feed.arguments, tensors), feed.names)


def _redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.dtype == torch.bool or tensor.is_complex() or not tensor.numel() or not torch.isfinite(tensor).all():
        return tensor.clone()
    low, high = tensor.min(), tensor.max()
    if not tensor.is_floating_point():
        return torch.randint(int(low), int(high) + 1, tensor.shape, generator=generator, dtype=torch.int64).to(
            tensor.dtype
        )
    if tensor.dim() > 3 and high > low:
        return tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=generator)
    if high > low:
        return low + (high - low) * torch.rand(tensor.shape, generator=generator)
    return torch.where(tensor == 0, 0.25, 0.75 * tensor)


def open_dims(feeds: Sequence[Feed], outputs: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[int, str]]:
    """Return the dimensions that vary over several runs.

    Args:
        feeds: what each run was given.
        outputs: name -> the tensor of each run, alike in rank.

    Returns:
        {input or output: {dimension: name}}. A dimension that has in every run the size of one of the images' is named as
        that: ``batch``, ``height``, ``width``; others ``NAME_dim2``.
    """
    first, usual = feeds[0].image_name, {0: "batch", 2: "height", 3: "width"}
    inputs = {name: [feed.tensors[name] for feed in feeds] for name in feeds[0].names}
    images = {dim: (sizes, usual.get(dim, f"{first}_dim{dim}")) for dim, sizes in _varying(inputs[first]).items()}
    others: dict[int, list[tuple[list[int], str]]] = {}  # of other inputs; a place alone may not tell two sides apart
    found: dict[str, dict[int, str]] = {}
    for name, runs in {**inputs, **outputs}.items():
        found[name] = {}
        for dim, sizes in _varying(runs).items():
            known = [*([images[dim]] if dim in images else []), *images.values(), *others.get(dim, [])]
            word = next((word for theirs, word in known if theirs == sizes), "")
            if not word and name in inputs:
                others.setdefault(dim, []).append((sizes, f"{name}_dim{dim}"))
            found[name][dim] = word or f"{name}_dim{dim}"
    return found


def _varying(tensors: Sequence[Tensor]) -> dict[int, list[int]]:
    """Return {dimension: its size in each run} of those that are not always the same."""
    sizes = {dim: [tensor.shape[dim] for tensor in tensors] for dim in range(tensors[0].dim())}
    return {dim: found for dim, found in sizes.items() if len(set(found)) > 1}
