"""A chain of linear layers on a zero-padded input: how it runs in training, and how it becomes one convolution.

Semantics: zeros are padded once, round the chain's *input*; every later layer sees the padded map. So the merge is exact
at the border too. Batch statistics that are taken before the first spatial layer count the real positions only.

Execution pads nothing by hand. On the way the map is carried as ``y`` together with a pending per-channel ``scale`` and
``shift``, the value being ``y * scale + shift``. All that a padding ring holds before the first spatial layer is then
``shift``, so ``y`` itself can be padded with zeros by the convolution, and BatchNorm costs statistics but no pass that
normalises: the next kernel absorbs the scale, and a constant of the kernel the shift.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.scripted import ScriptedChain, dilated_average
from rep_plugin.functional.kernels import (
    ConvParams,
    avgpool_kernel,
    bn_scale_shift,
    compose_all,
    identity_kernel,
    is_constant,
    pair,
    plain_ops,
    scale_kernel_inputs,
    sum_kernel_taps,
)


class Scale(nn.Module):
    """A learned factor for each channel: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, init: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1)


def _norm_filters(weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``weight * gain / norm`` and ``1 / norm``, norm = sqrt(|weight|^2 + eps) of each filter."""
    inverse = torch.rsqrt(torch.linalg.vector_norm(weight, dim=(1, 2, 3)).square() + eps)
    return weight * (gain * inverse).view(-1, 1, 1, 1), inverse


class _NormedFilters(torch.autograd.Function):
    """:func:`_norm_filters` with as few passes over the weights as backward needs."""

    @staticmethod
    def forward(ctx, weight: Tensor, gain: Tensor, eps: float) -> Tensor:
        kernel, inverse = _norm_filters(weight, gain, eps)
        ctx.save_for_backward(weight, gain, inverse)
        return kernel

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, gain, inverse = ctx.saved_tensors
        along = (grad * weight).sum((1, 2, 3))
        across = grad * (gain * inverse).view(-1, 1, 1, 1)
        return torch.addcmul(across, weight, (-along * gain * inverse**3).view(-1, 1, 1, 1)), along * inverse, None


class NormedConv2d(nn.Conv2d):
    """A convolution whose filters have the norm ``gain`` (O,) whatever that of ``weight``; no bias.

    ``kernel = weight * gain / sqrt(|weight|^2 + eps)``, a filter each. Stands where a BN would follow but may not: like it,
    it makes training independent of the weights' own size, which keeps large learning rates stable. Salimans and Kingma,
    "Weight Normalization" (NeurIPS 2016), section 2.
    """

    eps = 1e-5  # as BN's: a filter that was set to zero stays zero, and can grow again

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
            bias=False,
        )  # fmt: skip
        self.weight = conv.weight
        self.gain = nn.Parameter(torch.ones_like(conv.weight[:, 0, 0, 0]))

    def kernel(self, dtype: torch.dtype | None = None) -> Tensor:
        """The filters that are in effect, (O, I / groups, kh, kw), in ``dtype``; differentiable."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        gain = self.gain.to(weight.dtype)
        if plain_ops():
            return _norm_filters(weight, gain, self.eps)[0]
        return _NormedFilters.apply(weight, gain, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), None, self.stride, self.padding, self.dilation, self.groups)


def kernel_of(conv: nn.Conv2d, dtype: torch.dtype | None = None) -> Tensor:
    """The kernel of a convolution that is in effect, in ``dtype`` (default: its own)."""
    if isinstance(conv, NormedConv2d):
        return conv.kernel(dtype)
    return conv.weight if dtype is None else conv.weight.to(dtype)


