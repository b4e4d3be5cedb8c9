"""RepVGG, MobileOne and RepLKNet for OpenMMLab configs: ``backbone=dict(type='rep_plugin.RepVGG', arch='A0')``.

``out_indices``, ``frozen_stages``, ``norm_eval`` and ``init_cfg`` are those of mmpretrain's classes of the same names.
``deploy=True`` is the form that ``deploy.pth`` holds. ``channels_last=True`` runs in that memory format.
"""

from collections.abc import Sequence

from torch import Tensor

from rep_plugin.backbones.mobileone import MobileOne as PlainMobileOne
from rep_plugin.backbones.replknet import RepLKNet as PlainRepLKNet
from rep_plugin.backbones.repvgg import RepVGG as PlainRepVGG
from rep_plugin.mm_models import StagedBackbone
from rep_plugin.registry import MODELS


@MODELS.register_module()
class RepVGG(PlainRepVGG, StagedBackbone):
    """RepVGG as a registered type; arguments as in :class:`rep_plugin.backbones.repvgg.RepVGG` and this module's."""

    def __init__(
        self,
        arch: str | dict = "A0",
        out_indices: Sequence[int] = (3,),
        in_channels: int = 3,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        post_bn: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        channels_last: bool = False,
        deploy: bool = False,
        init_cfg: dict | list | None = None,
        online: bool = False,
        output_stride: int | None = None,
    ):
        super().__init__(arch, out_indices, in_channels, strides, post_bn, deploy, online, output_stride)
        self._configure(frozen_stages, norm_eval, channels_last, init_cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(self._formatted(x))


@MODELS.register_module()
class MobileOne(PlainMobileOne, StagedBackbone):
    """MobileOne as a registered type; arguments as in :class:`rep_plugin.backbones.mobileone.MobileOne` and this
    module's.
    """

    def __init__(
        self,
        arch: str | dict = "s0",
        out_indices: Sequence[int] = (3,),
        in_channels: int = 3,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        channels_last: bool = False,
        deploy: bool = False,
        init_cfg: dict | list | None = None,
        online: bool = False,
        output_stride: int | None = None,
    ):
        super().__init__(arch, out_indices, in_channels, strides, deploy, online, output_stride)
        self._configure(frozen_stages, norm_eval, channels_last, init_cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(self._formatted(x))


@MODELS.register_module()
class RepLKNet(PlainRepLKNet, StagedBackbone):
    """RepLKNet as a registered type; arguments as in :class:`rep_plugin.backbones.replknet.RepLKNet` and this module's.

    ``norm_maps=True`` gives every map that leaves a BN, as mmpretrain's RepLKNet does.
    """

    def __init__(
        self,
        arch: str | dict = "31B",
        out_indices: Sequence[int] = (3,),
        in_channels: int = 3,
        small_kernel: int | None = None,
        ffn_ratio: float = 4.0,
        drop_path_rate: float = 0.3,
        norm_maps: bool = True,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        channels_last: bool = False,
        deploy: bool = False,
        keep_bn: bool = False,
        init_cfg: dict | list | None = None,
        online: bool = False,
        output_stride: int | None = None,
    ):
        super().__init__(
            arch, out_indices, in_channels, small_kernel, ffn_ratio, drop_path_rate, norm_maps, deploy, keep_bn, online,
            output_stride,
        )  # fmt: skip
        self._configure(frozen_stages, norm_eval, channels_last, init_cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(self._formatted(x))
