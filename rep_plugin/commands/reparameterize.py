"""Merge a trained checkpoint into its deployed form: deploy.pth, deploy.py, and the report: deploy.json, deploy.html.

rep-plugin reparameterize CONFIG CHECKPOINT
rep-plugin reparameterize CONFIG CHECKPOINT --no-real-data --out-dir deployed
"""

import argparse

from rep_plugin.commands.parser import add_trained_arguments
from rep_plugin.commands.written import print_written
from rep_plugin.optional import require

HELP = "merge a trained checkpoint into its deployed form"
OUTPUTS = ("deploy.pth", "deploy.py", "deploy.json", "deploy.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of all commands that read a trained checkpoint."""
    add_trained_arguments(parser, no_real_data="prove on random images alone, no data set needed")
    parser.add_argument(
        "--fold-bn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="fold the network's own BNs as well; deploy.py then merges when it builds; default: --no-fold-bn",
    )


def run(args: argparse.Namespace) -> None:
    """Load, merge, prove, write, print the report."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin reparameterize")
    from rep_plugin.openmmlab.artefacts import write_deployed
    from rep_plugin.openmmlab.cli import open_trained, output_folder, session

    with session():
        out_dir = output_folder(args, OUTPUTS)
        trained = open_trained(args.config, args.checkpoint, args.cfg_options, not args.no_real_data)
        report = write_deployed(trained.model, trained.cfg, out_dir, trained.inputs, trained.dataset_meta, args.fold_bn)
        report.print()
        print_written(out_dir / name for name in OUTPUTS)
