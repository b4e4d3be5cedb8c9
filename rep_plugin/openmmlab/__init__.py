"""The OpenMMLab side: registered types, hooks, artefacts and what the command line tools share.

Types are named in configs (``type='rep_plugin.RepVGG'``); :mod:`rep_plugin.registry` finds their files.
"""

from importlib import import_module

from rep_plugin.optional import require

require("mmengine", "openmmlab", "rep_plugin.openmmlab")

# Imported at first use: `import rep_plugin` needs detectors.py of this room, and not mmengine.
_FILES = {"build_model": "load", "load_model": "load", "write_deployed": "artefacts", "write_pruned": "artefacts"}
__all__ = ["build_model", "load_model", "write_deployed", "write_pruned"]


def __getattr__(name: str):
    if name in _FILES:
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
