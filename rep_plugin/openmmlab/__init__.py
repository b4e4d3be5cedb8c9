"""The OpenMMLab side: registered types, hooks, artefacts and what the command line tools share."""

from rep_plugin.optional import require

require("mmengine", "openmmlab", "rep_plugin.openmmlab")
