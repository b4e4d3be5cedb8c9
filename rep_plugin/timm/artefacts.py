"""Expanded, pruned and merged timm models as a folder that ``timm.create_model('local-dir:FOLDER')`` loads.

It is the folder of :func:`rep_plugin.save`. Its ``config.json`` is timm's: the architecture is ``rep_plugin_rebuilt``, whose
``model_args`` are the original architecture and what was done to it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Classes, checked, fits, shown
from rep_plugin.checkpoints.strict import describe_mismatch, require_fit
from rep_plugin.errors import ArgumentError, CheckpointMismatchError, first_line
from rep_plugin.history import (
    CHANGED,
    changes,
    check_history,
    history_of,
    layers_of,
    rebuild_,
    replaceable,
    replays,
    start_of,
)
from rep_plugin.measure.forward import require_bare
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.rebuilt import require_identical
from rep_plugin.saving import (
    ARCHITECTURE,
    BUILDERS,
    OLD_ARCHITECTURE,
    WEIGHTS,
    Builder,
    Images,
    inputs_for,
    load_weights_,
    read_weights,
    state_of,
    write_folder,
)
from rep_plugin.timm.features import as_features

# The part of a pretrained_cfg that describes the input; where its first weights came from does not hold any more.
KEPT_CFG = (
    "input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
    "num_classes", "license", "label_names", "label_descriptions",
)  # fmt: skip
default_cfgs = generate_default_cfgs({f"{name}.untrained": {"url": ""} for name in (ARCHITECTURE, OLD_ARCHITECTURE)})


def _read_pool(pool: SelectAdaptivePool2d) -> dict:
    flatten = isinstance(pool.flatten, nn.Flatten) or bool(getattr(pool.pool, "flatten", False))
    last = getattr(pool.pool, "dim", None) == (1, 2)
    return {"pool_type": pool.pool_type, "flatten": flatten, "input_fmt": "NHWC" if last else "NCHW"}


replaceable(SelectAdaptivePool2d, "pool_type", "flatten", "input_fmt", read=_read_pool)


@checked
@private_random()
def save_timm(model: nn.Module, folder: str | Path, example_input: Images | None = None) -> None:
    """Write an expanded, pruned or merged timm model so that ``timm.create_model('local-dir:FOLDER')`` loads it.

    :func:`rep_plugin.save` does the same, and also takes models that timm does not build. The model is built again first, and
    must give the same output of every module, bit by bit. Where anything fails, older files stay.

    Args:
        model: made by ``timm.create_model``.
        folder: where ``config.json`` and ``model.safetensors`` go.
        example_input: images (N, C, H, W) to compare on; the default are random ones of ``pretrained_cfg['input_size']``.

    Raises:
        ArgumentError: timm did not create the model, JSON does not hold its arguments, or it was changed by hand in a way
            that cannot be repeated.
        CheckpointMismatchError: the model is not what its arguments and its history make.
        EquivalenceError: what is built again computes something else: a hook, a replaced forward, an attribute that was
            changed. It names the first module that differs.
        OSError: a file cannot be written.

    Example:
        >>> import os, timm, rep_plugin
        >>> model = timm.create_model("rep_mobilenetv2_035", num_classes=2).eval()
        >>> rep_plugin.timm.save_timm(rep_plugin.reparameterize(model)[0], "saved")
        >>> sorted(os.listdir("saved")), timm.create_model("local-dir:saved").num_classes
        (['config.json', 'model.safetensors'], 2)
    """
    require_bare(model)
    if (config := describe(model, example_input)) is None:
        raise ArgumentError(
            f"{type(model).__name__} was not made by timm.create_model, whose arguments the folder holds: use "
            "rep_plugin.save(model, folder) and rep_plugin.load(folder, model=a freshly built one)"
        )
    write_folder(folder, config, model)


def describe(model: Any, example_input: Tensor | None = None) -> dict | None:
    """Return the config of a folder, from which the model was built again and found to be the same.

    Args:
        model: any model.
        example_input: as for :func:`save_timm`.

    Returns:
        Content of ``config.json``, None for a model that timm did not make.

    Raises:
        ArgumentError: as :func:`save_timm`.
        CheckpointMismatchError, EquivalenceError: as :func:`save_timm`.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not isinstance(cfg, dict) or not cfg.get("architecture") or not hasattr(model, "_model_args"):
        return None
    base, base_args = getattr(model, "_rep_base", None) or (cfg["architecture"], model._model_args)
    base_args = {name: value for name, value in base_args.items() if name != "pretrained_model_args"}
    for name, value in base_args.items():
        _require_plain(name, value)
    fresh = _build(base, base_args)
    history = [*changes(layers_of(fresh), start_of(model)), *history_of(model)]
    check_history(history)
    rebuilt = rebuild_(fresh, history)
    differs = describe_mismatch(rebuilt, state_of(model)) or "; ".join(
        step["what"] if step["step"] == CHANGED else f"{step['layer']!r} is {step['by']}"
        for step in changes(layers_of(rebuilt), layers_of(model))
    )
    if differs:
        raise CheckpointMismatchError(
            f"{type(model).__name__} is not what its history makes of {base!r}: {differs}; nothing was written"
        )
    require_identical(model, load_weights_(rebuilt, state_of(model)), inputs_for(model, example_input, history))
    classes = {"num_classes": model.num_classes} if hasattr(model, "num_classes") else {}
    return {
        "architecture": ARCHITECTURE,
        **classes,
        "model_args": {"base": base, "base_args": base_args, "history": history},
        "pretrained_cfg": {key: cfg[key] for key in KEPT_CFG if cfg.get(key) is not None} | classes,
    }


