"""The timm side: ``timm.create_model('rep_mobilenetv2_100')`` and its sisters, registered by ``import rep_plugin``."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.timm_classifier import ClassifierMixin, name_first_conv_, pretrained_cfg


class RepMobileNetV2Classifier(ClassifierMixin, RepMobileNetV2):
    """Rep-MobileNetV2 with timm's classifier interface: (N, in_chans, H, W) -> logits (N, num_classes).

    ``branches``, ``act``, ``widen_factor``, ``strides``, ``last_kernel``, ``avg_shortcut``, ``deploy`` and ``anneal`` as in
    :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2`; ``drop_rate`` is the dropout before the classifier.
    """


WIDTHS = {"035": 0.35, "050": 0.5, "075": 0.75, "100": 1.0, "140": 1.4}
default_cfgs = generate_default_cfgs(
    {f"rep_mobilenetv2_{name}.untrained": pretrained_cfg("stem.branches.conv.conv") for name in WIDTHS}
)


def _create(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    kwargs.setdefault("widen_factor", WIDTHS[variant.rsplit("_", 1)[1]])
    if kwargs.get("deploy"):
        name_first_conv_(kwargs, "stem.reparam_conv")
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
