"""Models built from configs, and checkpoints loaded into them strictly."""

import copy
import inspect
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope, Registry, build_from_cfg
from mmengine.registry.build_functions import build_scheduler_from_cfg
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rep_plugin import depth as depth  # registers how its steps are repeated
from rep_plugin.arguments import That, checked, shown
from rep_plugin.blocks.annealed_layers import in_segments
from rep_plugin.checkpoints.plain import parse_json, require_fields
from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.checkpoints.strict import require_fit
from rep_plugin.errors import (
    ArgumentError,
    CheckpointMismatchError,
    EquivalenceError,
    RepPluginError,
    UnreadableCheckpointError,
    did_you_mean,
    first_line,
)
from rep_plugin.history import rebuild_
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.rebuilt import require_identical
from rep_plugin.measure.verify import default_inputs
from rep_plugin.openmmlab.configs import drop_pretrained_, typed_dicts
from rep_plugin.openmmlab.origin import explain_misfit

LINEARIZE = "rep_linearize"  # in a checkpoint's meta data, as JSON: what LinearizeHook did to the network
KEPT = {"segments": list[dict[str, Any]], "act_after": str | None}
Typed = Annotated[Mapping, That(lambda cfg: _is_type(cfg.get("type")), "a config with a type")]
REAL_IMAGES, REAL_PIXELS = 8, 8 * 384 * 384  # for the proof on real data: float64 is slow


def _is_type(kind: Any) -> bool:
    return isinstance(kind, type) or (isinstance(kind, str) and bool(kind))


# Of what a value of a config raises in code that is not ours. An assertion is mmengine's way to check an argument.
VALUE_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn what the values of a config raise when mmengine builds them into an ArgumentError that names the type.

    A type that does not exist, and an argument that a type does not take, are told with the nearest name.
    """
    try:
        yield
    except RepPluginError:
        raise
    except VALUE_ERRORS as error:
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code in _BUILDERS]
        built = [kind for frame in frames if (kind := frame.get("obj_cls") or frame.get("scheduler_cls")) is not None]
        where = f" {built[-1].__name__}:" if built else ""
        raise ArgumentError(f"the config cannot be built:{where} {_explain(error, frames, built)}") from error


def build_part(cfg: Mapping | nn.Module, registry: Registry) -> nn.Module:
    """Build a part of a model from its config; a module is the part itself.

    Args:
        cfg: the config, or the module.
        registry: finds its type.

    Returns:
        The part.

    Raises:
        ArgumentError: it cannot be built.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    with config_errors():
        built = registry.build(copy.deepcopy(dict(cfg)))
    if not isinstance(built, nn.Module):
        raise ArgumentError(f"the config must be one of a torch.nn.Module, got {shown(dict(cfg))}")
    return built


_BUILDERS = {build_from_cfg.__code__, build_scheduler_from_cfg.__code__}


def _explain(error: BaseException, frames: Sequence[Mapping], built: Sequence[Callable]) -> str:
    """What is wrong, in one line."""
    text = first_line(error)
    if isinstance(error, KeyError) and (found := re.search(r"(\S+) is not in the .*registry", text)):
        registry = frames[-1].get("registry") if frames else None
        return unknown_type(found[1].strip("'\""), registry) if isinstance(registry, Registry) else text
    if built and (found := re.search(r"unexpected keyword argument '(\w+)'", text)):
        return f"{text}{did_you_mean(found[1], inspect.signature(built[-1]).parameters)}"
    if isinstance(error, ZeroDivisionError):
        return f"{text}: the training is too short for it, or one of its numbers is 0"
    return text


def unknown_type(name: str, registry: Registry) -> str:
    """Return the message for a type that no registry has: the nearest name, or how a class of one's own gets in.

    Args:
        name: as the config has it, with its scope where it has one.
        registry: where it was looked for.

    Returns:
        The message, one line.
    """
    scope = name.rpartition(".")[0]
    related, known = [registry, *_ancestors(registry), registry.root.children.get(scope)], []
    for one in filter(None, related):
        prefix = f"{scope}." if scope and one.scope == scope else ""
        known += [prefix + known_name for known_name in one.module_dict]
    hint = did_you_mean(name, known)
    own = "; a class of your own is found once custom_imports names its module"
    return f"type {name!r} is no {registry.name} that is known{hint or own}"


