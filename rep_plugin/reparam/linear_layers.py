"""Reading layers that are not ours as padded convolutions, by what they hold rather than by their class.

Everything is read from the tensors: after channel pruning the attributes (``in_channels``, ``groups``,
``num_features``) may be stale. What is not certainly linear is refused with NotMergeableError.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.attached import what_is_attached
from rep_plugin.blocks.layers import NormedConv2d, groups_of, is_idle, why_not_plain
from rep_plugin.blocks.merge import layer_params
from rep_plugin.errors import ArgumentError, NotMergeableError
from rep_plugin.functional.kernels import ConvParams, identity_kernel, pair
from rep_plugin.functional.padded import PaddedConv, compose_padded, scale_padded

# Conv-BN holders: what they compute is known; the children are the layers.
CONV_NORM_CLASSES = {
    "ConvNormAct",  # timm.layers, byobnet and fastvit
    "ConvBnAct",  # timm's efficientnet and ghostnet blocks
    "ConvModule",  # mmcv
    "ConvNorm",  # timm levit, efficientvit_msra, repvit, iformer, tiny_vit
    "Conv2dNorm",  # timm shvit
    "Conv2d_BN",  # official LeViT, RepViT, EfficientViT
    "ConvolutionBatchNorm",  # mmpretrain LeViT
    "ConvBN2d",  # mmpretrain TinyViT
    "Conv",  # ultralytics and YOLOv6 wrap conv, bn, act
}


def is_plain_conv(module: nn.Module | None) -> bool:
    """Return True for a convolution that computes what ``nn.Conv2d`` does, with zero padding in numbers."""
    if not isinstance(module, nn.Conv2d) or isinstance(module, NormedConv2d):
        return False
    return why_not_plain(module) is None and not isinstance(module.padding, str)


def is_plain_bn(module: nn.Module | None) -> bool:
    """Return True for a BN (SyncBN, or timm's BatchNormAct2d without activation) that is an affine map in eval mode."""
    return isinstance(module, _BatchNorm) and module.running_var is not None and why_not_plain(module) is None


def bn_affine(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ``(scale, shift)`` of a plain BN in float64.

    Raises:
        NotMergeableError: another layer.
        TrainModeError: a BN in train mode.
    """
    if not is_plain_bn(bn) or what_is_attached(bn) is not None:
        raise NotMergeableError(f"{type(bn).__name__} is not an affine map of its input and cannot be merged")
    params = layer_params(bn, None, torch.float64, bn.running_var.device)
    assert params.bias is not None  # a BN always shifts
    return params.kernel.flatten(), params.bias


def affine_conv(scale: Tensor, shift: Tensor, padding: tuple[int, int] = (0, 0)) -> PaddedConv:
    """Return the depthwise 1x1 convolution ``x * scale + shift``.

    Args:
        scale, shift: (C,).
        padding: rows and columns of zeros.

    Returns:
        Convolution of C groups.
    """
    return PaddedConv(ConvParams(scale.reshape(-1, 1, 1, 1), shift, scale.numel()), padding)


def identity_conv(channels: int, device: torch.device | None = None) -> PaddedConv:
    """Return the convolution that copies its input.

    Args:
        channels: channels of the input.
        device: device of the result.

    Returns:
        Depthwise 1x1 convolution in float64, with bias 0.
    """
    kernel = identity_kernel(channels, channels, dtype=torch.float64, device=device)
    return PaddedConv(ConvParams(kernel, kernel.new_zeros(channels), channels))


def _read_based_1x1(conv: nn.Module) -> PaddedConv:
    """DBB's IdentityBasedConv1x1: a 1x1 kernel that is added to the identity's; its padding and bias are not used."""
    kernel = conv.weight.detach().double()
    groups = groups_of(conv)
    eye = identity_kernel(kernel.shape[0], groups, dtype=kernel.dtype, device=kernel.device)
    return PaddedConv(ConvParams(kernel + eye, kernel.new_zeros(kernel.shape[0]), groups))


def flatten_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the layers that run one after the other: Sequentials and Conv-BN holders opened, idle ones left out.

    Raises:
        NotMergeableError: a holder with a part that is not known to be idle (an activation, a skip).
    """
    flat = []
    for module in modules:
        if is_idle(module):
            continue
        if (what := what_is_attached(module)) is not None:
            raise NotMergeableError(f"{type(module).__name__} {what}, which a merge would lose: take it off first")
        if type(module).forward is nn.Sequential.forward:
            flat += flatten_layers(module)
        elif type(module).__name__ in CONV_NORM_CLASSES:
            flat += _open_conv_norm(module)
        else:
            flat.append(module)
    return flat


def _open_conv_norm(module: nn.Module) -> list[nn.Module]:
    name = type(module).__name__
    parts = [child for child in module._modules.values() if not is_idle(child)]
    if getattr(module, "has_skip", False):
        raise NotMergeableError(f"{name} adds its own input, which is not a chain of layers")
    if getattr(module, "with_explicit_padding", False) or getattr(module, "with_spectral_norm", False):
        raise NotMergeableError(f"{name} pads or normalises its weight by itself and cannot be merged")
    if not parts or not isinstance(parts[0], nn.Conv2d) or len(parts) > 2:
        raise NotMergeableError(f"{name} holds {[type(p).__name__ for p in parts]}, expected a convolution and a BN")
    return flatten_layers(parts)


def read_layer(module: nn.Module, channels: int | None, device: torch.device) -> PaddedConv:
    """Read one linear layer as a padded convolution.

    Args:
        module: the layer, in eval mode.
        channels: channels of its input, where known.
        device: device of the result, for layers without tensors.

    Returns:
        Convolution in float64, with a bias.

    Raises:
        NotMergeableError: a layer that is not linear.
        TrainModeError: a BN in train mode.
    """
    kind = type(module).__name__
    if (what := what_is_attached(module)) is not None:
        raise NotMergeableError(f"{kind} {what}, which a merge would lose: take it off first")
    if kind == "IdentityBasedConv1x1":
        return _read_based_1x1(module)
    if kind == "BNAndPadLayer":  # a BN that pads with what it answers to zeros: a 1x1 convolution padded with zeros
        return affine_conv(*bn_affine(module.bn), padding=pair(module.pad_pixels))
    padding = getattr(module, "padding", 0)
    if isinstance(padding, str):
        raise NotMergeableError(f"padding of {kind} must be numbers, got {padding!r}")
    if isinstance(module, nn.AvgPool2d) and channels is None:
        raise NotMergeableError(f"{kind} has no channel number and nothing before it has one")
    params = layer_params(module, channels, torch.float64, device, padded=any(pair(padding)))
    kernel = params.kernel.detach()
    bias = kernel.new_zeros(len(kernel)) if params.bias is None else params.bias.detach()
    return PaddedConv(params._replace(kernel=kernel, bias=bias), pair(padding))


def read_chain(modules: Iterable[nn.Module] | nn.Module, channels: int | None = None) -> PaddedConv:
    """Read layers that run one after the other as one padded convolution.

    Args:
        modules: the layers, in eval mode.
        channels: channels of the input; needed only where no layer has a channel number.

    Returns:
        Convolution in float64, with a bias.

    Raises:
        NotMergeableError: a layer that is not linear.
        TrainModeError: a BN in train mode.
        ArgumentError: the layers do not form one convolution.
    """
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    device = tensors[0].device if tensors else torch.device("cpu")
    merged = None
    for layer in flatten_layers(modules):
        part = read_layer(layer, channels, device)
        merged = part if merged is None else compose_padded(merged, part)
        channels = merged.params.out_channels
    if merged is None:
        if channels is None:
            raise ArgumentError("an empty chain has no channel number")
        return identity_conv(channels, device)
    return merged


def after_affine(conv: PaddedConv, scale: Tensor, shift: Tensor) -> PaddedConv:
    """Return the convolution followed by ``y * scale + shift``.

    Args:
        conv: the convolution, with a bias.
        scale, shift: (O,).

    Returns:
        Convolution of the same geometry.
    """
    scaled = scale_padded(conv, scale)
    return scaled._replace(params=scaled.params._replace(bias=scaled.params.bias + shift))


def read_linear(
    linear: nn.Linear, before: Sequence[nn.Module] = (), after: Sequence[nn.Module] = ()
) -> tuple[Tensor, Tensor]:
    """Return a linear layer with BNs in front of it and behind it as one, in float64.

    Args:
        linear: the layer.
        before: BNs in front of it, in order.
        after: BNs behind it, in order.

    Returns:
        ``(weight (O, I), bias (O,))``.

    Raises:
        NotMergeableError: a layer that computes something else, or a BN that is not plain.
        TrainModeError: a BN in train mode.
    """
    if type(linear).forward is not nn.Linear.forward or what_is_attached(linear) is not None:
        raise NotMergeableError(f"{type(linear).__name__} does not compute what nn.Linear does and cannot be merged")
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.detach().double()
    for bn in reversed(before):
        scale, shift = bn_affine(bn)
        bias = bias + weight @ shift
        weight = weight * scale
    for bn in after:
        scale, shift = bn_affine(bn)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return weight, bias
