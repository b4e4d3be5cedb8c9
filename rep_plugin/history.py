"""What was done to a model since it was built: plain data on its root, from which the same structure can be built again.

Every verb registers how its step is repeated with :func:`replays`, so that this module knows none of them. What a user
does between two verbs is seen by comparing layers: a new classifier is a step as well, and what cannot be repeated is
noted, so that saving can refuse it by name. Verbs may be called on a part of a model; the step then names the part.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import shown
from rep_plugin.checkpoints.plain import require_fields
from rep_plugin.errors import ArgumentError, first_line

ATTRIBUTE, LAYERS = "rep_history", "rep_layers"
REPLACE, CHANGED, PART = "replace", "changed", "part"
Layers = dict[str, Any]
Replay = Callable[..., nn.Module]
_REPLAYS: dict[str, tuple[dict[str, Any], dict[str, Any], Replay]] = {}
# Layers that a user may put in another one's place, with their arguments, and how these are read from one.
_KINDS: dict[str, tuple[type[nn.Module], frozenset[str], Callable[[Any], dict]]] = {}
_INERT = {"kind": "Identity"}


def replays(step: str, *keys: str, optional: Sequence[str] = ()) -> Callable[[Replay], Replay]:
    """Decorate ``function(model, **keys) -> model`` as what repeats a step on a freshly built model in eval mode.

    Args:
        step: name of the step.
        *keys: what a step holds.
        optional: what it may hold besides.

    Returns:
        The decorator.
    """

    def register(function: Replay) -> Replay:
        hints = get_type_hints(function)
        wanted, more = ({key: hints[key] for key in names} for names in (keys, optional))
        _REPLAYS[step] = (wanted, more, function)
        return function

    return register


def replaceable(kind: type[nn.Module], *arguments: str, read: Callable[[Any], dict] | None = None) -> None:
    """Let layers of a class be put in the place of others between two steps.

    Args:
        kind: the class; a subclass is not meant.
        *arguments: names of its arguments, plain data.
        read: returns them, of a layer; None where they are its attributes.
    """
    _KINDS[kind.__name__] = (kind, frozenset(arguments), read or (lambda module: _attributes(module, arguments)))


def _attributes(module: nn.Module, names: Sequence[str]) -> dict:
    found = {name: getattr(module, name) for name in names}
    return {name: value is not None if name == "bias" else value for name, value in found.items()}


replaceable(nn.Identity)
replaceable(nn.Linear, "in_features", "out_features", "bias")
replaceable(
    nn.Conv2d, "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias",
    "padding_mode",
)  # fmt: skip
replaceable(nn.Flatten, "start_dim", "end_dim")
replaceable(nn.AdaptiveAvgPool2d, "output_size")


def _describe(module: nn.Module) -> Any:
    """A layer as plain data: all that decides what it computes, but its weights."""
    kind = type(module)
    if "Drop" in kind.__name__:
        return _INERT  # in eval mode
    if _is_known(module):
        found = _KINDS[kind.__name__][2](module)
        return {"kind": kind.__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}}
    if isinstance(module, _BatchNorm):
        name = "BatchNorm2d" if kind is nn.SyncBatchNorm else kind.__name__
        return f"{name}({module.num_features}, eps={module.eps})"
    return re.sub(r" at 0x[0-9a-f]+|(, )?inplace=(True|False)", "", repr(module))


def _is_known(module: nn.Module) -> bool:
    return _KINDS.get(type(module).__name__, (None,))[0] is type(module)


def layers_of(model: nn.Module) -> Layers:
    """Return the layers of a model, described; of a part with steps of its own those before its first step."""
    return _layers(model, "")


def _layers(module: nn.Module, name: str) -> Layers:
    dot = f"{name}." if name else ""
    if name and hasattr(module, LAYERS):
        return {(dot + key).rstrip("."): value for key, value in getattr(module, LAYERS)[0].items()}
    children = [(dot + key, child) for key, child in module.named_children()]
    if not children or _is_known(module):
        return {name: _describe(module)}
    found: Layers = {}
    for key, child in children:
        found |= _layers(child, key)
    return found


def changes(before: Layers, now: Layers, part: str = "") -> list[dict]:
    """Return the steps that make of some layers others.

    Args:
        before: layers as :func:`layers_of` returns them.
        now: the same, later.
        part: name of the part that they belong to.

    Returns:
        ``replace`` steps, or one that says what cannot be repeated.
    """
    steps: list[dict] = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        full = f"{part}.{name}".strip(".")
        if old is None or not isinstance(new, dict):
            was, is_now = (_say(value) for value in (old, new))
            return [{"step": CHANGED, "what": f"{full!r} was {was} and is {is_now}"}]
        steps.append({"step": REPLACE, "layer": full, "by": new})
    return steps


def _say(layer: Any) -> str:
    if layer is None:
        return "not there"
    if not isinstance(layer, dict):
        return layer if len(layer) < 80 else f"{layer[:76]}..."
    return f"{layer['kind']}({', '.join(f'{k}={v}' for k, v in layer.items() if k != 'kind')})"


def _parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost parts of a model that have steps of their own."""
    for key, child in module.named_children():
        full = f"{name}.{key}".strip(".")
        if hasattr(child, ATTRIBUTE):
            yield full, child
        else:
            yield from _parts(child, full)