def _ancestors(registry: Registry) -> Iterator[Registry]:
    while (registry := registry.parent) is not None:
        yield registry


def require_type(name: object, registry: Registry, key: str) -> None:
    """Raise ArgumentError for a name that a registry does not have, where mmengine itself would fail without it.

    Args:
        name: the type, by name; a class is taken as it is.
        registry: of the types.
        key: where the config has it, for the message.
    """
    if isinstance(name, str):
        with registry.switch_scope_and_registry(None) as there:
            if there.get(name) is None:
                raise ArgumentError(f"the config cannot be built: {key}: {unknown_type(name, there)}")


@checked
def build_model(cfg: Config) -> nn.Module:
    """Build ``cfg.model`` as mmengine's Runner does, in eval mode. Raises ArgumentError where that cannot be built."""
    if not isinstance(cfg.get("model"), Mapping):
        raise ArgumentError(f"the config has no model, expected model = dict(type=...), got {cfg.get('model')!r:.40}")
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.setdefault("data_preprocessor", cfg.get("data_preprocessor"))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
        model = ROOT_MODELS.build(model_cfg)
    model.eval()  # not chained: mmpretrain's return None
    return model


def load_strictly(model: nn.Module, state_dict: dict, source: str) -> None:
    """Load a state dict that must fit exactly; on a mismatch nothing is loaded.

    Args:
        model: the model.
        state_dict: names and tensors.
        source: what to call it in the message.

    Raises:
        CheckpointMismatchError: it does not fit; the message names the first keys that do not.
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


def relinearize(model: nn.Module, meta: Mapping) -> nn.Module:
    """Give a model the annealed layers that LinearizeHook gave the one in a checkpoint, by the checkpoint's meta data.

    Args:
        model: what the config builds, changed in place.
        meta: the meta data.

    Returns:
        The model.

    Raises:
        UnreadableCheckpointError: something else stands there.
        ArgumentError: it is of another model.
    """
    if LINEARIZE not in meta or any(True for _ in in_segments(model)):
        return model
    try:
        step = require_fields(parse_json(meta[LINEARIZE], f"meta.{LINEARIZE}"), KEPT, f"meta.{LINEARIZE}")
    except (ArgumentError, TypeError) as error:
        raise UnreadableCheckpointError(
            f"meta.{LINEARIZE} of the checkpoint is not what LinearizeHook keeps: {error}"
        ) from None
    return rebuild_(model, [{"step": "linearize", **step}])


@checked
def load_model(cfg: Config, checkpoint: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Build a config's model and load a checkpoint into it strictly.

    Args:
        cfg: the config.
        checkpoint: path of the checkpoint.

    Returns:
        The model in eval mode, and the file's meta data.

    Raises:
        ArgumentError: the config cannot be built.
        CheckpointMismatchError: the checkpoint is not exactly the model's.

    Example:
        >>> import torch
        >>> from mmengine.config import Config
        >>> from rep_plugin.openmmlab import build_model, load_model
        >>> net = dict(type="ImageClassifier", backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1))
        >>> cfg = Config(dict(default_scope="mmpretrain", model=net))
        >>> torch.save({"state_dict": build_model(cfg).state_dict(), "meta": {"epoch": 1}}, "epoch_1.pth")
        >>> model, meta = load_model(cfg, "epoch_1.pth")
        >>> model.training, meta
        (False, {'epoch': 1})
    """
    state_dict, meta = read_state_dict(checkpoint)
    cfg = copy.deepcopy(cfg)
    for part in typed_dicts(cfg.model):
        if part["type"] == "rep_plugin.Expanded":  # the weights it was expanded from may be gone by now
            for inner in typed_dicts(part):
                drop_pretrained_(inner)
    model = relinearize(build_model(cfg), meta)
    try:
        load_strictly(model, state_dict, str(checkpoint))
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{error}{explain_misfit(checkpoint, meta, cfg)}") from None
    return model, meta


