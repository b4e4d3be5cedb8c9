"""``expand`` from a config: a stock model, its trained checkpoint, and branches in the place of its convolutions."""

import copy
from collections.abc import Sequence

from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from rep_plugin.backbones.loading import refuse_misfits
from rep_plugin.mm_artefact import load_strictly, read_state_dict
from rep_plugin.registry import MODELS
from rep_plugin.reparam import expand


@MODELS.register_module()
def Expanded(
    model: dict,
    block: str = "dbb",
    where: str | Sequence[str] | None = None,
    checkpoint: str | None = None,
    data_preprocessor: dict | None = None,
) -> nn.Module:
    """Build a stock model, initialise it, load ``checkpoint`` into it where one is given, and expand it.

    ``model`` is any stock model config; a ``Pretrained`` init_cfg in it is honoured. ``checkpoint`` is one of that very
    model, in full. ``block`` and ``where`` as in :func:`rep_plugin.expand`. The Runner's ``init_weights()`` then changes
    nothing, and a checkpoint that does not fit the expanded network is refused. To test or resume, the checkpoint of the
    run itself is loaded afterwards, as ever. ``deploy.py`` holds the stock config alone.
    """
    stock = copy.deepcopy(model)
    if data_preprocessor is not None:
        stock.setdefault("data_preprocessor", copy.deepcopy(data_preprocessor))
    net = ROOT_MODELS.build(stock)
    if hasattr(net, "init_weights"):
        net.init_weights()
    if checkpoint is not None:
        load_strictly(net, read_state_dict(checkpoint)[0], str(checkpoint))
    net, report = expand(net, block, inplace=True, where=where)
    print_log(f"{len(report.blocks)} convolutions expanded\n{report}", logger="current")
    refuse_misfits(net)
    return net
