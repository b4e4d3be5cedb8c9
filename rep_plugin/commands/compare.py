"""One table of a finished run: trained form, deployed form and stock MobileNetV2.

rep-plugin compare CONFIG WORK_DIR

Predicts the whole validation set with the last checkpoint and with deploy.pth, and compares them image by image;
measures the errors on real images in float64 and float32, at the configured size, 224 and 225; times all three
with one thread and batch 1, interleaved. Ends with an error where a prediction differs.
"""

import argparse

from rep_plugin.optional import require

HELP = "compare the trained and the deployed form of a finished run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run, and what to time beside it."""
    parser.add_argument("config", metavar="CONFIG", help="config of the run")
    parser.add_argument("work_dir", metavar="WORK_DIR", help="its folder, with checkpoints, deploy.py and deploy.pth")
    parser.add_argument(
        "--stock",
        default="mobilenetv2_050",
        metavar="NAME",
        help="timm name of the stock network to time (not trained); default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each network; default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Load, predict, measure, print."""
    for package in ("mmengine", "mmcv", "mmpretrain", "timm"):
        require(package, "openmmlab", "rep-plugin compare")
    from rep_plugin.openmmlab.cli import session
    from rep_plugin.openmmlab.compare import compare_deployed
    from rep_plugin.timm import load_timm

    with session():
        compare_deployed(
            args.config,
            args.work_dir,
            args.stock,
            lambda model_args: load_timm(args.stock, model_args=model_args),
            args.rounds,
        )
