"""A pytest plugin for timm's own tests: they see our names, and no others. See `make test-timm`.

Left out, as there is nothing to test: ``rep_rebuilt``, which is built from a folder; of the bilinear CNNs, which end in
vectors, what is about pyramids of maps, and TorchScript, which they do not take (``torch.export`` and fx they do); and
what is about a network of timm's own (``with_features_fx``, ``naflexvit``, ``gemma4``). Four of timm's tests find no
name of ours and count as skipped: three of pretrained weights, one of networks whose input has a size of its own.
"""

import timm
from timm.models import list_models

import rep_plugin as rep_plugin

MODULES = ["timm_models", "timm_backbones", "timm_variants", "timm_bilinear"]
NOT_FOR_BILINEAR = (
    "test_model_forward_features",
    "test_model_forward_torchscript",
    "test_model_forward_fx_torchscript",
)


def list_ours(filter="", module="", pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None):
    """timm.list_models, of our modules; tests of chosen modules are about ``forward_intermediates``."""
    modules = MODULES[:3] if module else MODULES
    return list_models(filter, modules, pretrained, exclude_filters, name_matches_cfg, include_tags)


timm.list_models, timm.list_pretrained = list_ours, lambda *filters, **options: []


def pytest_collection_modifyitems(config, items):
    out = [item for item in items if "bcnn_" in item.name and item.name.startswith(NOT_FOR_BILINEAR)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
