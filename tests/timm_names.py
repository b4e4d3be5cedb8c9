"""A pytest plugin for timm's own tests: they see our names, and no others. See `make test-timm`.

Left out, as there is nothing to test: ``rep_rebuilt``, which is built from a folder; TorchScript, as timm's tests script
training forms: ours are refused, deployed ones alone script (tests/test_blocks/test_scripted.py), and bilinear CNNs do
not (``torch.export`` and fx they do); of the bilinear CNNs, which end in vectors, what is about pyramids of maps; and what
is about a network of timm's own (``with_features_fx``, ``naflexvit``, ``gemma4``). Four of timm's tests find no name of
ours and count as skipped: three of pretrained weights, one of networks whose input has a size of its own.
"""

import timm
from timm.models import list_models

import rep_plugin as rep_plugin

MODULES = ["models", "variants", "bilinear"]  # as timm's registry names them: the last part of rep_plugin.timm.models
TORCHSCRIPT = ("test_model_forward_torchscript", "test_model_forward_fx_torchscript")


def list_ours(filter="", module="", pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None):
    """timm.list_models, of our modules; tests of chosen modules are about ``forward_intermediates``."""
    modules = MODULES[:2] if module else MODULES
    return list_models(filter, modules, pretrained, exclude_filters, name_matches_cfg, include_tags)


timm.list_models, timm.list_pretrained = list_ours, lambda *filters, **options: []


def pytest_collection_modifyitems(config, items):
    bilinear = "test_model_forward_features"
    out = [i for i in items if i.name.startswith(TORCHSCRIPT) or (i.name.startswith(bilinear) and "bcnn_" in i.name)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
