"""Files written whole or not at all."""

import glob
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch


def check_writable(folder: Path) -> None:
    """Raise OSError, naming the folder, where files cannot be written: before minutes of work, not after them."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror} ({there})") from None


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, then put it in place in one step.

    Args:
        path: the file.
        write: function that is given the open temporary file.

    Raises:
        OSError: the disk refused. ``path`` still holds its old content, and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_temporaries(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = _disk_error(error)
        if cause is None:
            raise
        raise OSError(
            cause.errno, f"cannot write {path}: {cause.strerror or cause}, the old file is unchanged"
        ) from None
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_together(out_dir: Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files under temporary names; once all are on disk they get their names.

    Args:
        out_dir: their folder, made where it is missing.
        files: name -> function that is given the path to write.

    Raises:
        OSError: a file cannot be written. Older files then stay.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    written = [out_dir / f"{name}.new" for name in files]
    try:
        for path, write in zip(written, files.values()):
            write(path)
        for path in written:
            if path.with_suffix("").is_dir():
                raise IsADirectoryError(f"{path.with_suffix('')} is a folder, expected a file or nothing")
        for path in written:
            os.replace(path, path.with_suffix(""))
    finally:
        for path in written:
            path.unlink(missing_ok=True)


def save_checkpoint_file(obj: Any, path: str | os.PathLike) -> None:
    """Save with ``torch.save`` so that the file is at every moment the old or the new one, complete.

    Args:
        obj: the checkpoint.
        path: the file.

    Raises:
        OSError: the disk refused. ``path`` still holds its old content.

    Example:
        >>> save_checkpoint_file({"epoch": 3}, "checkpoint.pth")
        >>> torch.load("checkpoint.pth")
        {'epoch': 3}
    """
    write_atomic(path, lambda file: torch.save(obj, file))


def _disk_error(error: BaseException | None) -> OSError | None:
    """torch's writer hides the OSError behind a RuntimeError of its own."""
    while isinstance(error, RuntimeError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None


def _remove_stale_temporaries(path: Path) -> None:
    """A writer killed with ``kill -9`` cannot clean up, so the next one does it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = leftover.name.split(".")[-2]
        if owner.isdigit():
            try:
                os.kill(int(owner), 0)
            except ProcessLookupError:
                leftover.unlink(missing_ok=True)
            except OSError:
                pass
