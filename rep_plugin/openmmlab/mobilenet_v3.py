"""mmpretrain's MobileNetV3 for small images: ``backbone=dict(type='rep_plugin.MobileNetV3_CIFAR')``."""

from collections.abc import Sequence
from typing import Annotated

from mmpretrain.models.backbones import MobileNetV3
from torch import nn

from rep_plugin.arguments import Channels, OneOf, checked
from rep_plugin.openmmlab.load import Typed, config_errors
from rep_plugin.registry import MODELS

MOBILENET_V3_NORM = dict(type="BN", eps=0.001, momentum=0.01)  # mmpretrain's default


@checked
@MODELS.register_module()
class MobileNetV3_CIFAR(MobileNetV3):
    """mmpretrain's MobileNetV3 for small images, as its ``ResNet_CIFAR`` is for ResNet: the stem has stride 1.

    The checkpoint's keys are those of mmpretrain's MobileNetV3.

    Args:
        in_channels: channels of the images.
        arch, norm_cfg, out_indices, frozen_stages, norm_eval, with_cp: as in mmpretrain's MobileNetV3.
    """

    def __init__(
        self,
        arch: Annotated[str, OneOf(MobileNetV3.arch_settings)] = "small",
        in_channels: Channels = 3,
        norm_cfg: Typed = MOBILENET_V3_NORM,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
    ):
        with config_errors():
            super().__init__(arch, None, norm_cfg, out_indices, frozen_stages, norm_eval, with_cp)
        stock = self.layer0.conv
        self.layer0.conv = nn.Conv2d(in_channels, stock.out_channels, stock.kernel_size, 1, stock.padding, bias=False)
        self.layer0.in_channels, self.layer0.stride = in_channels, (1, 1)  # ConvModule's copies
