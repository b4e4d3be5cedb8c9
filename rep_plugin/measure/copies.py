"""The one way in which models are copied: what is tried on a copy can never reach the model that was given."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rep_plugin.attached import why_no_copy
from rep_plugin.errors import ArgumentError, first_line

_ATTEMPTS = 20  # another thread may run the model meanwhile, and set attributes


_TENSORS = ("_parameters", "_buffers")
_ATOMS = {type(None), bool, int, float, str, torch.dtype, torch.Size}
_HOLDERS = {dict, OrderedDict, list, set}
_USUAL = {
    "__deepcopy__": (None,),
    "__new__": (object.__new__,),
    "__reduce__": (object.__reduce__,),
    "__reduce_ex__": (object.__reduce_ex__,),
    "__getstate__": (getattr(nn.Module, "__getstate__", None),),
    "__setstate__": (nn.Module.__setstate__, nn.Conv2d.__setstate__),
    "__slots__": (None,),
}


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
        ArgumentError: a module cannot be copied, or its copy shares modules or memory with it, or a hook or a replaced method
            refers to it. The message names it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> copied = copy_model(model)
        >>> copied[1].training, copied[0].weight is model[0].weight
        (False, False)
    """
    if (why := why_no_copy(model)) is not None:
        raise ArgumentError(why)
    for attempt in range(_ATTEMPTS):
        try:
            copied = _copy(model, dict(shared or {}))
            break
        except Exception as error:  # a module's own __deepcopy__, or what it holds, may raise anything
            if "changed size during iteration" in str(error) and attempt < _ATTEMPTS - 1:
                continue
            raise ArgumentError(
                f"{_say(model, _which_fails(model))} cannot be copied, and all is tried on a copy first: {first_line(error)}"
            ) from error
    _require_apart(model, copied, shared is None)
    for one, other in zip(model.modules(), copied.modules()):
        # torchvision's feature extractors come out of a deepcopy in train mode
        wanted = one.training if training is None else training
        if other.training != wanted:
            other.training = wanted
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


def _copy(model: nn.Module, memo: dict[int, object]) -> Any:
    """What ``copy.deepcopy`` gives, in a fifth of the time: it takes most of it for the empty dicts of hooks."""
    with _Detached():
        plain = list(_plain_modules(model, memo))
        for module in plain:
            values = list(vars(module).items())  # at once: another thread may set attributes
            vars(memo[id(module)]).update((name, _copy_value(value, memo)) for name, value in values)
        return copy.deepcopy(model, memo)


def _plain_modules(module: nn.Module, memo: dict[int, object]) -> Iterator[nn.Module]:
    """Modules that are copied attribute by attribute, down to those that have a way of their own; begins their copies."""
    kind = type(module)
    own = [name for name, usual in _USUAL.items() if getattr(kind, name, None) not in usual]
    if own or id(module) in memo or module._compiled_call_impl is not None:
        return
    memo[id(module)] = object.__new__(kind)
    yield module
    for child in list(module._modules.values()):
        if child is not None:
            yield from _plain_modules(child, memo)


def _copy_value(value: object, memo: dict[int, object]) -> object:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _HOLDERS and not value and id(value) not in memo:
        memo[id(value)] = kind()
        return memo[id(value)]
    return copy.deepcopy(value, memo)


def _which_fails(module: nn.Module, name: str = "") -> str:
    """The innermost module that cannot be copied by itself."""
    for key, child in module.named_children():
        try:
            _copy(child, {})
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
    mine, own = {}, set()
    for name, module in model.named_modules():
        mine[name] = module
        own |= {id(module), *_addresses(module)} if memory else {id(module)}
    for name, module in copied.named_modules():
        if id(module) in own:
            raise ArgumentError(f"{_say(model, name)} copies as itself: its __deepcopy__ must return a copy")
        held = mine.pop(name, None)
        if held is None or any(getattr(held, kind).keys() != getattr(module, kind).keys() for kind in _TENSORS):
            raise ArgumentError(f"{_say(model, name)} copies with other parts: its parent's __deepcopy__ must copy all")
        if memory and own & set(_addresses(module)):
            raise ArgumentError(
                f"the copy of {_say(model, name)} shares memory with it: its __deepcopy__ must copy tensors"
            )
    if mine:
        raise ArgumentError(f"{_say(model, next(iter(mine)))} is not in the model's copy: __deepcopy__ must copy all")


def _addresses(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Where a module's own tensors lie in memory."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if plain and (address := tensor.untyped_storage().data_ptr()):
            yield str(tensor.device), address
