"""The timm side: ``timm.create_model('rep_mobilenetv2_100')`` and its sisters, registered by ``import rep_plugin``."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from rep_plugin.backbones.rep_mobilenet_v2 import STAGES, RepMobileNetV2


class RepMobileNetV2Classifier(RepMobileNetV2):
    """Rep-MobileNetV2 with timm's classifier interface: (N, in_chans, H, W) -> logits (N, num_classes).

    ``branches``, ``act``, ``widen_factor``, ``strides``, ``last_kernel``, ``avg_shortcut``, ``deploy`` and ``anneal`` as in
    :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2`; ``drop_rate`` is the dropout before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **backbone_args,
    ):
        super().__init__(in_channels=in_chans, **backbone_args)
        self.in_chans, self.drop_rate, self.grad_checkpointing = in_chans, drop_rate, False
        self.num_features = self.head_hidden_size = self.out_channels[-1]
        # As timm's own MobileNetV2: the last stage at each reduction.
        last_at = {reduction: index for index, reduction in enumerate(self.reductions[: len(STAGES)])}
        self.feature_info = [
            {"num_chs": self.out_channels[index], "reduction": reduction, "module": f"stages.{index}"}
            for reduction, index in last_at.items()
        ]
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's parameter groups for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of keeping their maps."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier of ``num_classes`` (0: none, the model then returns pooled features)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        width = self.num_features * (self.global_pool.feat_mult() if num_classes > 0 else 1)
        like = next(self.parameters())
        self.classifier = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()
        self.classifier.to(like.device, like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, (N, num_features, H / 32, W / 32)."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.last_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with ``pre_logits`` the pooled features (N, num_features)."""
        x = self.global_pool(x)
        x = nn.functional.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Return the chosen stage maps (by index into ``feature_info``), and the final map unless told otherwise.

        Raises ValueError for an ``output_fmt`` other than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        stage_of = [int(info["module"].split(".")[1]) for info in self.feature_info]
        take = {stage_of[i] for i in wanted}
        stop = stage_of[last]
        intermediates = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: stop + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self.last_conv(x) if not stop_early else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen intermediates do not need; return their indices."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: int(self.feature_info[last]["module"].split(".")[1]) + 1]
        if prune_head:
            self.last_conv = nn.Identity()
            self.reset_classifier(0, "")
        return wanted


def _cfg() -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.branches.conv.conv",
        "classifier": "classifier",
        "license": "apache-2.0",
    }


WIDTHS = {"035": 0.35, "050": 0.5, "075": 0.75, "100": 1.0, "140": 1.4}
default_cfgs = generate_default_cfgs({f"rep_mobilenetv2_{name}.untrained": _cfg() for name in WIDTHS})


def _create(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    kwargs.setdefault("widen_factor", WIDTHS[variant.rsplit("_", 1)[1]])
    return build_model_with_cfg(
        RepMobileNetV2Classifier,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def rep_mobilenetv2_035(pretrained: bool = False, **kwargs) -> nn.Module:
    """Rep-MobileNetV2 at width 0.35."""
    return _create("rep_mobilenetv2_035", pretrained, **kwargs)


@register_model
def rep_mobilenetv2_050(pretrained: bool = False, **kwargs) -> nn.Module:
    """Rep-MobileNetV2 at width 0.5."""
    return _create("rep_mobilenetv2_050", pretrained, **kwargs)


@register_model
def rep_mobilenetv2_075(pretrained: bool = False, **kwargs) -> nn.Module:
    """Rep-MobileNetV2 at width 0.75."""
    return _create("rep_mobilenetv2_075", pretrained, **kwargs)


@register_model
def rep_mobilenetv2_100(pretrained: bool = False, **kwargs) -> nn.Module:
    """Rep-MobileNetV2 at width 1.0."""
    return _create("rep_mobilenetv2_100", pretrained, **kwargs)


@register_model
def rep_mobilenetv2_140(pretrained: bool = False, **kwargs) -> nn.Module:
    """Rep-MobileNetV2 at width 1.4."""
    return _create("rep_mobilenetv2_140", pretrained, **kwargs)
