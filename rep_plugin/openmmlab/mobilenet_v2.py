"""mmpretrain's MobileNetV2 for small images: ``backbone=dict(type='rep_plugin.MobileNetV2_CIFAR')``."""

from collections.abc import Sequence

import torch
from mmpretrain.models.backbones import MobileNetV2
from torch import Tensor, nn

from rep_plugin.registry import MODELS


@MODELS.register_module()
class MobileNetV2_CIFAR(MobileNetV2):
    """mmpretrain's MobileNetV2 with the strides that small images need, as its ``ResNet_CIFAR`` is for ResNet.

    It is what :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2` of the same strides is compared with. The
    checkpoint's keys are those of mmpretrain's MobileNetV2.

    Args:
        in_channels: channels of the images.
        strides: of the stem and of the seven stages.
        channels_last: run in that memory format, which is faster on a CPU.
        **backbone_args: as in mmpretrain's MobileNetV2.
    """

    def __init__(
        self,
        in_channels: int = 3,
        strides: Sequence[int] = (1, 1, 2, 2, 2, 1, 2, 1),
        channels_last: bool = False,
        **backbone_args,
    ):
        stock = MobileNetV2.arch_settings
        self.arch_settings = [[*row[:3], stride] for row, stride in zip(stock, strides[1:], strict=True)]
        super().__init__(**backbone_args)
        self.channels_last = channels_last
        stem = self.conv1.conv
        self.conv1.conv = nn.Conv2d(in_channels, stem.out_channels, 3, strides[0], 1, bias=False)
        self.conv1.in_channels, self.conv1.stride = in_channels, self.conv1.conv.stride  # ConvModule's copies

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of ``out_indices``.

        Args:
            x: images (N, in_channels, H, W).
        """
        return super().forward(x.contiguous(memory_format=torch.channels_last) if self.channels_last else x)
