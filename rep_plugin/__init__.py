"""Structural re-parameterization for mmpretrain, mmengine and timm, every step proven equal."""

from rep_plugin.export import export_onnx
from rep_plugin.missing import explain_missing, is_missing
from rep_plugin.pruning import PrunePlan, apply_plan, plan_pruning
from rep_plugin.reparam import expand, merge_sequence, reparameterize
from rep_plugin.report import Report
from rep_plugin.verify import EquivalenceError, InconclusiveWarning

__version__ = "0.1.0"
__all__ = [
    "EquivalenceError",
    "InconclusiveWarning",
    "PrunePlan",
    "Report",
    "apply_plan",
    "expand",
    "export_onnx",
    "merge_sequence",
    "plan_pruning",
    "reparameterize",
]

explain_missing()
if not is_missing("timm"):  # registers our names with timm
    from rep_plugin import timm_artefact as timm_artefact
    from rep_plugin import timm_backbones as timm_backbones
    from rep_plugin import timm_bilinear as timm_bilinear
    from rep_plugin import timm_models as timm_models
    from rep_plugin import timm_variants as timm_variants
