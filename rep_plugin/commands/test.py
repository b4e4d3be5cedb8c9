"""Test a model on the data set of its config (mmpretrain's, mmdet's or mmseg's), with the flags of mmpretrain's own tool.

rep-plugin test CONFIG CHECKPOINT
rep-plugin test CONFIG CHECKPOINT --out predictions.pkl
rep-plugin test MODEL.onnx --config CONFIG                # a classifier as rep-plugin export wrote it, float or int8
rep-plugin test MODEL.onnx --config CONFIG --runtime openvino
"""

import argparse

from rep_plugin.commands.parser import add_runner_arguments, count, number_in
from rep_plugin.optional import require

HELP = "test a checkpoint or an ONNX file on the data set of its config"
RUNTIMES = ("onnxruntime", "openvino")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add mmpretrain's flags."""
    add_runner_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="checkpoint file; none for MODEL.onnx")
    onnx = parser.add_argument_group("with MODEL.onnx in the place of CONFIG CHECKPOINT")
    onnx.add_argument("--config", metavar="CONFIG", dest="data_config", help="config that it was exported with")
    onnx.add_argument("--runtime", choices=RUNTIMES, help=f"what runs it, on the CPU; default: {RUNTIMES[0]}")
    parser.add_argument(
        "--out", metavar="FILE", help="file for the results: .pkl for predictions, .json too for metrics"
    )
    parser.add_argument("--out-item", choices=["metrics", "pred"], help="what goes into --out; default: pred")
    parser.add_argument("--show-dir", metavar="FOLDER", help="folder for the images with their predictions")
    parser.add_argument("--show", action="store_true", help="show the images with their predictions in a window")
    parser.add_argument("--interval", type=count, default=1, help="show every so many images; default: %(default)s")
    parser.add_argument(
        "--wait-time", type=number_in("[0, inf)"), default=2, help="seconds a window stays; default: %(default)s"
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation by tta_model and tta_pipeline of the config; default: average with the mirrored",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Sort CONFIG CHECKPOINT from MODEL.onnx --config CONFIG, and refuse options that do not fit."""
    args.onnx = args.config.endswith(".onnx")
    if args.onnx:
        if args.data_config is None or args.checkpoint is not None:
            got = f"the checkpoint {args.checkpoint}" if args.checkpoint else "no config"
            args.parser.error(f"expected {args.config} --config CONFIG, got {got}")
        args.config, args.checkpoint = args.data_config, args.config
        if args.amp:
            args.parser.error(f"--amp does not go with {args.checkpoint}, whose precision is its own")
    elif args.checkpoint is None:
        args.parser.error(f"expected CONFIG CHECKPOINT or MODEL.onnx --config CONFIG, got {args.config}")
    for name, value in (("--config", args.data_config), ("--runtime", args.runtime)):
        if value is not None and not args.onnx:
            args.parser.error(f"{name} goes with MODEL.onnx, got {args.config}")
    if args.out_item is not None and args.out is None:
        args.parser.error(f"--out-item {args.out_item} needs --out, which is not given")
    if args.out is not None and args.out_item != "metrics" and not args.out.endswith((".pkl", ".pickle")):
        args.parser.error(f"--out is {args.out}, expected a name ending in .pkl or .pickle for predictions")


def run(args: argparse.Namespace) -> None:
    """Test, write the results."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin test")
    from rep_plugin.openmmlab.cli import session
    from rep_plugin.openmmlab.runs import test

    with session():
        test(args)
