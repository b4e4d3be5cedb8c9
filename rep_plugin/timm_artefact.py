"""Pruned and merged timm models as a folder that ``timm.create_model('local-dir:FOLDER')`` loads.

The folder holds ``config.json`` (timm's: architecture ``rep_rebuilt``, whose ``model_args`` are the original architecture
and what was done to it) and ``model.safetensors``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
from safetensors.torch import load_file, save
from timm.models import generate_default_cfgs, register_model
from torch import nn

from rep_plugin.backbones.loading import require_fit
from rep_plugin.checkpoint import write_atomic
from rep_plugin.history import ATTRIBUTE, history_of
from rep_plugin.rebuild import rebuild_

ARCHITECTURE, CONFIG, WEIGHTS = "rep_rebuilt", "config.json", "model.safetensors"
# What of a model's pretrained_cfg tells how to feed it; where its first weights came from does not hold any more.
KEPT_CFG = (
    "input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
    "num_classes", "license", "label_names", "label_descriptions",
)  # fmt: skip
default_cfgs = generate_default_cfgs({f"{ARCHITECTURE}.untrained": {"url": ""}})


def save_timm(model: nn.Module, folder: str | Path) -> None:
    """Write a pruned or merged timm model so that ``timm.create_model('local-dir:FOLDER')`` loads it.

    The structure is built again from its history first, so that what is written is known to load. Raises ValueError for a
    model that timm did not create, :class:`rep_plugin.backbones.loading.CheckpointMismatchError` where it was changed by
    something that its history does not tell, OSError where a file cannot be written; older files then stay.
    """
    pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
    if not pretrained_cfg.get("architecture") or not hasattr(model, "_model_args"):
        raise ValueError(f"{type(model).__name__} was not made by timm.create_model, whose arguments the folder holds")
    base, base_args = getattr(model, "_rep_base", None) or (pretrained_cfg["architecture"], _args_of(model))
    base_args = {**base_args, "num_classes": model.num_classes}  # a fresh classifier has the old one's place
    history = history_of(model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    require_fit(_build(base, base_args, history), state, f"the history of this {type(model).__name__}")

    config = {
        "architecture": ARCHITECTURE,
        "num_classes": model.num_classes,
        "model_args": {"base": base, "base_args": base_args, "history": history},
        "pretrained_cfg": {key: pretrained_cfg[key] for key in KEPT_CFG if pretrained_cfg.get(key) is not None},
    }
    text, weights = json.dumps(config, indent=1).encode(), save(state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights))
    write_atomic(folder / CONFIG, lambda file: file.write(text))


def _args_of(model: nn.Module) -> dict:
    """What timm.create_model was given."""
    return {name: value for name, value in model._model_args.items() if name != "pretrained_model_args"}


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
    weights: bool = True,
) -> nn.Module:
    """What a folder of :func:`save_timm` holds; its weights are loaded unless ``weights=False`` (from scratch).

    ``num_classes`` other than the saved ones puts a fresh classifier on it. Raises ValueError where it is not called with
    a folder, :class:`rep_plugin.backbones.loading.CheckpointMismatchError` where the weights do not fit.
    """
    folder = (pretrained_cfg or {}).get("file") if isinstance(pretrained_cfg, Mapping) else None
    if not base or not folder:
        raise ValueError(f"{ARCHITECTURE!r} is loaded from a folder: timm.create_model('local-dir:FOLDER')")
    model = _build(base, base_args or {}, history)
    if weights:
        state = load_file(Path(folder) / WEIGHTS)
        require_fit(model, state, str(Path(folder) / WEIGHTS))
        model.load_state_dict(state)
    setattr(model, ATTRIBUTE, [dict(step) for step in history])
    model._rep_base = (base, dict(base_args or {}))
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in pretrained_cfg.items()}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **{k: own[k] for k in KEPT_CFG if k in own}}
    if num_classes is not None and num_classes != model.num_classes:
        _new_classifier(model, num_classes)
    return model


def _new_classifier(model: nn.Module, num_classes: int) -> None:
    """Not timm's ``reset_classifier``: that reads widths from attributes, which pruning leaves as they were."""
    old = model.get_classifier()
    if not isinstance(old, nn.Linear):
        raise ValueError(f"num_classes (={num_classes}) needs a linear classifier, the model has {type(old).__name__}")
    name = next(name for name, module in model.named_modules() if module is old)
    model.set_submodule(name, nn.Linear(old.in_features, num_classes, old.bias is not None))
    model.num_classes = num_classes