def _require_plain(name: str, value: object) -> None:
    try:
        json.dumps(value)
    except TypeError:
        raise ArgumentError(
            f"the argument {name}={value!r} of timm.create_model cannot be written as JSON: use rep_plugin.save(model, "
            "folder) and rep_plugin.load(folder, model=a freshly built one)"
        ) from None


# Arguments of timm.create_model that read other files, or load from the network.
LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def _build(base: str, base_args: Mapping) -> nn.Module:
    """Build a network of timm by its plain name and plain arguments, without weights."""
    if not isinstance(base, str) or ":" in base or not timm.is_model(base.partition(".")[0]):
        raise ArgumentError(f"base must be the name of a network of timm, got {shown(base)}")
    if base.partition(".")[0] in (ARCHITECTURE, OLD_ARCHITECTURE):
        raise ArgumentError(f"base must be the network before all steps, got {base!r}")
    if not fits(base_args, dict[str, Any]):
        raise ArgumentError(f"base_args must be a dict of arguments, got {shown(base_args)}")
    if loading := sorted(LOADING & base_args.keys()):
        raise ArgumentError(f"base_args must build the network alone, got {', '.join(loading)}, which load other files")
    return timm.create_model(base, pretrained=False, **base_args)


@register_model
@checked
def rep_plugin_rebuilt(
    pretrained: bool = False,
    pretrained_cfg: Mapping | None = None,
    pretrained_cfg_overlay: Mapping | None = None,
    pretrained_model_args: Mapping | None = None,
    cache_dir: str | Path | None = None,
    base: Any = "",  # of the folder, as the next two: checked with its name where they are used
    base_args: Any = None,
    history: Any = (),
    num_classes: Classes | None = None,
    in_chans: Channels | None = None,
    global_pool: str | None = None,
    features_only: bool = False,
    weights: bool = True,
    device: Any = None,
    dtype: Any = None,
    **arguments,
) -> nn.Module:
    """Build what a folder of :func:`save_timm` holds, for ``timm.create_model('local-dir:FOLDER')``.

    Args:
        pretrained, pretrained_cfg_overlay, pretrained_model_args, cache_dir: timm passes them; they change nothing.
        pretrained_cfg: what timm made of the folder's ``config.json``, with the folder as ``file``.
        base: name of the network before the history.
        base_args: arguments of that network.
        history: what was done to it, see :mod:`rep_plugin.history`.
        num_classes: another number than the saved one puts a fresh classifier on it, 0: none.
        in_chans: timm's own scripts give it; must be the model's.
        global_pool: another pool before the classifier, one of timm's.
        features_only: return the maps of the stages, as timm's own models do; ``out_indices`` chooses them.
        weights: load the saved weights; False trains from scratch.
        device, dtype: of the parameters.
        **arguments: passed on to the network (``drop_rate``, ``drop_path_rate`` ...).

    Returns:
        The model.

    Raises:
        ArgumentError: an argument does not fit, or timm was not called with a folder of its own models.
        CheckpointMismatchError: the weights do not fit.
    """
    folder = (pretrained_cfg or {}).get("file") if isinstance(pretrained_cfg, Mapping) else None
    if not folder:
        raise ArgumentError(f"{ARCHITECTURE!r} is loaded from a folder: timm.create_model('local-dir:FOLDER')")
    if not base:
        raise ArgumentError(
            f"{folder} holds a model that timm does not build: rep_plugin.load({str(folder)!r}, model=a freshly built one)"
        )
    base_args = dict(base_args or {})
    if in_chans is not None and in_chans != (own := base_args.get("in_chans", 3)):
        raise ArgumentError(f"in_chans must be what the model in {folder} has, {own}, got {in_chans}")
    options = {name: arguments.pop(name) for name in ("out_indices", "feature_cls") if name in arguments}
    base_args |= arguments
    try:
        model: Any = rebuild_(_build(base, base_args), history)
    except Exception as error:  # what a network does not take it refuses in a way of its own
        raise ArgumentError(f"{folder}: {shown(base)} cannot be built as saved: {first_line(error)}") from error
    model._rep_base = (base, base_args)
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in pretrained_cfg.items()}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **{k: own[k] for k in KEPT_CFG if k in own}}
    if hasattr(model, "num_classes") and own.get("num_classes") is not None:
        model.num_classes = own["num_classes"]
    if weights:
        state = read_weights(Path(folder))
        require_fit(model, state, str(Path(folder) / WEIGHTS))
        load_weights_(model, state)
    if global_pool is not None:
        _set_pool(model, global_pool, num_classes)
    if num_classes is not None and num_classes != getattr(model, "num_classes", None) and not features_only:
        _set_classes(model, num_classes)
    if features_only or options:
        if not features_only:
            raise ArgumentError(f"{min(options)} goes with features_only=True")
        model = as_features(model, options)
    return model if device is None and dtype is None else model.to(device=device, dtype=dtype)


