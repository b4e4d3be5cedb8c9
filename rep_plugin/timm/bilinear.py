"""Bilinear CNNs under timm's names: ``timm.create_model('bcnn_vgg16_bn', num_classes=200)``."""

from typing import Annotated, Any, NamedTuple

import timm
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Classes, Count, Fraction, OneOf, checked
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.bilinear.methods import METHODS
from rep_plugin.bilinear.pooling import Dim
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.bilinear import Steps
from rep_plugin.timm.register import name_first_conv_, pretrained_cfg, register


class Backbone(NamedTuple):
    """Channels and side (at 448 x 448) of its last map, its first convolution, and the projection before the pooling."""

    channels: int
    side: int
    first_conv: str
    projection: int | None
    description: str


# VGG's map is the one after the last ReLU, without the fifth pool.
BACKBONES = {
    "vgg16_bn": Backbone(
        512, 28, "features_0", None,
        "B-CNN [D, D] of Lin et al. (ICCV 2015) on VGG16-BN: 512 * 512 features, 67,152,136 parameters at 200 classes.",
    ),
    "resnet50": Backbone(
        2048, 14, "conv1", 512, "B-CNN on ResNet-50: its 2048 channels are projected to 512 before the pooling."
    ),
    "rep_mobilenetv2_100": Backbone(
        1280, 14, "stem.branches.conv.conv", 256,
        "B-CNN on Rep-MobileNetV2 1.0: its 1280 channels are projected to 256 before the pooling.",
    ),
}  # fmt: skip


def _build_backbone(name: str, in_chans: int, pretrained: bool, deploy: bool) -> nn.Module:
    if name.startswith("rep_"):
        if pretrained:
            raise ArgumentError(f"bcnn_{name} has no pretrained backbone, got pretrained_backbone=True")
        return RepMobileNetV2(1.0, in_channels=in_chans, deploy=deploy)
    return timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(4,), in_chans=in_chans)


Pool = Annotated[str, OneOf(("bilinear", ""))]


@checked
class BilinearCNN(nn.Module):
    """Backbone, bilinear pooling, linear layer, with timm's methods: (N, in_chans, H, W) -> (N, num_classes).

    ``num_features`` are the channels of ``forward_features``, ``head_hidden_size`` the length of the pooled vector.

    Args:
        backbone: a name of BACKBONES.
        num_classes: classes, 0 for pooled features.
        in_chans: channels of the images.
        drop_rate: dropout on the pooled features.
        global_pool: ``bilinear``; or "", which needs ``num_classes=0`` and returns the map.
        method, projection, dim, rank, iterations: as in :class:`rep_plugin.bilinear.pooling.BilinearPooling`.
        pretrained_backbone: load timm's own ImageNet weights.
        deploy: build the folded head, and the merged blocks of a backbone that has any.

    Raises:
        ArgumentError: an unknown backbone or pool, or what the pooling refuses.
    """

    def __init__(
        self,
        backbone: Annotated[str, OneOf(BACKBONES)],
        num_classes: Classes = 200,
        in_chans: Channels = 3,
        drop_rate: Fraction = 0.0,
        global_pool: Pool = "bilinear",
        method: Annotated[str, OneOf(METHODS)] = "full",
        projection: Channels | None = None,
        dim: Dim = 8192,
        rank: Count | None = None,
        iterations: Steps = 5,
        pretrained_backbone: bool = False,
        deploy: bool = False,
    ):
        super().__init__()
        self._set_pool(global_pool, num_classes)
        self.num_features = BACKBONES[backbone].channels
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.backbone = _build_backbone(backbone, in_chans, pretrained_backbone, deploy)
        pooling = dict(projection=projection, dim=dim, rank=rank, iterations=iterations)
        self.head = BilinearHead(self.num_features, num_classes, method, drop_rate, deploy, **pooling)

    def _set_pool(self, global_pool: str, num_classes: int) -> None:
        if not global_pool and num_classes:
            raise ArgumentError(f"without pooling there is no classifier: num_classes must be 0, got {num_classes}")
        self.global_pool = global_pool

    @property
    def head_hidden_size(self) -> int:
        return int(self.head.in_features)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @checked
    def reset_classifier(self, num_classes: Classes, global_pool: Pool | None = None) -> None:
        """Put a new classifier in place.

        Args:
            num_classes: classes, 0 for none.
            global_pool: as in the constructor; None keeps the present one.

        Raises:
            ArgumentError: as the constructor, or ``num_classes`` is below 0.
        """
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
        """Recompute the backbone's maps in the backward pass. Raises ArgumentError where the backbone cannot."""
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)
        elif enable:
            raise ArgumentError(f"gradient checkpointing is not supported by {type(self.backbone).__name__}")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's last map, (N, num_features, H', W')."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a map; without pooling the map itself.

        Args:
            x: the last map, (N, num_features, H', W').
            pre_logits: return the pooled features (N, head_hidden_size) instead.
        """
        if not self.global_pool:
            return x
        return self.head.pre_logits((x,)) if pre_logits else self.head((x,))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **kwargs) -> BilinearCNN:
    if kwargs.pop("features_only", False):
        raise ArgumentError(f"{variant} ends in a vector and has no features_only form: take its backbone's")
    name = variant.removeprefix("bcnn_")
    if kwargs.get("deploy") and name.startswith("rep_"):
        name_first_conv_(kwargs, "backbone.stem.reparam_conv")
    defaults = {"backbone": name, "projection": BACKBONES[name].projection}
    return build_model_with_cfg(BilinearCNN, variant, pretrained, **(defaults | kwargs))


for _name, _backbone in BACKBONES.items():
    _cfg = pretrained_cfg(
        f"backbone.{_backbone.first_conv}",
        num_classes=200,
        input_size=(3, 448, 448),
        pool_size=(_backbone.side, _backbone.side),
        crop_pct=1.0,
        interpolation="bilinear",
        classifier="head.fc",
    )
    register(__name__, f"bcnn_{_name}", _create, _cfg, _backbone.description)
