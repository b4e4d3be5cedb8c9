"""Configs of deployed and pruned models, made from the configs they were trained with; nothing is built here."""

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mmengine.config import Config

from rep_plugin.errors import ArgumentError
from rep_plugin.openmmlab.convs import TYPES as CONV_TYPES
from rep_plugin.pruning import PrunePlan
from rep_plugin.registry import MODELS

# Hooks that have done their work on the way to a pruned model: they would do it again when it is fine-tuned.
NARROWING_HOOKS = (
    "CentripetalHook", "DistillHook", "LinearizeHook", "PruneHook", "ResRepHook", "SoftPruneHook", "SparsityHook",
)  # fmt: skip

LINEARIZED = "rep_plugin.Linearized"
FINE_TUNING_LENGTH, FINE_TUNING_RATE = 3, 10  # a third of the epochs, a tenth of the rate


def deploy_config(cfg: Config, as_stock: bool = True) -> Config:
    """Make the config of a deployed network: the same file in all else.

    An ``Expanded`` model and ``conv_cfg`` look-alikes become the stock network they merge into. A pruned model is merged
    when it is built, its plan being for the layers before.

    Args:
        cfg: the config it was trained with.
        as_stock: False merges any model when it is built.

    Returns:
        A changed copy.

    Raises:
        ArgumentError: the model holds no rep_plugin type that has a deployed form.
    """
    cfg = copy.deepcopy(cfg)
    parts = []
    if cfg.model.get("type") in ("rep_plugin.Pruned", LINEARIZED) or not as_stock:
        cfg.model = dict(type="rep_plugin.Merged", model=cfg.model, backbone=dict())
        replaced = 1
    else:
        cfg.model, replaced = _as_stock(cfg.model)
        parts = [part for part in typed_dicts(cfg.model) if _takes_deploy(part["type"])]
    if not parts and not replaced:
        raise ArgumentError(
            f"the model {cfg.model.get('type')!r} holds no rep_plugin part that can be merged: leave "
            "ReparamHook out, or give it one (conv_cfg=dict(type='rep_plugin.DBBConv2d'), a backbone of rep_plugin)"
        )
    for part in parts:
        part["deploy"] = True
        part.pop("init_cfg", None)  # the weights come from deploy.pth
    _finish_(cfg, ("ReparamHook", *NARROWING_HOOKS))
    return cfg


def pruned_config(cfg: Config, plan: PrunePlan, linear: bool = True) -> Config:
    """Make the config of a pruned model, with its structure inside: the same file in all else.

    Args:
        cfg: the config of the model before.
        plan: what was removed.
        linear: no anneal is under way, so that ``LinearizeHook`` has nothing to do.

    Returns:
        A changed copy.
    """
    cfg = copy.deepcopy(cfg)
    # As text, and without the scores: mmengine takes seconds to print thousands of indented numbers.
    text = json.dumps(asdict(replace(plan, scores={})), separators=(",", ":"))
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=text, backbone=dict())
    _finish_(cfg, [name for name in NARROWING_HOOKS if linear or name != "LinearizeHook"])
    return cfg


def linearized_config(cfg: Config, history: Sequence[Mapping]) -> Config:
    """Make the config of a model that was linearized in training: the same file in all else.

    Args:
        cfg: the config of the model before.
        history: of the model, see :func:`rep_plugin.history.history_of`.

    Returns:
        A changed copy; ``cfg`` itself where nothing was linearized, or where it says so already.
    """
    step = next((step for step in history if step["step"] == "linearize" and not step.get("part")), None)
    if step is None or any(part["type"] == LINEARIZED for part in typed_dicts(cfg.model)):
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model = dict(
        type=LINEARIZED,
        model=cfg.model,
        segments=plain_data(step["segments"]),
        act_after=step["act_after"],
        backbone=dict(),
    )
    return cfg


def expanded_config(cfg: Config, block: str, where: str | Sequence[str] | None) -> Config:
    """Make the config of an expanded model: the same file in all else.

    Args:
        cfg: the config of the model before.
        block: as in :func:`rep_plugin.expand`.
        where: as in :func:`rep_plugin.expand`.

    Returns:
        A changed copy.
    """
    cfg = copy.deepcopy(cfg)
    for part in typed_dicts(cfg.model):
        drop_pretrained_(part)
    cfg.model = dict(type="rep_plugin.Expanded", model=cfg.model, block=block, where=where)
    _finish_(cfg, ())
    return cfg


