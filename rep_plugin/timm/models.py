"""Our networks under timm's names: ``timm.create_model('rep_mobilenetv2_100')`` and all others of the table MODELS."""

import torch
from timm.models import build_model_with_cfg
from torch import nn

from rep_plugin.backbones import mobileone, replknet, repvgg
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.timm.classifier import ClassifierMixin
from rep_plugin.timm.register import name_first_conv_, pretrained_cfg, register


class RepMobileNetV2Classifier(ClassifierMixin, RepMobileNetV2):
    """Rep-MobileNetV2 with timm's classifier interface: (N, in_chans, H, W) -> logits (N, num_classes).

    ``branches``, ``act``, ``widen_factor``, ``strides``, ``last_kernel``, ``avg_shortcut``, ``deploy`` and ``anneal`` as in
    :class:`rep_plugin.backbones.rep_mobilenet_v2.RepMobileNetV2`; ``drop_rate`` is the dropout before the classifier.
    """


class RepVGGClassifier(ClassifierMixin, repvgg.RepVGG):
    """RepVGG with timm's classifier interface: ``arch``, ``strides``, ``post_bn`` and ``deploy`` as in
    :class:`rep_plugin.backbones.repvgg.RepVGG`.
    """


class MobileOneClassifier(ClassifierMixin, mobileone.MobileOne):
    """MobileOne with timm's classifier interface: ``arch``, ``strides`` and ``deploy`` as in
    :class:`rep_plugin.backbones.mobileone.MobileOne`.
    """


class RepLKNetClassifier(ClassifierMixin, replknet.RepLKNet):
    """RepLKNet with timm's classifier interface: ``arch``, ``small_kernel``, ``ffn_ratio``, ``drop_path_rate``,
    ``norm_maps``, ``deploy`` and ``keep_bn`` as in :class:`rep_plugin.backbones.replknet.RepLKNet`.
    """

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's parameter groups for layer-wise learning rates; a transition comes before its stage's blocks."""
        fine = [(r"^stages\.(\d+)\.transition", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norms", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As the mixin's; ``prune_norm`` drops the BN of the last map."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm:
            self.drop_finish()
        return wanted


FIRST_CONVS = {
    RepMobileNetV2Classifier: "stem.branches.conv.conv",
    RepVGGClassifier: ("stem.branches.conv.conv", "stem.branches.point.conv"),
    MobileOneClassifier: ("stem.branches.conv0.conv", "stem.branches.scale.conv"),
    RepLKNetClassifier: "stem.0.branches.conv.conv",
}
WIDTHS = {"035": 0.35, "050": 0.5, "075": 0.75, "100": 1.0, "140": 1.4}
# timm's name -> (class, arguments)
MODELS: dict[str, tuple[type[nn.Module], dict]] = {
    **{
        f"rep_mobilenetv2_{name}": (RepMobileNetV2Classifier, {"widen_factor": width}) for name, width in WIDTHS.items()
    },
    **{f"rep_repvgg_{arch.lower()}": (RepVGGClassifier, {"arch": arch}) for arch in repvgg.ARCHS},
    **{f"rep_mobileone_{arch}": (MobileOneClassifier, {"arch": arch}) for arch in mobileone.ARCHS},
    **{f"rep_replknet_{arch.lower()}": (RepLKNetClassifier, {"arch": arch}) for arch in replknet.ARCHS},
}


def _create(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    kind, arguments = MODELS[variant]
    kwargs = arguments | kwargs
    if kwargs.get("deploy") and not kwargs.get("keep_bn"):
        name_first_conv_(kwargs, "stem.0.reparam_conv" if kind is RepLKNetClassifier else "stem.reparam_conv")
    maps = 4 if kind is RepLKNetClassifier else 5  # its stem and first stage share one reduction
    feature_cfg = {"out_indices": tuple(range(maps)), "flatten_sequential": True}
    return build_model_with_cfg(kind, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


for _name, (_kind, _arguments) in MODELS.items():
    _options = ", ".join(f"{key}={value!r}" for key, value in _arguments.items())
    _described = f"{_kind.__mro__[2].__name__} with {_options}."
    register(__name__, _name, _create, pretrained_cfg(FIRST_CONVS[_kind]), _described)
