"""mmpretrain's MobileNetV2 for small images: ``backbone=dict(type='rep_plugin.MobileNetV2_CIFAR')``."""

from collections.abc import Sequence
from typing import Annotated

import torch
from mmpretrain.models.backbones import MobileNetV2
from torch import Tensor, nn

from rep_plugin.arguments import Channels, In, That, checked
from rep_plugin.backbones.staged import Strides
from rep_plugin.openmmlab.load import Typed, config_errors
from rep_plugin.registry import MODELS

EightStrides = Annotated[Strides, That(lambda strides: len(strides) == 8, "8 strides, each 1 or 2")]


@checked
@MODELS.register_module()
class MobileNetV2_CIFAR(MobileNetV2):
    """mmpretrain's MobileNetV2 with the strides that small images need, as its ``ResNet_CIFAR`` is for ResNet.

    It is what :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2` of the same strides is compared with. The
    checkpoint's keys are those of mmpretrain's MobileNetV2.

    Args:
        in_channels: channels of the images.
        strides: of the stem and of the seven stages.
        channels_last: run in that memory format, which is faster on a CPU.
        widen_factor, out_indices, frozen_stages, norm_eval, with_cp: as in mmpretrain's MobileNetV2.
        **cfgs: ``conv_cfg``, ``norm_cfg``, ``act_cfg`` and ``init_cfg``, as in mmpretrain's MobileNetV2.
    """

    def __init__(
        self,
        in_channels: Channels = 3,
        strides: EightStrides = (1, 1, 2, 2, 2, 1, 2, 1),
        channels_last: bool = False,
        widen_factor: Annotated[float, In("(0, 32]")] = 1.0,
        out_indices: Sequence[Annotated[int, In("[0, 7]")]] = (7,),
        frozen_stages: Annotated[int, In("[-1, 7]")] = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        **cfgs: Typed | list | None,
    ):
        stock = MobileNetV2.arch_settings
        self.arch_settings = [[*row[:3], stride] for row, stride in zip(stock, strides[1:], strict=True)]
        with config_errors():
            super().__init__(widen_factor, out_indices, frozen_stages, norm_eval=norm_eval, with_cp=with_cp, **cfgs)
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
