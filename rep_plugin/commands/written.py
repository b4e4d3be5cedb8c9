"""The last line of every command that writes files."""

import os
from collections.abc import Iterable


def print_written(paths: Iterable[str | os.PathLike]) -> None:
    """Print ``written: a/deploy.pth, a/deploy.py``: every file, as it can be opened from here."""
    print(f"written: {', '.join(os.fspath(path) for path in paths)}")
