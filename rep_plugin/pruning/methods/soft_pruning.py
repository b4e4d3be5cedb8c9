"""Soft filter pruning: channels set to zero that may come back. Source: He et al., "Soft Filter Pruning" (IJCAI 2018)."""

import torch
from torch import nn

from rep_plugin.arguments import checked
from rep_plugin.pruning.apply import kept_by
from rep_plugin.pruning.planning.plan import PrunePlan
from rep_plugin.pruning.surgery.mask import mask_channels_
from rep_plugin.pruning.tracing.graph import Trace, named_tensors
from rep_plugin.pruning.tracing.kept_channels import KeptChannels
from rep_plugin.pruning.tracing.tracer import trace_channels


def _traced(model: nn.Module, plan: PrunePlan) -> tuple[Trace, KeptChannels]:
    trace = trace_channels(model, plan.input_shape, plan.prune_outputs)
    return trace, kept_by(plan, model, trace)


@checked
def zero_channels_(model: nn.Module, plan: PrunePlan) -> None:
    """Set to zero what makes the channels that ``plan`` removes: kernels and biases, gammas and betas.

    The model then computes what it would without them. Behind a ReLU their gradients are zero as well: they come back by
    the momentum that the optimizer has for them, which stays.

    Args:
        model: Changed in place.
        plan: Made for this model.

    Raises:
        ArgumentError: The plan is not for this model.

    Example:
        >>> import torch
        >>> from rep_plugin import plan_pruning
        >>> from rep_plugin.pruning.methods import zero_channels_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> zero_channels_(net, plan_pruning(net, (1, 3, 8, 8), "l1", 0.5))
        >>> int((net[0].weight.abs().sum((1, 2, 3)) == 0).sum())
        4
    """
    trace, kept = _traced(model, plan)
    mask_channels_(model, trace, kept)


@torch.no_grad()
def count_returned(model: nn.Module, plan: PrunePlan) -> tuple[int, int]:
    """Return how many of the channels that :func:`zero_channels_` set to zero are not zero any more.

    Args:
        model: In training.
        plan: By which channels were set to zero.

    Returns:
        (how many are not zero, how many were set to zero); channels are counted once in every tensor that makes them.

    Example:
        >>> import torch
        >>> from rep_plugin import plan_pruning
        >>> from rep_plugin.pruning.methods.soft_pruning import count_returned, zero_channels_
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Conv2d(8, 4, 1))
        >>> plan = plan_pruning(net, (1, 3, 8, 8), "l1", 0.5)
        >>> zero_channels_(net, plan)
        >>> count_returned(net, plan)
        (0, 4)
    """
    trace, kept = _traced(model, plan)
    tensors = named_tensors(model)
    returned = total = 0
    for name, dim in trace.makers:
        labels = trace.slices[name][dim]
        if labels.dim() == 1 and kept.changes(labels):
            rows = tensors[name].index_select(dim, kept.removed(labels).to(tensors[name].device)).movedim(dim, 0)
            returned, total = returned + int(rows.reshape(len(rows), -1).any(1).sum()), total + len(rows)
    return returned, total
