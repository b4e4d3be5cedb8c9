"""Deployed models as stock code loads them: ``deploy.pth`` and ``deploy.py``, written together or not at all."""

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rep_plugin
from rep_plugin.backbones.loading import CheckpointMismatchError, require_fit
from rep_plugin.checkpoint import load_checkpoint_file, save_checkpoint_file, write_atomic
from rep_plugin.registry import MODELS
from rep_plugin.reparam import reparameterize
from rep_plugin.report import Report
from rep_plugin.verify import EquivalenceError, compare_outputs

REAL_PICTURES = 8  # for the proof on real data: float64 is slow


def _typed_dicts(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for value in node.values():
            yield from _typed_dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _typed_dicts(value)


def _takes_deploy(type_name: object) -> bool:
    if not isinstance(type_name, str) or not type_name.startswith("rep_plugin."):
        return False
    found = MODELS.get(type_name.split(".", 1)[1])
    return found is not None and "deploy" in inspect.signature(found).parameters


def deploy_config(cfg: Config) -> Config:
    """Return a copy of a config that builds the deployed network: the same file in all else.

    Raises ValueError where the model holds no rep_plugin type that has a deployed form.
    """
    cfg = copy.deepcopy(cfg)
    parts = [part for part in _typed_dicts(cfg.model) if _takes_deploy(part["type"])]
    if not parts:
        raise ValueError(f"the model {cfg.model.get('type')!r} holds no rep_plugin part that has a deployed form")
    for part in parts:
        part["deploy"] = True
        part.pop("init_cfg", None)  # the weights come from deploy.pth
    cfg.load_from, cfg.resume = None, False
    for key in ("work_dir", "launcher"):  # a Runner writes its config into work_dir, over this very file
        cfg.pop(key, None)
    hooks = cfg.get("custom_hooks") or []
    over = ("rep_plugin.ReparamHook", "rep_plugin.LinearizeHook")
    cfg.custom_hooks = [hook for hook in hooks if str(hook.get("type")) not in over]
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build ``cfg.model`` as mmengine's Runner does, in eval mode."""
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.setdefault("data_preprocessor", cfg.get("data_preprocessor"))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
        model = ROOT_MODELS.build(model_cfg)
    model.eval()  # not chained: mmpretrain's return None
    return model


def load_strictly(model: nn.Module, state_dict: dict, source: str) -> None:
    """Load a state dict that must fit exactly; on a mismatch nothing is loaded.

    Raises RuntimeError with the first missing, unexpected and differently shaped keys.
    """
    require_fit(model, state_dict, source)
    model.load_state_dict(state_dict)


def load_model(cfg: Config, checkpoint: str) -> tuple[nn.Module, dict]:
    """Build a config's model and load a checkpoint into it strictly; return it in eval mode, with the file's meta data."""
    content = load_checkpoint_file(checkpoint)
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    ):
        raise CheckpointMismatchError(f"{checkpoint} holds no state dict (names and tensors)")
    model = build_model(cfg)
    load_strictly(model, state_dict, str(checkpoint))
    meta = content.get("meta")
    return model, meta if isinstance(meta, dict) else {}


def real_inputs(model: nn.Module, loader: DataLoader, count: int = REAL_PICTURES) -> Tensor:
    """Return up to ``count`` pictures of a loader's data set, evenly spread, preprocessed as the model sees them."""
    dataset = loader.dataset
    step = max(1, len(dataset) // count)
    batch = loader.collate_fn([dataset[i] for i in range(0, min(len(dataset), count * step), step)])
    with torch.no_grad():
        return model.data_preprocessor(copy.deepcopy(batch), False)["inputs"]


def _check_rebuilt(cfg: Config, merged: nn.Module, inputs: Tensor) -> None:
    """What stock code will build from deploy.py must load the weights and say the same as the merged model."""
    rebuilt = build_model(cfg)
    load_strictly(rebuilt, merged.state_dict(), "the merged model")
    with torch.no_grad():
        difference = compare_outputs(merged.cpu()(inputs.cpu()), rebuilt(inputs.cpu()))
    if difference.exceeds(1e-6):
        raise EquivalenceError(f"the model built from deploy.py differs by {difference.max_rel:.2e} relative")


def write_deployed(
    model: nn.Module,
    cfg: Config,
    out_dir: str | os.PathLike,
    inputs: Tensor | None = None,
    dataset_meta: dict | None = None,
) -> Report:
    """Merge a copy of a trained model, prove it, and write ``deploy.pth``, ``deploy.py`` and ``deploy.json`` (the report).

    ``model`` is what ``cfg.model`` builds, in any mode; ``inputs`` are preprocessed pictures (N, C, H, W) for the proof
    beside random ones. The files are what ``mmpretrain.apis.init_model`` and the stock ``tools/test.py`` load. Raises what
    :func:`rep_plugin.reparameterize` raises, or OSError where a file cannot be written; older files then stay.
    """
    out_dir = Path(out_dir)
    deployed = deploy_config(cfg)
    source = copy.deepcopy(model)
    source.eval()
    merged, report = reparameterize(source, inputs, inplace=True, fold_bn=False)
    merged.cpu()
    example = inputs if inputs is not None else torch.zeros(report.input_shape)
    _check_rebuilt(deployed, merged, example)

    meta = {"rep_plugin_version": rep_plugin.__version__, "dataset_meta": _plain(dataset_meta or {})}
    out_dir.mkdir(parents=True, exist_ok=True)
    pretty, written = deployed.pretty_text.encode(), []
    try:
        for name in ("deploy.pth", "deploy.py", "deploy.json"):
            written.append(out_dir / f"{name}.new")
        save_checkpoint_file({"meta": meta, "state_dict": merged.state_dict()}, written[0])
        write_atomic(written[1], lambda file: file.write(pretty))
        write_atomic(written[2], lambda file: file.write(report.to_json().encode()))
        for path in written:
            if path.with_suffix("").is_dir():
                raise IsADirectoryError(f"{path.with_suffix('')} is a folder, expected a file or nothing")
        for path in written:  # all three are on disk: now they get their names
            os.replace(path, path.with_suffix(""))
    finally:
        for path in written:
            path.unlink(missing_ok=True)
    return report


def _plain(value: object) -> object:
    """Lists, dicts, strings and numbers only, so that a checkpoint loads with ``weights_only=True``."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
