"""A disk that is full, or a file that may not grow: the old files stay, nothing else is left, the message names a file."""

import ctypes
import os
import random
import resource
import signal
from collections import Counter
from pathlib import Path

from tests.attack.writers import HEAVY, LIGHT, WRITERS, contents, in_child

SHORT, LONG, FEW, LIMIT_S = 12, 60, 4, 120
NEW_USER, NEW_MOUNTS = 0x10000000, 0x20000


def attack(seed: int, folder: Path) -> Counter:
    """Write a set, then another one over it where there is no room for it."""
    rng = random.Random(seed)
    name = HEAVY[seed // 3 % len(HEAVY)] if seed % 3 == 2 else LIGHT[seed // 3 % len(LIGHT)]
    kind = ("limit", "tmpfs")[seed % 2]
    place = folder / "set"
    place.mkdir()
    _, found = in_child(lambda: {"limit": _file_limit, "tmpfs": _small_disk}[kind](name, place, rng))
    assert isinstance(found, dict), f"{name}, {kind}: {found}"
    return Counter(found)


def _file_limit(name: str, place: Path, rng: random.Random) -> dict:
    writer = WRITERS[name]
    writer.write(place, 0)
    largest = max(map(len, contents(place).values()))
    limit = rng.randrange(1, largest)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return _full(name, place)


def _small_disk(name: str, place: Path, rng: random.Random) -> dict:
    """A small disk of one's own, where the machine lets a user have one."""
    user, group, library = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if library.unshare(NEW_USER | NEW_MOUNTS):
        return {"no disk of one's own": 1}
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return {"no disk of one's own": 1}
    WRITERS[name].write(place, 0)
    size = sum(-(-len(data) // 4096) * 4096 for data in contents(place).values())
    room = size + rng.randrange(size // 4096 or 1) * 4096 + 4096  # for the old set, not for two
    if library.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={room}".encode()):
        return {"no disk of one's own": 1}
    try:
        WRITERS[name].write(place, 0)
    except OSError as error:  # its own temporary files found no room beside it
        assert "No space" in str(error), error
        assert not list(place.iterdir()), f"leaves {sorted(path.name for path in place.iterdir())}"
        return {"full": 1, "full from the start": 1, "full disks": 1}
    return _full(name, place) | {"full disks": 1}


def _full(name: str, place: Path) -> dict:
    writer, old = WRITERS[name], contents(place)
    try:
        writer.write(place, 1)
    except OSError as error:
        text = str(error)
    else:
        return {"there was room": 1}
    left = sorted(path.name for path in place.iterdir())
    assert left == sorted(old), f"leaves {left}"
    assert contents(place) == old, "the old files are changed"
    assert str(place) in text and "\n" not in text, f"the message names no file: {text!r}"
    assert ".tmp" not in text.replace(str(place.parent), ""), f"the message names a temporary file: {text!r}"
    writer.read(place)
    return {"full": 1, f"full, {name}": 1}
