"""Metrics of validation outside of a Runner's loop, and statistics of batch norms measured anew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Number
from typing import TYPE_CHECKING

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR, DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from rep_plugin.errors import DataError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import eval_mode
from rep_plugin.measure.progress import track
from rep_plugin.openmmlab.data import check_data
from rep_plugin.openmmlab.load import config_errors
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan

if TYPE_CHECKING:
    from rep_plugin.openmmlab.cli import Trained


def validation_metrics(model: nn.Module, cfg: Config, loader: DataLoader, what: str = "validation") -> dict[str, float]:
    """Measure a model with the evaluator of a config, on a graphics card where there is one.

    Args:
        model: what ``cfg.model`` builds; it stays as it is.
        cfg: its config, with a ``val_evaluator``.
        loader: of the validation set.
        what: is measured, for the progress line.

    Returns:
        The metrics by name.
    """
    metrics = cfg.val_evaluator
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
        whole = isinstance(metrics, dict) and "metrics" in metrics
        evaluator = EVALUATOR.build(dict(type="Evaluator") | metrics) if whole else Evaluator(metrics)
    evaluator.dataset_meta = getattr(loader.dataset, "metainfo", None)
    with _on_device(model):
        return measure(model, track(loader, what, len(loader)), evaluator)


def prune_and_measure(
    trained: "Trained", plan: PrunePlan, accuracy: bool = True, bn_images: int = 0
) -> tuple[nn.Module, PruneReport]:
    """Prune a copy of a trained model, and measure it before, after, and with new statistics of its batch norms.

    Args:
        trained: what :func:`rep_plugin.openmmlab.cli.open_trained` returns.
        plan: what to remove.
        accuracy: run the config's validation, where its data set was read.
        bn_images: training images on which statistics are measured anew, after the proof; 0: they stay.

    Returns:
        The pruned model in eval mode, and the report: ``metrics`` has what was measured, ``notes`` what was not and why.

    Raises:
        EquivalenceError: the pruned model computes something else than the masked one, and what else
            :func:`rep_plugin.apply_plan` raises.
    """
    cfg, loader = trained.cfg, trained.val_loader
    accuracy = accuracy and loader is not None and cfg.get("val_evaluator") is not None

    def metrics(model: nn.Module, what: str) -> None:
        if accuracy:
            report.metrics[what] = validation_metrics(model, cfg, loader, f"validation {what.replace('_', ' ')}")

    pruned = copy_model(trained.model)
    pruned.eval()
    report = apply_plan(pruned, plan, example_input=trained.inputs)
    metrics(trained.model, "before")
    metrics(pruned, "after")
    if bn_images and loader is not None:
        if reason := _why_no_training_images(pruned, cfg):
            report.notes.append(f"statistics of batch norms stay: {reason}")
        else:
            with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
                images = Runner.build_dataloader(cfg.train_dataloader)
            read = reestimate_norms_(pruned, images, bn_images)
            report.notes.append(
                f"after the proof, statistics of batch norms were measured anew on {read} training images"
            )
            metrics(pruned, "after_bn")
    return pruned, report


def _why_no_training_images(model: nn.Module, cfg: Config) -> str | None:
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return "there are none"
    if not cfg.get("train_dataloader"):
        return "the config has no train_dataloader"
    try:
        check_data(cfg)
    except DataError as error:
        return str(error)
    return None


def reestimate_norms_(model: nn.Module, loader: Iterable[dict], images: int) -> int:
    """Measure the running statistics of batch norms anew: those of a pruned network are of the one before.

    Weights stay. Norms that the model keeps in eval mode (``norm_eval``) stay as well, and dropout is off.

    Args:
        model: of mmengine; changed in place, its mode is kept.
        loader: of training images; it is read until there are enough.
        images: how many to read.

    Returns:
        How many were read.
    """
    with eval_mode(model), torch.no_grad(), _on_device(model):
        model.train()  # not chained: mmpretrain's return None
        for module in model.modules():
            if isinstance(module, _DropoutNd) or "DropPath" in type(module).__name__:
                module.eval()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        read = 0
        for batch in loader:
            inputs = model.data_preprocessor(batch, False)["inputs"]
            model(inputs)
            read += len(inputs)
            if read >= images:
                break
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    return read


@contextmanager
def _on_device(model: nn.Module) -> Iterator[None]:
    device = next(model.parameters()).device
    model.to(get_device())
    try:
        yield
    finally:
        model.to(device)


@torch.no_grad()
def measure(
    model: nn.Module, batches: Iterable[dict], evaluator: Evaluator, images: int | None = None
) -> dict[str, float]:
    """Measure a model on batches of validation.

    Args:
        model: of mmengine; it stays as it is.
        batches: what a loader gives.
        evaluator: of the metrics.
        images: how many there are for all processes together; None: as many as this one and the others have seen.

    Returns:
        The metrics by name.
    """
    seen = 0
    with eval_mode(model):
        for batch in batches:
            outputs = model.val_step(batch)
            evaluator.process(data_samples=outputs, data_batch=batch)
            seen += len(outputs)
    metrics = evaluator.evaluate(images or seen * get_world_size())
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Number)}
