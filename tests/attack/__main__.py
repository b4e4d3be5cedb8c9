"""Attacks on the package: random networks, malicious files, kills, threads, wrong arguments. Every fault is repeatable.

    python -m tests.attack nets --first 0 --count 100
    python -m tests.attack nets files --record work_dirs/attack --jobs 2      # goes on where it was stopped
    python -m tests.attack --long --record work_dirs/attack --summary docs/results/records/attack.json

A part is a module of this package with ``attack(seed, folder) -> Counter``: one unit (one network through all verbs, one
malicious file, one kill), and its counts by outcome. A fault raises AssertionError, in one line. A part may state how many
units a short and a long run have (``SHORT``, ``LONG``) and when a unit hangs (``LIMIT_S``, seconds). Units run in processes
of their own: one that hangs or dies is a fault, and the next goes on. A record has one JSON line for each unit; units that
passed are skipped when it is given again, faults are repeated. Exits with 1 where a fault is left.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import tests.attack
from tests.attack._worker import work

ROOT = Path(__file__).resolve().parents[2]


def find_parts() -> list[str]:
    """Names of the modules of this package that are parts."""
    found = [module.name for module in pkgutil.iter_modules(tests.attack.__path__) if not module.name.startswith("_")]
    return [name for name in found if hasattr(importlib.import_module(f"tests.attack.{name}"), "attack")]


def commit() -> str:
    """The checkout's commit, with a + where files are changed."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return f"{name}+" if dirty else name


class Child:
    """A process that runs units, started again where one hangs or kills it."""

    def __init__(self, module: str, limit_s: float):
        self.module, self.limit_s, self.process = module, limit_s, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(self.module, other), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()  # EOFError: the part cannot be imported, and its traceback is on stderr

    def run(self, seed: int) -> tuple[dict[str, int], str | None]:
        """Return one unit's counts, and its fault."""
        if self.process is None:
            self.start()
        self.connection.send(seed)
        try:
            if self.connection.poll(self.limit_s):
                return self.connection.recv()
            fault = f"still running after {self.limit_s:.0f} s"
        except EOFError:
            self.process.join()
            fault = f"the process died with code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.process = None
        return {}, fault

    def stop(self) -> None:
        if self.process is not None:
            self.connection.send(None)
            self.process.join()


@dataclass
class Units:
    """What became of the units of one part; the last result of a seed counts."""

    part: str
    lines: dict[int, dict] = field(default_factory=dict)

    @property
    def faults(self) -> list[dict]:
        return [line for line in self.lines.values() if line.get("fault")]

    @property
    def counts(self) -> Counter:
        total: Counter = Counter()
        for line in self.lines.values():
            total.update(line["counts"])
        return total

    def summary(self) -> dict:
        """What is stored of a long run."""
        lines = self.lines.values()
        commits = Counter(line["commit"] for line in lines)
        return dict(
            units=len(lines),
            faults=[f"{line['fault']} [{how(self.part, line['seed'])}]" for line in self.faults],
            counts=dict(sorted(self.counts.items())),
            seconds=round(sum(line["seconds"] for line in lines)),
            commits=dict(commits),
        )


def how(part: str, seed: int) -> str:
    return f"python -m tests.attack {part} --first {seed} --count 1"


def read_record(path: Path) -> Iterator[dict]:
    """Yield the lines of a record; one that a kill left unfinished is no result."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def run_part(part: str, seeds: Iterable[int], jobs: int = 1, record: Path | None = None, limit_s: float = 0) -> Units:
    """Run the units of a part that the record does not have yet, in ``jobs`` processes."""
    module = part if "." in part else f"tests.attack.{part}"
    limit_s = limit_s or getattr(importlib.import_module(module), "LIMIT_S", 300.0)
    units, now, lock = Units(part), commit(), threading.Lock()
    wanted = list(seeds)
    for line in read_record(record) if record else ():
        if line["part"] == part and line["seed"] in wanted:
            units.lines[line["seed"]] = line
    left = iter([seed for seed in wanted if seed not in units.lines or units.lines[seed].get("fault")])

    def shard() -> None:
        child = Child(module, limit_s)
        while True:
            with lock:
                if (seed := next(left, None)) is None:
                    break
            start = time.perf_counter()
            counts, fault = child.run(seed)
            line = dict(part=part, seed=seed, commit=now, seconds=round(time.perf_counter() - start, 2), counts=counts)
            if fault:
                line["fault"] = " ".join(fault.split())
                print(f"{how(part, seed)}: {line['fault']}", flush=True)
            with lock:
                units.lines[seed] = line
                if record:
                    with record.open("a") as file:
                        file.write(json.dumps(line) + "\n")
        child.stop()

    if record:
        record.parent.mkdir(parents=True, exist_ok=True)
        if record.exists() and not record.read_text().endswith("\n"):
            record.write_text(record.read_text() + "\n")  # a kill left a line unfinished
    threads = [threading.Thread(target=shard) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if set(units.lines) != set(wanted):
        raise SystemExit(f"{part}: stopped after {len(units.lines)} of {len(wanted)} units")
    return units


def print_table(results: Sequence[Units]) -> None:
    table = Table("part", "units", "outcomes", "faults", "seconds")
    for units in results:
        summary = units.summary()
        outcomes = ", ".join(f"{name} {count:,}" for name, count in summary["counts"].items())
        table.add_row(units.part, f"{summary['units']:,}", outcomes, str(len(units.faults)), str(summary["seconds"]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for units in results:
        for fault in units.summary()["faults"]:
            console.print(fault, markup=False, soft_wrap=True)


def write_summary(path: Path, results: Sequence[Units]) -> None:
    """Write what was attacked, where, and what came out."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    record = dict(command="make attack LONG=1", date=str(date.today()), versions=versions)
    record |= dict(parts={units.part: units.summary() for units in results})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all parts")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, help="number of units; default: a part's own")
    parser.add_argument("--long", action="store_true", help="as many units as a part's long run has")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th seed, from the I-th on")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON lines; a folder: PART.jsonl in it")
    parser.add_argument("--limit", type=float, default=0, metavar="SECONDS", help="a unit that takes longer hangs")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the summary of all results as JSON")
    args = parser.parse_args(argv)
    index, shards = map(int, args.shard.split("/"))
    results = []
    for part in args.parts or find_parts():
        module = importlib.import_module(part if "." in part else f"tests.attack.{part}")
        own = getattr(module, "LONG", 100) if args.long else getattr(module, "SHORT", 10)
        count = own if args.count is None else args.count
        record = args.record
        if record and not record.suffix:
            record = record / f"{part}.jsonl"
        seeds = range(args.first, args.first + count)[index::shards]
        results.append(run_part(part, seeds, args.jobs, record, args.limit))
    print_table(results)
    if args.summary:
        write_summary(args.summary, results)
    return int(any(units.faults for units in results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
