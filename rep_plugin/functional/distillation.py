"""Losses between the outputs and maps of a teacher and of a student that may be narrower, as pure functions."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from rep_plugin.arguments import Dims, Positive, Side
from rep_plugin.errors import ArgumentError

Image = Annotated[Tensor, Dims("(N, C, H, W)")]
OtherImage = Annotated[Tensor, Dims("(N, C2, H2, W2)")]
Rows = Annotated[Tensor, Dims("(N, classes)")]


def _wide(x: Tensor) -> Tensor:
    """Half precision is too coarse for the sums below."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def soft_divergence(student: Rows, teacher: Rows, temperature: Positive) -> Tensor:
    """Return the divergence of softened class probabilities, KL(teacher || student) * temperature^2, mean of the batch.

    The square keeps its gradients as large as those of a loss on labels, whatever the temperature: Hinton et al.,
    "Distilling the Knowledge in a Neural Network" (2015).

    Args:
        student, teacher: logits (N, classes).
        temperature: divisor of the logits, > 0.

    Returns:
        Scalar >= 0.

    Raises:
        ArgumentError: logits of different shapes.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import soft_divergence
        >>> soft_divergence(torch.ones(2, 3), torch.ones(2, 3), 4.0).item()
        0.0
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ArgumentError(
            f"logits must both be (N, classes), got {tuple(student.shape)} of the student and {tuple(teacher.shape)} of "
            "the teacher"
        )
    ours, theirs = (F.log_softmax(_wide(x) / temperature, dim=1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def attention_map(x: Image, size: tuple[Side, Side] | None = None) -> Tensor:
    """Return where a map has its energy, summed over channels, at unit norm.

    Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017).

    Args:
        x: map (N, C, H, W).
        size: rows and columns to average the energy to first.

    Returns:
        (N, H * W).

    Example:
        >>> import torch
        >>> from rep_plugin.functional import attention_map
        >>> attention_map(torch.ones(2, 8, 4, 4), (2, 2)).shape
        torch.Size([2, 4])
    """
    energy = _wide(x).square().mean(1, keepdim=True)  # (N, 1, H, W)
    if size is not None and size != energy.shape[2:]:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1), dim=1)


def attention_distance(student: Image, teacher: OtherImage) -> Tensor:
    """Return how far apart two maps look, |a_s - a_t|^2 of their attention maps, mean of the batch.

    Channels are summed away, so that a narrow map compares with a wide one without a learned projection. Where rows or
    columns differ, both are averaged to the smaller number.

    Args:
        student, teacher: maps (N, C1, H1, W1) and (N, C2, H2, W2).

    Returns:
        Scalar from 0 to 2.

    Raises:
        ArgumentError: anything but maps of equally many images.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import attention_distance
        >>> attention_distance(torch.ones(2, 4, 8, 8), torch.ones(2, 16, 4, 4)).item()
        0.0
    """
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ArgumentError(f"expected maps (N, C, H, W), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return (attention_map(student, size) - attention_map(teacher, size)).square().sum(1).mean()
