#!/usr/bin/env python
"""Five ways to slim one ResNet-18 on Fashion-MNIST, and what they must beat: the same widths from scratch, Torch-Pruning.

    python benchmarks/slimming.py                                   # all rows, three seeds: about an hour on two cores
    python benchmarks/slimming.py --rows dense one-shot "scratch (one-shot)" --seeds 1
    python benchmarks/slimming.py --rows one-shot --seeds 1 --samples 512 --epochs 3          # a smoke run

Every row is one config under `rep-plugin train`, with the same network, images, number of epochs in all, cosine and seed.
Finished runs are kept in the work folder and not repeated, so that a table can be completed later; the latency of all
networks is then measured side by side. Prints the table and writes it to ``table.json`` in the work folder. Columns: top-1
of the dense network trained as long; before the (first) removal, right after the (last) one, and at the end; costs;
seconds of the whole training, with what its hooks validate, prove and write.

``--epochs`` other than the configs' scales begin, end and warmup of their hooks, to whole epochs.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from common import make_table
from mmengine.config import Config
from rich.console import Console
from training_runs import ROOT, Job, add_arguments, add_fashion_arguments, fashion_options, folder_of, run_all

from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.latency import eager_calls, interleaved_medians, torch_threads
from rep_plugin.openmmlab.load import build_model, load_model

CONFIGS = ROOT / "configs/pruning"
DENSE = ROOT / "configs/_base_/resnet18_fashion_mnist.py"
TORCH_PRUNING = ROOT / "benchmarks/configs/torch_pruning_resnet18_fashion_mnist.py"
TOP1 = "accuracy/top1"
COLUMNS = ["trained as", "dense", "before", "after", "final", "params", "MACs", "of dense", "ms", "train s", "CPU s"]


@dataclass(frozen=True)
class Row:
    """A config with options, or the name of the row whose widths are trained from scratch."""

    config: Path | None
    options: tuple[str, ...] = ()
    widths_of: str = ""


SLIMMED = {
    "one-shot": Row(CONFIGS / "slim_resnet18_fashion_mnist.py"),
    "iterative": Row(CONFIGS / "slim_resnet18_fashion_mnist_iterative.py"),
    "soft": Row(CONFIGS / "slim_resnet18_fashion_mnist_soft.py"),
    "ResRep": Row(CONFIGS / "resrep_resnet18_fashion_mnist.py"),
    "C-SGD": Row(CONFIGS / "csgd_resnet18_fashion_mnist.py"),
    "Torch-Pruning, BN scale": Row(TORCH_PRUNING, ("custom_hooks.0.kind=bn_scale",)),
    "Torch-Pruning, group norm": Row(TORCH_PRUNING, ("custom_hooks.0.kind=group_norm", "custom_hooks.0.reg=5e-4")),
}
SCRATCH = {f"scratch ({name})": Row(None, widths_of=name) for name in SLIMMED}
ROWS = {"dense": Row(DENSE), **SLIMMED, **SCRATCH}
DEFAULT = ("dense", *SLIMMED, "scratch (one-shot)")


def scaled(config: Path, epochs: int) -> list[str]:
    """Options that bring the epochs of a config's hooks to another number in all."""
    cfg = Config.fromfile(config)
    options, before = [], cfg.train_cfg.max_epochs
    for index, hook in enumerate(cfg.custom_hooks):
        for key in ("begin", "end", "warmup"):
            if epochs != before and hook.get("by_epoch", True) and hook.get(key):
                options.append(f"custom_hooks.{index}.{key}={max(1, round(hook[key] * epochs / before))}")
    return options


def from_scratch() -> list[str]:
    """Options that train a pruned network's config from random weights, at the rate of the dense network."""
    return ["load_from=None", f"optim_wrapper.optimizer.lr={Config.fromfile(DENSE).optim_wrapper.optimizer.lr}"]


def make_job(name: str, seed: int, args: argparse.Namespace, work_dir: Path) -> Job:
    """The run of one row with one seed."""
    row, label = ROWS[name], f"e{args.epochs}_n{args.samples}"
    config = row.config
    if row.widths_of:
        config = folder_of(make_job(row.widths_of, seed, args, work_dir), work_dir) / "pruned.py"
    elif not config.is_file():
        sys.exit(f"error: row {name!r} needs {config}, which does not exist; leave it out with --rows")
    options = [
        *(from_scratch() if row.widths_of else scaled(config, args.epochs)),
        *fashion_options(seed, args.epochs, args.samples),
        *row.options,
        *args.cfg_options,
    ]
    return Job(name, seed, config, options, label)


