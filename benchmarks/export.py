#!/usr/bin/env python
"""ONNX Runtime and OpenVINO against PyTorch, on images: merged networks, every bilinear pooling, a pruned network.

    python benchmarks/export.py                                  # about five minutes on one core
    python benchmarks/export.py --only 'bcnn*' --size 128

Random weights; every BN has random gammas (a quarter negative), betas, and the statistics of the images. Every network
is exported with open batch and open size and compared on eight images, on one and on three, and at two more sizes. Errors
are the largest over all of these, in float32: each channel of a map against its own size, each logit against itself, so
that a logit near zero has a large one; "float32 itself" is how far PyTorch's own lies from its float64. Times are medians
of one image, one after the other in turns, with torch's threads. Exits with 1 where the export is refused: an error that
is over its tolerance and that rounding does not explain; or where another image changes the output by less than 1e-3.
"""

import argparse
import fnmatch
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import add_record, make_table, write_table
from rich.console import Console
from torch import Tensor, nn

import rep_plugin
from rep_plugin.bilinear.methods import METHODS
from rep_plugin.measure.verify import MIN_SENSITIVITY, rounding_error
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.export import read_images

IMAGES = Path(__file__).resolve().parents[1] / "data/mini_cub/images"


def named(name: str, **options) -> Callable[[Tensor], nn.Module]:
    """A timm model with random, calibrated BNs."""
    return lambda x: calibrate_random_bn_(timm.create_model(name, **options), x)


def pruned(name: str) -> Callable[[Tensor], nn.Module]:
    """The same, without 30 % of its channels."""

    def build(x: Tensor) -> nn.Module:
        model = named(name)(x)
        plan = rep_plugin.plan_pruning(model, x[:1], scores="l1", prune_fraction=0.3, round_to=8)
        rep_plugin.apply_plan(model, plan, example_input=x[:2])
        return model

    return build


NETWORKS = {
    "rep_mobilenetv2_100": named("rep_mobilenetv2_100"),
    "rep_repvgg_a0": named("rep_repvgg_a0"),
    "dbb_resnet18": named("dbb_resnet18"),
    "rep_mobileone_s0": named("rep_mobileone_s0"),
    "mobilenetv3_large_100, pruned by 30 %": pruned("mobilenetv3_large_100"),
    "rep_mobilenetv2_100, features_only": named("rep_mobilenetv2_100", features_only=True),
    **{f"bcnn_rep_mobilenetv2_100, {method}": named("bcnn_rep_mobilenetv2_100", method=method) for method in METHODS},
}


def main() -> int:
    """Build, export, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of these names")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--images", default=str(IMAGES), help="folder of images")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each runtime")
    parser.add_argument("--dynamo", action="store_true", help="torch's newer exporter")
    add_record(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cfg = timm.data.resolve_data_config({"input_size": (3, args.size, args.size)}, pretrained_cfg={})
    x = read_images(args.images, cfg)
    columns = ("network", "merged", "params", "sensitivity", "ONNX Runtime", "OpenVINO", "float32 itself", "PyTorch ms")
    title = f"against PyTorch in float32, {args.size}x{args.size} images, any batch, any size"
    table = make_table(title, (*columns, "ONNX Runtime ms", "OpenVINO ms", ""), ["network", ""])
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, build in NETWORKS.items():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only):
                continue
            torch.manual_seed(0)
            model, path = build(x), Path(folder) / "model.onnx"
            try:
                report = rep_plugin.export_onnx(
                    model, path, x, dynamic_size=True, rounds=args.rounds, dynamo=args.dynamo
                )
            except rep_plugin.EquivalenceError as error:
                failures += 1
                table.add_row(name, *[""] * (len(table.columns) - 2), f"FAILED: {error}")
                continue
            ort, openvino = report.runtimes
            good = report.sensitivity >= MIN_SENSITIVITY
            failures += not good
            cells = (str(len(report.blocks)), f"{report.params_after:,}", f"{report.sensitivity:.1e}")
            cells += (
                f"{ort.max_rel_error:.1e}",
                f"{openvino.max_rel_error:.1e}",
                f"{rounding_error(model, x[:2]):.1e}",
            )
            times = (report.pytorch_milliseconds, ort.milliseconds, openvino.milliseconds)
            table.add_row(name, *cells, *(f"{value:.1f}" for value in times), "ok" if good else "FAILED")
            print(f"{name}: {report.max_rel_error:.1e}, {report.seconds:.0f} s", file=sys.stderr)
    Console(width=170).print(table)
    if args.record:
        write_table(table, "export")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
