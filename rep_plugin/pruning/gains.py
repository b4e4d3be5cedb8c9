"""Normalised filters: what stays of a filter keeps its values, although its norm, which it is divided by, falls."""

import torch
from torch import Tensor, nn

from rep_plugin.blocks.chain import NormedConv2d
from rep_plugin.pruning.graph import Trace, member
from rep_plugin.pruning.kept import Kept


def _squared_norms(conv: NormedConv2d) -> Tensor:
    return conv.weight.double().square().sum((1, 2, 3)) + conv.eps


def measure_filters(model: nn.Module, trace: Trace) -> dict[str, Tensor]:
    """Return {name: |w|^2 + eps of each filter (O,)} for the normalised convolutions of a trace."""
    return {
        name: _squared_norms(module)
        for name, module in model.named_modules()
        if isinstance(module, NormedConv2d) and member(name, "weight") in trace.cuts
    }


@torch.no_grad()
def keep_filters_(model: nn.Module, trace: Trace, kept: Kept, before: dict[str, Tensor]) -> None:
    """Give the gains what the norms have lost since :func:`measure_filters`, by inputs that were removed or set to zero.

    ``kernel = weight * gain / sqrt(|w|^2 + eps)`` is then what it was, on the inputs that stay.
    """
    for name, old in before.items():
        conv = model.get_submodule(name)
        if len(old) != len(conv.weight):
            labels = trace.cuts[member(name, "weight")][0]
            old = old[kept.index(labels).to(old.device)]
        new = _squared_norms(conv)
        conv.gain.mul_(torch.where(new == old, 1.0, (new / old).sqrt()).to(conv.gain.dtype))
