"""Oracles that several tests share: written for plainness, not for speed."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parents[1]  # of the checkout

FUZZ = int(os.environ.get("FUZZ", "0"))


def examples(count: int) -> int:
    """How many random cases a property test tries: ``count``, or FUZZ where the environment sets it (`make fuzz`)."""
    return FUZZ or count


def relative_error(expected: Tensor, got: Tensor) -> float:
    """Largest difference, divided by the largest expected value."""
    assert expected.shape == got.shape
    assert torch.isfinite(expected).all() and torch.isfinite(got).all()
    return ((expected - got).abs().max() / expected.abs().max()).item()


def randomise_bn_(module: nn.Module) -> nn.Module:
    """Random gammas (a quarter negative), betas, means and variances."""
    for bn in module.modules():
        if isinstance(bn, _BatchNorm):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)
            if bn.weight is not None:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                bn.weight.data *= torch.where(torch.rand_like(bn.weight) < 0.25, -1.0, 1.0)
                nn.init.normal_(bn.bias)
    return module


def chain_by_hand(ops, x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Run layers one after the other on an explicitly padded map. Train-mode BN counts the real positions only."""
    y = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    h, w = padding
    for op in ops:
        if isinstance(op, nn.Conv2d):
            y = F.conv2d(y, op.weight, op.bias, op.stride, 0, op.dilation, op.groups)
            if op.weight.shape[2:] != (1, 1):
                h = w = 0
        elif isinstance(op, nn.AvgPool2d):
            channels = y.shape[1]
            kh, kw = (op.kernel_size,) * 2 if isinstance(op.kernel_size, int) else op.kernel_size
            kernel = y.new_full((channels, 1, kh, kw), 1 / (kh * kw))
            y = F.conv2d(y, kernel, None, op.stride, 0, getattr(op, "dilation", 1), channels)
            h = w = 0
        elif isinstance(op, _BatchNorm) and op.training:
            real = y[:, :, h : y.shape[2] - h, w : y.shape[3] - w]
            mean, var = real.mean((0, 2, 3)), real.var((0, 2, 3), unbiased=False)
            y = (y - mean.view(1, -1, 1, 1)) / torch.sqrt(var.view(1, -1, 1, 1) + op.eps)
            if op.weight is not None:
                y = y * op.weight.view(1, -1, 1, 1) + op.bias.view(1, -1, 1, 1)
        else:
            y = op(y)
    return y


def block_by_hand(block, x: Tensor) -> Tensor:
    """Sum of a block's chains, each on a map that is padded (or cropped) to be centred in the block's window."""
    total = 0
    for chain in block.branches.values():
        padding = [
            p - d * (big - small) // 2
            for p, d, big, small in zip(block.padding, block.dilation, block.kernel_size, chain.kernel_size)
        ]
        total = total + chain_by_hand(list(chain.children()), x, tuple(padding))
    return block.act(total)
