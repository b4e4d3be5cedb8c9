#!/usr/bin/env python
"""Warm start on Fashion-MNIST: stock MobileNetV2, then annealed into the mergeable form, against as many epochs from scratch.

    python benchmarks/warm_start.py                                              # about an hour on two cores
    python benchmarks/warm_start.py --seeds 1 --samples 512 --stock-epochs 1 --epochs 1 --anneal-epochs 0.5    # a smoke run

All rows see the same number of images (``--stock-epochs`` + ``--epochs``). The warm-started network and the one from
scratch deploy as the same 3x3 convolutions; stock MobileNetV2, which does not merge, is the reference. Finished runs are
kept in the work folder and not repeated. Prints means and spread over the seeds.
"""

import argparse
from pathlib import Path

from training_runs import (
    ROOT,
    Job,
    add_arguments,
    add_fashion_arguments,
    fashion_options,
    folder_of,
    print_scores,
    run_all,
)  # fmt: skip

SCRATCH, STOCK = ROOT / "configs/rep_mbv2_fashion_mnist.py", ROOT / "benchmarks/configs/stock_mbv2_fashion_mnist.py"
WARM = ROOT / "benchmarks/configs/warm_start_fashion_mnist.py"
WARM_NAME, SCRATCH_NAME, STOCK_NAME, FIRST = "stock, then annealed", "from scratch", "stock MobileNetV2", "first phase"


def make_job(name: str, seed: int, config: Path, epochs: int, args: argparse.Namespace, *options: str) -> Job:
    """One run of ``epochs``; only config, options and seed differ between runs."""
    common = [*fashion_options(seed, epochs, args.samples), f"model.backbone.widen_factor={args.width}"]
    label = f"e{epochs}_n{args.samples}_w{args.width}"
    if config == WARM:
        label += f"_s{args.stock_epochs}_a{args.anneal_epochs}_lr{args.lr}"
    return Job(name, seed, config, [*common, *options, *args.cfg_options], label)


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock-epochs", type=int, default=6, help="of stock MobileNetV2, before the warm start")
    parser.add_argument("--epochs", type=int, default=6, help="after the warm start, anneal included")
    parser.add_argument("--anneal-epochs", type=float, default=3, help="of those, until alpha is 1")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate after the warm start")
    add_arguments(parser, "bench_warm_start")
    add_fashion_arguments(parser)
    args = parser.parse_args()
    work_dir, total, seeds = Path(args.work_dir).resolve(), args.stock_epochs + args.epochs, range(args.seeds)

    first = [make_job(FIRST, seed, STOCK, args.stock_epochs, args) for seed in seeds]
    found = run_all(first, work_dir, args.workers)
    jobs = []
    for seed, before in zip(seeds, first):
        checkpoint = folder_of(before, work_dir) / f"epoch_{args.stock_epochs}.pth"
        warm = (
            f"load_from={checkpoint}",
            f"custom_hooks.0.end={args.anneal_epochs}",
            f"optim_wrapper.optimizer.lr={args.lr}",
        )
        jobs += [
            make_job(WARM_NAME, seed, WARM, args.epochs, args, *warm),
            make_job(SCRATCH_NAME, seed, SCRATCH, total, args),
            make_job(STOCK_NAME, seed, STOCK, total, args),
        ]
    found = run_all(jobs, work_dir, args.workers) | {f"({FIRST}: stock, {args.stock_epochs} epochs)": found[FIRST]}
    phases = f"{args.stock_epochs} + {args.epochs} epochs (annealed over {args.anneal_epochs:g}, lr {args.lr:g})"
    size = f"{args.samples} images, {phases}, width {args.width}, {args.seeds} seeds"
    print_scores(f"Fashion-MNIST, {size}", found, SCRATCH_NAME)


if __name__ == "__main__":
    main()
