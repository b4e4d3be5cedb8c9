"""Checkpoints that do not fit are refused whole, with the keys that differ."""

from collections.abc import Callable, Mapping

from torch import nn

from rep_plugin.blocks.annealed import ALPHA
from rep_plugin.errors import CheckpointMismatchError


def describe_mismatch(own: Mapping, given: Mapping) -> str:
    """Return what differs between two state dicts, the first three keys of each kind; '' where they fit.

    The alphas of annealed blocks are 1 where they are absent: plain and finished annealed checkpoints fit each other.
    """
    counters = ".num_batches_tracked"  # absent from old checkpoints, and torch fills it in
    missing = [key for key in own if key not in given and not key.endswith((counters, ALPHA))]
    unexpected = [key for key in given if key not in own and not (key.endswith(ALPHA) and given[key] == 1)]
    shapes = [key for key in own if key in given and own[key].shape != given[key].shape]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(keys)} {kind} (first: {', '.join(keys[:3])})" for kind, keys in kinds if keys)


def require_fit(model: nn.Module, state_dict: Mapping, source: str = "the checkpoint") -> None:
    """Raise CheckpointMismatchError with the first keys that differ where a state dict is not exactly the model's."""
    if mismatch := describe_mismatch(model.state_dict(), state_dict):
        raise CheckpointMismatchError(f"{source} does not fit {type(model).__name__}: {mismatch}; nothing was loaded")


def load_whole(model: nn.Module, load: Callable, state_dict: Mapping, strict: bool, assign: bool):
    """Call torch's ``load`` where the state dict fits or ``strict`` is off: torch itself loads first and complains then."""
    if strict:
        require_fit(model, state_dict)
    return load(state_dict, strict=strict, assign=assign)


def refuse_misfits(model: nn.Module) -> None:
    """Make ``model`` raise CheckpointMismatchError for a checkpoint that does not fit, also as a part of a larger model.

    For mmengine: it loads every checkpoint leniently and only warns (35 of 242 tensors, say, and a network of noise).
    """

    def check(module, state_dict, prefix, *_):
        require_fit(module, {key[len(prefix) :]: v for key, v in state_dict.items() if key.startswith(prefix)})

    model.register_load_state_dict_pre_hook(check)
