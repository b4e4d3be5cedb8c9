"""What one module computes besides what its class says: hooks, replaced methods, computed and shared weights.

Hooks that only observe cannot be told from those that change something: all are named alike.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def _hooks_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, kind in _HOOKS.items():
        for hook in list(getattr(module, name, {}).values()):
            yield kind, hook


def own_methods(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, what stands in its place) of the methods of the class that an attribute of the instance hides."""
    for name, value in list(vars(module).items()):
        if name != "_compiled_call_impl" and callable(value) and callable(getattr(type(module), name, None)):
            yield name, value


def what_is_attached(module: nn.Module) -> str | None:
    """Return what makes a call of this very module another one than of its class, None where nothing does.

    Args:
        module: the module; those inside it are not looked at.

    Returns:
        As ``has a forward hook (clamp)`` or ``has a forward of its own``.

    Example:
        >>> layer = nn.ReLU()
        >>> what_is_attached(layer) is None
        True
        >>> _ = layer.register_forward_hook(print)
        >>> what_is_attached(layer)
        'has a forward hook (print)'
    """
    for kind, hook in _hooks_of(module):
        hook = getattr(hook, "func", hook)  # functools.partial
        return f"has {kind} ({getattr(hook, '__name__', type(hook).__name__)})"
    for name, _ in own_methods(module):
        return f"has a {name} of its own"
    for base in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        if "__call__" in vars(base) and not base.__module__.startswith("torch."):
            return f"is called by a __call__ of {base.__name__}"
    return None


def own_forwards(model: nn.Module) -> dict[str, str]:
    """Return {name: what is attached} of the modules that have something attached, by each of their names."""
    found = ((name, what_is_attached(module)) for name, module in model.named_modules(remove_duplicate=False))
    return {name: what for name, what in found if what is not None}


def own_forwards_inside(module: nn.Module) -> str | None:
    """Return what makes a module compute something else than its class says, hooks on the module itself left aside.

    Args:
        module: a module with parts.

    Returns:
        As ``has a forward of its own`` or ``holds 'bn', which has a forward hook (clamp)``; None for nothing.
    """
    for name, _ in own_methods(module):
        return f"has a {name} of its own"
    for name, what in own_forwards(module).items():
        if name and "backward" not in what:
            return f"holds {name!r}, which {what}"
    return None


def detach_all_(module: nn.Module) -> nn.Module:
    """Take all hooks and replaced methods off a module and those inside it; return it."""
    for part in module.modules():
        for name in (*_HOOKS, *_FLAGS):
            getattr(part, name, {}).clear()
        for name, _ in list(own_methods(part)):
            delattr(part, name)
    return module


def bound_weights(model: nn.Module) -> dict[str, str]:
    """Return {name: why} of the modules whose own tensors cannot be set: they are computed, or another module's as well."""
    users: dict[Any, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, tensor in _own_tensors(module):
            users.setdefault(_place(tensor), []).append((module, f"{name}.{key}" if name else key))
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "parametrizations") or isinstance(vars(module).get("weight"), Tensor):
            found[name] = "has weights that are computed in every call"
        shared = ((k, other) for k, t in _own_tensors(module) for user, other in users[_place(t)] if user is not module)
        for key, other in shared:
            found.setdefault(name, f"shares its {key} with {other!r}")
    return found


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    tensors = {**module._parameters, **module._buffers}
    return [(key, tensor) for key, tensor in tensors.items() if tensor is not None and tensor.numel()]


def _place(tensor: Tensor) -> Any:
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    return (tensor.data_ptr() if plain else 0) or id(tensor)


def why_no_copy(model: nn.Module) -> str | None:
    """Return why a copy of a model would run a part of the model itself, None where it would not.

    A function is not copied: what is attached and refers to a module (``old = m.forward; m.forward = lambda x: old(x)``)
    goes on referring to the module of the given model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    names |= {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, module in model.named_modules():
        for kind, function in (*_hooks_of(module), *((f"a {key} of its own", f) for key, f in own_methods(module))):
            for value in _captured(function):
                if id(value) in names:
                    other = names[id(value)]
                    return (
                        f"{name or 'the model'!r} has {kind} that refers to {other or 'the model'!r} of the given model, as "
                        "its copy would too: take it off, or define it in a class"
                    )
    return None


def _captured(function: Any) -> Iterator[Any]:
    """The objects that a plain function holds on to, and those that bound methods among them belong to."""
    if not inspect.isfunction(function):
        return  # a bound method, or a partial, is copied with what it holds
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    for value in (*cells, *(function.__defaults__ or ())):
        yield value
        if inspect.ismethod(value):
            yield value.__self__


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
