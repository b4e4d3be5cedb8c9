"""Metrics of validation outside of a Runner's loop, what is planned by them, and statistics of batch norms measured anew."""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from rep_plugin.depth import DepthPlan, plan_depth
from rep_plugin.errors import ArgumentError, DataError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import eval_mode
from rep_plugin.measure.progress import track
from rep_plugin.openmmlab.data import check_data
from rep_plugin.openmmlab.load import build_loader, config_errors, real_inputs
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan

if TYPE_CHECKING:
    from rep_plugin.openmmlab.cli import Trained

HIGH_IS_GOOD = ("accuracy", "precision", "recall", "f1", "mAP", "mIoU")
CALIBRATION = 64  # images, for batch norms of what is judged


def main_metric(metrics: Mapping[str, float]) -> str | None:
    """Return the name of the first metric that is high for good models; None where there is none."""
    return next((name for name in metrics if any(word in name for word in HIGH_IS_GOOD)), None)


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
    with _on_device(model):
        return measure(model, track(loader, what, len(loader)), _evaluator_of(cfg, loader))


def _evaluator_of(cfg: Config, loader: DataLoader) -> Evaluator:
    metrics = cfg.val_evaluator
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
        whole = isinstance(metrics, dict) and "metrics" in metrics
        evaluator = EVALUATOR.build(dict(type="Evaluator") | metrics) if whole else Evaluator(metrics)
    evaluator.dataset_meta = getattr(loader.dataset, "metainfo", None)
    return evaluator


