"""What a teacher's outputs and maps tell a student that may be narrower: losses, as pure functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rep_plugin.errors import ArgumentError


def _wide(x: Tensor) -> Tensor:
    """Half precision is too coarse for the sums below."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of softened class probabilities, KL(teacher || student) * temperature^2, mean of the batch.

    ``student``, ``teacher``: logits (N, classes). The square keeps its gradients as large as those of a loss on labels,
    whatever the temperature: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015). Raises ValueError for
    logits of different shapes.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ArgumentError(
            f"logits must both be (N, classes), got {tuple(student.shape)} of the student and {tuple(teacher.shape)} of "
            "the teacher"
        )
    ours, theirs = (F.log_softmax(_wide(x) / temperature, dim=1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def attention_map(x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(N, C, H, W) -> (N, H * W) of unit norm: where a map has its energy, summed over channels.

    ``size``: average the energy to so many rows and columns first. Zagoruyko and Komodakis, "Paying More Attention to
    Attention" (ICLR 2017).
    """
    energy = _wide(x).square().mean(1, keepdim=True)  # (N, 1, H, W)
    if size is not None and size != energy.shape[2:]:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how far apart two maps look, |a_s - a_t|^2 of their attention maps, mean of the batch: between 0 and 2.

    Channels are summed away, so that a narrow map (N, C1, H, W) compares with a wide one (N, C2, H, W) without a learned
    projection. Where rows or columns differ, both are averaged to the smaller number. Raises ValueError for anything but
    maps of equally many pictures.
    """
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ArgumentError(f"expected maps (N, C, H, W), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return (attention_map(student, size) - attention_map(teacher, size)).square().sum(1).mean()
