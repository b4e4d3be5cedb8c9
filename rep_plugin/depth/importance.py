"""What it costs to take activations away: by a user's metric, by what becomes of the outputs, or by batch norms alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import Dims, checked
from rep_plugin.blocks.annealed_layers import set_segments_
from rep_plugin.depth.linearize import linearize_
from rep_plugin.depth.segments import Segment
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.differences import flatten_outputs
from rep_plugin.measure.forward import of_user, require_bare, run_model

QUANTILES = 199  # of a normal distribution
Images = Annotated[Tensor, Dims("(N, C, H, W)")]
Evaluate = Callable[[nn.Module], float]


@checked
@torch.no_grad()
def reestimate_bn_(model: nn.Module, batches: Iterable[Images]) -> nn.Module:
    """Set the running statistics of all BNs to the average over batches, in place; the model ends in eval mode.

    Args:
        model: the model.
        batches: images (N, C, H, W) each.

    Returns:
        The model.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(3))
        >>> reestimate_bn_(net, [torch.ones(2, 3, 4, 4)])[0].running_mean.tolist()
        [1.0, 1.0, 1.0]
    """
    require_bare(model)
    model.eval()
    bns = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None
    ]
    momenta = [bn.momentum for bn in bns]
    for bn in bns:
        bn.momentum, bn.training = None, True  # a plain average
        bn.reset_running_stats()
    try:
        for batch in batches:
            with of_user(model, batch, "batches"):
                run_model(model, batch.clone())
    finally:
        for bn, momentum in zip(bns, momenta):
            bn.momentum, bn.training = momentum, False
    return model


def linear_copy(
    model: nn.Module, segments: Sequence[Segment], act_after: str | None, batches: Sequence[Tensor]
) -> nn.Module:
    """Return a copy in eval mode with segments linear, its BNs estimated anew where there are images.

    Args:
        model: the model.
        segments: of it.
        act_after: name of the activation behind them, or None.
        batches: images (N, C, H, W) each; none: the BNs stay.

    Returns:
        The copy.
    """
    copied = copy_model(model, training=False)
    linearize_(copied, [segment.data for segment in segments], act_after)
    set_segments_(copied, 1.0)
    return reestimate_bn_(copied, batches) if batches else copied


def score_of(evaluate: Evaluate, model: nn.Module) -> float:
    """Return what a user's function says of a model.

    Args:
        evaluate: the function.
        model: in eval mode.

    Returns:
        The score.

    Raises:
        ArgumentError: it is no finite number.
    """
    score = evaluate(model)
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = float("nan")
    if not torch.isfinite(torch.tensor(value)):
        raise ArgumentError(f"evaluate must return a finite number, higher is better, got {score!r:.60}")
    return value


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Return the first output of a model for each batch.

    Args:
        model: in eval mode.
        batches: images (N, C, H, W) each.

    Returns:
        Outputs (N, values), one for each batch.
    """
    return [flatten_outputs(run_model(model, batch.clone()))[0].flatten(1) for batch in batches]


def output_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return how far outputs moved, relative to their size, on average over images.

    Args:
        before: outputs (N, values).
        after: the same.

    Returns:
        The share, >= 0.
    """
    shares = [(b - a).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12) for a, b in zip(before, after)]
    return torch.cat(shares).mean().item()


@torch.no_grad()
def curvature(model: nn.Module, segment: Segment) -> float:
    """Return how far a segment's activations are from the identity, summed up; no data is needed.

    Of each activation it is the mean over channels of ``E[(act(z) - z)^2] / E[z^2]``, where z is normal with the mean and
    deviation that the BN in front of it gives (beta, gamma), or 0 and 1 without one. A branch that is skipped counts 1 more.

    Args:
        model: the model.
        segment: of it.

    Returns:
        The sum, >= 0.
    """
    quantiles = torch.special.ndtri((torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES)
    total, bn = float(segment.skip), None
    for name in segment.layers:
        module = model.get_submodule(name)
        if isinstance(module, _BatchNorm):
            bn = module
        elif isinstance(module, nn.Conv2d):
            bn = None
        else:
            z = quantiles[None]
            if bn is not None and bn.weight is not None:
                z = (
                    bn.bias.detach().cpu().double()[:, None]
                    + bn.weight.detach().cpu().double().abs()[:, None] * quantiles
                )
            moved = module(z.clone()[None, :, :, None])[0, :, :, 0]
            total += ((moved - z).square().mean(1) / z.square().mean(1).clamp_min(1e-12)).mean().item()
    return total
