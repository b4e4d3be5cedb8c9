"""Bilinear CNNs under timm's names: ``timm.create_model('bcnn_vgg16_bn', num_classes=200)``."""

from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.errors import ArgumentError
from rep_plugin.timm.classifier import name_first_conv_


def _timm_backbone(name: str, out_index: int, channels: int, in_chans: int, pretrained: bool) -> nn.Module:
    net = timm.create_model(
        name, pretrained=pretrained, features_only=True, out_indices=(out_index,), in_chans=in_chans
    )
    if net.feature_info.channels() != [channels]:
        raise RuntimeError(f"{name} gives {net.feature_info.channels()} channels, expected [{channels}]")
    return net


def _rep_mobilenet(in_chans: int, pretrained: bool, deploy: bool) -> nn.Module:
    if pretrained:
        raise ArgumentError("bcnn_rep_mobilenetv2_100 has no pretrained backbone, got pretrained_backbone=True")
    return RepMobileNetV2(1.0, in_channels=in_chans, deploy=deploy)


# name -> (builder, channels of its last map). VGG's map is the one after the last ReLU, without the fifth pool.
BACKBONES = {
    "vgg16_bn": (lambda chans, pretrained, deploy: _timm_backbone("vgg16_bn", 4, 512, chans, pretrained), 512),
    "resnet50": (lambda chans, pretrained, deploy: _timm_backbone("resnet50", 4, 2048, chans, pretrained), 2048),
    "rep_mobilenetv2_100": (_rep_mobilenet, 1280),
}


class BilinearCNN(nn.Module):
    """Backbone, bilinear pooling, linear layer, with timm's methods: (N, in_chans, H, W) -> (N, num_classes).

    ``method``, ``projection``, ``dim``, ``rank`` and ``iterations`` as in
    :class:`rep_plugin.bilinear.pooling.BilinearPooling`; ``drop_rate`` acts on the pooled features.
    ``pretrained_backbone`` loads timm's own ImageNet weights. ``deploy=True`` builds the folded head, and the merged blocks
    of a backbone that has any. ``num_features`` are the channels of ``forward_features``, ``head_hidden_size`` the length
    of the pooled vector. ``global_pool=""`` leaves the pooling out, which needs ``num_classes=0``: the model then returns
    the map. Raises ValueError for an unknown backbone or global_pool, and as the pooling does.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 200,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "bilinear",
        method: str = "full",
        projection: int | None = None,
        dim: int = 8192,
        rank: int | None = None,
        iterations: int = 5,
        pretrained_backbone: bool = False,
        deploy: bool = False,
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise ArgumentError(f"unknown backbone {backbone!r}, expected one of {sorted(BACKBONES)}")
        self._set_pool(global_pool, num_classes)
        build, self.num_features = BACKBONES[backbone]
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.backbone = build(in_chans, pretrained_backbone, deploy)
        self.head = BilinearHead(
            self.num_features,
            num_classes,
            method,
            drop_rate,
            deploy,
            projection=projection,
            dim=dim,
            rank=rank,
            iterations=iterations,
        )

    def _set_pool(self, global_pool: str, num_classes: int) -> None:
        if global_pool not in ("bilinear", ""):
            raise ArgumentError(f"global_pool must be 'bilinear' or '' (none), got {global_pool!r}")
        if not global_pool and num_classes:
            raise ArgumentError(f"without pooling there is no classifier: num_classes must be 0, got {num_classes}")
        self.global_pool = global_pool

    @property
    def head_hidden_size(self) -> int:
        return self.head.in_features

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place, 0: none. Raises ValueError as the constructor does, or for num_classes < 0."""
        self._set_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        self.head.reset_classes(num_classes)
        like = next(self.backbone.parameters())
        self.head.fc.to(like.device, like.dtype)
        self.num_classes = num_classes

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^backbone", blocks=[(r"^head", None)])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raises ValueError where the backbone has none."""
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)
        elif enable:
            raise ArgumentError(f"gradient checkpointing is not supported by {type(self.backbone).__name__}")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's last map, (N, num_features, H', W')."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a map, or the pooled features (N, head_hidden_size); without pooling the map itself."""
        if not self.global_pool:
            return x
        return self.head.pre_logits((x,)) if pre_logits else self.head((x,))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(first_conv: str, side: int) -> dict[str, Any]:
    return dict(
        url="",
        num_classes=200,
        input_size=(3, 448, 448),
        pool_size=(side, side),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=first_conv,
        classifier="head.fc",
    )


default_cfgs = generate_default_cfgs(
    {
        "bcnn_vgg16_bn": _cfg("backbone.features_0", 28),
        "bcnn_resnet50": _cfg("backbone.conv1", 14),
        "bcnn_rep_mobilenetv2_100": _cfg("backbone.stem.branches.conv.conv", 14),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> BilinearCNN:
    if kwargs.pop("features_only", False):
        raise ArgumentError(f"{variant} ends in a vector and has no features_only form: take its backbone's")
    return build_model_with_cfg(BilinearCNN, variant, pretrained, **kwargs)


@register_model
def bcnn_vgg16_bn(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """B-CNN [D, D] of Lin et al. (ICCV 2015) on VGG16-BN: 512 * 512 features, 67,152,136 parameters at 200 classes."""
    return _create("bcnn_vgg16_bn", pretrained, **dict(dict(backbone="vgg16_bn"), **kwargs))


@register_model
def bcnn_resnet50(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """B-CNN on ResNet-50: its 2048 channels are projected to 512 before the pooling."""
    return _create("bcnn_resnet50", pretrained, **dict(dict(backbone="resnet50", projection=512), **kwargs))


@register_model
def bcnn_rep_mobilenetv2_100(pretrained: bool = False, **kwargs) -> BilinearCNN:
    """B-CNN on Rep-MobileNetV2 1.0: its 1280 channels are projected to 256 before the pooling."""
    defaults = dict(backbone="rep_mobilenetv2_100", projection=256)
    if kwargs.get("deploy"):
        name_first_conv_(kwargs, "backbone.stem.reparam_conv")
    return _create("bcnn_rep_mobilenetv2_100", pretrained, **dict(defaults, **kwargs))
