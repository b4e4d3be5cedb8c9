"""The register of rules, and what several of them need.

A rule takes the recorder, the (valueless) output and the torch function's own arguments, and returns the mark of every
output tensor, or None where that is not known: then the channels are frozen.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Mark
from rep_plugin.pruning.tracing.labels import FIXED

RULES: dict[str, Callable] = {}


def rule(*names: str) -> Callable:
    """Decorate a function as the rule for torch functions of these names."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def fixed_like(out: Tensor) -> Mark:
    """Return the mark of a map whose elements belong to no channel that could go."""
    return Mark(torch.tensor(FIXED).expand(out.shape), False)


def spread(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Return the labels of channels as those of a whole map.

    Args:
        labels: (C,).
        dim: The dimension of the channels.
        shape: Of the map.

    Returns:
        Labels of that shape.
    """
    view = [1] * len(shape)
    view[dim] = -1
    return labels.view(view).expand(tuple(shape))
