"""Files written whole or not at all."""

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rep_plugin.arguments import checked
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
    given = Path(path)
    path = _followed(given)
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, f"{path} is a folder, expected a file or nothing")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"{path} is a device, pipe or socket, expected a regular file or nothing")
    return _followed(given.parent) / given.name if _is_passing(given) else path


def _followed(path: Path) -> Path:
    for _ in range(100):  # a link when it was looked at may be a file when it is read: another process put it there
        try:
            return Path(os.path.realpath(path))
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
    raise OSError(errno.EAGAIN, f"{path} is being replaced by other processes all the time")


NO_LINK = (errno.EINVAL, errno.ENOENT)


def _target(link: Path) -> str | None:
    """Where a link leads, None where the path is no link (any more)."""
    try:
        return os.readlink(link)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        return None


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
    """Write several files so that every reader finds all the old ones or all the new ones, also after ``kill -9``.

    Threads of one process take turns.

    Args:
        out_dir: their folder, made where it is missing.
        files: name -> function that is given the path to write. A link of that name is replaced, not followed.

    Raises:
        OSError: a file cannot be written, or another process is writing files into this folder. Older files then stay.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    with _only_writer(out_dir):
        _settle(out_dir)
        for name in files:
            require_regular(out_dir / name)
        _remove_stale_temporaries(out_dir)
        stage = out_dir / _temporary_name("files")
        try:
            for part in ("old", "new"):
                (stage / part).mkdir(parents=True)
            for name, write in files.items():
                try:
                    write(stage / "new" / name)
                except OSError as error:
                    reason = (error.strerror or str(error)).replace(str(stage / "new"), str(out_dir))
                    raise OSError(error.errno, f"cannot write {out_dir / name}: {reason}") from None
            try:
                _switch(out_dir, stage, list(files))
            except OSError as error:
                reason = error.strerror or str(error)
                raise OSError(error.errno, f"cannot put {', '.join(files)} into {out_dir}: {reason}") from None
        finally:
            if _shown(out_dir) is None:
                shutil.rmtree(stage, ignore_errors=True)


def write_contents(out_dir: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files as :func:`write_together` does.

    Args:
        out_dir: their folder.
        contents: name -> content.
    """

    def writer(data: bytes) -> Callable[[Path], None]:
        return lambda path: write_atomic(path, lambda file: file.write(data))

    write_together(out_dir, {name: writer(data) for name, data in contents.items()})


# Several files change in one step: each name becomes a link through one common link, POINTER, to the old file. POINTER is
# then replaced by one to the new files, and last each name is replaced by its file. No step but the middle one changes what
# a reader finds, and after a kill the links stay until the next writer in this folder puts the files in their place.
POINTER = ".rep_plugin.current"


def _switch(folder: Path, stage: Path, names: Sequence[str]) -> None:
    """Put the files in ``stage/new`` in the place of those in ``folder``, all or none."""
    try:
        os.symlink(f"{stage.name}/old", folder / POINTER)
    except OSError:  # no links there (Windows, FAT)
        return _replace_all({stage / "new" / name: folder / name for name in names}, stage / "old")
    try:
        for name in names:
            if os.path.lexists(folder / name):
                _keep(folder / name, stage / "old" / name)
        for part in (stage / "old", stage / "new", stage):
            _sync_folder(part)
        for name in names:
            os.symlink(f"{POINTER}/{name}", stage / "link")
            os.replace(stage / "link", folder / name)
        _sync_folder(folder)
        os.symlink(f"{stage.name}/new", stage / "link")
        os.replace(stage / "link", folder / POINTER)
        _sync_folder(folder)
    finally:
        _settle(folder)
    return None


def _settle(folder: Path) -> None:
    """Put the files that POINTER shows in the place of the links through it. Its writer has them, or was killed."""
    if (shown := _shown(folder)) is None:
        return
    for link in [path for path in folder.iterdir() if _is_passing(path)]:
        if os.path.lexists(shown / link.name):
            (shown.parent / "link").unlink(missing_ok=True)
            _keep(shown / link.name, shown.parent / "link")  # not moved: readers may be on their way through the links
            os.replace(shown.parent / "link", link)
        else:
            link.unlink()
    _sync_folder(folder)
    (folder / POINTER).unlink()
    shutil.rmtree(shown.parent, ignore_errors=True)


def _shown(folder: Path) -> Path | None:
    """The files that POINTER shows, None where there is no such link."""
    pointer = folder / POINTER
    target = _target(pointer)
    if target is None and not os.path.lexists(pointer):
        return None
    if not re.fullmatch(rf"{STAGE}/(old|new)", target or "") or (folder / str(target)).parent.is_symlink():
        raise FileExistsError(errno.EEXIST, f"{pointer} was not made by rep_plugin, expected nothing there: remove it")
    return folder / target


def _is_passing(path: Path) -> bool:
    """Whether a name is a link through POINTER, to be replaced by its file."""
    return _target(path) == f"{POINTER}/{path.name}"


def _replace_all(moves: Mapping[Path, Path], folder: Path) -> None:
    """Rename files; where one rename fails, those before it are taken back. ``folder`` takes the old files meanwhile."""
    undo: list[tuple[Path | None, Path]] = []
    try:
        for source, target in moves.items():
            old = folder / target.name if target.exists() else None
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
        os.link(file, other, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without links, another user's file
        shutil.copy2(file, other, follow_symlinks=False)


_TURNS: dict[str, threading.Lock] = {}


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process that holds it; other threads wait for their turn.

    Raises:
        BlockingIOError: another process holds it.
    """
    with _TURNS.setdefault(os.path.realpath(folder), threading.Lock()):
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
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor as well
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@checked
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


STAGE = r"\.files\.\d+-[0-9a-f]{8}\.tmp"


def _remove_stale_temporaries(folder: Path) -> None:
    """A writer killed with ``kill -9`` cannot clean up, so the next one in this folder does it."""
    for leftover in folder.glob(".*.tmp"):
        if match := re.fullmatch(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp", leftover.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                if (shown := _shown(folder)) is not None and shown.parent == leftover:
                    continue  # names in this folder are links into it
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
            except (OSError, OverflowError):
                pass