def metrics_of(result: dict, folder: Path) -> dict:
    """Metrics of a run: top-1 before, after and at the end, seconds, and steps per second around each removal."""
    found = dict(before=None, after=None, final=result["top1"], seconds=result["seconds"], speeds=[])
    found |= dict(cpu_seconds=result["cpu_seconds"])
    path = folder / "pruned.rounds.json"
    if path.is_file():
        rounds = json.loads(path.read_text())
        first, last = rounds[0], rounds[-1]
        found["before"] = (first.get("zeroings") or [first])[-1]["before"][TOP1]
        found["after"] = last["after"][TOP1]
        found["final"] = (last["tuned"] or last["after"])[TOP1]
        found["speeds"] = [entry["steps_per_second"] for entry in rounds if entry.get("steps_per_second")]
    return found


def network_of(job: Job, epochs: int, folder: Path) -> torch.nn.Module:
    """The network a run ended with, read from its files as anyone would."""
    if (folder / "pruned.pth").is_file():
        return load_model(Config.fromfile(folder / "pruned.py"), folder / "pruned.pth")[0]
    return load_model(Config.fromfile(job.config), folder / f"epoch_{epochs}.pth")[0]


def measure(runs: dict[str, tuple[dict, torch.nn.Module]], batch: int, rounds: int) -> None:
    """Add parameters, multiply-adds for one image, and milliseconds for a batch, taken in turns on one thread."""
    x = torch.randn(batch, 1, 28, 28)
    with torch_threads(1):
        times = interleaved_medians(eager_calls({name: model for name, (_, model) in runs.items()}, x), rounds)
    for name, (metrics, model) in runs.items():
        metrics |= dict(params=count_params(model), macs=count_macs(model, x[:1]), ms=times[name] * 1e3)


def mean(values: list[float | None], digits: int = 2) -> str:
    """The mean with its standard deviation, where there are several numbers; '-' where there is none."""
    values = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"


def speed(pair: dict[str, float | None]) -> str:
    """Steps per second before and after a removal; '?' where training began, or ended, just there."""
    return " -> ".join("?" if pair[when] is None else f"{pair[when]:.1f}" for when in ("before", "after"))


def print_table(title: str, found: dict[str, list[dict]]) -> None:
    """Print one line a row, means over the seeds."""
    table = make_table(title, COLUMNS, ["trained as"])
    dense = found.get("dense")
    whole = count_macs(build_model(Config.fromfile(DENSE)), torch.zeros(1, 1, 28, 28))
    for name, runs in found.items():

        def of(key: str, runs: list[dict] = runs) -> list:
            return [run[key] for run in runs]

        share = f"{statistics.mean(of('macs')) / whole:.1%}"
        table.add_row(
            name, mean([run["final"] for run in dense or ()]), mean(of("before")), mean(of("after")), mean(of("final")),
            f"{statistics.mean(of('params')):,.0f}", f"{statistics.mean(of('macs')) / 1e6:.2f} M", share,
            f"{statistics.mean(of('ms')):.1f}", mean(of("seconds"), 0), mean(of("cpu_seconds"), 0),
        )  # fmt: skip
    console = Console(width=150)
    console.print(table)
    for name, runs in found.items():
        if runs[0]["speeds"]:
            steps = "; ".join(", then ".join(map(speed, run["speeds"])) for run in runs)
            console.print(f"{name}: steps per second before and after each removal: {steps}", markup=False)


def main() -> None:
    """Run all, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", default=list(DEFAULT), choices=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--epochs", type=int, default=10, help="in all, of every row")
    parser.add_argument("--batch", type=int, default=32, help="images a call when latency is measured")
    parser.add_argument("--rounds", type=int, default=50, help="calls of each network when latency is measured")
    add_arguments(parser, "bench_slimming")
    add_fashion_arguments(parser, width=False)
    args = parser.parse_args()
    work_dir = Path(args.work_dir).resolve()

    needed = [ROWS[name].widths_of for name in args.rows if ROWS[name].widths_of]
    rows = list(dict.fromkeys([*(name for name in args.rows if not ROWS[name].widths_of), *needed]))
    rows += [name for name in args.rows if ROWS[name].widths_of]
    jobs = [make_job(name, seed, args, work_dir) for seed in range(args.seeds) for name in rows]
    results: dict[str, list[dict]] = {}
    for later in (False, True):  # from scratch there is only what another row has pruned
        results |= run_all([job for job in jobs if bool(ROWS[job.name].widths_of) == later], work_dir, args.workers)

    found: dict[str, list[dict]] = {name: [] for name in rows}
    for seed in range(args.seeds):
        runs = {}
        for job in (job for job in jobs if job.seed == seed):
            folder = folder_of(job, work_dir)
            metrics = metrics_of(results[job.name][seed], folder)
            runs[job.name] = (metrics, network_of(job, args.epochs, folder))
            found[job.name].append(metrics)
        measure(runs, args.batch, args.rounds)
    (work_dir / "table.json").write_text(json.dumps(dict(arguments=vars(args), rows=found), indent=1) + "\n")
    print_table(
        f"ResNet-18 of 16 to 128 channels on Fashion-MNIST, {args.samples} images, {args.epochs} epochs in all, "
        f"{args.seeds} seeds; top-1 in %, ms for {args.batch} images on one thread",
        found,
    )


if __name__ == "__main__":
    main()
