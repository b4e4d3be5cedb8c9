#!/usr/bin/env python
"""The demo's top-1 over seeds, threads and instruction sets, and stock MobileNetV2 under the same schedule.

Writes docs/results/records/demo.json and demo_stock_mobilenetv2.json, from which `make demo` takes the stock network's
top-1. A run that is finished is not repeated.

    python benchmarks/demo.py                                 # about an hour on two cores
    python benchmarks/demo.py --runs "stock, seed 0"
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import mmengine
import mmpretrain
import torch
from mmengine.config import Config
from training_runs import ROOT, Job, print_scores, run_all

from rep_plugin.openmmlab.experiments import processor

DEMO, STOCK = ROOT / "configs/rep_mbv2_mini_cub.py", ROOT / "benchmarks/configs/stock_mbv2_mini_cub.py"
RECORDS = ROOT / "docs/results/records"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # sums in the order of another processor
# name: config, seed, environment
RUNS = {
    "seed 0, 1 thread": (DEMO, 0, {}),
    "seed 0, 2 threads": (DEMO, 0, {"OMP_NUM_THREADS": "2"}),
    "seed 0, AVX2": (DEMO, 0, AVX2),
    "seed 1": (DEMO, 1, {}),
    "stock, seed 0": (STOCK, 0, {}),
    "stock, seed 1": (STOCK, 1, {}),
    "stock, seed 2": (STOCK, 2, {}),
}


def write_record(path: Path, config: Path, command: str, jobs: list[Job], results: list[dict]) -> None:
    """Write what was trained, how, where, and what came out."""
    runs = [
        dict(seed=job.seed, threads=int(job.environment.get("OMP_NUM_THREADS", 1)))
        | ({"environment": dict(job.environment)} if job.environment else {})
        | {"top1": result["top1"], "seconds": round(result["seconds"]), "cpu_seconds": round(result["cpu_seconds"])}
        for job, result in zip(jobs, results)
    ]
    versions = {"torch": torch.__version__, "mmengine": mmengine.__version__, "mmpretrain": mmpretrain.__version__}
    epochs = Config.fromfile(config).train_cfg.max_epochs
    record = dict(config=str(config.relative_to(ROOT)), epochs=epochs, command=command, date=str(date.today()))
    record |= dict(versions=versions | {"python": platform.python_version()}, processor=processor(), runs=runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")


def main() -> None:
    """Run all, print the table, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--data-root", default=str(ROOT / "data/mini_cub"))
    parser.add_argument("--work-dir", default=str(ROOT / "work_dirs/bench_demo"))
    args = parser.parse_args()
    data = [f"{part}_dataloader.dataset.data_root={args.data_root}" for part in ("train", "val", "test")]
    jobs = []
    for name in args.runs:
        config, seed, environment = RUNS[name]
        jobs.append(Job(name, seed, config, [*data, f"randomness.seed={seed}"], "demo", environment))
    results = run_all(jobs, Path(args.work_dir), args.workers)
    print_scores("rendered birds, 20 classes, the schedule of make demo", results, args.runs[0])
    for config, name in ((DEMO, "demo.json"), (STOCK, "demo_stock_mobilenetv2.json")):
        if own := [job for job in jobs if job.config == config]:
            command = f"rep-plugin train {config.relative_to(ROOT)}"
            write_record(RECORDS / name, config, command, own, [results[job.name][0] for job in own])


if __name__ == "__main__":
    main()
