"""Makes mmengine read checkpoints safely, write them in one step, and resume from one that is really there."""

import ast
import functools
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from rep_plugin.checkpoints.files import write_atomic
from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.errors import UnreadableCheckpointError

BEST_CHECKPOINT = re.compile(r"best_.+_(epoch|iter)_\d+\.pth")
# Every module that imported the function by name has to get the replacement.
_LATEST_USERS = [f"mmengine.runner{file}" for file in ("", ".runner", "._flexible_runner", ".checkpoint")]


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Loader for checkpoints on this machine, in place of mmengine's own of this name.

    Args:
        filename: path of the checkpoint.
        map_location: as in ``torch.load``.

    Returns:
        The file's content.

    Raises:
        FileNotFoundError: ``filename`` is no file.
        UnsafeCheckpointError: the file asks for something outside the allow-list.
        UnreadableCheckpointError: the file is torn, or is no checkpoint.
    """
    content = load_checkpoint_file(os.path.expanduser(filename), map_location)
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise UnreadableCheckpointError(f"checkpoint {filename} holds no state dict, expected names and tensors")
    return content


def without_code(content: Any) -> Any:
    """Take out of a checkpoint what mmengine's Runner would execute, or hand to the file system, when it resumes.

    The text of the config is executed as Python, to read one list from it. The paths of earlier checkpoints are deleted
    once newer ones exist.

    Args:
        content: what a checkpoint file contains; changed in place.

    Returns:
        The same, with ``meta.config`` cut down to ``gpu_ids``, and without paths that no CheckpointHook writes.
    """
    if not isinstance(content, dict):
        return content
    meta, hub = content.get("meta"), content.get("message_hub")
    if isinstance(meta, dict) and "config" in meta:
        meta["config"] = _gpu_ids_alone(meta["config"])
    info = hub.get("runtime_info") if isinstance(hub, dict) else None
    for key in list(info) if isinstance(info, dict) else ():
        is_path = isinstance(key, str) and key.startswith("best_ckpt")
        if is_path and not BEST_CHECKPOINT.fullmatch(os.path.basename(str(info[key]))):
            print_log(
                f"{key}={info[key]!r} in the checkpoint is left out: no CheckpointHook writes such a file", "current"
            )
            del info[key]
    if isinstance(info, dict) and not all(isinstance(step, int) for step in info.get("keep_ckpt_ids") or ()):
        del info["keep_ckpt_ids"]
    return content


def _gpu_ids_alone(config: Any) -> str:
    """The one assignment of a config's text that Runner.resume reads, where it is a plain list."""
    try:
        body = ast.parse(config).body
        for node in body if isinstance(config, str) else ():
            if isinstance(node, ast.Assign) and [ast.unparse(name) for name in node.targets] == ["gpu_ids"]:
                return f"gpu_ids = {[int(number) for number in ast.literal_eval(node.value)]}\n"
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass  # no text that a Runner wrote
    return ""


def _load_without_code(load: Callable) -> Callable:
    @functools.wraps(load)
    def load_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        return without_code(load(cls, *args, **kwargs))

    return load_checkpoint


def _load_any(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """In place of the fork's ``_safe_torch_load``, which falls back on the normal pickle module."""
    return load_checkpoint_file(file, map_location)


def _put_atomic(self: LocalBackend, obj: bytes, filepath: str | Path) -> None:
    """``LocalBackend.put``, but the file under ``filepath`` is at every moment complete.

    Raises:
        OSError: the disk refused; ``filepath`` still holds what it held before.
    """
    write_atomic(filepath, lambda file: file.write(obj))


def _put_text_atomic(self: LocalBackend, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
    """``LocalBackend.put_text``, likewise: metrics and dumped configs."""
    _put_atomic(self, obj.encode(encoding), filepath)


def is_complete(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a file which is not cut off: the directory of a zip file stands at its end."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        return False
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    return not is_zip or zipfile.is_zipfile(path)


def find_latest_checkpoint(path: str) -> str | None:
    """The checkpoint to resume from in the work directory ``path``, or None.

    It is the one which ``last_checkpoint`` names. Where that text is cut off, or names a file which is gone or cut
    off, it is the most recently written complete ``epoch_N.pth`` or ``iter_N.pth``.
    """
    record = Path(path) / "last_checkpoint"
    if not record.is_file():
        print_log("Did not find last_checkpoint to be resumed.", logger="current")
        return None
    named = record.read_text(errors="replace").strip()
    # deepspeed's checkpoints are folders; without the ending, a cut off text may name the work directory itself.
    is_folder = "\0" not in named and named.endswith(".pth") and os.path.isdir(named)
    if is_folder or "://" in named or ("\0" not in named and is_complete(named)):
        return named
    latest = latest_complete(path)
    print_log(
        f"{record} names {named!r}, which is no complete checkpoint; resuming from {latest or 'nothing'} instead.",
        logger="current",
        level=logging.WARNING,
    )
    return latest


def latest_complete(path: str | os.PathLike) -> str | None:
    """Return the most recently written complete ``epoch_N.pth`` or ``iter_N.pth`` of a folder, or None."""
    found = [file for file in Path(path).iterdir() if re.fullmatch(r"(epoch|iter)_\d+\.pth", file.name)]
    return max(
        (str(file) for file in found if is_complete(file)), key=lambda file: os.stat(file).st_mtime_ns, default=None
    )


def enable_safe_loading() -> None:
    """Route mmengine's local checkpoint reading and writing through :mod:`rep_plugin.checkpoints.safe_load`.

    Calling it again changes nothing. The loaders for addresses such as ``https://`` stay as they are; what any loader
    returns goes through :func:`without_code`.
    """
    import mmengine.runner.checkpoint as mm

    load = CheckpointLoader.__dict__["load_checkpoint"].__func__
    if not hasattr(load, "__wrapped__"):
        CheckpointLoader.load_checkpoint = classmethod(_load_without_code(load))
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_local, force=True)
    mm.load_from_local = load_from_local
    if hasattr(mm, "_safe_torch_load"):
        mm._safe_torch_load = _load_any
    # The class and not a newly registered backend: instances may exist, and HardDiskBackend inherits from it.
    LocalBackend.put, LocalBackend.put_text = _put_atomic, _put_text_atomic
    for name in _LATEST_USERS:
        if hasattr(sys.modules.get(name), "find_latest_checkpoint"):
            vars(sys.modules[name])["find_latest_checkpoint"] = find_latest_checkpoint
