"""Configs and scripts that the package ships, found by name. They lie in ``rep_plugin/.mim``, where mim looks for them."""

import difflib
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from rep_plugin.arguments import checked
from rep_plugin.errors import ArgumentError

CONFIGS = Path(__file__).with_name(".mim") / "configs"
SCRIPTS = Path(__file__).with_name(".mim") / "tools"


@checked
def list_configs(filter: str | Iterable[str] = "") -> list[str]:
    """List the names of the shipped configs, which :func:`rep_plugin.get_config` and the commands take.

    Args:
        filter: a wildcard or several, each compared with whole names, with and without the folder; empty: all.

    Returns:
        The names, sorted.

    Example:
        >>> import rep_plugin
        >>> rep_plugin.list_configs("rep_mbv2*cub")
        ['rep_mbv2_cub', 'rep_mbv2_mini_cub']
        >>> rep_plugin.list_configs("bcnn/*_step1")
        ['bcnn/bcnn_vgg16bn_aircraft_step1', 'bcnn/bcnn_vgg16bn_cars_step1', 'bcnn/bcnn_vgg16bn_cub_step1']
    """
    wanted = [filter] if isinstance(filter, str) else list(filter)
    names = [name for name in _names(CONFIGS, ".py") if not name.startswith(("_base_/", "experiments/"))]
    return [
        name
        for name in names
        if any(fnmatch(part, pattern or "*") for pattern in wanted for part in (name, os.path.basename(name)))
    ]


def find_config(name: str) -> Path:
    """Return the path of a shipped config, by its name with or without its folder, with or without ``.py``.

    Raises:
        ArgumentError: there is none; the message has the nearest names.
    """
    return _find(CONFIGS, name, ".py", "config")


def find_script(name: str) -> Path:
    """Return the path of a shipped script (``make_mini_fgvc.py``), by its name with or without its folder.

    Raises:
        ArgumentError: there is none; the message has the nearest names.
    """
    return _find(SCRIPTS, name, ".sh" if name.endswith(".sh") else ".py", "script")


def resolve_config(path_or_name: str | os.PathLike) -> str:
    """Return the path of a config that a command was given as a file or by the name of a shipped one.

    Args:
        path_or_name: a path, which is taken where such a file is, or a name.

    Returns:
        The path.

    Raises:
        ArgumentError: neither is there.
    """
    given = os.fspath(path_or_name)
    return given if os.path.isfile(given) else str(find_config(given))


def _names(folder: Path, suffix: str) -> list[str]:
    """Names in a folder and in those below it, without the suffix; of hidden scripts (``_birds.py``) none."""
    files = (
        path.relative_to(folder) for path in sorted(folder.glob(f"*{suffix}")) + sorted(folder.glob(f"*/*{suffix}"))
    )
    return sorted(path.with_suffix("").as_posix() for path in files if not path.name.startswith("_"))


def _find(folder: Path, given: str, suffix: str, kind: str) -> Path:
    name, names = given.removesuffix(suffix), _names(folder, suffix)
    found = [known for known in names if name in (known, os.path.basename(known))]
    if found:
        return folder / f"{found[0]}{suffix}"
    bare = os.path.basename(name)
    near = difflib.get_close_matches(bare, [os.path.basename(known) for known in names])
    hint = f"the nearest: {', '.join(near)}" if near else f"as {', '.join(map(os.path.basename, names[:3]))}"
    expected = f"expected a file or the name of a shipped {kind}; {hint}"
    raise ArgumentError(f"{kind} {given} does not exist, {expected}")
