#!/usr/bin/env python
"""Bilinear pooling against global average pooling on the rendered birds: same backbone, schedule and seeds.

Every run is `tools/train.py configs/bcnn_rep_mbv2_mini_cub.py` with options; the two arms differ in neck and head alone.
The average-pooling arm is run with the config's learning rate for its classifier and with the plain one.
"""

import argparse
from pathlib import Path

from training_runs import Job, print_scores, run_all

ROOT = Path(__file__).resolve().parents[1]
BILINEAR, GAP = ROOT / "configs/bcnn_rep_mbv2_mini_cub.py", ROOT / "benchmarks/configs/gap_rep_mbv2_mini_cub.py"
CONTENDERS = {
    "bilinear": (BILINEAR, []),
    "global average": (GAP, []),
    "global average, head lr x 20": (GAP, ["optim_wrapper.paramwise_cfg.custom_keys.fc.lr_mult=20.0"]),
}


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work-dir", default=str(ROOT / "work_dirs/bench_bilinear_against_gap"))
    parser.add_argument("--cfg-options", nargs="*", default=[], help="further options for every run")
    args = parser.parse_args()
    warm_up = 2
    options = [
        f"train_cfg.max_epochs={args.epochs}",
        f"train_cfg.val_interval={args.epochs}",
        f"default_hooks.checkpoint.interval={args.epochs}",
        f"param_scheduler.1.T_max={args.epochs - warm_up}",
        f"param_scheduler.1.end={args.epochs}",
        "default_hooks.logger.interval=10",
        *args.cfg_options,
    ]
    jobs = [
        Job(
            name,
            seed,
            CONTENDERS[name][0],
            [*options, *CONTENDERS[name][1], f"randomness.seed={seed}"],
            f"e{args.epochs}",
        )
        for seed in range(args.seeds)
        for name in args.contenders
    ]
    found = run_all(jobs, Path(args.work_dir), args.workers)
    print_scores(f"rendered birds, 20 classes, {args.epochs} epochs, {args.seeds} seeds", found, "global average")


if __name__ == "__main__":
    main()
