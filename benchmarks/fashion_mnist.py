#!/usr/bin/env python
"""Multi-branch against plain training of the same deployed network on Fashion-MNIST, and stock MobileNetV2 beside them.

Every run is `rep-plugin train configs/rep_mbv2_fashion_mnist.py` with options; nothing but the backbone and the seed
differs. Finished runs are kept in the work folder and not repeated. Prints means and spread over the seeds.
"""

import argparse
from pathlib import Path

from training_runs import ROOT, Job, add_arguments, add_fashion_arguments, fashion_options, print_scores, run_all

REP, STOCK = ROOT / "configs/rep_mbv2_fashion_mnist.py", ROOT / "benchmarks/configs/stock_mbv2_fashion_mnist.py"


def branches(*names: str) -> tuple[Path, list[str]]:
    """Our config with other branches."""
    return REP, [f"model.backbone.branches={names!r}".replace(" ", "")]


CONTENDERS = {
    "bottleneck, identity (default)": branches("bottleneck", "identity"),
    "bottleneck, identity, online": (REP, ["model.backbone.online=True"]),
    "plain (conv3x3)": branches("conv3x3"),
    "bottleneck, conv3x3, identity": branches("bottleneck", "conv3x3", "identity"),
    "conv3x3, conv1x1, identity": branches("conv3x3", "conv1x1", "identity"),
    "bottleneck, conv3x3, identity, avgpool": branches("bottleneck", "conv3x3", "identity", "avgpool"),
    "stock MobileNetV2": (STOCK, []),
}
WARM_UP = [
    "param_scheduler._delete_=True",
    "param_scheduler.type=OneCycleLR",
    "param_scheduler.eta_max=0.1",
    "param_scheduler.pct_start=0.2",
    "param_scheduler.by_epoch=True",
    "param_scheduler.convert_to_iter_based=True",
]
DEFAULT = ("bottleneck, identity (default)", "bottleneck, identity, online", "plain (conv3x3)", "stock MobileNetV2")


def options_of(name: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Everything a run changes in its config."""
    return [
        *fashion_options(seed, args.epochs, args.samples),
        f"model.backbone.widen_factor={args.width}",
        *CONTENDERS[name][1],
        *(WARM_UP if args.warm_up else []),
        *args.cfg_options,
    ]


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(DEFAULT), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--warm-up", action="store_true", help="one-cycle schedule with warm-up instead of the config's"
    )
    add_arguments(parser, "bench_fashion_mnist")
    add_fashion_arguments(parser)
    args = parser.parse_args()

    label = f"e{args.epochs}_n{args.samples}_w{args.width}" + ("_warm" if args.warm_up else "")
    jobs = [
        Job(name, seed, CONTENDERS[name][0], options_of(name, seed, args), label)
        for seed in range(args.seeds)
        for name in args.contenders
    ]
    found = run_all(jobs, Path(args.work_dir), args.workers)
    schedule = "one-cycle with warm-up" if args.warm_up else "cosine"
    size = f"{args.samples} images, {args.epochs} epochs, {schedule}, width {args.width}, {args.seeds} seeds"
    print_scores(f"Fashion-MNIST, {size}", found, "plain (conv3x3)")


if __name__ == "__main__":
    main()
