"""Kill -9 at a chosen step of a program that writes files."""

import os
import signal
from collections.abc import Callable

STEPS = ("replace", "rename", "symlink", "link", "unlink", "rmdir", "mkdir", "fsync", "open")


def count_steps(before: Callable[[int], None]) -> None:
    """From now on, call ``before(number)`` before every step of this process that changes names or waits for the disk."""
    steps = 0

    def counted(step: Callable) -> Callable:
        def counting(*args, **kwargs):
            nonlocal steps
            before(steps)
            steps += 1
            return step(*args, **kwargs)

        return counting

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def die_at(number: int) -> None:
    """Let this process be killed before its step of this number, from 0."""
    count_steps(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == number else None)
