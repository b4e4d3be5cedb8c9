#!/usr/bin/env python
"""Plans by latency against plans by multiply-adds: asked, planned and measured afresh, one thread, batch 1, in turns.

    python benchmarks/prune_latency.py                                    # about ten minutes
    python benchmarks/prune_latency.py --only resnet18 --shares 0.5

Random weights with calibrated BN. For every network and share of the dense model's time: the share the plan expects, a new
measurement of the pruned model next to the dense one, and the same for a plan by MACs with as many multiply-adds as the
first has (``--round-to`` for these alone). Exits with 1 where a plan is over 10 % off, or slower than dense.
"""

import argparse
import sys
import time
import warnings

import timm
import torch
from common import add_record, make_table, print_failures, pruned, write_table
from rich.console import Console

from rep_plugin import plan_pruning
from rep_plugin.measure.latency import eager_calls, interleaved_medians, torch_threads
from rep_plugin.testing import calibrate_random_bn_

TOLERANCE = 0.10


def main() -> int:
    """Plan, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one network of timm (default: mobilenetv2_100 and resnet18)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.8, 0.6, 0.5], help="asked shares of the dense time"
    )
    parser.add_argument("--scores", default="l1", choices=["l1", "l2", "bn_gamma", "random"], help="what goes first")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels")
    parser.add_argument("--round-to", type=int, default=1, help="of the plans by MACs")
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each contender")
    add_record(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    shape = (1, 3, args.size, args.size)
    title = f"one thread, batch 1, {args.size}x{args.size}, {args.scores}, {args.rounds} rounds in turns"
    columns = ("network", "dense ms", "asked", "planned", "measured", "off", "times faster", "MACs", "plan s")
    table = make_table(
        title, (*columns, "by MACs: MACs", "by MACs: measured", "by MACs: times faster", ""), ["network", ""]
    )
    failures = []
    for name in [args.only] if args.only else ["mobilenetv2_100", "resnet18"]:
        torch.manual_seed(0)
        dense = calibrate_random_bn_(timm.create_model(name), torch.randn(8, 3, 96, 96))
        for share in args.shares:
            started = time.perf_counter()
            plan = plan_pruning(dense, shape, args.scores, latency=share)
            seconds = time.perf_counter() - started
            plain = plan_pruning(dense, shape, args.scores, macs=plan.macs_after, round_to=args.round_to)
            models = {"dense": dense, "latency": pruned(dense, plan), "macs": pruned(dense, plain)}
            with torch_threads(1):
                times = interleaved_medians(eager_calls(models, torch.randn(shape)), args.rounds)
            measured, other = times["latency"] / times["dense"], times["macs"] / times["dense"]
            wrong = [
                text
                for text, bad in {
                    f"over {TOLERANCE:.0%} off": abs(measured / share - 1) > TOLERANCE,
                    "slower than dense": measured > 1,
                }.items()
                if bad
            ]
            failures += [f"{name} at {share}: {text}" for text in wrong]
            cells = (
                name,
                f"{times['dense'] * 1e3:.1f}",
                f"{share:.2f}",
                f"{plan.latency_after / plan.latency_before:.3f}",
            )
            cells += (f"{measured:.3f}", f"{measured / share - 1:+.1%}", f"{1 / measured:.2f}")
            cells += (f"{plan.macs_after / plan.macs_before:.3f}", f"{seconds:.0f}")
            cells += (f"{plain.macs_after / plain.macs_before:.3f}", f"{other:.3f}", f"{1 / other:.2f}")
            table.add_row(*cells, ", ".join(wrong) or "ok")
            print(f"{name} at {share}: planned {cells[3]}, measured {cells[4]}, by MACs {other:.3f}", file=sys.stderr)
    console = Console(width=150)
    console.print(table)
    if args.record:
        write_table(table, "prune_latency")
    return print_failures(console, failures)


if __name__ == "__main__":
    sys.exit(main())
