"""Deployed models as stock code loads them: ``deploy.pth`` and ``deploy.py``, written together or not at all."""

import copy
import inspect
import math
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
from rep_plugin.backbones.loading import CheckpointMismatchError, describe_mismatch, require_fit
from rep_plugin.checkpoint import load_checkpoint_file, save_checkpoint_file, write_atomic, write_together
from rep_plugin.mm_convs import TYPES as CONV_TYPES
from rep_plugin.registry import MODELS
from rep_plugin.reparam import reparameterize
from rep_plugin.report import Report
from rep_plugin.running import run_model
from rep_plugin.verify import EquivalenceError, compare_outputs, verify_equivalence

# Hooks that have done their work on the way to a pruned model: they would do it again when it is fine-tuned.
NARROWING_HOOKS = (
    "CentripetalHook", "DistillHook", "LinearizeHook", "PruneHook", "ResRepHook", "SoftPruneHook", "SparsityHook",
)  # fmt: skip
REAL_PICTURES, REAL_PIXELS = 8, 8 * 384 * 384  # for the proof on real data: float64 is slow


def typed_dicts(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for value in node.values():
            yield from typed_dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from typed_dicts(value)


def _takes_deploy(type_name: object) -> bool:
    if not isinstance(type_name, str) or not type_name.startswith("rep_plugin."):
        return False
    found = MODELS.get(type_name.split(".", 1)[1])
    return found is not None and "deploy" in inspect.signature(found).parameters


def drop_pretrained_(part: dict) -> None:
    """Drop what loads other weights when a part is built or initialised: an artefact's come from its own file."""
    init = part.get("init_cfg")
    kept = [one for one in (init if isinstance(init, (list, tuple)) else [init]) if one and one["type"] != "Pretrained"]
    if init is not None:
        part["init_cfg"] = kept or None
    part.pop("pretrained", None)
    if part["type"] == "rep_plugin.Expanded":
        part["checkpoint"] = None


def _as_stock(node: object) -> tuple[object, int]:
    """Return a config with the stock parts that our look-alikes and ``Expanded`` merge into, and how many there were."""
    found = 0
    if isinstance(node, dict):
        if node.get("type") == "rep_plugin.Expanded":
            outer, node, found = node, node["model"], 1
            if outer.get("data_preprocessor") is not None:
                node.setdefault("data_preprocessor", outer["data_preprocessor"])
            for part in typed_dicts(node):
                drop_pretrained_(part)
        elif node.get("type") in CONV_TYPES:
            return type(node)(type="Conv2d"), 1
        for key, value in node.items():
            node[key], count = _as_stock(value)
            found += count
    elif isinstance(node, (list, tuple)):
        pairs = [_as_stock(value) for value in node]
        return type(node)(value for value, _ in pairs), sum(count for _, count in pairs)
    return node, found


def deploy_config(cfg: Config, as_stock: bool = True) -> Config:
    """Return a copy of a config that builds the deployed network: the same file in all else.

    An ``Expanded`` model and ``conv_cfg`` look-alikes become the stock network they merge into; a pruned model is merged
    when it is built, its plan being for the layers before, and so is any model with ``as_stock=False``. Raises ValueError
    where the model holds no rep_plugin type that has a deployed form.
    """
    cfg = copy.deepcopy(cfg)
    parts = []
    if cfg.model.get("type") == "rep_plugin.Pruned" or not as_stock:
        cfg.model = dict(type="rep_plugin.Merged", model=cfg.model, backbone=dict())
        replaced = 1
    else:
        cfg.model, replaced = _as_stock(cfg.model)
        parts = [part for part in typed_dicts(cfg.model) if _takes_deploy(part["type"])]
    if not parts and not replaced:
        raise ValueError(f"the model {cfg.model.get('type')!r} holds no rep_plugin part that has a deployed form")
    for part in parts:
        part["deploy"] = True
        part.pop("init_cfg", None)  # the weights come from deploy.pth
    finish_(cfg, ("ReparamHook", *NARROWING_HOOKS))
    return cfg


def finish_(cfg: Config, hooks_over: Sequence[str]) -> None:
    """Take out of a config what belongs to the training that is over, its own hooks (by name) among it."""
    cfg.load_from, cfg.resume = None, False
    for key in ("work_dir", "launcher"):  # a Runner writes its config into work_dir, over this very file
        cfg.pop(key, None)
    over = [f"rep_plugin.{name}" for name in hooks_over]
    cfg.custom_hooks = [hook for hook in cfg.get("custom_hooks") or [] if str(hook.get("type")) not in over]


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


def read_state_dict(checkpoint: str | os.PathLike) -> tuple[dict, dict]:
    """Return the state dict and the meta data of a checkpoint file. Raises CheckpointMismatchError where it has none."""
    content = load_checkpoint_file(checkpoint)
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    ):
        raise CheckpointMismatchError(f"{checkpoint} holds no state dict (names and tensors)")
    meta = content.get("meta")
    return state_dict, meta if isinstance(meta, dict) else {}


