"""The layers that may stand in a chain, and which convolution each of them is."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from rep_plugin.arguments import Channels, Size, checked
from rep_plugin.attached import what_is_attached
from rep_plugin.errors import NotMergeableError, TrainModeError
from rep_plugin.functional.kernels import avgpool_kernel, pair, plain_ops


@checked
class Scale(nn.Module):
    """A learned factor for each channel: (N, C, H, W) -> (N, C, H, W).

    Args:
        channels: number of channels C.
        init: first value of every factor.

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import Scale
        >>> Scale(4, 2.0)(torch.ones(1, 4, 5, 5)).unique().item()
        2.0
    """

    def __init__(self, channels: Channels, init: float = 1.0):
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


@checked
class DilatedAvgPool2d(nn.AvgPool2d):
    """Average pool that counts zeros and whose window has holes, as a dilated convolution's.

    Args:
        kernel_size: sides of the window.
        stride: stride in pixels.
        dilation: distance in pixels between two taps of the window.

    Example:
        >>> import torch
        >>> from rep_plugin.blocks import DilatedAvgPool2d
        >>> DilatedAvgPool2d(3, dilation=2)(torch.ones(1, 4, 9, 9)).shape
        torch.Size([1, 4, 5, 5])
    """

    def __init__(self, kernel_size: Size, stride: Size = 1, dilation: Size = (1, 1)):
        super().__init__(pair(kernel_size), pair(stride), padding=0)
        self.dilation = pair(dilation)

    def forward(self, x: Tensor) -> Tensor:
        return average(x, self, (0, 0))


DROPS = {"DropPath", "StochasticDepth", "DropBlock2d"}  # of timm, mmcv and torchvision; torch's are told by their class


def is_idle(module: nn.Module | None) -> bool:
    """True where the module computes nothing in eval mode: Identity, dropout, drop path, an empty Sequential, None."""
    if module is None:
        return True
    if what_is_attached(module) is not None:
        return False
    if isinstance(module, (nn.Identity, _DropoutNd)) or type(module).__name__ in DROPS:
        return type(module).__module__.startswith("torch.nn.") or _returns_its_input(module)
    return type(module).forward is nn.Sequential.forward and all(map(is_idle, module.children()))


def _returns_its_input(module: nn.Module) -> bool:
    """True where a module called dropout gives its input back in eval mode: Monte Carlo dropout does not."""
    idle, x = copy.copy(module), torch.arange(-8.0, 8.0).view(2, 2, 2, 2)
    idle.training = False
    try:
        with torch.random.fork_rng(devices=[]):
            return torch.equal(idle(x.clone()), x)
    except Exception:  # it takes something else than one map
        return False


def why_not_plain(op: nn.Module) -> str | None:
    """Return why a convolution, BN or average computes something else than its class stands for; None where it does not.

    timm's BatchNormAct2d is a BN where its activation is the identity.
    """
    kind: Any = type(op)
    plain = next((k for k in (nn.Conv2d, _BatchNorm, nn.AvgPool2d) if isinstance(op, k)), None)
    if plain is None or isinstance(op, (DilatedAvgPool2d, NormedConv2d)):
        return None
    known = kind.forward is plain.forward
    if plain is nn.Conv2d:
        known = known or kind.__module__ == "mmcv.cnn.bricks.wrappers"
        known = known and kind._conv_forward is nn.Conv2d._conv_forward
    elif plain is _BatchNorm:
        known = known or kind.forward is nn.SyncBatchNorm.forward
        known = known or kind.__name__ in {"BatchNormAct2d", "SyncBatchNormAct"}
        known = known and is_idle(getattr(op, "drop", None)) and is_idle(getattr(op, "act", None))
    if not known:
        return f"it computes something else than {plain.__name__}: its own forward would be passed over"
    if plain is nn.Conv2d and "weight" not in op._parameters and not hasattr(op, "parametrizations"):
        return "its weight is set by a hook, which a merge does not call: use torch.nn.utils.parametrize"
    if plain is nn.Conv2d and op.padding_mode != "zeros":
        return f"padding_mode must be 'zeros', got {op.padding_mode!r}"
    return None


def why_not_average(pool: nn.AvgPool2d, padded: bool) -> str | None:
    """Return why an average pool is not a convolution.

    Args:
        pool: the layer.
        padded: whether zeros are padded round its input.

    Returns:
        The reason; None where it is one.
    """
    if (pool.count_include_pad or not padded) and not pool.ceil_mode and not pool.divisor_override:
        return None
    return (
        "it needs count_include_pad=True, ceil_mode=False and no divisor_override: any other average is not a convolution "
        "at the border"
    )


def require_eval(bn: nn.Module, name: str = "") -> None:
    """Raise TrainModeError for a BN in train mode.

    Args:
        bn: the layer.
        name: what the message calls it (default: its class).
    """
    if bn.training:
        raise TrainModeError(
            f"{name or type(bn).__name__} is in train mode (batch statistics cannot be merged): call model.eval() first"
        )


def require_eval_mode(model: nn.Module) -> None:
    """Raise TrainModeError where a part of a model computes by chance or by the batch: a BN or a dropout in train mode."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            require_eval(module, name and repr(name))
        drops = isinstance(module, _DropoutNd) or type(module).__name__ in DROPS
        if drops and module.training and any(getattr(module, rate, 0) for rate in ("p", "drop_prob")):
            raise TrainModeError(
                f"{name or 'the model'!r} ({type(module).__name__}) is in train mode (what it drops cannot be merged): call "
                "model.eval() first"
            )


