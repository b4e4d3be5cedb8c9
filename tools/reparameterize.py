#!/usr/bin/env python
"""Merge a trained checkpoint into its deployed form: deploy.pth, deploy.py and deploy.json beside it."""

import argparse

from rep_plugin.optional import require_or_exit

require_or_exit("mmengine", "mmcv", extra="openmmlab")

from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.cli import add_trained_arguments, open_trained, output_folder, run

OUTPUTS = ("deploy.pth", "deploy.py", "deploy.json")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_trained_arguments(parser, no_real_data="prove on random images alone, no data set needed")
    return parser.parse_args()


def main() -> None:
    """Load, merge, prove, write, print the report."""
    args = parse_args()
    out_dir = output_folder(args, OUTPUTS)
    trained = open_trained(args.config, args.checkpoint, args.cfg_options, not args.no_real_data)
    report = write_deployed(trained.model, trained.cfg, out_dir, trained.inputs, trained.dataset_meta)
    report.print()
    print(f"written: {out_dir / 'deploy.pth'} and deploy.py")


if __name__ == "__main__":
    run(main)
