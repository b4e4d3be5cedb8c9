"""The mmengine side: the plain backbones as registered types that configs, mmdet and mmseg know how to handle."""

import copy
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.backbones.mobileone import MobileOne as PlainMobileOne
from rep_plugin.backbones.rep_mobilenet_v2 import DEFAULT_ACT, DEFAULT_BRANCHES, STAGES, STRIDES
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2 as PlainRepMobileNetV2
from rep_plugin.backbones.replknet import RepLKNet as PlainRepLKNet
from rep_plugin.backbones.repvgg import RepVGG as PlainRepVGG
from rep_plugin.checkpoints.strict import refuse_misfits
from rep_plugin.errors import ArgumentError
from rep_plugin.registry import MODELS


def activation_name(act_cfg: dict | str) -> str:
    """Return our name of an mmcv activation: ``dict(type='ReLU6')`` -> ``relu6``. Raises ValueError for other keys."""
    if isinstance(act_cfg, str):
        return act_cfg.lower()
    extra = sorted(set(act_cfg) - {"type", "inplace"})
    if extra or "type" not in act_cfg:
        raise ArgumentError(f"act_cfg takes 'type' alone, got {dict(act_cfg)}")
    return {"hswish": "hardswish", "swish": "silu"}.get(act_cfg["type"].lower(), act_cfg["type"].lower())


class StagedBackbone(BaseModule):
    """What OpenMMLab users expect of a backbone with ``stem``, ``stages`` and ``last_conv``.

    ``frozen_stages`` -1 freezes nothing, 0 the stem, n the stem and the first n stages; frozen parts stay in eval mode.
    ``norm_eval`` keeps every BN in eval mode. ``channels_last`` runs in that memory format.
    """

    frozen_stages = -1
    norm_eval = False

    def _configure(
        self, frozen_stages: int, norm_eval: bool, channels_last: bool, init_cfg: dict | list | None
    ) -> None:
        if frozen_stages not in range(-1, len(self.stages) + 1):
            raise ArgumentError(f"frozen_stages must lie in -1..{len(self.stages)}, got {frozen_stages}")
        self.frozen_stages, self.norm_eval, self.init_cfg = frozen_stages, norm_eval, copy.deepcopy(init_cfg)
        self.channels_last = channels_last
        if channels_last:  # the kernels too: a map of one channel does not tell its own format
            self.to(memory_format=torch.channels_last)
        for part in (*self.stages, *filter(None, [getattr(self, "last_conv", None)]))[
            max(self.out_indices, default=0) + 1 :
        ]:
            part.requires_grad_(False)  # not run, and DDP waits for every parameter that wants a gradient
        self._freeze_stages()
        refuse_misfits(self)

    def _formatted(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _freeze_stages(self) -> None:
        parts = [self.stem, *self.stages][: self.frozen_stages + 1]
        for part in parts:
            part.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


@MODELS.register_module()
class RepMobileNetV2(PlainRepMobileNetV2, StagedBackbone):
    """Rep-MobileNetV2 for mmpretrain, mmdet and mmseg configs: ``backbone=dict(type='rep_plugin.RepMobileNetV2')``.

    Arguments as in :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2`, with mmcv's ``act_cfg`` for the
    activation, and ``frozen_stages``, ``norm_eval`` and ``init_cfg`` as in mmpretrain's MobileNetV2. ``deploy=True`` is
    the form that ``deploy.pth`` holds. ``channels_last=True`` runs in that memory format: on CPU a training step takes
    about half the time, and the numbers stay the same. With ``anneal=True``, ``load_from`` and
    ``init_cfg=dict(type='Pretrained', ...)`` take stock MobileNetV2 checkpoints (mmpretrain's, timm's or torchvision's),
    and training needs ``rep_plugin.LinearizeHook``.
    """

    def __init__(
        self,
        widen_factor: float = 1.0,
        branches: Sequence[str] = DEFAULT_BRANCHES,
        out_indices: Sequence[int] = (len(STAGES),),
        in_channels: int = 3,
        strides: Sequence[int] = STRIDES,
        act_cfg: dict | str = DEFAULT_ACT,
        avg_shortcut: bool = False,
        last_kernel: int = 1,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        channels_last: bool = False,
        deploy: bool = False,
        init_cfg: dict | list | None = None,
        online: bool = False,
        anneal: bool = False,
        output_stride: int | None = None,
    ):
        super().__init__(
            widen_factor, branches, out_indices, in_channels, strides, activation_name(act_cfg), avg_shortcut, last_kernel,
            deploy, online, anneal, output_stride,
        )  # fmt: skip
        self._configure(frozen_stages, norm_eval, channels_last, init_cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(self._formatted(x))


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
