"""What a checkpoint's network was made into, and which config builds it: for messages about checkpoints that do not fit."""

import ast
import os
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config

from rep_plugin.openmmlab.configs import typed_dicts

MADE = "rep_plugin_made"  # in an artefact's meta data: pruned, deployed
# The outermost type of a network says what was done to it last. What is pruned or merged has a config of its own.
KINDS = {
    "rep_plugin.Pruned": "pruned",
    "rep_plugin.Merged": "deployed",
    "rep_plugin.Expanded": "expanded",
    "rep_plugin.Linearized": "linearized",
}
FILES = {"deployed": "deploy.py", "pruned": "pruned.py", "expanded": "expanded.py"}
# Hooks change the network while it is trained: only the same config, in training, builds it.
IN_TRAINING = {"rep_prune": "was pruned in training", "rep_resrep": "was trained with the compactors of ResRepHook"}


def kind_of_config(cfg: Config) -> str:
    """Return ``deployed``, ``pruned``, ``expanded`` or ``plain``: what the network of a config is."""
    model = cfg.get("model") or {}
    inside = any(part.get("deploy") is True for part in typed_dicts(model))
    return KINDS.get(str(model.get("type")), "deployed" if inside else "plain")


def _kind_of_text(text: str) -> str | None:
    """The same of a config's text, which is read and not run; None where there is no network in it."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return None
    for node in body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "model"
            and isinstance(node.value, ast.Call)
        ):
            outer = next((ast.unparse(word.value) for word in node.value.keywords if word.arg == "type"), "").strip("'")
            return KINDS.get(outer, "deployed" if "deploy=True" in ast.unparse(node.value) else "plain")
    return None


def kind_of_checkpoint(meta: Mapping) -> str | None:
    """Return the same of a checkpoint's network, from its meta data; None where it says nothing."""
    if meta.get(MADE):
        return meta[MADE]
    text = meta.get("cfg")
    return _kind_of_text(text) if isinstance(text, str) else None


def changed_in_training(meta: Mapping) -> str | None:
    """Return what a hook has done to a checkpoint's network, which only the same hook builds; None for nothing."""
    return next((text for key, text in IN_TRAINING.items() if meta.get(key)), None)


def explain_misfit(checkpoint: str | os.PathLike, meta: Mapping, cfg: Config) -> str:
    """Return what is known of a checkpoint that does not fit a config's network, and which config fits it.

    Args:
        checkpoint: path of the file.
        meta: its meta data.
        cfg: the config it was given with.

    Returns:
        A sentence that goes on from the message, '' where nothing is known.
    """
    folder, asked = Path(checkpoint).resolve().parent, kind_of_config(cfg)
    if changed := changed_in_training(meta):
        made = [name for name in ("pruned.py", "pruned.pth") if (folder / name).is_file()]
        where = (
            f"{folder / 'pruned.py'} and pruned.pth"
            if len(made) == 2
            else "pruned.py and pruned.pth, written at its end"
        )
        return f"; the checkpoint {changed}: give {where}"
    kind = kind_of_checkpoint(meta)
    if kind in (None, asked):
        return ""
    if kind == "plain":
        return f"; the checkpoint's network was not {asked}, the config's is: give the config it was trained with"
    beside = _config_beside(folder, kind)
    given = f"give its own config, {beside or FILES.get(kind) or 'the one it was trained with'}"
    return f"; the checkpoint's network was {kind}: {given}"


def _config_beside(folder: Path, kind: str) -> Path | None:
    """A config of this kind in a folder, first the one that an artefact is written with."""
    files = sorted(folder.glob("*.py"), key=lambda path: path.name != FILES.get(kind))
    return next((path for path in files if _kind_of_text(path.read_text(errors="replace")) == kind), None)
