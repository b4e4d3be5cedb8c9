"""Metrics of validation outside of a Runner's loop, and statistics of batch norms measured anew."""

from itertools import islice
from numbers import Number

import torch
from mmengine.evaluator import Evaluator
from torch import nn
from torch.utils.data import DataLoader

from rep_plugin.measure.forward import eval_mode
from rep_plugin.measure.progress import track


@torch.no_grad()
def measure(model: nn.Module, loader: DataLoader, evaluator: Evaluator, batches: int | None = None) -> dict[str, float]:
    """Measure a model in validation.

    Args:
        model: of mmengine; it stays as it is.
        loader: of the validation set.
        evaluator: of its metrics.
        batches: how many at most; None: all.

    Returns:
        The metrics by name.
    """
    seen = 0
    with eval_mode(model):
        for batch in track(loader if batches is None else islice(loader, batches), "validating", batches):
            outputs = model.val_step(batch)
            evaluator.process(data_samples=outputs, data_batch=batch)
            seen += len(outputs)
        metrics = evaluator.evaluate(len(loader.dataset) if batches is None else seen)
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Number)}
