"""Multi-branch blocks: linear chains whose sum becomes one convolution."""

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.conv_like import ACBConv2d, DBBConv2d, MobileOneConv2d, RepConv2d
from rep_plugin.blocks.families import ACBlock, DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.blocks.layers import DilatedAvgPool2d, Scale
from rep_plugin.blocks.merge import merge_chain

__all__ = [
    "ACBConv2d",
    "ACBlock",
    "Chain",
    "DBBConv2d",
    "DilatedAvgPool2d",
    "DiverseBranchBlock",
    "LargeKernelBlock",
    "MobileOneBlock",
    "MobileOneConv2d",
    "RepBlock",
    "RepConv2d",
    "RepInvertedResidual",
    "RepVGGBlock",
    "Scale",
    "merge_chain",
]
