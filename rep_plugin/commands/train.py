"""Train a model from a config of mmpretrain, mmdet or mmseg, with the flags of mmpretrain's own tool.

rep-plugin train CONFIG
rep-plugin train CONFIG --resume                                          # after an interruption
torchrun --nproc-per-node 2 -m rep_plugin train CONFIG --launcher pytorch

Checkpoints are read without unpickling code and written in one step. On a machine without a graphics card --amp trains
in bfloat16.
"""

import argparse

from rep_plugin.commands.parser import add_runner_arguments
from rep_plugin.optional import require

HELP = "train a model from a config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add mmpretrain's flags."""
    add_runner_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="checkpoint to resume from; without a path, the latest one in the work directory",
    )
    parser.add_argument("--no-validate", action="store_true", help="do not evaluate during training")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate by the real batch size")
    parser.add_argument(
        "--no-persistent-workers", action="store_true", help="set persistent_workers=False in the dataloaders"
    )


def run(args: argparse.Namespace) -> None:
    """Train."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin train")
    from rep_plugin.openmmlab.cli import session
    from rep_plugin.openmmlab.runs import train

    with session():
        train(args)
