"""torchvision's SqueezeNet 1.1 as a backbone of mmpretrain, which has none."""

from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor
from torchvision.models import squeezenet1_1


@MODELS.register_module()
class SqueezeNet(BaseModule):
    """Its layers before the classifier."""

    def __init__(self):
        super().__init__()
        self.features = squeezenet1_1().features

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return one map (N, 512, H / 16, W / 16) of images (N, 3, H, W)."""
        return (self.features(x),)