def judge_of(loader: DataLoader, evaluator: Evaluator, batches: int) -> Callable[[nn.Module], float]:
    """Return what judges many models: the first metric that is high for good ones, on a few batches of validation.

    The batches are spread evenly over the data set (many are sorted by class), and read once. Of several processes only this
    one measures. A graphics card is used where there is one.

    Args:
        loader: of the validation set.
        evaluator: of the metrics.
        batches: how many.

    Returns:
        A function of a model, as :func:`rep_plugin.plan_depth` takes it.
    """
    size, dataset = loader.batch_size or 1, loader.dataset
    count = min(len(dataset), batches * size)
    chosen = [place * len(dataset) // count for place in range(count)]
    parts = [chosen[first : first + size] for first in range(0, count, size)]
    kept = [loader.collate_fn([dataset[place] for place in part]) for part in parts]

    def judge(model: nn.Module) -> float:
        with _on_device(model):
            metrics = measure(model, copy.deepcopy(kept), evaluator, alone=True)
        if (name := main_metric(metrics)) is None:
            raise ArgumentError(f"a metric that is high for good models is needed, validation has {sorted(metrics)}")
        return metrics[name]

    return judge


def calibration_images(model: nn.Module, loader: DataLoader) -> Tensor:
    """Return images, spread over a data set, on which batch norms of what is judged are estimated anew.

    Args:
        model: preprocesses them.
        loader: of the data set.

    Returns:
        Images (N, C, H, W), 64 at most.
    """
    return real_inputs(model, loader, CALIBRATION, math.inf)


def plan_by_validation(trained: "Trained", image: Tensor, batches: int, **options: Any) -> DepthPlan:
    """Plan depth for a trained model, by its config's validation and training images.

    Args:
        trained: what :func:`rep_plugin.openmmlab.cli.open_trained` returns; without its validation set batch norms judge.
        image: (1, C, H, W), of the size to be timed.
        batches: of validation that judge a segment; 0: the outputs on the training images do.
        **options: of :func:`rep_plugin.plan_depth`.

    Returns:
        The plan; its notes say where other images than those of training were taken.
    """
    model, cfg, loader = trained.model, trained.cfg, trained.val_loader
    if loader is None:
        return plan_depth(model, image, **options)
    source, notes = loader, []
    if reason := _why_no_training_images(model, cfg):
        notes.append(f"segments were judged with statistics of validation images, not of training: {reason}")
    else:
        source = build_loader(cfg, "train_dataloader")
    judge = judge_of(loader, _evaluator_of(cfg, loader), batches) if batches and cfg.get("val_evaluator") else None
    plan = plan_depth(model, image, judge, calibration=calibration_images(model, source), **options)
    return replace(plan, notes=(*plan.notes, *notes))


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
            report.notes.append(renew_norms_(pruned, build_loader(cfg, "train_dataloader"), bn_images))
            metrics(pruned, "after_bn")
    return pruned, report


def renew_norms_(model: nn.Module, loader: DataLoader, images: int) -> str:
    """Measure the statistics of batch norms anew after a removal, on the same training images each time.

    Args:
        model: of mmengine; changed in place, its mode is kept.
        loader: of the training.
        images: how many to read.

    Returns:
        What a report says of it.
    """
    read = reestimate_norms_(model, norm_batches(loader, images), images)
    return f"after the proof, statistics of batch norms were measured anew on {read} training images"


def has_norms(model: nn.Module) -> bool:
    """Return whether a model has batch norms."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _why_no_training_images(model: nn.Module, cfg: Config) -> str | None:
    if not has_norms(model):
        return "it has no batch norms"
    if not cfg.get("train_dataloader"):
        return "the config has no train_dataloader"
    try:
        check_data(cfg)
    except DataError as error:
        return str(error)
    return None


def norm_batches(loader: DataLoader, images: int) -> Iterator[dict]:
    """Yield batches of training images for :func:`reestimate_norms_`: the same ones in every process and every run.

    They are spread evenly over the data set, each batch as well (many are sorted by class), and augmented with random
    numbers of their own; random states stay.

    Args:
        loader: of the training; its workers are not asked.
        images: how many.

    Yields:
        What the loader's ``collate_fn`` makes of the samples of a batch.
    """
    dataset, size = loader.dataset, getattr(loader.batch_sampler, "batch_size", None) or 32
    count = min(images, len(dataset))
    chosen = [place * len(dataset) // count for place in range(count)]
    batches = -(-count // size)
    for number in range(batches):
        with kept_random_state():
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            batch = loader.collate_fn([dataset[place] for place in chosen[number::batches]])
        yield batch


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give back the random states of torch, numpy and Python, which augmentations draw from: the training stays the same."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def reestimate_norms_(model: nn.Module, loader: Iterable[dict], images: int) -> int:
    """Measure the running statistics of batch norms anew: those of a pruned network are of the one before.

    Weights stay. Norms that the model keeps in eval mode (``norm_eval``) stay as well, and dropout is off.

    Args:
        model: of mmengine; changed in place, its mode is kept.
        loader: batches of training images, as of :func:`norm_batches`; it is read until there are enough.
        images: how many to read.

    Returns:
        How many were read.
    """
    with eval_mode(model), torch.no_grad(), _on_device(model), kept_random_state():
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
    model: nn.Module, batches: Iterable[dict], evaluator: Evaluator, images: int | None = None, alone: bool = False
) -> dict[str, float]:
    """Measure a model on batches of validation.

    Args:
        model: of mmengine; it stays as it is.
        batches: what a loader gives.
        evaluator: of the metrics.
        images: how many there are for all processes together; None: as many as this one and the others have seen.
        alone: the other processes do not measure; nothing is gathered.

    Returns:
        The metrics by name.
    """
    seen = 0
    with eval_mode(model):
        for batch in batches:
            outputs = model.val_step(batch)
            evaluator.process(data_samples=outputs, data_batch=batch)
            seen += len(outputs)
    metrics = _own_metrics(evaluator) if alone else evaluator.evaluate(images or seen * get_world_size())
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Number)}


def _own_metrics(evaluator: Evaluator) -> dict[str, Any]:
    """The metrics of what this process has seen: mmengine's own call waits for all processes."""
    found: dict[str, Any] = {}
    for metric in evaluator.metrics:
        results = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, metric.results)
        prefix = f"{metric.prefix}/" if metric.prefix else ""
        found |= {prefix + name: value for name, value in metric.compute_metrics(results).items()}
        metric.results.clear()
    return found