def real_inputs(model: nn.Module, loader: DataLoader, count: int = REAL_IMAGES, pixels: float = REAL_PIXELS) -> Tensor:
    """Take images of a loader's data set, evenly spread, preprocessed as the model sees them.

    Images of several sizes do not make a batch: those of the most frequent size are taken, and of large ones fewer, but
    two.

    Args:
        model: the model.
        loader: the dataloader.
        count: how many at most.
        pixels: in all, at most, but of two images.

    Returns:
        The images, (N, C, H, W).
    """
    dataset = loader.dataset
    step = max(1, len(dataset) // count)
    samples = [dataset[i] for i in range(0, min(len(dataset), count * step), step)]
    shapes = [tuple(sample["inputs"].shape) for sample in samples]
    common = max(shapes, key=shapes.count)
    samples = [sample for sample, shape in zip(samples, shapes) if shape == common]
    samples = samples[: int(max(2, min(count, pixels / math.prod(common[-2:]))))]
    with torch.no_grad():
        return model.data_preprocessor(copy.deepcopy(loader.collate_fn(samples)), False)["inputs"]


def build_loader(cfg: Config, part: str) -> DataLoader:
    """Return the data loader of a config.

    Args:
        cfg: the config.
        part: its key, as ``val_dataloader``.

    Returns:
        The loader.

    Raises:
        ArgumentError: the config has none, or it cannot be built.
    """
    if not cfg.get(part):
        raise ArgumentError(f"labelled images are needed: the config has no {part}")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
        return Runner.build_dataloader(cfg[part])


def labelled_batches(
    model: nn.Module, cfg: Config, count: int, batch_size: int = 32, part: str = "val_dataloader"
) -> list[tuple[Tensor, Tensor]]:
    """Take labelled images of a data set of the config, evenly spread, preprocessed as the model sees them.

    Args:
        model: a classifier.
        cfg: its config.
        count: how many images at most.
        batch_size: images of a batch.
        part: key of the data set's loader in the config.

    Returns:
        Batches of images (N, C, H, W) and labels (N,).

    Raises:
        ArgumentError: the config has no such loader, or its images have no single label.
    """
    found = take_batches(model, build_loader(cfg, part), count, batch_size)
    labelled = [(images, labels) for images, labels in found if labels is not None]
    if len(labelled) < len(found):
        raise ArgumentError(f"one label for each image is needed: the images of {part} have none, or several")
    return labelled


def take_batches(
    model: nn.Module, loader: DataLoader, count: int, batch_size: int = 32
) -> list[tuple[Tensor, Tensor | None]]:
    """Take images of a loader's data set, evenly spread, preprocessed as the model sees them, with their labels.

    Args:
        model: the model.
        loader: the dataloader.
        count: how many images at most.
        batch_size: images of a batch.

    Returns:
        Batches of images (N, C, H, W) and labels (N,); None where an image has no label, or several.
    """
    chosen = range(0, len(loader.dataset), max(1, len(loader.dataset) // count))[:count]
    batches = []
    for first in range(0, len(chosen), batch_size):
        samples = loader.collate_fn([loader.dataset[i] for i in chosen[first : first + batch_size]])
        with torch.no_grad():
            data = model.data_preprocessor(samples, False)
        labels = [getattr(sample, "gt_label", None) for sample in data["data_samples"]]
        single = all(label is not None and label.numel() == 1 for label in labels)
        batches.append((data["inputs"], torch.tensor([int(label) for label in labels]) if single else None))
    return batches


@private_random()
def check_rebuilt(cfg: Config, model: nn.Module, inputs: Tensor) -> None:
    """Check that what stock code will build from a written config loads a model's weights and computes the same, bit by bit.

    Args:
        cfg: the config to be written.
        model: the model whose weights go into the file; it is moved to the CPU.
        inputs: preprocessed images (N, C, H, W); random ones of their size, and of an odd one, are tried as well.

    Raises:
        CheckpointMismatchError: the weights do not fit.
        EquivalenceError: an output differs; it names the first module.
    """
    rebuilt = build_model(cfg)
    load_strictly(rebuilt, model.state_dict(), "what was made of the model")
    images = inputs.to("cpu", next(model.parameters()).dtype)
    random = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    try:
        require_identical(model.cpu(), rebuilt, [images, *default_inputs(model, random)])
    except EquivalenceError as error:
        raise EquivalenceError(f"the model built from the written config differs: {error}") from None
