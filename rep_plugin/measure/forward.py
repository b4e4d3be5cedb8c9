"""How a model is run on images alone: ``model(x)``, unless a :class:`Forward` is registered for models of its kind."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Annotated, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rep_plugin.arguments import That, checked, shown
from rep_plugin.errors import ArgumentError, RepPluginError, first_line


class Forward:
    """How models of one kind are run: the default, ``model(x)``. A subclass for another kind is registered with
    :func:`register_forward`.
    """

    def matches(self, model: nn.Module) -> bool:
        """Return whether a model is of this kind."""
        return True

    def run(self, model: nn.Module, x: Tensor) -> object:
        """Return the outputs of ``model`` for images alone.

        Args:
            model: a model of this kind.
            x: images (N, C, H, W).
        """
        return model(x)

    def run_auxiliary(self, model: nn.Module, x: Tensor) -> object:
        """Return the outputs that only training reads, as :meth:`run` does."""
        return self.run(model, x)

    def run_unreached(self, model: nn.Module, x: Tensor, unused: list[str]) -> object:
        """Return the maps that parts which no forward reaches may read; the default is none.

        Args:
            model: a model of this kind.
            x: images (N, C, H, W).
            unused: names of the parameters that no forward used.
        """
        return []


_FORWARDS = [Forward()]


def _holds_tensor(example: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(example))


# A tensor, or all that a model is called with: a tuple of positional arguments, or a dict of named ones.
Example = (
    Tensor
    | Annotated[tuple, That(_holds_tensor, "a tuple of arguments")]
    | Annotated[Mapping, That(_holds_tensor, "a dict of arguments")]
)


@checked
def register_forward(forward: Forward) -> None:
    """Add how models of one kind are run; later ones are asked first.

    Example:
        >>> class OnPairs(Forward):
        ...     def matches(self, model): return hasattr(model, "compare")
        ...     def run(self, model, x): return model(x, x)
        >>> register_forward(OnPairs())
        >>> type(forward_of(nn.Identity())).__name__
        'Forward'
    """
    _FORWARDS.insert(0, forward)


def forward_of(model: nn.Module) -> Forward:
    """Return how a model is run."""
    return _CALL.get() or next(forward for forward in _FORWARDS if forward.matches(model))


class _Call(Forward):
    """Runs a model on all arguments of an example, of which its images are replaced."""

    def __init__(self, example: tuple | Mapping, images: Tensor):
        self.example, self.images = example, images

    def run(self, model: nn.Module, x: Tensor) -> object:
        return run_model(model, self.arguments(x))

    def arguments(self, x: Tensor) -> tuple | Mapping:
        """Return the example with other images: what counts images is taken in turns, and maps follow in height and width."""

        def argument(leaf: object) -> object:
            if leaf is self.images:
                return x
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.dim() and len(leaf) == len(self.images) != len(x):
                leaf = torch.cat([leaf] * -(-len(x) // len(leaf)))[: len(x)]
            leaf = _resized(leaf, self.images.shape, x.shape)
            return leaf.to(x.device, x.dtype if leaf.is_floating_point() else None, copy=True)

        return tree_map(argument, self.example)


def _resized(leaf: Tensor, given: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Maps for images of another size: float ones (N, C, H, W) in proportion, others where they have the images' size."""
    is_map = leaf.dim() == 4 and leaf.is_floating_point() and min(leaf.shape[2:]) > 1
    if len(given) != 4 or given[2:] == wanted[2:] or not (is_map or (leaf.dim() > 2 and leaf.shape[-2:] == given[2:])):
        return leaf
    for dim in (-2, -1):
        size = leaf.shape[dim]
        side = max(1, round(size * wanted[dim] / given[dim]))
        leaf = leaf.index_select(dim, torch.arange(side, device=leaf.device) * size // side)  # any type, no new values
    return leaf


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)


def arguments_of(x: Tensor) -> Tensor | tuple | Mapping:
    """Return all that a verb's model is called with for some images: the images alone, unless its example holds more.

    Args:
        x: images (N, C, H, W).
    """
    call = _CALL.get()
    return x if call is None else call.arguments(x)


def takes_examples(verb: Callable) -> Callable:
    """Decorate a verb with an ``example_input`` to take a tuple or a dict of all arguments of its model as well.

    The first float tensor of most dimensions stands for the images: the verb is given it, and runs its model on all
    arguments.

    Args:
        verb: the function.

    Returns:
        The function.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def run(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        example = given.arguments.get("example_input")
        if isinstance(example, Tensor) or not _holds_tensor(example):
            return verb(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        images = max(leaves, key=Tensor.dim, default=None)
        if images is None:
            raise ArgumentError(
                f"example_input, {shown(example)}, holds no float tensor: its images are what is varied"
            )
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(example)):
            raise ArgumentError(
                f"example_input, {shown(example)}, holds a tensor on the meta device, which has no data"
            )
        _require_fit(given.arguments["model"], example)
        given.arguments["example_input"] = images
        token = _CALL.set(_Call(example, images))
        try:
            return verb(*given.args, **given.kwargs)
        finally:
            _CALL.reset(token)

    return run


def _require_fit(model: nn.Module, example: tuple | Mapping) -> None:
    """Refuse arguments that a forward does not take."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a scripted one tells nothing
        return
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"example_input does not fit {type(model).__name__}.forward: {error}") from None


