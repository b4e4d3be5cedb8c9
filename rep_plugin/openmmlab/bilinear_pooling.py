"""Bilinear pooling as a neck, for mmpretrain and, without it, for whatever else is built on mmengine."""

import copy

from mmengine.model import BaseModule

from rep_plugin.arguments import checked
from rep_plugin.bilinear.pooling import BilinearPooling as PlainBilinearPooling
from rep_plugin.registry import MODELS


@checked
@MODELS.register_module()
class BilinearPooling(PlainBilinearPooling, BaseModule):
    """Bilinear pooling as a neck: ``neck=dict(type='rep_plugin.BilinearPooling', in_channels=512)``.

    The stock ``LinearClsHead`` fits with ``in_channels`` set to :attr:`out_channels` (512 * 512 for ``full``);
    :func:`rep_plugin.bilinear.head.fold_bilinear_head` folds the two.

    Args:
        init_cfg: first weights, as for every module of mmengine.
        **pooling: ``in_channels``, ``method``, ``deploy`` and all else of
            :class:`rep_plugin.bilinear.pooling.BilinearPooling`.

    Example:
        >>> from mmengine.registry import MODELS
        >>> neck = MODELS.build(dict(type="rep_plugin.BilinearPooling", in_channels=8))
        >>> neck.out_channels
        64
    """

    def __init__(self, *args, init_cfg: dict | list | None = None, **pooling):
        super().__init__(*args, **pooling)
        self.init_cfg = copy.deepcopy(init_cfg)
