"""Multi-branch convolutions for any ``conv_cfg``: ``conv_cfg=dict(type='rep_plugin.DBBConv2d')``.

mmcv's ``build_conv_layer`` finds them, so every mmpretrain, mmdet and mmseg network that takes a ``conv_cfg`` gets its
variant. Kernels of side 1 stay plain convolutions, as in the papers. ``online=True`` beside the type merges the branches in
every training step.
"""

from collections.abc import Callable
from typing import Annotated

from torch import nn

from rep_plugin.arguments import Channels, OneOf, Padding, Size, checked
from rep_plugin.blocks.conv_like import CONV_LIKES, ConvLike
from rep_plugin.errors import ArgumentTypeError
from rep_plugin.functional.kernels import pair
from rep_plugin.registry import MODELS

TYPES = {f"rep_plugin.{cls.__name__}" for cls in CONV_LIKES.values()}


def _builder(cls: type[ConvLike]) -> Callable[..., nn.Module]:
    def build(
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding | Annotated[str, OneOf(("same", "valid"))] = 0,
        dilation: Size = 1,
        groups: Channels = 1,
        bias: bool = True,
        padding_mode: Annotated[str, OneOf(("zeros",))] = "zeros",
        **options,
    ) -> nn.Module:
        known = {*cls.own_options, "online"}
        if unknown := sorted(set(options) - known):
            raise ArgumentTypeError(
                f"conv_cfg of {cls.__name__} takes {sorted(known)} beside 'type', got {unknown[0]!r}"
            )
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        return nn.Conv2d(*shape) if pair(kernel_size) == (1, 1) else cls(*shape, **options)

    build.__name__ = cls.__name__
    build.__doc__ = f"Return ``{cls.__name__}``, or a plain ``nn.Conv2d`` for kernels of side 1."
    return checked(build)


for _cls in dict.fromkeys(CONV_LIKES.values()):  # some have two names
    MODELS.register_module(_cls.__name__, module=_builder(_cls))
