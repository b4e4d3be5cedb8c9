"""What is said where a module of ours needs a package that is not installed: which one, and how to get it."""

import importlib.abc
import sys
from importlib.util import find_spec

# Beginnings of module names -> the package that they need, and the extra that brings it.
NEEDS = {
    "rep_plugin.timm_": ("timm", "timm"),
    "rep_plugin.mm_bilinear": ("mmpretrain", "openmmlab"),
    "rep_plugin.mm_mobilenet_v3": ("mmpretrain", "openmmlab"),
    "rep_plugin.mm_data": ("mmcv", "openmmlab"),
    "rep_plugin.mm_": ("mmengine", "openmmlab"),
    "rep_plugin.hooks": ("mmengine", "openmmlab"),
    "rep_plugin.registry": ("mmengine", "openmmlab"),
}


def is_missing(package: str) -> bool:
    """Whether a package is not installed."""
    return find_spec(package) is None


def explain(name: str, package: str, extra: str) -> ModuleNotFoundError:
    text = f"{name} needs {package}, which is not installed: pip install 'rep-plugin[{extra}]'"
    return ModuleNotFoundError(text, name=package)


class _Explainer(importlib.abc.MetaPathFinder):
    """Finds nothing; asked for a module of ours whose package is missing, it says so."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        for beginning, (package, extra) in NEEDS.items():
            if name.startswith(beginning) and is_missing(package):
                raise explain(name, package, extra)


def explain_missing() -> None:
    """Let imports of our modules whose package is missing say so; does nothing where all is installed."""
    if any(is_missing(package) for package, _ in NEEDS.values()):
        sys.meta_path.insert(0, _Explainer())
