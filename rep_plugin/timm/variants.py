"""timm's own networks with a multi-branch block plugged in: ``timm.create_model('dbb_resnet18')`` and its sisters.

As in "Diverse Branch Block" (Ding et al., CVPR 2021, section 4.1), every K x K convolution with 1 < K < 7 becomes a block,
so ResNet's 7x7 stem stays. The papers' blocks have no BN behind their sum; here the network's own BN stays there. It
adds no multiply-adds once merged, it keeps the scale of the sum at that of one convolution whatever the number of
branches (timm's zero-initialised last gamma of a residual block goes on working), and merged with ``fold_bn=False`` the
weights load into timm's network itself.
"""

from functools import partial

import timm
import torch
from timm.models import build_model_with_cfg
from torch import nn

from rep_plugin.blocks.conv_like import like_conv, look_alike, why_not_replaceable
from rep_plugin.reparam.expand import own_convs
from rep_plugin.reparam.fold_bn import fold_conv_bn_, replace_module_
from rep_plugin.timm.register import name_first_conv_, pretrained_cfg, register

BLOCKS = ("dbb", "acb")
# timm's network -> its first convolution and its classifier.
STOCK = {
    "resnet18": ("conv1", "fc"),
    "resnet50": ("conv1", "fc"),
    "mobilenetv1_100": ("conv_stem", "classifier"),
    "mobilenetv2_100": ("conv_stem", "classifier"),
}
NAMES = tuple(f"{block}_{stock}" for stock in STOCK for block in BLOCKS)


def plug_in_(model: nn.Module, block: str, online: bool = False) -> nn.Module:
    """Put a block, all of its branches live, in the place of every convolution with 1 < K < 7.

    Args:
        model: the network; it is changed.
        block: ``dbb`` or ``acb``.
        online: merge the branches in every training step.

    Returns:
        The model.
    """
    for _, conv in list(own_convs(model)):
        if not why_not_replaceable(conv) and max(conv.kernel_size) < 7:
            replace_module_(model, conv, like_conv(conv, block, online=online))
    return model


def _build(block: str, stock: str, deploy: bool, online: bool, **kwargs) -> nn.Module:
    model = timm.create_model(stock, **kwargs)
    if not deploy:
        return plug_in_(model, block, online)
    fold_conv_bn_(model.eval())
    return model.train()


def _first_convs(block: str, stock: str, deploy: bool) -> str | tuple[str, ...]:
    """Names of the convolutions that read the image, as timm's ``first_conv``: several in a block."""
    first = STOCK[stock][0]
    if deploy or stock.startswith("resnet"):
        return first
    with torch.device("meta"):  # names alone: an import must not draw random numbers
        made = look_alike(block)(3, 4, 3)
    heads = {name: next(iter(chain.named_children())) for name, chain in made.branches.items()}
    return tuple(f"{first}.branches.{name}.{layer}" for name, (layer, _) in heads.items())


def _create(name: str, pretrained: bool, deploy: bool = False, online: bool = False, **kwargs) -> nn.Module:
    block, stock = name.split("_", 1)
    if deploy:
        name_first_conv_(kwargs, _first_convs(block, stock, deploy))
    feature_cfg = {"flatten_sequential": stock.startswith("mobilenet")}
    return build_model_with_cfg(
        partial(_build, block, stock, deploy, online), name, pretrained, feature_cfg=feature_cfg, **kwargs
    )


for _name in NAMES:
    _block, _stock = _name.split("_", 1)
    _cfg = pretrained_cfg(_first_convs(_block, _stock, deploy=False), classifier=STOCK[_stock][1])
    _described = f"""timm's {_stock} with {look_alike(_block).__name__} for its convolutions of 1 < K < 7.

    ``deploy=True`` builds what :func:`rep_plugin.reparameterize` makes of it: no branches, no BN.
    ``online=True`` merges the branches in every training step, which is several times as fast.
    """
    register(__name__, _name, _create, _cfg, _described)
