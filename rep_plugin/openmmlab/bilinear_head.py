"""What bilinear CNNs need of mmpretrain: a head that pools and classifies, and a backbone of two streams."""

import copy
from collections.abc import Sequence

from mmengine.model import BaseModule
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Count, Fraction, checked
from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.openmmlab.load import Typed, build_part
from rep_plugin.registry import MODELS

CROSS_ENTROPY = dict(type="CrossEntropyLoss", loss_weight=1.0)


@checked
@MODELS.register_module()
class BilinearClsHead(BilinearHead, ClsHead):
    """Bilinear pooling and classifier in one head, which therefore folds itself (``switch_to_deploy``).

    Takes the backbone's maps, without a neck. Give ``head.fc`` a larger learning rate
    (``custom_keys={'head.fc': dict(lr_mult=100)}``).

    Args:
        in_channels: channels of the map, or of two maps.
        num_classes: classes, at least 1.
        method: how to pool; None takes what a ``BilinearPooling`` neck pooled.
        drop_rate: dropout before the classifier.
        deploy: build the folded form.
        loss: config of the loss, or the loss itself.
        topk: the k of the accuracies to report.
        cal_acc: report accuracies while training.
        init_cfg: first weights, as for every module of mmengine.
        **pooling: all else of :class:`rep_plugin.bilinear.head.BilinearHead`.

    Raises:
        ArgumentError: ``num_classes`` is below 1.
    """

    def __init__(
        self,
        in_channels: Channels | Sequence[Channels],
        num_classes: Channels,
        method: str | None = "full",
        drop_rate: Fraction = 0.0,
        deploy: bool = False,
        loss: Typed | nn.Module = CROSS_ENTROPY,
        topk: Count | Sequence[Count] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | list | None = None,
        **pooling,
    ):
        super().__init__(in_channels, num_classes, method, drop_rate, deploy, **pooling)
        self.in_channels, self.topk, self.cal_acc = in_channels, topk, cal_acc
        self.loss_module = build_part(loss, MMPRETRAIN_MODELS)
        self.init_cfg = copy.deepcopy(init_cfg)


@checked
@MODELS.register_module()
class TwoStreamBackbone(BaseModule):
    """Two backbones on the same image: -> (last map of ``first``, last map of ``second``), for a pair of channels.

    Lin et al., "Bilinear CNN Models" (ICCV 2015). Weights of the two: ``init_cfg`` of each, or checkpoint keys ``first.``
    and ``second.``.

    Args:
        first: config of a backbone, or the backbone.
        second: the same, of the same stride.
        init_cfg: first weights, as for every module of mmengine.
    """

    def __init__(self, first: Typed | nn.Module, second: Typed | nn.Module, init_cfg: dict | list | None = None):
        super().__init__(init_cfg=copy.deepcopy(init_cfg))
        self.first = build_part(first, MMPRETRAIN_MODELS)
        self.second = build_part(second, MMPRETRAIN_MODELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x)[-1], self.second(x)[-1]