def kernel_of(conv: nn.Conv2d, dtype: torch.dtype | None = None) -> Tensor:
    """Return the kernel of a convolution that is in effect.

    Args:
        conv: the layer.
        dtype: the wanted type (default: the kernel's own).

    Returns:
        The kernel (O, I / groups, kh, kw).
    """
    if isinstance(conv, NormedConv2d):
        return conv.kernel(dtype)
    return conv.weight if dtype is None else conv.weight.to(dtype)


def channels_of(op: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) by the tensors (a pruned layer's attributes may be stale); None: any number."""
    if isinstance(op, nn.Conv2d):
        return op.weight.shape[1] * groups_of(op), op.weight.shape[0]
    if isinstance(op, _BatchNorm):
        width = op.num_features if op.running_mean is None else op.running_mean.numel()
        return width, width
    if isinstance(op, Scale):
        return op.weight.numel(), op.weight.numel()
    return None


def groups_of(conv: nn.Conv2d) -> int:
    """Return the groups: a depthwise layer keeps one channel a group whatever was pruned, others keep their groups."""
    if conv.groups == conv.in_channels and conv.weight.shape[1] == 1:
        return conv.weight.shape[0] // max(1, conv.out_channels // conv.in_channels)
    return conv.groups


def spatial_of(op: nn.Module, padded: bool = True) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the window of a linear layer; layers without one have side 1.

    Args:
        op: the layer.
        padded: whether zeros are padded round its input.

    Returns:
        ((kh, kw), stride, dilation), in pixels.

    Raises:
        NotMergeableError: a layer that is not linear (an activation), or not plain.
    """
    reason = why_not_plain(op)
    if reason is None and isinstance(op, nn.AvgPool2d):
        reason = why_not_average(op, padded)
    if reason is not None:
        raise NotMergeableError(f"{op} cannot be merged: {reason}")
    if isinstance(op, nn.Conv2d):
        return pair(op.weight.shape[2:]), pair(op.stride), pair(op.dilation)
    if isinstance(op, nn.AvgPool2d):
        return pair(op.kernel_size), pair(op.stride), pair(getattr(op, "dilation", 1))
    if isinstance(op, (_BatchNorm, Scale, nn.Identity)):
        return (1, 1), (1, 1), (1, 1)
    raise NotMergeableError(
        f"{type(op).__name__} is not linear and cannot be merged; expected Conv2d, BatchNorm2d, AvgPool2d, Identity or Scale"
    )


def average(y: Tensor, op: nn.AvgPool2d, padding: tuple[int, int]) -> Tensor:
    """Return the average over a window that may have holes, zeros counted.

    Args:
        y: map (N, C, H, W).
        op: the layer, whose own padding is not used.
        padding: rows and columns of zeros round the map.

    Returns:
        Map (N, C, H', W').
    """
    kernel_size, stride, dilation = spatial_of(op)
    if dilation == (1, 1):
        if padding[0] > kernel_size[0] // 2 or padding[1] > kernel_size[1] // 2:  # more than avg_pool2d takes
            y, padding = F.pad(y, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
        return F.avg_pool2d(y, kernel_size, stride, padding, count_include_pad=True)
    kernel = avgpool_kernel(y.shape[1], kernel_size, dtype=y.dtype, device=y.device)
    return F.conv2d(y, kernel, None, stride, padding, dilation, groups=y.shape[1])
