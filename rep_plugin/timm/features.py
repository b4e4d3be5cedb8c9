"""timm's feature extractors over a model that is built, pruned and loaded already."""

import inspect
from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import BatchNormAct2d
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from rep_plugin.errors import ArgumentError
from rep_plugin.history import before_step, record_, replays
from rep_plugin.pruning.tracing.features import entries_of

WRAPPERS = (FeatureDictNet, FeatureHookNet, FeatureGraphNet, FeatureGetterNet)


class _Catch(FeatureDictNet, FeatureHookNet):
    """Takes what timm would build a feature extractor with: each network has defaults of its own."""

    def __init__(self, model: nn.Module, **options):
        nn.ModuleDict.__init__(self)
        self.options = options


@replays("features", "options")
def as_features(model: Any, options: Mapping) -> nn.Module:
    """Return what ``timm.create_model(..., features_only=True)`` gives, of a model that was pruned or merged.

    Args:
        model: made by ``timm.create_model``; its layers become the extractor's.
        options: ``out_indices`` and ``feature_cls``, as for timm.

    Returns:
        The extractor.

    Raises:
        ArgumentError: the network has no extractor that can be built over its layers.
    """
    if odd := sorted(set(options) - {"out_indices", "feature_cls"}):
        raise ArgumentError(f"features take out_indices and feature_cls, got {', '.join(odd)}")
    before = before_step(model)
    name = model.pretrained_cfg["architecture"]
    arguments = {key: value for key, value in model._model_args.items() if key != "pretrained_model_args"}
    if arguments.get("features_only"):
        raise ArgumentError("the model is a feature extractor already: leave features_only out")
    arguments |= {"features_only": True, **options}
    made = timm.create_model(name, **arguments)
    kind = type(made)
    if isinstance(made, WRAPPERS):
        caught = timm.create_model(name, **(arguments | {"feature_cls": _Catch})).options
        if issubclass(kind, FeatureGetterNet) and "output_fmt" not in arguments:
            caught.pop("output_fmt", None)
        takes = inspect.signature(kind.__init__).parameters
        extractor: Any = kind(model, **{key: value for key, value in caught.items() if key in takes})
    else:  # a class of its own, which holds some of the same layers
        extractor = made
        plain = timm.create_model(name, **{k: v for k, v in arguments.items() if k not in ("features_only", *options)})
        activated: set[str] = set()  # layers whose activation is a part of the whole network's BN
        for key, child in made.named_children():
            theirs = getattr(plain, key, None)
            if isinstance(theirs, BatchNormAct2d) and isinstance(child, nn.BatchNorm2d):
                activated.add(f"act{key.removeprefix('bn')}")
            elif theirs is None and key in activated and not list(child.parameters()):
                setattr(made, key, nn.Identity())
                continue
            elif type(theirs) is not type(child):
                raise ArgumentError(f"{name} has no features_only form here: {kind.__name__} has other layers ({key})")
            setattr(made, key, getattr(model, key))
        for mine, theirs in zip(entries_of(made), entries_of(model), strict=True):
            mine["num_chs"] = theirs["num_chs"]
    for attribute in ("_traits", "in_chans", "_model_args"):
        if hasattr(made, attribute):
            setattr(extractor, attribute, getattr(made, attribute))
    if hasattr(model, "_rep_base"):
        extractor._rep_base = model._rep_base
    extractor.pretrained_cfg = extractor.default_cfg = {**made.pretrained_cfg, **_input_of(model.pretrained_cfg)}
    record_(extractor, before, step="features", options=dict(options))
    return extractor


def _input_of(cfg: Mapping) -> dict:
    return {key: value for key, value in cfg.items() if key not in ("num_classes", "classifier", "global_pool")}
