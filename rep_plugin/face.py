"""The names of the package, as ``import rep_plugin`` gives them; importing them registers ours with timm."""

from rep_plugin.arguments import checked
from rep_plugin.blocks.annealed import set_alpha_
from rep_plugin.depth import DepthPlan, linearize, plan_depth
from rep_plugin.errors import EquivalenceError, InconclusiveWarning
from rep_plugin.export.export_onnx import export_onnx
from rep_plugin.export.int8 import export_int8
from rep_plugin.measure.report import Report
from rep_plugin.optional import is_missing
from rep_plugin.pruning import PrunePlan, apply_plan, plan_pruning
from rep_plugin.reparam import expand, merge_sequence, reparameterize
from rep_plugin.saving import load, save
from rep_plugin.shipped import list_configs
from rep_plugin.version import __version__

__all__ = [
    "DepthPlan",
    "EquivalenceError",
    "InconclusiveWarning",
    "PrunePlan",
    "Report",
    "__version__",
    "apply_plan",
    "expand",
    "export_int8",
    "export_onnx",
    "get_config",
    "linearize",
    "list_configs",
    "load",
    "merge_sequence",
    "plan_depth",
    "plan_pruning",
    "reparameterize",
    "save",
    "set_alpha_",
]


@checked
def get_config(name: str, **options):
    """Read a shipped config, as :func:`rep_plugin.openmmlab.base_configs.get_config` does.

    Args:
        name: its name, with or without its folder, with or without ``.py``; :func:`rep_plugin.list_configs` has them.
        **options: changes to the config, key by key; dicts are merged.

    Returns:
        The mmengine Config.

    Raises:
        ArgumentError: there is no such config; the message has the nearest names.

    Example:
        >>> import rep_plugin
        >>> rep_plugin.get_config("rep_mbv2_mini_cub", train_cfg=dict(max_epochs=1)).train_cfg.max_epochs
        1
    """
    from rep_plugin.openmmlab import base_configs  # needs mmengine, and its second of import time

    return base_configs.get_config(name, **options)


if not is_missing("timm"):  # registers our names with timm
    import rep_plugin.timm
if not is_missing("mmengine"):  # registers how OpenMMLab's models are run; imports nothing of theirs
    import rep_plugin.openmmlab.detectors  # noqa: F401
