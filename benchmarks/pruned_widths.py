#!/usr/bin/env python
"""What multiples of 8 are worth: networks pruned to one budget with and without rounding, timed in the runtimes in turns.

    python benchmarks/pruned_widths.py                  # ten minutes
    python benchmarks/pruned_widths.py --only resnet18

Random weights with calibrated BN, one thread, one image. All times are shares of the network's before pruning.
"""

import argparse
import sys
import warnings

import timm
import torch
from common import add_record, make_table, pruned, write_table
from rich.console import Console

from rep_plugin import plan_pruning
from rep_plugin.depth.timing import call_of, deployed, time_in_turns
from rep_plugin.testing import calibrate_random_bn_

NETWORKS = ("mobilenetv2_050", "mobilenetv2_100", "resnet18", "mobilenetv3_large_100")
ROUNDED = {"default": None, "multiples of 4": 4, "not rounded": 1}


def main() -> int:
    """Plan, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NETWORKS, help="networks of timm; default: %(default)s")
    parser.add_argument("--macs", type=float, default=0.6, help="share of the multiply-adds; default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels; default: %(default)s")
    add_record(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    x = torch.randn(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    title = f"pruned to {args.macs} of the multiply-adds, scores flow, one thread, one image of {args.size} pixels"
    runtimes = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
    columns = [f"{runtime}: {kind}" for runtime in runtimes for kind in ROUNDED]
    table = make_table(title, ("network", "MACs: default", "MACs: not rounded", *columns), ["network"])
    for name in args.only:
        torch.manual_seed(0)
        dense = calibrate_random_bn_(timm.create_model(name), torch.randn(8, 3, 96, 96))
        models, macs = {"dense": dense}, {}
        for kind, round_to in ROUNDED.items():
            plan = plan_pruning(dense, x, "flow", macs=args.macs, round_to=round_to)
            models[kind], macs[kind] = pruned(dense, plan), f"{plan.macs_after / plan.macs_before:.3f}"
        models = {kind: deployed(model, x) for kind, model in models.items()}
        shares = []
        for runtime in runtimes.values():
            times = time_in_turns({kind: call_of(runtime, model, x, 1) for kind, model in models.items()}, 1)
            shares += [f"{times[kind] / times['dense']:.2f}" for kind in ROUNDED]
        table.add_row(name, macs["default"], macs["not rounded"], *shares)
        print(f"{name}: {', '.join(shares)}", file=sys.stderr)
    Console(width=150).print(table)
    if args.record:
        write_table(table, "pruned_widths")
    return 0


if __name__ == "__main__":
    sys.exit(main())
