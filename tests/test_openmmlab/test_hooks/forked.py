"""``rep-plugin train`` in forked processes: imports are paid for once, every training has a process or two."""

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def load_tool() -> ModuleType:
    """Return the command line as a module, with what training needs imported."""
    importlib.import_module("rep_plugin.openmmlab.runs")
    return importlib.import_module("rep_plugin.__main__")


def fork(tool: ModuleType, arguments: list[str], output: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the tool in a new process, ``prepare`` before it, and return its id; what it prints is appended to a file."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        prepare()
        tool.main(["train", *arguments])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(process: int, kill_after: float | None = None) -> int:
    """Return a process's exit code, negative for a signal; after so many seconds it is killed."""
    began = time.perf_counter()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and time.perf_counter() - began > kill_after:
            os.kill(process, signal.SIGKILL)
            kill_after = None
        time.sleep(0.005)


def train_together(tool: ModuleType, arguments: list[str], output: Path, ranks: int = 2) -> list[int]:
    """Run the tool in connected processes, as torchrun does; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def connect(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))

    arguments = [*arguments, "--launcher", "pytorch"]
    processes = [fork(tool, arguments, output, lambda rank=rank: connect(rank)) for rank in range(ranks)]
    return [wait(process, 300) for process in processes]