def _channels_of(op: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) as the live tensors say (a pruned layer's attributes may be stale); None: any number."""
    if isinstance(op, nn.Conv2d):
        return op.weight.shape[1] * _groups_of(op), op.weight.shape[0]
    if isinstance(op, _BatchNorm):
        width = op.num_features if op.running_mean is None else op.running_mean.numel()
        return width, width
    if isinstance(op, Scale):
        return op.weight.numel(), op.weight.numel()
    return None


def _groups_of(conv: nn.Conv2d) -> int:
    """Depthwise layers keep one channel a group whatever was pruned; other grouped layers keep their groups."""
    if conv.groups == conv.in_channels and conv.weight.shape[1] == 1:
        return conv.weight.shape[0] // max(1, conv.out_channels // conv.in_channels)
    return conv.groups


def _require_plain(op: nn.Module) -> None:
    """Raise TypeError for a layer whose forward is not the one that runs and merges here."""
    plain = next((kind for kind in (nn.Conv2d, _BatchNorm, nn.AvgPool2d) if isinstance(op, kind)), None)
    if isinstance(op, (nn.SyncBatchNorm, DilatedAvgPool2d, NormedConv2d)) or plain is None:
        return
    changed = type(op).forward is not plain.forward
    if changed or (plain is nn.Conv2d and type(op)._conv_forward is not nn.Conv2d._conv_forward):
        raise TypeError(
            f"{type(op).__name__} computes something else than {plain.__name__} and cannot stand inside a chain: its own "
            "forward would be passed over"
        )
    if plain is nn.Conv2d and "weight" not in op._parameters and not hasattr(op, "parametrizations"):
        raise TypeError(
            f"the weight of {type(op).__name__} is set by a hook, which a chain does not call: use "
            "torch.nn.utils.parametrize"
        )


def spatial_of(op: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return ((kh, kw), stride, dilation) of a layer, in pixels; layers without a window have side 1.

    Raises TypeError for a layer that is not linear: an activation inside a chain cannot be merged.
    """
    _require_plain(op)
    if isinstance(op, nn.Conv2d):
        if op.padding_mode != "zeros":
            raise TypeError(f"padding_mode must be 'zeros' in a chain, got {op.padding_mode!r}")
        return tuple(op.weight.shape[2:]), pair(op.stride), pair(op.dilation)
    if isinstance(op, nn.AvgPool2d):
        if not op.count_include_pad or op.ceil_mode or op.divisor_override:
            raise TypeError(
                f"{op} in a chain needs count_include_pad=True, ceil_mode=False and no divisor_override: any other "
                "average is not a convolution at the border"
            )
        return pair(op.kernel_size), pair(op.stride), pair(getattr(op, "dilation", 1))
    if isinstance(op, (_BatchNorm, Scale, nn.Identity)):
        return (1, 1), (1, 1), (1, 1)
    raise TypeError(
        f"{type(op).__name__} is not linear and cannot stand inside a chain; expected Conv2d, BatchNorm2d, AvgPool2d, "
        "Identity or Scale"
    )


class DilatedAvgPool2d(nn.AvgPool2d):
    """Average pool (zeros counted) whose window has holes, as a dilated convolution's: a constant depthwise conv."""

    def __init__(self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1, dilation=(1, 1)):
        super().__init__(pair(kernel_size), pair(stride), padding=0)
        self.dilation = pair(dilation)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return dilated_average(x, self.kernel_size, self.stride, self.dilation)
        else:
            return _average(x, self, (0, 0))


def _average(y: Tensor, op: nn.AvgPool2d, padding: tuple[int, int]) -> Tensor:
    kernel_size, stride, dilation = spatial_of(op)
    if dilation == (1, 1):
        if padding[0] > kernel_size[0] // 2 or padding[1] > kernel_size[1] // 2:  # more than avg_pool2d takes
            y, padding = F.pad(y, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
        return F.avg_pool2d(y, kernel_size, stride, padding, count_include_pad=True)
    kernel = avgpool_kernel(y.shape[1], kernel_size, dtype=y.dtype, device=y.device)
    return F.conv2d(y, kernel, None, stride, padding, dilation, groups=y.shape[1])


def _op_params(op: nn.Module, channels: int, dtype: torch.dtype, device: torch.device) -> ConvParams:
    kernel_size, stride, dilation = spatial_of(op)
    options = {"dtype": dtype, "device": device}
    if isinstance(op, nn.Conv2d):
        return ConvParams(
            kernel_of(op, dtype), None if op.bias is None else op.bias.to(dtype), _groups_of(op), stride, dilation
        )
    if isinstance(op, nn.AvgPool2d):
        return ConvParams(avgpool_kernel(channels, kernel_size, **options), None, channels, stride, dilation)
    if isinstance(op, nn.Identity):
        return ConvParams(identity_kernel(channels, channels, **options), None, channels)
    if isinstance(op, Scale):
        return ConvParams(op.weight.to(dtype).view(-1, 1, 1, 1), None, channels)
    if op.training:
        raise RuntimeError(
            f"{type(op).__name__}({channels}) is in train mode (batch statistics cannot be merged): call model.eval() first"
        )
    scale, shift = bn_scale_shift(op, dtype)
    return ConvParams(scale.view(-1, 1, 1, 1), shift, channels)


def merge_ops(ops: Iterable[nn.Module], in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
    """Return the one convolution equal to a chain of linear layers on a zero-padded input; no layer adds: no bias.

    ``in_channels`` is needed only where no layer tells it (a chain of poolings). Computes in ``dtype`` (default: that of
    the first tensor). Raises TypeError for a layer that is not linear, RuntimeError for a BN in train mode, ValueError
    where channels do not fit or the chain is empty.
    """
    ops = list(ops)
    tensors = [t for op in ops for t in (*op.parameters(), *op.buffers()) if t.is_floating_point()]
    dtype = dtype or (tensors[0].dtype if tensors else torch.get_default_dtype())
    device = tensors[0].device if tensors else torch.device("cpu")
    channels = next((c[0] for c in map(_channels_of, ops) if c), in_channels)
    if not ops or channels is None:
        raise ValueError(f"a chain of {len(ops)} layers with in_channels={in_channels} says no channel number")
    parts = []
    with torch.autocast(device.type, enabled=False):  # a half-precision merge would cost 2.3 times the accuracy
        for op in ops:
            parts.append(_op_params(op, channels, dtype, device))
            channels = parts[-1].out_channels
        return compose_all(parts)


def merge_chain(ops: Iterable[nn.Module], in_channels: int | None = None) -> tuple[Tensor, Tensor]:
    """Return ``(kernel, bias)`` of the one convolution equal to the chain; differentiable. See :func:`merge_ops`."""
    merged = merge_ops(ops, in_channels)
    bias = merged.bias if merged.bias is not None else merged.kernel.new_zeros(merged.out_channels)
    return (merged.kernel.clone() if is_constant(merged.kernel) else merged.kernel), bias


class _BatchStats(torch.autograd.Function):
    """Mean and biased variance of (N, C, H, W) over all but C, each (C,): one fused pass forward, one backward."""

    @staticmethod
    def forward(ctx, y: Tensor) -> tuple[Tensor, Tensor]:
        scratch = y.new_zeros(2, y.shape[1])
        mean, var = scratch[0], scratch[1]
        if not y.is_meta:  # torch has no kernel that tells the shapes alone
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
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
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


def _run_bn(bn: _BatchNorm, y: Tensor, scale: Tensor | None, shift: Tensor | None):
    """BatchNorm of the value ``y * scale + shift``, as a new pending (scale, shift) on the same ``y``."""
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


def _run_conv(conv: nn.Conv2d, y: Tensor, scale: Tensor | None, shift: Tensor | None, padding: tuple[int, int]):
    groups = _groups_of(conv)
    weight = kernel_of(conv)
    kernel = weight if scale is None else scale_kernel_inputs(weight, groups, scale.to(weight.dtype))
    stride = pair(conv.stride)
    if kernel.shape[2:] == (1, 1) and stride != (1, 1) and padding == (0, 0):
        # Not left to oneDNN: the weight gradient of its strided 1x1 writes past its buffer where a channels_last map has
        # fewer than 16 channels (uxlfoundation/oneDNN#6035), as every stem has: wrong gradients, or a crash.
        y, stride = y[:, :, :: stride[0], :: stride[1]], (1, 1)
    out = F.conv2d(y, kernel, None, stride, padding, conv.dilation, groups)
    new_shift = None if shift is None else sum_kernel_taps(weight, groups, shift.to(weight.dtype))
    if conv.bias is not None:
        new_shift = conv.bias if new_shift is None else new_shift + conv.bias
    return out, new_shift


class Chain(ScriptedChain):
    """Named linear layers that run one after the other on a zero-padded input.

    ``ops`` maps fixed names (they are the checkpoint keys) to Conv2d, BatchNorm2d, AvgPool2d, Identity or Scale. A conv's
    own ``padding`` is not used: the chain is padded once, at its head. Raises TypeError for a layer that is not linear and
    ValueError for a stride in front of the first window (the ring would be skipped).
    """

    __jit_unused_properties__ = ["kernel_size"]

    def __init__(self, ops: Mapping[str, nn.Module]):
        super().__init__()
        if not ops:
            raise ValueError("a chain needs at least one layer, got none")
        strided = None
        for name, op in ops.items():
            kernel_size, stride, _ = spatial_of(op)
            if strided and kernel_size != (1, 1):
                raise ValueError(f"layer {name!r} of size {kernel_size} stands behind {strided!r}, which has a stride")
            if stride != (1, 1):
                strided = name
            self.add_module(name, op)

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Sides of the merged kernel, in taps of the chain's dilation."""
        sides = [1, 1]
        for op in self.children():
            (kh, kw), _, _ = spatial_of(op)
            sides = [sides[0] + kh - 1, sides[1] + kw - 1]
        return sides[0], sides[1]

    def last_bn(self) -> _BatchNorm | None:
        """The BN that ends the chain, whose gamma scales its whole output; None where it ends otherwise."""
        last = list(self.children())[-1]
        return last if isinstance(last, _BatchNorm) else None

    def run(self, x: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return ``(y, scale, shift)`` with chain(x) == y * scale + shift (None: 1 and 0).

        ``x`` (N, C, H, W); ``padding`` is the ring in pixels per axis, a negative one crops.
        """
        y, scale, shift = x, None, None
        ops = list(self.children())
        spatial = [spatial_of(op)[0] != (1, 1) for op in ops]
        if min(padding) < 0 or (max(padding) > 0 and not any(spatial)):
            y, padding = F.pad(y, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
        for op, is_spatial in zip(ops, spatial):
            here = padding if is_spatial else (0, 0)
            if is_spatial:
                padding = (0, 0)
            if isinstance(op, nn.Conv2d):
                y, shift = _run_conv(op, y, scale, shift, here)
                scale = None
            elif isinstance(op, nn.AvgPool2d):
                y = _average(y, op, here)  # taps sum to one and the ring holds `shift` too: both stay pending
            elif isinstance(op, Scale):
                scale = op.weight if scale is None else scale * op.weight
                shift = None if shift is None else shift * op.weight
            elif isinstance(op, _BatchNorm):
                scale, shift = _run_bn(op, y, scale, shift)
        return y, scale, shift

    def forward(self, x: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the chain's output, (N, O, H', W'), for a zero ring of ``padding`` pixels."""
        if torch.jit.is_scripting():
            return self.layer_by_layer(x, padding)
        else:
            return self._settle(*self.run(x, pair(padding)))

    @staticmethod
    def _settle(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        out = y if scale is None else y * scale.view(1, -1, 1, 1)
        return (out if shift is None else out + shift.view(1, -1, 1, 1)).type_as(y)

    def merge(self, in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
        """Return the chain as one convolution. See :func:`merge_ops`."""
        return merge_ops(self.children(), in_channels, dtype)
