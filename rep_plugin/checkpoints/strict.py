"""Checkpoints that do not fit are refused whole, with the keys that differ."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rep_plugin.errors import CheckpointMismatchError


def describe_mismatch(model: nn.Module, given: Mapping) -> str:
    """Return the differences between a model's state dict and a given one.

    A module may have ``optional_state``: keys below it, and the value that stands for a key's absence.

    Args:
        model: the model.
        given: the state dict to load.

    Returns:
        The number and the first three keys of each kind; '' where they fit.

    Example:
        >>> import torch
        >>> describe_mismatch(torch.nn.PReLU(2), {"weight": torch.zeros(3)})
        '1 of another shape (first: weight)'
    """
    own = model.state_dict()
    optional = {
        f"{name}.{key}".lstrip("."): value
        for name, module in model.named_modules()
        for key, value in getattr(module, "optional_state", {}).items()
    }
    counters = ".num_batches_tracked"  # absent from old checkpoints, and torch fills it in
    missing = [key for key in own if key not in given and key not in optional and not key.endswith(counters)]
    unexpected = [key for key in given if key not in own and not (key in optional and given[key] == optional[key])]
    tensors = [key for key in own if key in given and isinstance(own[key], Tensor)]  # get_extra_state gives anything
    strangers = [key for key in tensors if not isinstance(given[key], Tensor)]
    tensors = [key for key in tensors if isinstance(given[key], Tensor)]
    shapes = [key for key in tensors if own[key].shape != given[key].shape]
    numbers = [key for key in tensors if _kind_of(own[key]) != _kind_of(given[key])]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("not a tensor", strangers),
        ("of another shape", shapes),
        ("of another kind of number", numbers),
    )
    return "; ".join(f"{len(keys)} {kind} (first: {', '.join(map(_word, keys[:3]))})" for kind, keys in kinds if keys)


def _word(key: object) -> str:
    """A key as a message shows it: in one line, and not without end."""
    text = key if isinstance(key, str) and key.isprintable() else repr(key)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _kind_of(tensor: Tensor) -> str:
    """float16 loads into float32, but torch also casts int8 weights and complex ones without a word."""
    if tensor.is_complex() or tensor.is_quantized:
        return str(tensor.dtype)
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    return "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "int"


def require_fit(model: nn.Module, state_dict: Mapping, source: str = "the checkpoint") -> None:
    """Refuse a state dict that is not exactly the model's.

    Args:
        model: the model.
        state_dict: the state dict to load.
        source: its name, for the message.

    Raises:
        CheckpointMismatchError: keys or shapes differ; it names the first ones.

    Example:
        >>> from torch import nn
        >>> require_fit(nn.Linear(2, 2), nn.Linear(2, 2).state_dict())
    """
    if mismatch := describe_mismatch(model, state_dict):
        raise CheckpointMismatchError(f"{source} does not fit {type(model).__name__}: {mismatch}; nothing was loaded")


def load_whole(model: nn.Module, load: Callable, state_dict: Mapping, strict: bool, assign: bool):
    """Load a state dict where it fits or ``strict`` is off: torch itself loads first and complains then.

    Args:
        model: the model.
        load: torch's ``load_state_dict`` of the model.
        state_dict: the state dict to load.
        strict: refuse one that is not exactly the model's.
        assign: as for torch's.

    Returns:
        The result of ``load``.

    Raises:
        CheckpointMismatchError: keys or shapes differ, and ``strict`` is on.
    """
    if strict:
        require_fit(model, state_dict)
    return load(state_dict, strict=strict, assign=assign)


def refuse_misfits(model: nn.Module) -> None:
    """Make a model refuse a checkpoint that does not fit, with CheckpointMismatchError, also as a part of a larger model.

    For mmengine: it loads every checkpoint leniently and only warns (35 of 242 tensors, say, and a network of noise).
    """

    def check(module, state_dict, prefix, *_):
        require_fit(module, {key[len(prefix) :]: v for key, v in state_dict.items() if key.startswith(prefix)})

    model.register_load_state_dict_pre_hook(check)