def start_of(model: nn.Module) -> Layers:
    """Return the layers that a model had before its first step."""
    return getattr(model, LAYERS)[0] if hasattr(model, LAYERS) else layers_of(model)


def history_of(model: nn.Module) -> list[dict]:
    """Return the steps so far, oldest first: ``{"step": "prune", "plan": ...}``, ``{"step": "reparameterize", ...}``.

    Steps of a part have its name as ``part``.
    """
    steps = list(getattr(model, ATTRIBUTE, []))
    if hasattr(model, LAYERS):
        steps += changes(getattr(model, LAYERS)[1], layers_of(model))
    for name, part in _parts(model):
        steps += [{**step, PART: f"{name}.{step.get(PART, '')}".strip(".")} for step in history_of(part)]
    return steps


def before_step(model: nn.Module) -> tuple[list[dict], Layers]:
    """Return what :func:`record_` needs to know of a model before anything is done to it."""
    return history_of(model), start_of(model)


def record_(model: nn.Module, before: tuple[list[dict], Layers], **step: object) -> None:
    """Note one more step on a model.

    Args:
        model: the result of the step.
        before: :func:`before_step` of the model that the step was given.
        step: ``step``, its name, and what it takes to repeat it, as plain data.
    """
    _set(model, [*before[0], step], before[1])


def _set(model: nn.Module, history: list[dict], start: Layers) -> None:
    for module in model.modules():
        for name in (ATTRIBUTE, LAYERS):  # of parts: their steps are the model's now
            module.__dict__.pop(name, None)
    setattr(model, ATTRIBUTE, history)
    setattr(model, LAYERS, (start, layers_of(model)))


def check_history(history: Sequence[Mapping]) -> None:
    """Raise ArgumentError, naming the step, for what is no history or cannot be repeated."""
    if not isinstance(history, (list, tuple)):
        raise ArgumentError(f"a history must be a list of steps, got {type(history).__name__}")
    for place, step in enumerate(history):
        if isinstance(step, Mapping) and step.get("step") == CHANGED:
            after = f"after {_name(history[place - 1])}" if place else "before its first step"
            raise ArgumentError(
                f"the model was changed by hand {after}, which cannot be repeated: {step.get('what')}; make the change when "
                "the model is built, before the first step"
            )
        if not isinstance(step, Mapping) or str(step.get("step")) not in _REPLAYS:
            what = shown(step.get("step") if isinstance(step, Mapping) else step)
            raise ArgumentError(f"unknown step {what} in the history, expected one of {', '.join(sorted(_REPLAYS))}")
        wanted, more, _ = _REPLAYS[step["step"]]
        kinds = wanted | {key: kind for key, kind in (more | {PART: str}).items() if key in step}
        arguments = {key: value for key, value in step.items() if key != "step"}
        require_fields(arguments, kinds, f"step {place} of the history ({step['step']})")


def _name(step: Mapping) -> str:
    return f"{step['step']!r}" + (f" of {step[PART]!r}" if PART in step else "")


def rebuild_(model: nn.Module, history: Sequence[Mapping]) -> nn.Module:
    """Give a freshly built model the structure that a history describes.

    The weights mean nothing yet, so nothing is proven: load the state dict next, strictly. The mode is kept.

    Args:
        model: the model that the history began with; steps that it has already come first.
        history: steps, oldest first, as :func:`history_of` returns them.

    Returns:
        The model, with the history; its root may be another object.

    Raises:
        ArgumentError: an unknown step, or one that does not fit this model.
    """
    check_history(history)
    steps, start = before_step(model)
    training = model.training
    for step in history:
        model.train(False)  # not chained: mmpretrain's return None
        wanted, more, replay = _REPLAYS[step["step"]]
        part = step.get(PART, "")
        new = replay(layer_named(model, part), **{key: step[key] for key in step if key in wanted | more})
        if not part:
            model = new
        else:
            model.set_submodule(part, new)
    model.train(training)
    _set(model, [*steps, *(dict(step) for step in history)], start)
    return model


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """Return a layer by its name.

    Args:
        model: that should have it.
        name: of the layer; of the model itself "".

    Returns:
        The layer.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ArgumentError(f"the history is of another model: {type(model).__name__} has no layer {name!r}") from None


@replays(REPLACE, "layer", "by")
def _replace(model: nn.Module, layer: str, by: Mapping) -> nn.Module:
    old = layer_named(model, layer)
    kind, names, _ = _KINDS.get(str(by.get("kind", "")), (None, (), None))
    if kind is None or by.keys() - {"kind"} != names:
        raise ArgumentError(f"layer {layer!r} cannot be replaced by {dict(by)}, expected one of {sorted(_KINDS)}")
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in by.items() if name != "kind"}
    like = next((p for p in (*old.parameters(), *model.parameters())), torch.zeros(0))
    try:
        new = kind(**tuples)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own words for sizes that are none
        raise ArgumentError(f"layer {layer!r} cannot be replaced by {by['kind']}: {first_line(error)}") from error
    model.set_submodule(layer, new.to(like.device, like.dtype).train(old.training))
    return model
