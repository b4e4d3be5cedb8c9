#!/usr/bin/env python
"""Merge a trained checkpoint into its deployed form: deploy.pth, deploy.py and deploy.json beside it."""

import argparse

from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.cli import add_arguments, open_trained, run

OUTPUTS = ("deploy.pth", "deploy.py", "deploy.json")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, no_real_data="prove on random pictures alone, no data set needed")
    return parser.parse_args()


def main() -> None:
    """Load, merge, prove, write, print the report."""
    args = parse_args()
    cfg, model, inputs, dataset_meta, out_dir = open_trained(args, outputs=OUTPUTS)
    report = write_deployed(model, cfg, out_dir, inputs, dataset_meta)
    report.print()
    print(f"written: {out_dir / 'deploy.pth'} and deploy.py")


if __name__ == "__main__":
    run(main, RuntimeError, ValueError, TypeError)