def fine_tune_(cfg: Config, weights: str) -> str:
    """Let training the config of a pruned network fine-tune the weights beside it, by a schedule made from its own.

    A third of the epochs (iterations), rounded up; a tenth of the highest learning rate, falling along a cosine. A config of
    a network that was pruned before has such a schedule already, and keeps it, as does one with an anneal under way.

    Args:
        cfg: what :func:`pruned_config` returns; it is changed.
        weights: name of the checkpoint beside the file that the config is written to.

    Returns:
        What was done to the schedule, one sentence.
    """
    cfg.load_from = f"{{{{ fileDirname }}}}/{weights}"  # mmengine fills the folder in, wherever that is
    loop, wrapper = cfg.get("train_cfg") or {}, cfg.get("optim_wrapper") or {}
    by_epoch = loop.get("by_epoch", "max_iters" not in loop)
    key = "max_epochs" if by_epoch else "max_iters"
    annealed = any(type_name(hook) == "LinearizeHook" for hook in cfg.custom_hooks)
    again = any(part["type"] == "rep_plugin.Pruned" for part in typed_dicts(cfg.model.model))
    if not isinstance(loop.get(key), int) or annealed or again:
        return "The schedule is that of the config before."
    length = loop[key] = -(-loop[key] // FINE_TUNING_LENGTH)
    loop.pop("dynamic_intervals", None)
    for name in ("val_begin", "val_interval"):
        if isinstance(loop.get(name), int):
            loop[name] = min(loop[name], length)
    schedulers = cfg.get("param_scheduler") or []
    peaks = [part.get("eta_max", 0) for part in typed_dicts(schedulers) if type_name(part).endswith("LR")]
    for _, optimizer in optimizers_of(wrapper):
        if isinstance(optimizer.get("lr"), (int, float)):
            optimizer["lr"] = float(f"{max(optimizer['lr'], *peaks, 0) / FINE_TUNING_RATE:.6g}")
    cosine = dict(type="CosineAnnealingLR", by_epoch=by_epoch)
    cfg.param_scheduler = cosine | (dict(convert_to_iter_based=True) if by_epoch else {})
    cfg.custom_hooks = [
        hook for hook in cfg.custom_hooks if type_name(hook) != "AccuracyLrHook"
    ]  # its steps are behind
    return f"{length} {key[4:]}, a third of before, at a tenth of the highest learning rate, falling along a cosine."


def optimizers_of(wrapper: Mapping, key: str = "optim_wrapper") -> Iterator[tuple[str, dict]]:
    """Yield the optimizers of a wrapper's config, one or several.

    Args:
        wrapper: the config.
        key: its place in the whole config.

    Yields:
        The place and the config of each optimizer.
    """
    for name, part in wrapper.items():
        if isinstance(part, Mapping):
            if name == "optimizer":
                yield f"{key}.{name}", part
            else:
                yield from optimizers_of(part, f"{key}.{name}")


def own_data_(cfg: Config, classes: Sequence[str] | None) -> None:
    """Take out of a config what it says of other data than its own, inherited: class names, and hints to get the data.

    Args:
        cfg: the config; it is changed.
        classes: those of the data set, where they are known.
    """
    hint = cfg.get("missing_data_hint")
    if isinstance(hint, dict):
        roots = {os.path.normpath(part["data_root"]) for part in typed_dicts(cfg._cfg_dict) if part.get("data_root")}
        left = {root: text for root, text in hint.items() if os.path.normpath(root) in roots}
        cfg.pop("missing_data_hint")
        if left:
            cfg.missing_data_hint = left
    if not classes:
        return
    if "classes" in cfg and list(cfg.classes) != list(classes):
        cfg.classes = list(classes)
    for key, value in list(cfg.items()):
        others = value.get("classes") if isinstance(value, dict) and "type" not in value else None
        if others is not None and list(others) != list(classes) and "dataset" not in value:
            cfg.pop(key)  # a variable that was unpacked into other data sets


def typed_dicts(node: object) -> Iterator[dict]:
    """Yield every dict with a ``type`` in a config, outer ones first."""
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for value in node.values():
            yield from typed_dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from typed_dicts(value)


def type_name(part: Mapping) -> str:
    """Return the name of a config's type without its scope; the type may also be the class itself."""
    kind = part.get("type", "")
    return (kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))).rpartition(".")[2]


def drop_pretrained_(part: dict) -> None:
    """Drop what loads other weights when a part is built or initialised: an artefact's come from its own file."""
    init = part.get("init_cfg")
    kept = [one for one in (init if isinstance(init, (list, tuple)) else [init]) if one and one["type"] != "Pretrained"]
    if init is not None:
        part["init_cfg"] = kept or None
    part.pop("pretrained", None)
    if part["type"] == "rep_plugin.Expanded":
        part["checkpoint"] = None


def plain_data(value: object) -> Any:
    """Lists, dicts, strings and numbers only, so that a checkpoint loads with ``weights_only=True``."""
    if isinstance(value, dict):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_data(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _finish_(cfg: Config, hooks_over: Sequence[str]) -> None:
    """Take out of a config what belongs to the training that is over.

    Args:
        cfg: the config; it is changed.
        hooks_over: names of our hooks that have done their work.
    """
    cfg.load_from, cfg.resume = None, False
    for key in ("work_dir", "launcher"):  # a Runner writes its config into work_dir, over this very file
        cfg.pop(key, None)
    over = [f"rep_plugin.{name}" for name in hooks_over]
    cfg.custom_hooks = [hook for hook in cfg.get("custom_hooks") or [] if str(hook.get("type")) not in over]


def _as_stock(node: Any) -> tuple[Any, int]:
    """Return a config with the stock parts that our look-alikes and ``Expanded`` merge into, and how many there were."""
    total = 0
    if isinstance(node, dict):
        if node.get("type") == "rep_plugin.Expanded":
            outer, node, total = node, node["model"], 1
            if outer.get("data_preprocessor") is not None:
                node.setdefault("data_preprocessor", outer["data_preprocessor"])
            for part in typed_dicts(node):
                drop_pretrained_(part)
        elif node.get("type") in CONV_TYPES:
            return type(node)(type="Conv2d"), 1
        for key, value in node.items():
            node[key], count = _as_stock(value)
            total += count
    elif isinstance(node, (list, tuple)):
        pairs = [_as_stock(value) for value in node]
        return type(node)(value for value, _ in pairs), sum(count for _, count in pairs)
    return node, total


def _takes_deploy(name: object) -> bool:
    if not isinstance(name, str) or not name.startswith("rep_plugin."):
        return False
    part = MODELS.get(name.split(".", 1)[1])
    makers = [cls.__init__ for cls in part.__mro__] if inspect.isclass(part) else [part]  # a subclass hands it on
    return any("deploy" in inspect.signature(maker).parameters for maker in makers if maker is not None)
