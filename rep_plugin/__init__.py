"""Structural re-parameterization for mmpretrain, mmengine and timm, every step proven equal.

The names stand in ``face.py``. Where the package is started as a command (``rep-plugin``, ``python -m rep_plugin``) they
are loaded on first use: its ``--help`` and a mistyped option need neither torch nor timm.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING


def _started_as_command() -> bool:
    words = getattr(sys, "argv", None) or [""]
    if words[0] == "-m":  # as long as `python -m` looks for the module
        return sys.orig_argv[-len(words)].removeprefix("-m") == "rep_plugin"
    return Path(words[0]).stem == "rep-plugin"


if TYPE_CHECKING or not _started_as_command():
    from rep_plugin.face import *  # noqa: F403
    from rep_plugin.face import __all__ as __all__
    from rep_plugin.face import __version__ as __version__
else:

    def __getattr__(name: str):
        if not name.startswith("__") or name in ("__all__", "__version__"):
            face = import_module("rep_plugin.face")
            if name == "__all__" or name in face.__all__:
                return getattr(face, name)
            if name in globals():  # a room that the face has imported
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
