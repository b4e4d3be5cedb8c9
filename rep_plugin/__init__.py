"""Structural re-parameterization for mmpretrain, mmengine and timm, every step proven equal."""

from rep_plugin.errors import EquivalenceError, InconclusiveWarning
from rep_plugin.export.export_onnx import export_onnx
from rep_plugin.measure.report import Report
from rep_plugin.optional import is_missing
from rep_plugin.pruning import PrunePlan, apply_plan, plan_pruning
from rep_plugin.reparam import expand, merge_sequence, reparameterize
from rep_plugin.shipped import list_configs
from rep_plugin.version import __version__

__all__ = [
    "EquivalenceError",
    "InconclusiveWarning",
    "PrunePlan",
    "Report",
    "__version__",
    "apply_plan",
    "expand",
    "export_onnx",
    "get_config",
    "list_configs",
    "merge_sequence",
    "plan_pruning",
    "reparameterize",
]

if not is_missing("timm"):  # registers our names with timm
    from rep_plugin import timm as timm
if not is_missing("mmengine"):  # registers how OpenMMLab's models are run; imports nothing of theirs
    from rep_plugin.openmmlab import detectors as detectors


def __getattr__(name: str):
    if name == "get_config":  # needs mmengine, and its second of import time
        from rep_plugin.openmmlab.base_configs import get_config

        return get_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
