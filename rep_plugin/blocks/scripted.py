"""A chain as TorchScript compiles it: layer by layer on the map itself, plainer than :mod:`rep_plugin.blocks.chain`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScriptedChain(nn.Module):
    """What TorchScript compiles of a :class:`rep_plugin.blocks.chain.Chain`; it tells layers by their attributes."""

    def layer_by_layer(self, x: Tensor, ring: tuple[int, int]) -> Tensor:
        """Return the chain's output, (N, O, H', W'), for a zero ring of ``ring`` pixels.

        ``edge`` (1, C, 1, 1) is what the ring's zeros have become. The ring is put round the map in front of the first
        window only, so that batch statistics count the real positions alone.
        """
        height, width = ring
        sides: list[int] = []  # TorchScript unrolls the loops over layers
        for op in self.children():
            if hasattr(op, "kernel_size"):
                if hasattr(op, "weight"):
                    sides.append(op.weight.shape[2] * op.weight.shape[3])
                else:
                    sides.append(2)
            else:
                sides.append(1)
        if max(sides) == 1 or min(height, width) < 0:
            x, height, width = F.pad(x, [width, width, height, height]), 0, 0
        edge = torch.zeros(1, x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
        for index, op in enumerate(self.children()):
            if sides[index] > 1 and max(height, width) > 0:
                x, height, width = F.pad(x - edge, [width, width, height, height]) + edge, 0, 0
            if hasattr(op, "running_var"):
                if op.training:
                    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
                else:
                    mean, var = op.running_mean.view(1, -1, 1, 1), op.running_var.view(1, -1, 1, 1)
                edge = (edge - mean) * torch.rsqrt(var + op.eps)
                if op.weight is not None:
                    edge = edge * op.weight.view(1, -1, 1, 1) + op.bias.view(1, -1, 1, 1)
                x, edge = op(x), edge.to(x.dtype)
            elif hasattr(op, "groups"):
                groups = x.shape[1] // op.weight.shape[1]  # after surgery the attribute may be stale
                if sides[index] > 1:
                    x = F.conv2d(x, op.weight, op.bias, op.stride, 0, op.dilation, groups)
                    edge = x.new_zeros(1, x.shape[1], 1, 1)  # behind the first window there is no ring
                else:  # strided 1x1 convolutions are not left to oneDNN: see rep_plugin.blocks.chain
                    x = F.conv2d(x[:, :, :: op.stride[0], :: op.stride[1]], op.weight, op.bias, groups=groups)
                    edge = F.conv2d(edge, op.weight, op.bias, groups=groups)
            elif hasattr(op, "dilation"):
                x = op(x)
            elif hasattr(op, "kernel_size"):
                x = F.avg_pool2d(x, op.kernel_size, op.stride)
            elif hasattr(op, "weight"):
                x, edge = x * op.weight.view(1, -1, 1, 1), edge * op.weight.view(1, -1, 1, 1)
        return x


def dilated_average(
    x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Average over a window with holes, no padding: (N, C, H, W) -> (N, C, H', W')."""
    share = 1 / (kernel_size[0] * kernel_size[1])
    kernel = torch.full([x.shape[1], 1, kernel_size[0], kernel_size[1]], share, dtype=x.dtype, device=x.device)
    return F.conv2d(x, kernel, None, stride, 0, dilation, x.shape[1])
