"""Latency of models side by side: interleaved in one run, so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from rep_plugin.measure.forward import run_model
from rep_plugin.measure.progress import track

Key = TypeVar("Key")


@contextmanager
def torch_threads(count: int):
    """Set the number of threads inside an operator, for the body of a ``with``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved_medians(
    contenders: Mapping[Key, Callable[[], object]], rounds: int = 50, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, float]:
    """Return the median latency of each call; every round times each contender once, after three rounds of warm-up.

    Args:
        contenders: name -> call.
        rounds: number of timed rounds.
        clock: what is read before and after each call, in seconds.

    Returns:
        name -> seconds.

    Example:
        >>> list(interleaved_medians({"a": lambda: None, "b": lambda: None}, rounds=3))
        ['a', 'b']
    """
    times: dict[Key, list[float]] = {name: [] for name in contenders}
    for index in track(range(rounds + 3), "timing"):
        for name, call in contenders.items():
            started = clock()
            call()
            if index >= 3:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def eager_calls(models: Mapping[str, nn.Module], x: Tensor) -> dict[str, Callable[[], object]]:
    """Return a call for each model, in eval mode and without gradients.

    Args:
        models: name -> model.
        x: images (N, C, H, W).

    Returns:
        name -> call, for :func:`interleaved_medians`.
    """
    run = torch.inference_mode()(run_model)
    return {name: partial(run, model.eval(), x) for name, model in models.items()}
