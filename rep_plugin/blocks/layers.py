"""The layers that may stand in a chain, and what they tell of themselves."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.scripted import dilated_average
from rep_plugin.errors import NotMergeableError
from rep_plugin.functional.kernels import avgpool_kernel, pair, plain_ops


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
        raise NotMergeableError(
            f"{type(op).__name__} computes something else than {plain.__name__} and cannot stand inside a chain: its own "
            "forward would be passed over"
        )
    if plain is nn.Conv2d and "weight" not in op._parameters and not hasattr(op, "parametrizations"):
        raise NotMergeableError(
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
            raise NotMergeableError(f"padding_mode must be 'zeros' in a chain, got {op.padding_mode!r}")
        return tuple(op.weight.shape[2:]), pair(op.stride), pair(op.dilation)
    if isinstance(op, nn.AvgPool2d):
        if not op.count_include_pad or op.ceil_mode or op.divisor_override:
            raise NotMergeableError(
                f"{op} in a chain needs count_include_pad=True, ceil_mode=False and no divisor_override: any other "
                "average is not a convolution at the border"
            )
        return pair(op.kernel_size), pair(op.stride), pair(getattr(op, "dilation", 1))
    if isinstance(op, (_BatchNorm, Scale, nn.Identity)):
        return (1, 1), (1, 1), (1, 1)
    raise NotMergeableError(
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
