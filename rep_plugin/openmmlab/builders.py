"""Pruned, merged, linearized and expanded models as config types: the stock model's own config and what was done to it.

``dict(type='rep_plugin.Pruned', model=<config>, plan=<plan>)`` in the place of ``model``; they nest, innermost first, so a
config holds the whole history.

Stock code reaches into ``model`` as if it were the network's own config: mmdet's ``init_detector`` looks at
``model.backbone``, mmseg's ``init_model`` sets ``model.pretrained`` and ``model.train_cfg`` to None. So both types take
``backbone``, changes to the config of the network's own backbone, and those two as None.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from rep_plugin.arguments import Name, OneOf, That, checked
from rep_plugin.blocks.activations import FUNCTIONS
from rep_plugin.blocks.conv_like import CONV_LIKES
from rep_plugin.checkpoints.strict import refuse_misfits
from rep_plugin.depth import DepthPlan
from rep_plugin.depth.plan import as_depth_plan
from rep_plugin.errors import ArgumentError
from rep_plugin.history import rebuild_
from rep_plugin.openmmlab.configs import drop_pretrained_, plain_data, typed_dicts
from rep_plugin.openmmlab.load import Typed, build_part, config_errors, load_strictly, read_state_dict
from rep_plugin.pruning import PrunePlan
from rep_plugin.pruning.planning.plan import as_plan
from rep_plugin.registry import MODELS
from rep_plugin.reparam import expand

Plans = Annotated[
    PrunePlan | Mapping | str | Sequence[PrunePlan | Mapping | str],
    That(lambda plan: True, "a PrunePlan, its data, JSON text or a path, or a list of these"),
]
OfInner = Annotated[None, That(lambda value: True, "None (it belongs into the inner model's config)")]


def _rebuilt(
    steps: Sequence[dict], model: Mapping, data_preprocessor: Mapping | nn.Module | None, backbone: Mapping | None
) -> nn.Module:
    """Build the inner model and repeat the steps on it."""
    inner = copy.deepcopy(dict(model))
    if backbone:
        inner["backbone"] = {**inner.get("backbone", {}), **copy.deepcopy(dict(backbone))}
    for part in typed_dicts(inner):
        drop_pretrained_(part)
    if data_preprocessor is not None and not isinstance(data_preprocessor, nn.Module):
        inner.setdefault("data_preprocessor", data_preprocessor)
    rebuilt = rebuild_(build_part(inner, ROOT_MODELS), steps)
    refuse_misfits(rebuilt)
    return rebuilt


@MODELS.register_module()
@checked
def Pruned(
    model: Typed,
    plan: Plans,
    data_preprocessor: Mapping | nn.Module | None = None,
    backbone: Mapping | None = None,
    pretrained: OfInner = None,
    train_cfg: OfInner = None,
) -> nn.Module:
    """Build a stock model from its config and remove what a plan removes; keys of the checkpoint stay the stock ones.

    A checkpoint that does not fit is refused whole.

    Args:
        model: config of the stock model.
        plan: a plan's JSON text, its data, or the path of its file; or several, applied one after the other.
        data_preprocessor: config of the preprocessor, where ``model`` has none.
        backbone: changes to the config of the network's own backbone.
        pretrained: None, for stock code that sets it.
        train_cfg: the same.

    Returns:
        The model; its weights mean nothing yet.

    Raises:
        ArgumentError: a plan is not for this model.
    """
    plans = [plan] if isinstance(plan, (PrunePlan, Mapping, str)) else plan
    steps = [{"step": "prune", "plan": asdict(as_plan(one))} for one in plans]
    return _rebuilt(steps, model, data_preprocessor, backbone)


@MODELS.register_module()
@checked
def Merged(
    model: Typed,
    fold_bn: bool = False,
    merge_linear: bool = False,
    data_preprocessor: Mapping | nn.Module | None = None,
    backbone: Mapping | None = None,
    pretrained: OfInner = None,
    train_cfg: OfInner = None,
) -> nn.Module:
    """Build a model from its config and merge its blocks, as :func:`rep_plugin.reparameterize` does; load weights next.

    Args:
        model: config of the model before.
        fold_bn: what it was when the weights were merged.
        merge_linear: the same.
        data_preprocessor: config of the preprocessor, where ``model`` has none.
        backbone: changes to the config of the network's own backbone.
        pretrained: None, for stock code that sets it.
        train_cfg: the same.

    Returns:
        The model; its weights mean nothing yet.
    """
    step = {"step": "reparameterize", "fold_bn": fold_bn, "merge_linear": merge_linear}
    return _rebuilt([step], model, data_preprocessor, backbone)


@MODELS.register_module()
@checked
def Linearized(
    model: Typed,
    plan: Path | DepthPlan | Mapping | str | None = None,
    segments: Sequence[Mapping] | None = None,
    act_after: Annotated[str, OneOf(FUNCTIONS)] | None = None,
    data_preprocessor: Mapping | nn.Module | None = None,
    backbone: Mapping | None = None,
    pretrained: OfInner = None,
    train_cfg: OfInner = None,
) -> nn.Module:
    """Build a stock model from its config and put annealed activations where a plan says so; stock checkpoints load into it.

    Args:
        model: config of the stock model.
        plan: what :func:`rep_plugin.plan_depth` returns, its data, its JSON text or the path of its file; or
        segments: what :func:`rep_plugin.linearize` notes in the history.
        act_after: activation behind the segments; the default is the plan's.
        data_preprocessor: config of the preprocessor, where ``model`` has none.
        backbone: changes to the config of the network's own backbone.
        pretrained: None, for stock code that sets it.
        train_cfg: the same.

    Returns:
        The model, at alpha 0.

    Raises:
        ArgumentError: neither or both are given, or they are not for this model.
    """
    if (plan is None) == (segments is None):
        raise ArgumentError("give exactly one of plan and segments")
    if plan is not None:
        whole = as_depth_plan(plan)
        segments, act_after = [one.data for one in whole.chosen_segments], act_after or whole.act_after
    step = {"step": "linearize", "segments": plain_data(segments), "act_after": act_after}
    return _rebuilt([step], model, data_preprocessor, backbone)


@MODELS.register_module()
@checked
def Expanded(
    model: Typed,
    block: Annotated[str, OneOf(CONV_LIKES)] = "dbb",
    where: str | Sequence[str] | None = None,
    checkpoint: Name | None = None,
    data_preprocessor: Mapping | None = None,
    online: bool = False,
) -> nn.Module:
    """Build a stock model, initialise it, load its weights where a checkpoint is given, and expand it.

    The Runner's ``init_weights()`` then changes nothing, and a checkpoint that does not fit the expanded network is
    refused. To test or resume, the checkpoint of the run itself is loaded afterwards, as ever. ``deploy.py`` holds the
    stock config alone.

    Args:
        model: config of any stock model; a ``Pretrained`` init_cfg in it is honoured.
        block: as in :func:`rep_plugin.expand`.
        where: as in :func:`rep_plugin.expand`.
        checkpoint: one of that very model, in full.
        data_preprocessor: config of the preprocessor, where ``model`` has none.
        online: as in :func:`rep_plugin.expand`.

    Returns:
        The expanded model.
    """
    stock: Any = copy.deepcopy(model)
    if data_preprocessor is not None:
        stock.setdefault("data_preprocessor", copy.deepcopy(data_preprocessor))
    net = build_part(stock, ROOT_MODELS)
    if hasattr(net, "init_weights"):
        with config_errors():
            net.init_weights()
    if checkpoint is not None:
        load_strictly(net, read_state_dict(checkpoint)[0], str(checkpoint))
    net, report = expand(net, block, inplace=True, where=where, online=online)
    print_log(f"{len(report.blocks)} convolutions expanded\n{report}", logger="current")
    refuse_misfits(net)
    return net
