"""The chains that blocks are made of. Names of layers are checkpoint keys: they never shift with other choices."""

import math

import torch
from torch import nn

from rep_plugin.arguments import Size
from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.layers import DilatedAvgPool2d
from rep_plugin.errors import ArgumentError


@torch.no_grad()
def he_normal_(conv: nn.Conv2d) -> None:
    """Draw a convolution's weights from He's normal distribution (fan out), bias 0.

    Not torch's: its fan_out forgets the groups, so that depthwise kernels would start 1 / sqrt(channels) too small, and
    with a BN behind them learn far too fast.
    """
    fan_out = conv.weight.shape[0] * conv.weight[0, 0].numel() // conv.groups
    conv.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
    if conv.bias is not None:
        conv.bias.zero_()


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, dilation: Size = 1, groups: int = 1
) -> Chain:
    """Return a convolution and its BN.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, dilation: sides, stride and dilation of the window, in pixels.
        groups: groups of the convolution.

    Returns:
        Chain of ``conv`` and ``bn``.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias=False)
    return Chain({"conv": conv, "bn": nn.BatchNorm2d(out_channels)})


def identity_bn(channels: int) -> Chain:
    """Return the input itself, normalised: ``bn``."""
    return Chain({"bn": nn.BatchNorm2d(channels)})


def require_groups(groups: int, **channels: int) -> None:
    """Raise ArgumentError for channels that ``groups`` does not divide."""
    for name, number in channels.items():
        if number % groups:
            raise ArgumentError(f"{name} (={number}) must be divisible by groups (={groups})")


def conv_conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    mid_channels: int | None = None,
) -> Chain:
    """Return a 1x1 and the window's convolution, a BN after each.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, dilation: sides, stride and dilation of the window, in pixels.
        groups: groups of both convolutions.
        mid_channels: channels between them (default: the inputs').

    Returns:
        Chain of ``reduce``, ``reduce_bn``, ``conv`` and ``bn``.

    Raises:
        ArgumentError: ``groups`` does not divide ``mid_channels``.
    """
    mid = in_channels if mid_channels is None else mid_channels
    require_groups(groups, mid_channels=mid)
    return Chain(
        {
            "reduce": nn.Conv2d(in_channels, mid, 1, groups=groups, bias=False),
            "reduce_bn": nn.BatchNorm2d(mid),
            "conv": nn.Conv2d(mid, out_channels, kernel_size, stride, 0, dilation, groups, bias=False),
            "bn": nn.BatchNorm2d(out_channels),
        }
    )


def conv_average_bn(
    in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, dilation: Size = 1, groups: int = 1
) -> Chain:
    """Return a 1x1 and the average over the window, a BN after each; a depthwise block needs no 1x1.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, dilation: sides, stride and dilation of the window, in pixels.
        groups: groups of the 1x1.

    Returns:
        Chain of ``reduce``, ``reduce_bn``, ``avg`` and ``bn``.
    """
    ops = {}
    if not groups == in_channels == out_channels:
        ops["reduce"] = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        ops["reduce_bn"] = nn.BatchNorm2d(out_channels)
    ops["avg"] = DilatedAvgPool2d(kernel_size, stride, dilation)
    ops["bn"] = nn.BatchNorm2d(out_channels)
    return Chain(ops)


def average_conv_bn(
    in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, dilation: Size = 1, mix: bool = False
) -> Chain:
    """Return the average over the window, a 1x1 where the shape changes, and a BN.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, dilation: sides, stride and dilation of the window, in pixels.
        mix: keep the 1x1 where the shape does not change.

    Returns:
        Chain of ``avg``, ``conv`` and ``bn``.
    """
    ops = {"avg": DilatedAvgPool2d(kernel_size, stride, dilation)}
    if mix or stride != 1 or in_channels != out_channels:
        ops["conv"] = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    ops["bn"] = nn.BatchNorm2d(out_channels)
    return Chain(ops)


def linear_bottleneck(
    in_channels: int, out_channels: int, stride: Size, expand_ratio: int, dilation: Size = 1
) -> Chain:
    """Return 1x1 expand, depthwise 3x3, 1x1 project, a BN after each and no activation; no expand at ratio 1.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        stride, dilation: stride and dilation of the depthwise layer, in pixels.
        expand_ratio: channels of the depthwise layer against the input's.

    Returns:
        Chain of ``expand``, ``depthwise`` and ``project``, each with its BN (``expand_bn`` ...).
    """
    mid = in_channels * expand_ratio
    ops = {}
    if expand_ratio != 1:
        ops["expand"] = nn.Conv2d(in_channels, mid, 1, bias=False)
        ops["expand_bn"] = nn.BatchNorm2d(mid)
    ops["depthwise"] = nn.Conv2d(mid, mid, 3, stride, dilation=dilation, groups=mid, bias=False)
    ops["depthwise_bn"] = nn.BatchNorm2d(mid)
    ops["project"] = nn.Conv2d(mid, out_channels, 1, bias=False)
    ops["project_bn"] = nn.BatchNorm2d(out_channels)
    return Chain(ops)
