"""The mmengine side of bilinear pooling: neck, head and two-stream backbone as registered types."""

import copy
from collections.abc import Sequence

from mmengine.model import BaseModule
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.bilinear.pooling import BilinearPooling as PlainBilinearPooling
from rep_plugin.errors import ArgumentError
from rep_plugin.registry import MODELS


@MODELS.register_module()
class BilinearPooling(PlainBilinearPooling, BaseModule):
    """Bilinear pooling as a neck: ``neck=dict(type='rep_plugin.BilinearPooling', in_channels=512)``.

    Arguments as in :class:`rep_plugin.bilinear.pooling.BilinearPooling`, and ``init_cfg``. The stock
    ``LinearClsHead`` fits with ``in_channels`` set to :attr:`out_channels` (512 * 512 for ``full``);
    :func:`rep_plugin.bilinear.head.fold_bilinear_head` folds the two, ``deploy=True`` builds the folded neck.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        method: str = "full",
        dim: int = 8192,
        rank: int | None = None,
        iterations: int = 5,
        projection: int | Sequence[int] | None = None,
        in_index: int | Sequence[int] | None = None,
        layout: str = "NCHW",
        normalize: bool | None = None,
        seed: int = 0,
        deploy: bool = False,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(
            in_channels, method, dim, rank, iterations, projection, in_index, layout, normalize, seed, deploy
        )
        self.init_cfg = copy.deepcopy(init_cfg)


CROSS_ENTROPY = dict(type="CrossEntropyLoss", loss_weight=1.0)


@MODELS.register_module()
class BilinearClsHead(BilinearHead, ClsHead):
    """Bilinear pooling and classifier in one head, which therefore folds itself (``switch_to_deploy``).

    Takes the backbone's maps, without a neck; ``method=None`` takes what a ``BilinearPooling`` neck pooled. ``in_channels``
    to ``deploy`` and ``**pooling`` as in :class:`rep_plugin.bilinear.head.BilinearHead`; ``loss``, ``topk``, ``cal_acc``
    and ``init_cfg`` as in mmpretrain's ``ClsHead``. Give ``head.fc`` a larger learning rate
    (``custom_keys={'head.fc': dict(lr_mult=100)}``). Raises ValueError for num_classes < 1.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        method: str | None = "full",
        drop_rate: float = 0.0,
        deploy: bool = False,
        loss: dict | nn.Module = CROSS_ENTROPY,
        topk: int | Sequence[int] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | list | None = None,
        **pooling,
    ):
        if num_classes < 1:
            raise ArgumentError(f"num_classes must be >= 1, got {num_classes}")
        super().__init__(in_channels, num_classes, method, drop_rate, deploy, **pooling)
        self.in_channels, self.topk, self.cal_acc = in_channels, topk, cal_acc
        self.loss_module = loss if isinstance(loss, nn.Module) else MMPRETRAIN_MODELS.build(loss)
        self.init_cfg = copy.deepcopy(init_cfg)


@MODELS.register_module()
class TwoStreamBackbone(BaseModule):
    """Two backbones on the same picture: -> (last map of ``first``, last map of ``second``), for a pair of channels.

    ``first`` and ``second``: configs or modules, of the same stride. Lin et al., "Bilinear CNN Models" (ICCV 2015).
    Weights of the two: ``init_cfg`` of each, or checkpoint keys ``first.`` and ``second.``.
    """

    def __init__(self, first: dict | nn.Module, second: dict | nn.Module, init_cfg: dict | list | None = None):
        super().__init__(init_cfg=copy.deepcopy(init_cfg))
        self.first = first if isinstance(first, nn.Module) else MMPRETRAIN_MODELS.build(first)
        self.second = second if isinstance(second, nn.Module) else MMPRETRAIN_MODELS.build(second)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x)[-1], self.second(x)[-1]
