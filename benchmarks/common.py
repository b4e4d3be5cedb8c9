"""What the benchmarks share: tables and their records, calls timed in turns, and the memory of a fresh process."""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from rep_plugin import PrunePlan, apply_plan
from rep_plugin.checkpoints.files import write_text
from rep_plugin.openmmlab.experiments import environment

RECORDS = Path(__file__).resolve().parents[1] / "docs/results/records/benchmarks"


def pruned(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Return a pruned copy, not proven.

    Args:
        model: it stays as it is.
        plan: of the model.
    """
    smaller = copy.deepcopy(model)
    apply_plan(smaller, plan, verify=False)
    return smaller


def make_table(title: str, columns: Iterable[str], left: Sequence[str] = (), **options) -> Table:
    """Return an empty table; columns are aligned to the right.

    Args:
        title: above the table.
        columns: headers.
        left: headers of columns that are aligned to the left.
        options: of every column, see ``rich.table.Table.add_column``.
    """
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", **options)
    return table


def add_record(parser: argparse.ArgumentParser) -> None:
    """Add the option of a benchmark whose table stands in the pages.

    Args:
        parser: of the benchmark.
    """
    parser.add_argument(
        "--record", action="store_true", help="keep the table in docs/results/records, from which the pages are made"
    )


def write_table(table: Table, name: str, threads: int | None = 1) -> None:
    """Write the record of a table.

    Args:
        table: as it is printed.
        name: of the record.
        threads: that were used; None: each row says it.
    """
    columns = [str(column.header) for column in table.columns]
    rows = [list(cells) for cells in zip(*(map(str, column.cells) for column in table.columns), strict=True)]
    record = {"benchmark": name, "command": " ".join(["python", *sys.argv]), "title": str(table.title)}
    record |= {**environment(), "threads": threads, "columns": columns, "rows": rows}
    write_text(RECORDS / f"{name}.json", json.dumps(record, indent=1))
    print(f"written: {RECORDS / name}.json", file=sys.stderr)


def print_failures(console: Console, failures: Sequence[str]) -> int:
    """Print a line for each failure.

    Args:
        console: where to print.
        failures: what missed its target.

    Returns:
        The exit status: 1 where something failed.
    """
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False)
    return int(bool(failures))


def times_in_turns(
    steps: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1, description: str = ""
) -> dict[str, list[float]]:
    """Run every step once a round, in turns: a noisy machine is noisy for all of them.

    Args:
        steps: name -> call that returns its own seconds.
        rounds: number of rounds that count.
        warm_up: number of rounds before, that do not count.
        description: of the progress bar; without one there is no bar.

    Returns:
        Name -> seconds of every round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    numbers: Iterable[int] = range(rounds + warm_up)
    for index in track(numbers, description) if description else numbers:
        for name, step in steps.items():
            seconds = step()
            if index >= warm_up:
                times[name].append(seconds)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Return the median ratio of neighbours in the same round: the machine's speed drifts.

    Args:
        times: seconds of one contender in every round.
        base: those of the other.
    """
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def memory_kb(key: str) -> int:
    """Return a field of ``/proc/self/status`` in kB: ``VmRSS`` now, ``VmHWM`` at most so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def print_growth(work: Callable[[], object]) -> None:
    """Print by how many MB a call grows this process at most; for a child process that does nothing else."""
    before = memory_kb("VmRSS")
    work()
    print(json.dumps((memory_kb("VmHWM") - before) / 1024))


def growth_of_child(script: str, options: Sequence[str]) -> float:
    """Run a script in a fresh process that ends with :func:`print_growth`.

    Args:
        script: its path.
        options: of its command line.

    Returns:
        What it printed, in MB.

    Raises:
        RuntimeError: the process failed.
    """
    child = subprocess.run([sys.executable, "-W", "ignore", script, *options], capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise RuntimeError(f"{' '.join(options)} failed (out of memory? try a smaller --batch): {last}")
    return float(json.loads(child.stdout.splitlines()[-1]))
