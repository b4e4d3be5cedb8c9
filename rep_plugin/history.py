"""What was done to a model since it was built: plain data on its root, from which the same structure can be built again.

Every verb registers how its step is repeated with :func:`replays`, so that this module knows none of them.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from rep_plugin.errors import ArgumentError

ATTRIBUTE = "rep_history"
Replay = Callable[..., nn.Module]
_REPLAYS: dict[str, tuple[frozenset[str], Replay]] = {}


def replays(step: str, *keys: str) -> Callable[[Replay], Replay]:
    """Decorate ``function(model, **keys) -> model`` as what repeats a step on a freshly built model in eval mode."""

    def register(function: Replay) -> Replay:
        _REPLAYS[step] = (frozenset(keys), function)
        return function

    return register


def history_of(model: nn.Module) -> list[dict]:
    """Return the steps so far, oldest first: ``{"step": "prune", "plan": ...}``, ``{"step": "reparameterize", ...}``."""
    return list(getattr(model, ATTRIBUTE, []))


def record_(model: nn.Module, before: list[dict], **step: object) -> None:
    """Note one more step on a model.

    Args:
        model: the result of the step.
        before: the history of the model that the step was given.
        step: ``step``, its name, and what it takes to repeat it, as plain data.
    """
    setattr(model, ATTRIBUTE, [*before, step])


def check_history(history: Sequence[Mapping]) -> None:
    """Raise ArgumentError, naming the step, for what is no history."""
    if not isinstance(history, (list, tuple)):
        raise ArgumentError(f"a history must be a list of steps, got {type(history).__name__}")
    for place, step in enumerate(history):
        if not isinstance(step, Mapping) or step.get("step") not in _REPLAYS:
            what = step.get("step") if isinstance(step, Mapping) else step
            raise ArgumentError(f"unknown step {what!r} in the history, expected one of {', '.join(sorted(_REPLAYS))}")
        if odd := sorted((step.keys() - {"step"}) ^ _REPLAYS[step["step"]][0]):
            raise ArgumentError(f"step {place} of the history ({step['step']}): missing or unknown {odd}")


def rebuild_(model: nn.Module, history: Sequence[Mapping]) -> nn.Module:
    """Give a freshly built model the structure that a history describes.

    The weights mean nothing yet, so nothing is proven: load the state dict next, strictly. The mode is kept.

    Args:
        model: the model that the history began with.
        history: steps, oldest first, as :func:`history_of` returns them.

    Returns:
        The model; its root may be another object.

    Raises:
        ArgumentError: an unknown step, or a plan that is not for this model.
    """
    check_history(history)
    training = model.training
    for step in history:
        model.train(False)  # not chained: mmpretrain's return None
        keys, replay = _REPLAYS[step["step"]]
        model = replay(model, **{key: step[key] for key in keys})
    model.train(training)
    return model
