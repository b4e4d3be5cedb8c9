"""The online form of a chain: norms of filters in the place of BNs, so that it can be merged in every training step.

Hu et al., "Online Convolutional Re-parameterization" (CVPR 2022), section 3.2: inside a branch a linear scaling layer stands
for BN, and one BN follows the sum of the branches. Theirs is a bare factor a channel. Here the filters are normalised
beside it (see :class:`rep_plugin.blocks.layers.NormedConv2d`): with the bare factors our Fashion-MNIST run blew up at the
learning rate that BN takes, even after a warm-up (make bench-fashion-mnist, ``--warm-up``).
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.layers import NormedConv2d, Scale, spatial_of
from rep_plugin.blocks.merge import merge_ops

# Multiply-adds in the time that a convolution takes to write an element and read it again (measured on CPU).
MOVE = 32


def without_bns(chain: Chain) -> Chain:
    """Return the chain without BNs: a convolution before one is normalised, elsewhere a :class:`Scale` takes its place.

    The scale's name is the BN's with ``scale`` for ``bn`` (``identity.bn`` -> ``identity.scale``).
    """
    ops: dict[str, nn.Module] = {}
    previous = None
    for name, op in chain.named_children():
        if not isinstance(op, _BatchNorm):
            ops[name] = op
        elif isinstance(ops.get(previous), nn.Conv2d) and ops[previous].bias is None:
            ops[previous] = NormedConv2d(ops[previous])
        else:
            ops[name.removesuffix("bn") + "scale"] = Scale(op.num_features)
        previous = name
    return Chain(ops)


def gain_of(op: nn.Module) -> nn.Parameter | None:
    """Return the factors (C,) that a layer of the online form has in the place of a BN's; None for other layers."""
    if isinstance(op, NormedConv2d):
        return op.gain
    return op.weight if isinstance(op, Scale) else None


@torch.no_grad()
def init_gains_(chain: Chain, in_channels: int) -> None:
    """Set every gain so that the chain up to it answers white noise with unit variance in each channel, as a BN would.

    Without it the branches start as unequal as the products of their kernels, and the strongest one learns alone.

    Args:
        chain: changed in place.
        in_channels: channels of its input.
    """
    ops = []
    for op in chain.children():
        ops.append(op)
        if (gain := gain_of(op)) is not None:
            gain.fill_(1.0)
            norm = merge_ops(ops, in_channels).kernel.flatten(1).norm(dim=1)
            gain.copy_(torch.where(norm > 0, 1.0 / norm, torch.ones_like(norm)))


def _is_dense(op: nn.Module) -> bool:
    return isinstance(op, nn.Conv2d) and op.weight.shape[1] > 1


def merge_macs(chain: Chain) -> int:
    """Return the multiply-adds of merging a chain: products of its dense kernels (those with depthwise ones are small)."""
    kh, kw = chain.kernel_size
    dense = [op for op in chain.children() if _is_dense(op)]
    # (M, I/g) with (O, M/g), at every tap of the result.
    return kh * kw * sum(a.weight[..., 0, 0].numel() * b.weight.shape[0] // b.groups for a, b in pairwise(dense))


def run_macs(chain: Chain, pixels_in: int, pixels_out: int) -> int:
    """Return the multiply-adds of a chain's forward; moving an element is counted as ``MOVE``.

    Args:
        chain: the chain.
        pixels_in, pixels_out: pixels of its input and of its output, in all images.

    Returns:
        Multiply-adds for all images.
    """
    total, pixels = 0, pixels_in
    for op in chain.children():
        if spatial_of(op)[1] != (1, 1):
            pixels = pixels_out
        if isinstance(op, nn.Conv2d):
            total += pixels * (op.weight.numel() + MOVE * op.weight.shape[0])
    return total
