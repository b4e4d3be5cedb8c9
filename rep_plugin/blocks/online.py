"""The online form of a chain: factors in the place of its BNs, so that it can be merged in every training step.

Hu et al., "Online Convolutional Re-parameterization" (CVPR 2022), section 3.2: inside a branch BN is replaced by a linear
scaling layer, and one BN follows the sum of the branches.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.chain import Chain, Scale, merge_ops, spatial_of

# Multiply-adds in the time that a convolution takes to write an element and read it again (measured on CPU).
MOVE = 32


def without_bns(chain: Chain) -> Chain:
    """Return the chain with a :class:`Scale` for every BN (``bn`` -> ``scale``, ``expand_bn`` -> ``expand_scale``)."""
    ops = {}
    for name, op in chain.named_children():
        if isinstance(op, _BatchNorm):
            ops[name.removesuffix("bn") + "scale"] = Scale(op.num_features)
        else:
            ops[name] = op
    return Chain(ops)


@torch.no_grad()
def init_gains_(chain: Chain, in_channels: int) -> None:
    """Set every factor so that the chain up to it answers white noise with unit variance in each channel, as a BN would.

    Without it the branches start as unequal as the products of their kernels, and the strongest one learns alone.
    """
    ops = []
    for op in chain.children():
        ops.append(op)
        if isinstance(op, Scale):
            op.weight.fill_(1.0)
            gain = merge_ops(ops, in_channels).kernel.flatten(1).norm(dim=1)
            op.weight.copy_(torch.where(gain > 0, 1.0 / gain, torch.ones_like(gain)))


def _is_dense(op: nn.Module) -> bool:
    return isinstance(op, nn.Conv2d) and op.weight.shape[1] > 1


def merge_macs(chain: Chain) -> int:
    """Multiply-adds of merging a chain: the products of its dense kernels (those with depthwise ones are small)."""
    kh, kw = chain.kernel_size
    dense = [op for op in chain.children() if _is_dense(op)]
    # (M, I/g) with (O, M/g), at every tap of the result.
    return kh * kw * sum(a.weight[..., 0, 0].numel() * b.weight.shape[0] // b.groups for a, b in pairwise(dense))


def run_macs(chain: Chain, pixels_in: int, pixels_out: int) -> int:
    """Multiply-adds of running a chain on maps of so many pixels in all; moving an element is counted as ``MOVE``."""
    total, pixels = 0, pixels_in
    for op in chain.children():
        if spatial_of(op)[1] != (1, 1):
            pixels = pixels_out
        if isinstance(op, nn.Conv2d):
            total += pixels * (op.weight.numel() + MOVE * op.weight.shape[0])
    return total
