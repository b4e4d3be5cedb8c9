"""Pruned and merged timm models as a folder that ``timm.create_model('local-dir:FOLDER')`` loads.

The folder holds ``config.json`` (timm's: architecture ``rep_rebuilt``, whose ``model_args`` are the original architecture
and what was done to it) and ``model.safetensors``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models import generate_default_cfgs, register_model
from torch import nn

from rep_plugin.checkpoints.files import write_atomic, write_together
from rep_plugin.checkpoints.strict import describe_mismatch, require_fit
from rep_plugin.errors import ArgumentError, CheckpointMismatchError
from rep_plugin.history import ATTRIBUTE, check_history, history_of, rebuild_, replays

ARCHITECTURE, CONFIG, WEIGHTS = "rep_rebuilt", "config.json", "model.safetensors"
# The part of a pretrained_cfg that describes the input; where its first weights came from does not hold any more.
KEPT_CFG = (
    "input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
    "num_classes", "license", "label_names", "label_descriptions",
)  # fmt: skip
default_cfgs = generate_default_cfgs({f"{ARCHITECTURE}.untrained": {"url": ""}})


def save_timm(model: nn.Module, folder: str | Path) -> None:
    """Write a pruned or merged timm model so that ``timm.create_model('local-dir:FOLDER')`` loads it.

    The structure is built again from the model's history first, so that what is written loads. Where anything fails, older
    files stay.

    Args:
        model: made by ``timm.create_model``.
        folder: where ``config.json`` and ``model.safetensors`` go.

    Raises:
        ArgumentError: timm did not create the model, or JSON does not hold its arguments.
        CheckpointMismatchError: the model was changed by something that is not in its history.
        OSError: a file cannot be written.

    Example:
        >>> import os, timm, rep_plugin
        >>> model = timm.create_model("rep_mobilenetv2_035", num_classes=2).eval()
        >>> rep_plugin.timm.save_timm(rep_plugin.reparameterize(model)[0], "saved")
        >>> sorted(os.listdir("saved")), timm.create_model("local-dir:saved").num_classes
        (['config.json', 'model.safetensors'], 2)
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
    if not pretrained_cfg.get("architecture") or not hasattr(model, "_model_args"):
        raise ArgumentError(
            f"{type(model).__name__} was not made by timm.create_model, whose arguments the folder holds"
        )
    base, base_args = getattr(model, "_rep_base", None) or (pretrained_cfg["architecture"], _args_of(model))
    for name, value in base_args.items():
        _require_plain(name, value)
    history, classes = _with_classifiers(model)
    base_args = {**base_args, "num_classes": classes}
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    rebuilt = _build(base, base_args, history)
    if mismatch := describe_mismatch(rebuilt, state):
        raise CheckpointMismatchError(
            f"{type(model).__name__} is not what its history makes of {base!r}: {mismatch}; nothing was written"
        )

    config = {
        "architecture": ARCHITECTURE,
        "num_classes": model.num_classes,
        "model_args": {"base": base, "base_args": base_args, "history": history},
        "pretrained_cfg": {key: pretrained_cfg[key] for key in KEPT_CFG if pretrained_cfg.get(key) is not None},
    }
    contents = {WEIGHTS: save(state), CONFIG: json.dumps(config, indent=1).encode()}
    writers = {
        name: lambda path, data=data: write_atomic(path, lambda file: file.write(data))
        for name, data in contents.items()
    }
    write_together(Path(folder), writers)


def _args_of(model: nn.Module) -> dict:
    """The arguments of timm.create_model."""
    return {name: value for name, value in model._model_args.items() if name != "pretrained_model_args"}


def _require_plain(name: str, value: object) -> None:
    try:
        json.dumps(value)
    except TypeError:
        raise ArgumentError(f"the argument {name}={value!r} of timm.create_model cannot be written as JSON") from None


def _with_classifiers(model: Any) -> tuple[list[dict], int]:
    """Return a model's history with the steps that put fresh classifiers in place, and the classes before the first.

    timm's ``reset_classifier`` records no step; the widths in the plans show where the number of classes changed.
    """
    steps = [step for step in history_of(model) if step["step"] != "classifier"]
    classifier = model.get_classifier()
    layer = next((name for name, module in model.named_modules() if module is classifier), None)
    seen = [
        (step, step["plan"]["widths"].get(layer, (None,))[0] if step["step"] == "prune" else None) for step in steps
    ]
    first = classes = next((number for _, number in seen if number is not None), model.num_classes)
    history: list[dict] = []
    for step, number in (*seen, (None, model.num_classes)):
        if number is not None and number != classes:
            history.append({"step": "classifier", "layer": layer, "num_classes": number})
            classes = number
        if step is not None:
            history.append(step)
    return history, first


def _build(base: str, base_args: Mapping, history: Sequence[Mapping]) -> nn.Module:
    return rebuild_(timm.create_model(base, pretrained=False, **base_args), history)


@register_model
def rep_rebuilt(
    pretrained: bool = False,
    pretrained_cfg: Mapping | None = None,
    pretrained_cfg_overlay: Mapping | None = None,
    pretrained_model_args: Mapping | None = None,
    cache_dir: str | Path | None = None,
    base: str = "",
    base_args: Mapping | None = None,
    history: Sequence[Mapping] = (),
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    weights: bool = True,
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
        drop_rate, drop_path_rate: passed on to the network.
        weights: load the saved weights; False trains from scratch.

    Returns:
        The model.

    Raises:
        ArgumentError: an argument does not fit, or timm was not called with a folder.
        CheckpointMismatchError: the weights do not fit.
    """
    folder = (pretrained_cfg or {}).get("file") if isinstance(pretrained_cfg, Mapping) else None
    if not base or not folder:
        raise ArgumentError(f"{ARCHITECTURE!r} is loaded from a folder: timm.create_model('local-dir:FOLDER')")
    base_args = dict(base_args or {})
    if in_chans is not None and in_chans != (own := base_args.get("in_chans", 3)):
        raise ArgumentError(f"in_chans must be what the model in {folder} has, {own}, got {in_chans}")
    check_history(history)
    given = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    model = _build(base, base_args | {name: value for name, value in given.items() if value is not None}, history)
    if weights:
        state = _read_weights(Path(folder) / WEIGHTS)
        require_fit(model, state, str(Path(folder) / WEIGHTS))
        model.load_state_dict(state)
    setattr(model, ATTRIBUTE, [dict(step) for step in history])
    model._rep_base = (base, base_args)
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in pretrained_cfg.items()}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **{k: own[k] for k in KEPT_CFG if k in own}}
    if num_classes is not None and num_classes != model.num_classes:
        classifier = model.get_classifier()
        layer = next((name for name, module in model.named_modules() if module is classifier), None)
        if layer is None:
            raise ArgumentError(
                f"num_classes (={num_classes}) needs a linear classifier, the model has {type(classifier).__name__}"
            )
        set_classes_(model, layer, num_classes)
    return model


def _read_weights(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected the weights of a model")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointMismatchError(f"{path} holds no weights: {error}") from None


@replays("classifier", "layer", "num_classes")
def set_classes_(model: nn.Module, layer: str, num_classes: int) -> nn.Module:
    """Put a fresh linear layer in the place of a classifier; ``model.num_classes`` follows.

    Its inputs are those of the old weights: timm's ``reset_classifier`` reads them from attributes that pruning leaves as
    they were.

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
    new = nn.Linear(old.in_features, num_classes, old.bias is not None) if num_classes else nn.Identity()
    model.set_submodule(layer, new.to(old.weight.device, old.weight.dtype).train(old.training))
    model.num_classes = num_classes
    return model
