"""The OpenMMLab side: registered types, hooks, artefacts and what the command line tools share.

Types are named in configs (``type='rep_plugin.RepVGG'``); :mod:`rep_plugin.registry` finds their files.
"""

from rep_plugin.optional import require

require("mmengine", "openmmlab", "rep_plugin.openmmlab")

from rep_plugin.openmmlab.artefacts import write_deployed, write_pruned
from rep_plugin.openmmlab.load import build_model, load_model

__all__ = ["build_model", "load_model", "write_deployed", "write_pruned"]
