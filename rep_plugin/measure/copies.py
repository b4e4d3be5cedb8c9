"""The one way in which models are copied: what is tried on a copy can never reach the model that was given."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rep_plugin.errors import ArgumentError, first_line

_ATTEMPTS = 20  # another thread may run the model meanwhile, and set attributes


class _Detached(TorchFunctionMode):
    """Copies of tensors that a graph made (a map that a module keeps) are detached: torch copies leaves alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = func(tensor.detach(), memo)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copy_model(model: nn.Module, shared: dict[int, object] | None = None, training: bool | None = None) -> nn.Module:
    """Return a copy of a model: modes, hooks, memory formats and tied weights are kept, nothing is shared.

    Args:
        model: the model; it stays as it is.
        shared: {id of a tensor: what stands for it in the copy}, where a copy need not hold all data.
        training: mode of all modules of the copy, whose own ``train()`` is not called; None: as they are in the model.

    Returns:
        The copy. Tensors that a graph made, as a map that a module keeps, are detached.

    Raises:
        ArgumentError: a module cannot be copied, or its copy shares modules or memory with it. The message names it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> copied = copy_model(model)
        >>> copied[1].training, copied[0].weight is model[0].weight
        (False, False)
    """
    for attempt in range(_ATTEMPTS):
        try:
            with _Detached():
                copied = copy.deepcopy(model, None if shared is None else dict(shared))
            break
        except Exception as error:  # a module's own __deepcopy__, or what it holds, may raise anything
            if "changed size during iteration" in str(error) and attempt < _ATTEMPTS - 1:
                continue
            raise ArgumentError(
                f"{_say(model, _which_fails(model))} cannot be copied, and all is tried on a copy first: {first_line(error)}"
            ) from error
    _require_apart(model, copied, shared is None)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        # torchvision's feature extractors come out of a deepcopy in train mode
        wanted = modes[name] if training is None else training
        if module.training != wanted:
            module.training = wanted
    return copied


def copy_inputs(example: Any) -> Any:
    """Return a copy of what a model is called with, without gradients: a model may work in place.

    Args:
        example: a tensor, or tuples, lists and dicts of tensors.

    Returns:
        The same structure with other tensors.
    """
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)


def copy_values(values: Any) -> Any:
    """Return a copy of what a module was given or gives, any objects: some models hand out the tensors they work on."""
    with _Detached():
        return copy.deepcopy(values)


def _which_fails(module: nn.Module, name: str = "") -> str:
    """The innermost module that cannot be copied by itself."""
    for key, child in module.named_children():
        try:
            with _Detached():
                copy.deepcopy(child)
        except Exception:  # as above
            return _which_fails(child, f"{name}.{key}" if name else key)
    return name


def _say(model: nn.Module, name: str) -> str:
    try:
        kind = type(model.get_submodule(name)).__name__
    except AttributeError:  # under a name that only the copy has
        return repr(name)
    return f"{name!r} ({kind})" if name else f"the model ({kind})"


def _require_apart(model: nn.Module, copied: object, memory: bool) -> None:
    if not isinstance(copied, nn.Module):
        raise ArgumentError(
            f"{_say(model, '')} copies as a {type(copied).__name__}: its __deepcopy__ must return a copy"
        )
    mine, theirs = dict(model.named_modules()), dict(copied.named_modules())
    if odd := [name for name in (*mine, *theirs) if (name in mine) != (name in theirs)]:
        raise ArgumentError(
            f"{_say(model, odd[0])} stands in the model or in its copy alone: see its parent's __deepcopy__"
        )
    ids = {id(module) for module in mine.values()}
    if same := [name for name, module in theirs.items() if id(module) in ids]:
        raise ArgumentError(f"{_say(model, same[0])} copies as itself: its __deepcopy__ must return a copy")
    for kind in ("parameters", "buffers"):
        ours, others = (dict(getattr(one, f"named_{kind}")()) for one in (model, copied))
        if ours.keys() != others.keys():
            raise ArgumentError(
                f"the copy of {_say(model, '')} has other {kind}: {sorted(ours.keys() ^ others.keys())[0]!r}"
            )
    if not memory:
        return
    own = {address for _, address in _addresses(model)}
    for name, address in _addresses(copied):
        if address in own:
            raise ArgumentError(
                f"the copy of {_say(model, name.rpartition('.')[0])} shares memory with it: its __deepcopy__ must copy "
                f"{name.rpartition('.')[2]!r} too"
            )


def _addresses(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of tensors, and where they lie in memory."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if plain and (address := tensor.untyped_storage().data_ptr()):
            yield name, address
