"""BatchNorm inside a chain: statistics of a map, and a pending scale and shift instead of a pass over it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.errors import ArgumentError


class _BatchStats(torch.autograd.Function):
    """Mean and biased variance of (N, C, H, W) over all but C, each (C,): one fused pass forward, one backward."""

    @staticmethod
    def forward(ctx, y: Tensor) -> tuple[Tensor, Tensor]:
        scratch = y.new_zeros(2, y.shape[1])
        mean, var = scratch[0], scratch[1]
        if not y.is_meta:  # torch has no kernel for shapes alone
            mean, var = torch.ops.aten.batch_norm_update_stats(y, mean, var, 0.0)
        ctx.save_for_backward(y, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        y, mean = ctx.saved_tensors
        count = y.numel() // y.shape[1]
        slope = grad_var * (2.0 / count)
        offset = grad_mean / count - slope * mean
        return torch.addcmul(offset.view(1, -1, 1, 1), y, slope.view(1, -1, 1, 1))


def _sync_group(bn: _BatchNorm):
    if not isinstance(bn, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _batch_stats(y: Tensor, group) -> tuple[Tensor, Tensor, int]:
    """(mean, biased variance, number of values a channel), over all ranks of ``group`` where one is given."""
    if y.dtype in (torch.float16, torch.bfloat16):
        y = y.float()
    count = y.numel() // y.shape[1]
    mean, var = _BatchStats.apply(y)
    if group is not None:
        from torch.distributed.nn.functional import all_reduce  # the differentiable one

        total = torch.tensor([count], device=y.device)
        dist.all_reduce(total, group=group)
        local, count = count, int(total.item())
        common = all_reduce(mean * (local / count), group=group)
        # Not E[x^2] - E[x]^2: in float32 that is noise once the mean is a hundred deviations away.
        var = all_reduce((var + (mean - common) ** 2) * (local / count), group=group)
        mean = common
    if count <= 1:
        raise ArgumentError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
    return mean, var, count


def _update_running(bn: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    if not bn.track_running_stats or bn.running_mean is None:
        return
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
        bn.running_mean.lerp_(mean.detach().to(bn.running_mean.dtype), momentum)
        unbiased = var.detach() * (count / (count - 1))
        bn.running_var.lerp_(unbiased.to(bn.running_var.dtype), momentum)


def run_bn(bn: _BatchNorm, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the BatchNorm of the value ``y * scale + shift``, as a new pending scale and shift on the same ``y``.

    Args:
        bn: the layer; in train mode its running statistics are updated.
        y: map (N, C, H, W).
        scale: pending factor (C,); None: 1.
        shift: pending shift (C,); None: 0.

    Returns:
        ``(scale (C,), shift (C,))``.

    Raises:
        ArgumentError: in train mode, one value a channel.
    """
    uses_batch = bn.training or bn.running_mean is None
    if uses_batch:
        mean, var, count = _batch_stats(y, _sync_group(bn))
        if scale is not None:
            mean, var = mean * scale, var * scale * scale
        if shift is not None:
            mean = mean + shift
        if bn.training:
            _update_running(bn, mean, var, count)
    else:
        mean, var = bn.running_mean, bn.running_var
        if var.dtype in (torch.float16, torch.bfloat16):  # 1 / sqrt(eps) is out of half precision's range
            mean, var = mean.float(), var.float()
    gain = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        gain = gain * bn.weight
    offset = -mean * gain
    if bn.bias is not None:
        offset = offset + bn.bias
    new_shift = offset if shift is None else offset + shift * gain
    return (gain if scale is None else scale * gain), new_shift
