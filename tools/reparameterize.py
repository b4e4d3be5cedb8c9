#!/usr/bin/env python
"""Merge a trained checkpoint into its deployed form: deploy.pth, deploy.py and deploy.json beside it."""

import argparse
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from train import run

from rep_plugin.mm_artefact import load_model, real_inputs, write_deployed
from rep_plugin.mm_data import check_data


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config the checkpoint was trained with")
    parser.add_argument("checkpoint", help="trained checkpoint")
    parser.add_argument("--out-dir", help="folder for the files; default: the checkpoint's")
    parser.add_argument(
        "--no-real-data", action="store_true", help="prove on random pictures alone, no data set needed"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config as key=value")
    return parser.parse_args()


def main() -> None:
    """Load, merge, prove, write, print the report."""
    args = parse_args()
    for path in (args.config, args.checkpoint):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist, expected a file")
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    model, meta = load_model(cfg, args.checkpoint)
    inputs, dataset_meta = None, meta.get("dataset_meta")
    if not args.no_real_data and cfg.get("val_dataloader"):
        check_data(cfg, ("val_dataloader",))
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
            loader = Runner.build_dataloader(cfg.val_dataloader)
        inputs, dataset_meta = real_inputs(model, loader), dataset_meta or loader.dataset.metainfo
    out_dir = args.out_dir or Path(args.checkpoint).resolve().parent
    report = write_deployed(model, cfg, out_dir, inputs, dataset_meta)
    report.print()
    print(f"written: {Path(out_dir) / 'deploy.pth'} and deploy.py")


if __name__ == "__main__":
    run(main, RuntimeError, ValueError, TypeError)
