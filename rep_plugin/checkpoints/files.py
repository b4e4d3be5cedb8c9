"""Files written whole or not at all."""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rep_plugin.errors import ArgumentError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_writable(folder: Path) -> None:
    """Raise OSError, naming the folder, where files cannot be written: before minutes of work, not after them."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder}: {error.strerror} ({there})") from None


def refuse_existing(folder: Path, names: Iterable[str], overwrite: bool = False) -> None:
    """Refuse to replace the files of an earlier run, unless that was asked for.

    Args:
        folder: where files are to be written.
        names: their names, which the user did not choose.
        overwrite: replace them.

    Raises:
        ArgumentError: one of them exists.
    """
    if not overwrite and (there := next((folder / name for name in names if (folder / name).exists()), None)):
        raise ArgumentError(f"{there} exists already: give another folder, or --overwrite to replace it")


def require_regular(path: str | os.PathLike) -> Path:
    """Return where ``path`` leads, links followed. Raises OSError where something else than a regular file stands there."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder, expected a file or nothing")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"{path} is a device, pipe or socket, expected a regular file or nothing")
    return path


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, then put it in place in one step.

    Args:
        path: the file; a link is followed.
        write: function that is given the open temporary file.

    Raises:
        OSError: the disk refused, or ``path`` is no regular file. It still holds its old content, and the temporary file is
            removed.
    """
    target = require_regular(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_temporaries(target.parent)
    temporary = target.with_name(_temporary_name(target.name))
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = _disk_error(error)
        if cause is None:
            raise
        raise OSError(
            cause.errno, f"cannot write {path}: {cause.strerror or cause}, the old file is unchanged"
        ) from None
    _sync_folder(target.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text as :func:`write_atomic` does, with a line break at its end.

    Args:
        path: the file.
        text: what it will hold.
    """
    write_atomic(path, lambda file: file.write(f"{text}\n".encode()))


def write_together(out_dir: Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Write several files into a temporary folder; once all are on disk they get their names, or none does.

    Args:
        out_dir: their folder, made where it is missing.
        files: name -> function that is given the path to write.

    Raises:
        OSError: a file cannot be written, or another process is writing files into this folder. Older files then stay.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    targets = {name: require_regular(out_dir / name) for name in files}
    with _only_writer(out_dir):
        _remove_stale_temporaries(out_dir)
        temporary = out_dir / _temporary_name("files")
        temporary.mkdir()
        try:
            for name, write in files.items():
                try:
                    write(temporary / name)
                except OSError as error:
                    reason = (error.strerror or str(error)).replace(str(temporary), str(out_dir))
                    raise OSError(error.errno, f"cannot write {out_dir / name}: {reason}") from None
            _replace_all({temporary / name: target for name, target in targets.items()}, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(out_dir)


def _replace_all(moves: Mapping[Path, Path], folder: Path) -> None:
    """Rename files; where one rename fails, those before it are taken back. ``folder`` takes the old files meanwhile."""
    undo: list[tuple[Path | None, Path]] = []
    try:
        for number, (source, target) in enumerate(moves.items()):
            old = folder / f"{number}.old" if target.exists() else None
            if old is not None:
                _keep(target, old)
            os.replace(source, target)
            undo.append((old, target))
    except OSError:
        for old, target in undo:
            target.unlink() if old is None else os.replace(old, target)
        raise


def _keep(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except OSError:  # a file system without links
        shutil.copy2(file, other)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process that holds it.

    Raises:
        BlockingIOError: another process or thread holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"another process is writing its files into {folder}; nothing was written"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def _temporary_name(name: str) -> str:
    """A name that no other writer takes: process and a random part. ``_remove_stale_temporaries`` reads it."""
    return f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _remove_stale_temporaries(folder: Path) -> None:
    """A writer killed with ``kill -9`` cannot clean up, so the next one in this folder does it."""
    for leftover in folder.glob(".*.tmp"):
        if match := re.fullmatch(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp", leftover.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            except (OSError, OverflowError):
                pass
