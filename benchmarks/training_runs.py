"""Training runs of `rep-plugin train` side by side, kept on disk, and their table: means and spread over seeds."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import make_table
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One run: the contender's name, its seed, its config with options, what else distinguishes it, more environment."""

    name: str
    seed: int
    config: Path
    options: Sequence[str]
    label: str
    environment: Mapping[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Add what every benchmark of trainings takes.

    Args:
        parser: of the benchmark.
        work_dir: name of its folder in ``work_dirs/``.
    """
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work-dir", default=str(ROOT / "work_dirs" / work_dir))
    parser.add_argument("--cfg-options", nargs="*", default=[], help="further options for every run")


def add_fashion_arguments(parser: argparse.ArgumentParser, width: bool = True) -> None:
    """Add what trainings on Fashion-MNIST take.

    Args:
        parser: of the benchmark.
        width: whether the networks have one.
    """
    parser.add_argument("--samples", type=int, default=12000, help="training images used, of 60,000")
    if width:
        parser.add_argument("--width", type=float, default=0.5, help="width of all networks")


def fashion_options(seed: int, epochs: int, samples: int) -> list[str]:
    """Return the options of a run on Fashion-MNIST that is validated and saved once, at its end.

    Args:
        seed: of the run.
        epochs: in all.
        samples: number of training images.
    """
    return [
        f"randomness.seed={seed}",
        f"train_dataloader.dataset.indices={samples}",
        f"train_cfg.max_epochs={epochs}",
        f"train_cfg.val_interval={epochs}",
        f"default_hooks.checkpoint.interval={epochs}",
        "default_hooks.logger.interval=20",
    ]


def folder_of(job: Job, work_dir: Path) -> Path:
    """Where a run leaves its log, checkpoints and result."""
    slug = "".join(c if c.isalnum() else "_" for c in job.name)
    return work_dir / f"{slug}_{job.label}_seed{job.seed}"


def run(job: Job, work_dir: Path) -> dict:
    """Train one network, unless done before; return its last top-1 in percent, and the seconds it took.

    ``step_seconds``: the median; ``seconds`` and ``cpu_seconds``: the whole process, with what its hooks write.
    Raises RuntimeError, with the log's path, where the training fails.
    """
    folder = folder_of(job, work_dir)
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", "-m", "rep_plugin", "train", str(job.config), "--work-dir", str(folder)]
    started = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--cfg-options", *job.options],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | dict(job.environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"training of {job.name!r}, seed {job.seed}, failed; see {folder / 'log.txt'}")
    lines = [json.loads(line) for line in sorted(folder.glob("*/vis_data/scalars.json"))[-1].read_text().splitlines()]
    found = {
        "top1": next(line["accuracy/top1"] for line in reversed(lines) if "accuracy/top1" in line),
        "step_seconds": statistics.median(line["time"] for line in lines if "loss" in line),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    result.write_text(json.dumps(found))
    return found


def run_all(jobs: Sequence[Job], work_dir: Path, workers: int) -> dict[str, list[dict]]:
    """Run the jobs, ``workers`` at a time, one thread each; return the results by contender."""
    found: dict[str, list[dict]] = {}
    with Progress() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("training runs", total=len(jobs))
        for job, result in zip(jobs, pool.map(lambda job: run(job, work_dir), jobs)):
            found.setdefault(job.name, []).append(result)
            progress.advance(task)
    return found


def print_scores(title: str, found: dict[str, list[dict]], baseline: str) -> None:
    """Print means, spread, every seed, and the gain over the baseline's mean."""
    base = [result["top1"] for result in found.get(baseline, [])]
    columns = ("trained as", "top-1 %, mean", "spread (std)", "each seed", f"against {baseline}", "ms a step")
    table = make_table(title, columns, ["trained as"])
    for name, results in found.items():
        scores = [result["top1"] for result in results]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-"
        gain = f"{statistics.mean(scores) - statistics.mean(base):+.2f}" if base else "-"
        step = statistics.median(result["step_seconds"] for result in results) * 1e3
        each = " ".join(f"{score:.2f}" for score in scores)
        table.add_row(name, f"{statistics.mean(scores):.2f}", spread, each, gain, f"{step:.0f}")
    Console(width=130).print(table)
