"""Progress of what takes more than a few seconds: on a terminal alone, on stderr, and gone when it is over.

Nothing is written where stderr is no terminal (a file, a notebook, a test), in a process of DDP other than the first, and
in the first :data:`DELAY` seconds. What runs inside of something else adds a line below it.
"""

import multiprocessing
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
DELAY = 2.0  # seconds


class _Stage:
    """One thing that is being done, and its line once the display is on."""

    def __init__(self, what: str, total: float | None):
        self.what, self.total, self.done = what, total, 0
        self.line: Any = None


class _Display:
    """The stages under way, outermost first, and the display: a timer turns it on, the end of the outermost off."""

    def __init__(self) -> None:
        self.stages: list[_Stage] = []
        self.bars: Any = None
        self.lock = threading.RLock()
        self.timer: threading.Timer | None = None

    def enter(self, stage: _Stage) -> None:
        with self.lock:
            self.stages.append(stage)
            if self.bars is not None:
                stage.line = self.bars.add_task(stage.what, total=stage.total)
            elif self.timer is None:
                self.timer = threading.Timer(DELAY, self._show)
                self.timer.daemon = True
                self.timer.start()

    def advance(self, stage: _Stage) -> None:
        stage.done += 1
        with self.lock:
            if self.bars is not None and stage.line is not None:
                self.bars.update(stage.line, completed=stage.done)

    def leave(self, stage: _Stage) -> None:
        with self.lock:
            self.stages.remove(stage)
            if self.bars is not None and stage.line is not None:
                self.bars.remove_task(stage.line)
            if self.stages:
                return
            if self.timer is not None:
                self.timer.cancel()
            if self.bars is not None:
                self.bars.stop()
            self.timer = self.bars = None

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        with self.lock:
            console = Console(stderr=True)
            if self.timer is not threading.current_thread() or console.is_dumb_terminal:  # over in the meantime
                return
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            # What is printed meanwhile goes above the lines; a piped stdout is left alone.
            bars = Progress(
                *columns,
                TimeElapsedColumn(),
                console=console,
                transient=True,
                refresh_per_second=4,  # latency is measured meanwhile
                redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
            )
            for stage in self.stages:
                stage.line = bars.add_task(stage.what, total=stage.total, completed=stage.done)
            bars.start()
            self.bars = bars


_DISPLAY = _Display()


def _is_shown() -> bool:
    try:
        terminal = sys.stderr.isatty()
    except (AttributeError, ValueError):  # none at all, or closed
        return False
    if not terminal or multiprocessing.parent_process() is not None:
        return False
    distributed = getattr(sys.modules.get("torch"), "distributed", None)  # not imported for this alone
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def working(what: str, total: float | None = None) -> Iterator[Callable[[], None]]:
    """Show that something is being done; also a decorator.

    Args:
        what: what is being done, a few words.
        total: number of steps, where it is known.

    Yields:
        A function to call after each step.

    Example:
        >>> with working("adding", total=2) as step:
        ...     step(), step()
        (None, None)
    """
    if not _is_shown():
        yield lambda: None
        return
    stage = _Stage(what, total)
    _DISPLAY.enter(stage)
    try:
        yield lambda: _DISPLAY.advance(stage)
    finally:
        _DISPLAY.leave(stage)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, and show how many are done.

    Args:
        items: what is gone through.
        what: what is being done, a few words.
        total: how many there are (default: ``len(items)``, where they have a length).

    Yields:
        The items.

    Example:
        >>> [x * x for x in track([1, 2], "squaring")]
        [1, 4]
    """
    if total is None and (known := operator.length_hint(items, -1)) >= 0:  # a data loader may have a len() that raises
        total = known
    with working(what, total) as step:
        for item in items:
            yield item
            step()