def load_model(cfg: Config, checkpoint: str) -> tuple[nn.Module, dict]:
    """Build a config's model and load a checkpoint into it strictly; return it in eval mode, with the file's meta data."""
    state_dict, meta = read_state_dict(checkpoint)
    cfg = copy.deepcopy(cfg)
    for part in typed_dicts(cfg.model):
        if part["type"] == "rep_plugin.Expanded":  # the weights it was expanded from may be gone by now
            for inner in typed_dicts(part):
                drop_pretrained_(inner)
    model = build_model(cfg)
    load_strictly(model, state_dict, str(checkpoint))
    return model, meta


def real_inputs(model: nn.Module, loader: DataLoader, count: int = REAL_PICTURES) -> Tensor:
    """Return up to ``count`` pictures of a loader's data set, evenly spread, preprocessed as the model sees them.

    Pictures of several sizes do not make a batch: those of the most frequent size are taken, and of large ones fewer, but
    two.
    """
    dataset = loader.dataset
    step = max(1, len(dataset) // count)
    samples = [dataset[i] for i in range(0, min(len(dataset), count * step), step)]
    shapes = [tuple(sample["inputs"].shape) for sample in samples]
    common = max(shapes, key=shapes.count)
    samples = [sample for sample, shape in zip(samples, shapes) if shape == common]
    samples = samples[: max(2, REAL_PIXELS // math.prod(common[-2:]))]
    with torch.no_grad():
        return model.data_preprocessor(copy.deepcopy(loader.collate_fn(samples)), False)["inputs"]


def check_rebuilt(cfg: Config, merged: nn.Module, inputs: Tensor) -> None:
    """What stock code will build from the written config must load the weights and say the same as the given model."""
    rebuilt = build_model(cfg)
    load_strictly(rebuilt, merged.state_dict(), "what was made of the model")
    with torch.no_grad():
        difference = compare_outputs(run_model(merged.cpu(), inputs.cpu()), run_model(rebuilt, inputs.cpu()))
    if difference.exceeds(1e-6):  # or is it rounding, of weights that lie otherwise in memory?
        try:
            verify_equivalence(merged, rebuilt, [inputs.cpu()])
        except EquivalenceError:
            found = f"{difference.max_rel:.2e} relative"
            raise EquivalenceError(f"the model built from the written config differs by {found}") from None


def write_deployed(
    model: nn.Module,
    cfg: Config,
    out_dir: str | os.PathLike,
    inputs: Tensor | None = None,
    dataset_meta: dict | None = None,
) -> Report:
    """Merge a copy of a trained model, prove it, and write ``deploy.pth``, ``deploy.py`` and ``deploy.json`` (the report).

    ``model`` is what ``cfg.model`` builds, in any mode; ``inputs`` are preprocessed pictures (N, C, H, W) for the proof
    beside random ones. The files are what ``init_model`` of ``mmpretrain.apis`` and ``mmseg.apis``, ``init_detector`` of
    ``mmdet.apis`` and the stock ``tools/test.py`` load. Raises what :func:`rep_plugin.reparameterize` raises, or OSError
    where a file cannot be written; older files then stay.
    """
    out_dir = Path(out_dir)
    deployed = deploy_config(cfg)
    source = copy.deepcopy(model)
    source.eval()
    merged, report = reparameterize(source, inputs, inplace=True, fold_bn=False)
    merged.cpu()
    if describe_mismatch(build_model(deployed).state_dict(), merged.state_dict()):
        deployed = deploy_config(
            cfg, as_stock=False
        )  # biases that the stock network has not: no batch norm took them up
    example = inputs if inputs is not None else torch.zeros(report.input_shape)
    check_rebuilt(deployed, merged, example)

    meta = file_meta(merged, dataset_meta, report.notes)
    pretty = deployed.pretty_text.encode()
    write_together(
        out_dir,
        {
            "deploy.pth": lambda path: save_checkpoint_file({"meta": meta, "state_dict": merged.state_dict()}, path),
            "deploy.py": lambda path: write_atomic(path, lambda file: file.write(pretty)),
            "deploy.json": lambda path: write_atomic(path, lambda file: file.write(report.to_json().encode())),
        },
    )
    return report


def file_meta(model: nn.Module, dataset_meta: dict | None, notes: list[str]) -> dict:
    """Return the meta data of an artefact's file; class names that cannot be the classifier's are left out, with a note."""
    told = plain_data(dataset_meta or {})
    if "classes" in told and (misfit := misfit_of(told["classes"], model)):
        del told["classes"]
        notes.append(misfit)
    return {"rep_plugin_version": rep_plugin.__version__, "dataset_meta": told}


def misfit_of(class_names: Sequence[str] | None, model: nn.Module) -> str:
    """Return why the names of a data set are not those of a classifier's outputs; empty where they may be."""
    outputs = getattr(getattr(model, "head", None), "num_classes", None)
    if not class_names or outputs in (None, len(class_names)):
        return ""
    return (
        f"class names left out: the data set has {len(class_names)}, the head {outputs} (give the data set classes=...)"
    )


def plain_data(value: object) -> object:
    """Lists, dicts, strings and numbers only, so that a checkpoint loads with ``weights_only=True``."""
    if isinstance(value, dict):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_data(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
