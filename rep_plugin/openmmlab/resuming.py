"""What a checkpoint must hold before a training goes on from it, checked before the work folder is touched."""

import copy
import os
import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from rep_plugin.arguments import fits, shown
from rep_plugin.checkpoints.strict import describe_mismatch
from rep_plugin.errors import CheckpointMismatchError, UnreadableCheckpointError, first_line
from rep_plugin.openmmlab.checkpoint import find_latest_checkpoint, load_from_local
from rep_plugin.openmmlab.configs import type_name
from rep_plugin.openmmlab.load import build_model
from rep_plugin.openmmlab.origin import changed_in_training, explain_misfit

OPTIMIZER = {"state": dict, "param_groups": list[dict]}
# Hooks that leave the network as the config builds it until training begins.
LEAVING = {"AccuracyLrHook", "CentripetalHook", "DistillHook", "QATHook", "ReparamHook", "SparsityHook"}
OF_A_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")


def require_resumable(cfg: Config) -> None:
    """Refuse a checkpoint that a training with ``resume=True`` cannot go on from; an address or a folder passes.

    Args:
        cfg: the config of the training, with the command line in it.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableCheckpointError: it is torn, or no checkpoint of a training; the message names what is missing.
        CheckpointMismatchError: it is of another network or optimizer.
    """
    path = cfg.get("load_from")
    if not path:
        recorded = os.path.isfile(os.path.join(cfg.work_dir, "last_checkpoint"))
        path = find_latest_checkpoint(cfg.work_dir) if recorded else None
    if not path or "://" in str(path) or os.path.isdir(path):
        return
    content = load_from_local(str(path))
    meta = _require_training(content, str(path))
    if changed_in_training(meta) is None and not _hooks_change_the_network(cfg):
        _require_fit(cfg, content, meta, str(path))


def _require_training(content: Any, path: str) -> Mapping:
    """Return the meta data of what a Runner saved."""
    kinds = {
        "state_dict": dict[str, Tensor],
        "meta": dict[str, Any],
        "meta.epoch": int,
        "meta.iter": int,
        "message_hub": dict[str, Any],
        "message_hub.log_scalars": dict[str, Any],
        "message_hub.runtime_info": dict[str, Any],
        "message_hub.resumed_keys": dict[str, Any],
    }
    optional = {
        "meta.seed": int | None,
        "meta.dataset_meta": dict | None,
        "optimizer": dict[str, Any],
        "param_schedulers": list[dict] | dict[str, list[dict]],
    }
    for name, kind in (kinds | optional).items():
        value: Any = content
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and name in optional:
            continue
        if not fits(value, kind) or (kind is int and value < 0):
            got = "is missing" if value is None else f"is {shown(value)}"
            raise UnreadableCheckpointError(
                f"checkpoint {path} cannot be resumed from: {name} {got}, expected what training saves; "
                "load_from takes the weights alone"
            )
    optimizer = content.get("optimizer") or {"state": {}, "param_groups": []}
    several = [value for value in optimizer.values() if isinstance(value, dict) and "param_groups" in value]
    for one in several or [optimizer]:
        if not all(fits(one.get(key), kind) for key, kind in OPTIMIZER.items()):
            raise UnreadableCheckpointError(
                f"checkpoint {path} cannot be resumed from: optimizer holds no state and param_groups, expected what "
                "training saves"
            )
    return content["meta"]


def _hooks_change_the_network(cfg: Config) -> bool:
    """Whether a hook may give the network another structure before the checkpoint is loaded."""
    kinds = [str(hook.get("type", "")) for hook in cfg.get("custom_hooks") or []]
    ours = {f"rep_plugin.{name}" for name in LEAVING}
    return any(kind not in ours and (type_name({"type": kind}) not in _STOCK_HOOKS) for kind in kinds)


_STOCK_HOOKS = {
    "EMAHook",
    "EarlyStoppingHook",
    "ProfilerHook",
    "SyncBuffersHook",
    "EmptyCacheHook",
    "NumClassCheckHook",
}


def _require_fit(cfg: Config, content: Mapping, meta: Mapping, path: str) -> None:
    model = build_model(cfg)
    state = {re.sub(r"^module\.", "", key): value for key, value in content["state_dict"].items()}
    if differs := describe_mismatch(model, state):
        raise CheckpointMismatchError(
            f"checkpoint {path} does not fit {type(model).__name__}: {differs}; nothing was loaded"
            f"{explain_misfit(path, meta, cfg)}"
        )
    if content.get("optimizer") and cfg.get("optim_wrapper"):
        _require_optimizer_fit(cfg, model, content["optimizer"], path)


def _require_optimizer_fit(cfg: Config, model: nn.Module, state: Mapping, path: str) -> None:
    """Load the optimizer's state into one that is thrown away: torch looks at the numbers of parameters alone."""
    wrapper_cfg = copy.deepcopy(cfg.optim_wrapper)
    if wrapper_cfg.get("type", "OptimWrapper") != "OptimWrapper" or "optimizer" not in wrapper_cfg:
        return
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
        try:
            wrapper = build_optim_wrapper(model, wrapper_cfg)
        except Exception:  # the runner builds it again, and says what is wrong with it
            return
    try:
        wrapper.load_state_dict(copy.deepcopy(dict(state)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:  # torch's, for groups that differ
        raise CheckpointMismatchError(
            f"checkpoint {path} holds the state of another optimizer: {first_line(error)}"
        ) from error
    for group in wrapper.optimizer.param_groups:
        for parameter in group["params"]:
            for key in OF_A_PARAMETER:
                value = wrapper.optimizer.state.get(parameter, {}).get(key)
                if value is not None and getattr(value, "shape", None) != parameter.shape:
                    raise CheckpointMismatchError(
                        f"checkpoint {path} holds the state of another optimizer: {key} of a parameter of shape "
                        f"{tuple(parameter.shape)} is {tuple(getattr(value, 'shape', ()))}"
                    )
