"""One table of a finished run: trained form, deployed form and stock MobileNetV2.

rep-plugin compare CONFIG WORK_DIR

Predicts the whole validation set with the last checkpoint and with deploy.pth, and compares them image by image;
measures the errors on real images in float64 and float32, at the configured size, 224 and 225; times all three
with one thread and batch 1, interleaved. Ends with an error where a prediction differs, else with what to do next.
"""

import argparse
import shutil
import sys
from pathlib import Path

from rep_plugin.commands.parser import count
from rep_plugin.optional import is_missing, require

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
    parser.add_argument(
        "--stock-record",
        nargs="+",
        metavar="FILE",
        help="records of rep-plugin experiments with the stock network's top-1, one a seed",
    )
    parser.add_argument("--rounds", type=count, default=100, help="timed calls of each network; default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Load, predict, measure, print."""
    for package in ("mmengine", "mmcv", "mmpretrain", "timm"):
        require(package, "openmmlab", "rep-plugin compare")
    from rep_plugin.openmmlab.cli import session
    from rep_plugin.openmmlab.compare import compare_deployed, read_stock_record
    from rep_plugin.timm import load_timm

    with session():
        record = read_stock_record(*args.stock_record) if args.stock_record else None
        checkpoint = compare_deployed(
            args.config,
            args.work_dir,
            args.stock,
            lambda model_args: load_timm(args.stock, model_args=model_args),
            args.rounds,
            record,
        )
    print("\n".join(next_steps(args.config, checkpoint)))


def next_steps(config: str, checkpoint: Path) -> list[str]:
    """Return what a finished run invites to, as commands that work as they stand.

    Args:
        config: the run's config.
        checkpoint: its last; ``deploy.py`` and ``deploy.pth`` lie beside it.

    Returns:
        The lines.
    """
    checkpoint = Path(as_typed(str(checkpoint)))
    program, folder = called_as(), checkpoint.parent
    deployed = f"{folder / 'deploy.py'} {folder / 'deploy.pth'}"
    steps = {
        "test": f"{program} test {deployed}",
        "prune": f"{program} prune {config} {checkpoint} --macs 0.5 --scores l1 --round-to 8",
        "export": f"{program} export {deployed} {folder / 'deploy.onnx'}",
        "own images": 'inherit the config: _base_ = ["rep_plugin::rep_mbv2_mini_cub.py"] (docs/quickstart_mmpretrain.md)',
    }
    if is_missing("onnx") or is_missing("onnxruntime"):
        install = f"{as_typed(sys.executable)} -m pip install 'rep-plugin[export]'"
        steps["export"] = f"{install} && {steps['export']}"
    files = ", ".join(str(path) for path in (checkpoint, *(folder / f"deploy.{end}" for end in ("pth", "py", "json"))))
    return [f"files: {files}", "next:", *(f"  {what:<12}{how}" for what, how in steps.items())]


def called_as() -> str:
    """Return this program as it can be typed again."""
    called = Path(sys.argv[0])
    if called.name == "rep-plugin" and called.is_file():
        found = shutil.which("rep-plugin")
        return "rep-plugin" if found and called.samefile(found) else as_typed(sys.argv[0])
    return f"{as_typed(sys.executable)} -m rep_plugin"


def as_typed(path: str) -> str:
    """Return a path as a user would type it: relative to here where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
