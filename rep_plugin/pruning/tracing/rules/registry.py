"""The register of rules, and what several of them need.

A rule takes the recorder, the (valueless) output and the torch function's own arguments, and returns the mark of every
output tensor, or None where that is not known: then the channels are frozen.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rep_plugin.pruning.tracing.graph import Mark
from rep_plugin.pruning.tracing.labels import FIXED
from rep_plugin.pruning.tracing.recorder import Recorder

RULES: dict[str, Callable] = {}
OPEN: set[str] = set()


def rule(*names: str, keeps_open: bool = False) -> Callable:
    """Decorate a function as the rule for torch functions of these names.

    Args:
        *names: Of the functions.
        keeps_open: It takes maps of which channels vary along several dimensions, as heads and what is in each; for any
            other rule only the longest of these is left to vary.

    Returns:
        The decorator.
    """

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        if keeps_open:
            OPEN.update(names)
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


def goes_past(recorder: Recorder, labels: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Return the labels of a map without what a layer reads at once, where its channels lie along none of that.

    A layer that is applied to each head treats heads as it treats images.

    Args:
        recorder: Of the trace.
        labels: Of the map.
        dims: The dimensions that the layer reads at once, its own channels among them.

    Returns:
        The labels with these dimensions cut to length 1; None where channels lie along them, or nowhere.
    """
    if any(recorder.channels.varies(labels, dim) for dim in dims) or not recorder.channels.varying(labels):
        return None
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    return labels