OLD_ENTRY = rep_plugin_rebuilt


def rep_rebuilt(*args, **kwargs) -> nn.Module:
    """Read a folder that was written before the name told the package; as :func:`rep_plugin_rebuilt`."""
    return OLD_ENTRY(*args, **kwargs)


register_model(rep_rebuilt)


def _classifier(model: Any, what: str) -> tuple[str, nn.Linear]:
    """Name and layer of a model's linear classifier. Raises ArgumentError, beginning with ``what``, for another one."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    name = next((name for name, module in model.named_modules() if module is classifier), None)
    if name is None or not isinstance(classifier, nn.Linear):
        raise ArgumentError(f"{what} needs a linear classifier, the model has {type(classifier).__name__}")
    return name, classifier


def _set_classes(model: Any, num_classes: int) -> None:
    set_classes_(model, _classifier(model, f"num_classes (={num_classes})")[0], num_classes)


def _set_pool(model: Any, global_pool: str, num_classes: int | None) -> None:
    """Give a model another pool by timm's own method; a classifier that still fits keeps its weights."""
    old = model.get_classifier()
    model.reset_classifier(model.num_classes if num_classes is None else num_classes, global_pool)
    new = model.get_classifier()
    if isinstance(old, nn.Linear) and isinstance(new, nn.Linear) and old.weight.shape == new.weight.shape:
        new.load_state_dict(old.state_dict())


@replays("classifier", "layer", "num_classes")
def set_classes_(model: nn.Module, layer: str, num_classes: int) -> nn.Module:
    """Put a fresh linear layer in the place of a classifier; ``model.num_classes`` follows.

    Its inputs are those of the old weights: timm's ``reset_classifier`` reads them from attributes.

    Args:
        model: the network; it is changed.
        layer: name of the classifier.
        num_classes: classes, 0 for none.

    Returns:
        The model.

    Raises:
        ArgumentError: ``layer`` is not linear.
    """
    old = model.get_submodule(layer)
    if not isinstance(old, nn.Linear):
        raise ArgumentError(
            f"num_classes (={num_classes}) needs a linear classifier, the model has {type(old).__name__}"
        )
    try:
        new = nn.Linear(old.in_features, num_classes, old.bias is not None) if num_classes else nn.Identity()
    except RuntimeError as error:  # a negative number, or more than there is memory for
        raise ArgumentError(f"num_classes (={num_classes}) cannot be: {first_line(error)}") from error
    model.set_submodule(layer, new.to(old.weight.device, old.weight.dtype).train(old.training))
    model.num_classes = num_classes
    return model


BUILDERS["timm"] = Builder(describe, lambda folder: timm.create_model(f"local-dir:{folder}"))
