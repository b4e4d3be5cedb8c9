"""The plain backbones as registered types that mmpretrain, mmdet and mmseg configs build."""

import copy
from typing import Annotated

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import In, check, checked, shown
from rep_plugin.backbones.mobileone import MobileOne as PlainMobileOne
from rep_plugin.backbones.rep_mobilenet_v2 import DEFAULT_ACT, Activation
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2 as PlainRepMobileNetV2
from rep_plugin.backbones.replknet import RepLKNet as PlainRepLKNet
from rep_plugin.backbones.repvgg import RepVGG as PlainRepVGG
from rep_plugin.checkpoints.strict import refuse_misfits
from rep_plugin.errors import ArgumentError
from rep_plugin.registry import MODELS


def activation_name(act_cfg: dict | str) -> str:
    """Return our name of an mmcv activation: ``dict(type='ReLU6')`` -> ``relu6``. Raises ArgumentError for other keys."""
    name = act_cfg if isinstance(act_cfg, str) else act_cfg.get("type")
    if not isinstance(name, str) or (not isinstance(act_cfg, str) and set(act_cfg) - {"type", "inplace"}):
        raise ArgumentError(f"act_cfg takes 'type' alone, a name, got {shown(act_cfg)}")
    name = {"hswish": "hardswish", "swish": "silu"}.get(name.lower(), name.lower())
    return check("act_cfg", name, Activation)


@checked
class BackboneMixin(nn.Module):
    """Give a :class:`rep_plugin.backbones.staged.StagedNetwork` what OpenMMLab's users expect: write it before the network.

    Args:
        *args: the network's own arguments, by position.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages; frozen parts stay in eval mode.
        norm_eval: keep every BN in eval mode.
        channels_last: run in that memory format; on CPU a training step takes about half the time, with the same numbers.
        init_cfg: first weights, as for every module of mmengine.
        **backbone_args: the network's own arguments, by name.

    Raises:
        ArgumentError: there are fewer stages than ``frozen_stages``.
    """

    def __init__(
        self,
        *args,
        frozen_stages: Annotated[int, In("[-1, inf)")] = -1,
        norm_eval: bool = False,
        channels_last: bool = False,
        init_cfg: dict | list | None = None,
        **backbone_args,
    ):
        super().__init__(*args, **backbone_args)
        if frozen_stages not in range(-1, len(self.stages) + 1):
            raise ArgumentError(f"frozen_stages must lie in -1..{len(self.stages)}, got {frozen_stages}")
        self.frozen_stages, self.norm_eval, self.init_cfg = frozen_stages, norm_eval, copy.deepcopy(init_cfg)
        self.channels_last = channels_last
        if channels_last:  # the kernels too: a map of one channel does not show its own format
            self.to(memory_format=torch.channels_last)
        last = getattr(self, "last_conv", None)
        parts = [*self.stages, *([last] if last is not None else [])]
        for part in parts[max(self.out_indices, default=0) + 1 :]:
            part.requires_grad_(False)  # not run, and DDP waits for every parameter that wants a gradient
        self._freeze_stages()
        refuse_misfits(self)

    def _freeze_stages(self) -> None:
        for part in [self.stem, *self.stages][: self.frozen_stages + 1]:
            part.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "BackboneMixin":
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x.contiguous(memory_format=torch.channels_last) if self.channels_last else x)


@checked
@MODELS.register_module()
class RepMobileNetV2(BackboneMixin, PlainRepMobileNetV2, BaseModule):
    """Rep-MobileNetV2 as a registered type: ``backbone=dict(type='rep_plugin.RepMobileNetV2')``.

    With ``anneal=True``, ``load_from`` and ``init_cfg=dict(type='Pretrained', ...)`` take stock MobileNetV2 checkpoints
    (mmpretrain's, timm's or torchvision's), and training needs ``rep_plugin.LinearizeHook``.

    Args:
        *args: as :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2`, by position.
        act_cfg: mmcv's config of the activation, or its name.
        **backbone_args: all else of that class (but ``act``) and of :class:`BackboneMixin`.
    """

    def __init__(self, *args, act_cfg: dict | str = DEFAULT_ACT, **backbone_args):
        super().__init__(*args, act=activation_name(act_cfg), **backbone_args)


@MODELS.register_module()
class RepVGG(BackboneMixin, PlainRepVGG, BaseModule):
    """RepVGG as a registered type; arguments of :class:`rep_plugin.backbones.repvgg.RepVGG` and :class:`BackboneMixin`."""


@MODELS.register_module()
class MobileOne(BackboneMixin, PlainMobileOne, BaseModule):
    """MobileOne as a registered type; arguments of :class:`rep_plugin.backbones.mobileone.MobileOne` and
    :class:`BackboneMixin`.
    """


@MODELS.register_module()
class RepLKNet(BackboneMixin, PlainRepLKNet, BaseModule):
    """RepLKNet as a registered type; arguments of :class:`rep_plugin.backbones.replknet.RepLKNet` and
    :class:`BackboneMixin`. Its maps leave a BN, as those of mmpretrain's RepLKNet do, unless ``norm_maps=False``.
    """