def run_model(model: nn.Module, x: object) -> object:
    """Return the outputs of a model for images alone, or for all of its arguments.

    Args:
        model: any model.
        x: images (N, C, H, W); or a tuple or a dict of what the model is called with.

    Returns:
        ``model(x)``, or what the registered :class:`Forward` of its kind gives; ``model(*x)`` or ``model(**x)``.

    Example:
        >>> import torch
        >>> run_model(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """
    if isinstance(x, tuple):
        return model(*x)
    if isinstance(x, Mapping):
        return model(**x)
    return forward_of(model).run(model, x)


def first_image(example: object) -> tuple[object, int]:
    """Return the first image of an example, and how many images it has.

    The batch is the first dimension of the first tensor, or the length of a list of images (C, H, W), as detectors take
    them. All that is as long is cut to its first entry.

    Args:
        example: a tensor, or tuples, lists and dicts of tensors.

    Returns:
        (the same structure with one image, the number of images).

    Example:
        >>> import torch
        >>> one, images = first_image((torch.zeros(8, 3, 5, 5), {"size": torch.zeros(8, 2)}))
        >>> one[0].shape, one[1]["size"].shape, images
        (torch.Size([1, 3, 5, 5]), torch.Size([1, 2]), 8)
    """
    images = _batch_of(example) or 1

    def first(part: object) -> object:
        if isinstance(part, Tensor) or _is_batch(part):
            return part[:1] if _batch_of(part) == images else part
        if isinstance(part, Mapping):
            return {key: first(value) for key, value in part.items()}
        if type(part) is list:
            return [*map(first, part)]
        return tuple(map(first, part)) if type(part) is tuple else part

    return first(example), images


def _is_batch(part: object) -> TypeGuard[list]:
    return isinstance(part, list) and bool(part) and isinstance(part[0], Tensor) and part[0].dim() == 3


def _batch_of(part: object) -> int | None:
    if isinstance(part, Tensor):
        return len(part) if part.dim() else None
    if _is_batch(part):
        return len(part)
    parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, (tuple, list)) else ()
    return next((number for one in parts if (number := _batch_of(one)) is not None), None)


def require_numbers(name: str, tensor: Tensor, finite: bool = True) -> None:
    """Refuse a tensor that holds no numbers to compare with.

    Args:
        name: of the argument.
        tensor: floating point or not.
        finite: refuse infinite values too; a mask may hold them.

    Raises:
        ArgumentError: it is on the meta device, or holds NaN or infinite values.
    """
    if tensor.is_meta:
        raise ArgumentError(f"{name} has no data: {shown(tensor)}, expected real values")
    wrong = ~torch.isfinite(tensor) if finite else torch.isnan(tensor)
    if wrong.any():
        kind = "finite values" if finite else "numbers"
        raise ArgumentError(
            f"{name} must hold {kind}, got {int(wrong.sum())} of {wrong.numel()} that are NaN or infinite"
        )


@contextmanager
def of_user(model: nn.Module, example: object, name: str = "example_input") -> Iterator[None]:
    """Say of whatever a forward raises on an input that the input does not go through the model.

    Args:
        model: the model.
        example: the input.
        name: of the argument.

    Returns:
        A context manager that raises ArgumentError.
    """
    try:
        yield
    except RepPluginError:
        raise
    except Exception as error:
        made = first_line(error)
        example = arguments_of(example) if isinstance(example, Tensor) else example
        raise ArgumentError(f"{name}, {shown(example)}, does not go through {type(model).__name__}: {made}") from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def require_bare(model: nn.Module, data: bool = True) -> None:
    """Refuse a model that is wrapped for several processes or compiled: what is changed inside would not be noticed there.

    Args:
        model: the model.
        data: its weights are read, so that they may not be on the meta device.

    Raises:
        ArgumentError: it is wrapped (the message says what to pass), or no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if data and any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ArgumentError(f"model has no data: a {type(model).__name__} on the meta device, load its weights first")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ArgumentError(f"got a {type(model).__name__}: pass its .module, and wrap the model again")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(f"got a scripted or traced {model.original_name}: pass the model that it was made from")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ArgumentError(
            "got a compiled model: pass the model itself (._orig_mod), and compile what comes out again"
        )
