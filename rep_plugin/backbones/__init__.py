"""Networks without a classifier, built of the blocks."""

from rep_plugin.backbones.mobileone import MobileOne
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.backbones.replknet import RepLKNet
from rep_plugin.backbones.repvgg import RepVGG

__all__ = ["MobileOne", "RepLKNet", "RepMobileNetV2", "RepVGG"]
