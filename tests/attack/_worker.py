"""What runs in the child processes of the runner: a module of its own, as a process that is spawned imports no __main__."""

import importlib
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path


def work(module: str, connection) -> None:
    """In a child process: run the units whose seeds come, and send what came out."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch is imported by the part, and by what it starts
    logging.disable(logging.WARNING)  # mmengine tells of each layer
    attack = importlib.import_module(module).attack
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        counts, fault = Counter(), None
        with tempfile.TemporaryDirectory(prefix=f"attack_{seed}_") as folder:
            try:
                counts = attack(seed, Path(folder))
            except AssertionError as error:
                fault = str(error) or "AssertionError"
            except Exception as error:  # whatever a unit did not expect is a fault, and the next unit goes on
                fault = f"{type(error).__name__}: {error}"
        connection.send((dict(counts), fault))
