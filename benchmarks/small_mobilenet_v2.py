"""mmpretrain's MobileNetV2 with the strides and input channels that small images need; nothing else is changed."""

import torch
from mmpretrain.models.backbones import MobileNetV2
from mmpretrain.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class SmallMobileNetV2(MobileNetV2):
    """Stock MobileNetV2, with ``strides`` of stem and seven stages. (N, in_channels, H, W) -> tuple of one map."""

    def __init__(self, in_channels: int, strides: tuple[int, ...], **kwargs):
        stock = MobileNetV2.arch_settings
        self.arch_settings = [[*row[:3], stride] for row, stride in zip(stock, strides[1:], strict=True)]
        super().__init__(**kwargs)
        stem = self.conv1.conv
        self.conv1.conv = torch.nn.Conv2d(in_channels, stem.out_channels, 3, strides[0], 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x.contiguous(memory_format=torch.channels_last))
