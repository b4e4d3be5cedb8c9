#!/usr/bin/env python
"""Multi-branch against plain training of the same deployed network on Fashion-MNIST, and stock MobileNetV2 beside them.

Every run is `tools/train.py configs/rep_mbv2_fashion_mnist.py` with options; nothing but the backbone and the seed
differs. Finished runs are kept in the work folder and not repeated. Prints means and spread over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
REP, STOCK = ROOT / "configs/rep_mbv2_fashion_mnist.py", ROOT / "benchmarks/configs/stock_mbv2_fashion_mnist.py"


def branches(*names: str) -> tuple[Path, list[str]]:
    """Our config with other branches."""
    return REP, [f"model.backbone.branches={names!r}".replace(" ", "")]


CONTENDERS = {
    "multi-branch (default)": (REP, []),
    "plain (conv3x3)": branches("conv3x3"),
    "bottleneck, identity": branches("bottleneck", "identity"),
    "conv3x3, conv1x1, identity": branches("conv3x3", "conv1x1", "identity"),
    "bottleneck, conv3x3, identity, avgpool": branches("bottleneck", "conv3x3", "identity", "avgpool"),
    "stock MobileNetV2": (STOCK, []),
}
DEFAULT = ("multi-branch (default)", "plain (conv3x3)", "stock MobileNetV2")


def run(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one network and return its top-1 in percent and its seconds a training step."""
    slug = "".join(c if c.isalnum() else "_" for c in name)
    folder = Path(args.work_dir) / f"{slug}_e{args.epochs}_n{args.samples}_w{args.width}_seed{seed}"
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    config, own_options = CONTENDERS[name]
    options = [
        f"randomness.seed={seed}",
        f"train_dataloader.dataset.indices={args.samples}",
        f"train_cfg.max_epochs={args.epochs}",
        f"train_cfg.val_interval={args.epochs}",
        f"default_hooks.checkpoint.interval={args.epochs}",
        "default_hooks.logger.interval=20",
        f"model.backbone.widen_factor={args.width}",
        *own_options,
        *args.cfg_options,
    ]
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "tools/train.py"),
        str(config),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [*command, "--work-dir", str(folder), "--cfg-options", *options],
            env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"training of {name!r}, seed {seed}, failed; see {folder / 'log.txt'}")
    lines = [json.loads(line) for line in sorted(folder.glob("*/vis_data/scalars.json"))[-1].read_text().splitlines()]
    found = {
        "top1": next(line["accuracy/top1"] for line in reversed(lines) if "accuracy/top1" in line),
        "step_seconds": statistics.median(line["time"] for line in lines if "loss" in line),
    }
    result.write_text(json.dumps(found))
    return found


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(DEFAULT), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=12000, help="training pictures used, of 60,000")
    parser.add_argument("--width", type=float, default=0.5, help="width of all networks")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work-dir", default=str(ROOT / "work_dirs/bench_fashion_mnist"))
    parser.add_argument("--cfg-options", nargs="*", default=[], help="further options for every run")
    args = parser.parse_args()

    jobs = [(name, seed) for seed in range(args.seeds) for name in args.contenders]
    found: dict[str, list[dict]] = {name: [] for name in args.contenders}
    with Progress() as progress, ThreadPoolExecutor(args.workers) as pool:
        task = progress.add_task("training runs", total=len(jobs))
        for (name, _), result in zip(jobs, pool.map(lambda job: run(*job, args), jobs)):
            found[name].append(result)
            progress.advance(task)

    plain = [r["top1"] for r in found.get("plain (conv3x3)", [])]
    title = f"Fashion-MNIST, {args.samples} pictures, {args.epochs} epochs, width {args.width}, {args.seeds} seeds"
    table = Table(title=title)
    for column in ("trained as", "top-1 %, mean", "spread (std)", "each", "against plain", "ms a step"):
        table.add_column(column, justify="left" if column == "trained as" else "right")
    for name, results in found.items():
        scores = [r["top1"] for r in results]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-"
        gain = f"{statistics.mean(scores) - statistics.mean(plain):+.2f}" if plain else "-"
        step = statistics.median(r["step_seconds"] for r in results) * 1e3
        table.add_row(
            name, f"{statistics.mean(scores):.2f}", spread, " ".join(f"{s:.2f}" for s in scores), gain, f"{step:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
