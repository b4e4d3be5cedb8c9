#!/usr/bin/env python
"""Train a model from a config of mmpretrain, mmdet or mmseg, with the flags of mmpretrain's own tool.

Checkpoints are read without unpickling code and written in one step. On a machine without a graphics card ``--amp``
trains in bfloat16.
"""

import argparse

from rep_plugin.optional import require_or_exit

require_or_exit("mmengine", "mmcv", extra="openmmlab")

from mmengine.config import Config

from rep_plugin.errors import ArgumentError
from rep_plugin.openmmlab.cli import (
    add_runner_arguments,
    build_runner,
    complete_dataloader,
    load_config,
    require_checkpoint,
    require_whole_checkpoint,
    run,
    use_amp,
)
from rep_plugin.openmmlab.data import check_data


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a model")
    add_runner_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="checkpoint to resume from; without a path, the latest one in the work directory",
    )
    parser.add_argument("--no-validate", action="store_true", help="do not evaluate during training")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate by the real batch size")
    parser.add_argument(
        "--no-persistent-workers", action="store_true", help="set persistent_workers=False in the dataloaders"
    )
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Work the command line into the config.

    Raises:
        ArgumentError: the config lacks what a flag needs.
    """
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        use_amp(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    if args.auto_scale_lr:
        if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
            raise ArgumentError(
                f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set"
            )
        cfg.auto_scale_lr.enable = True
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)  # now, for num_workers, and once more at the end: options win
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        # torch refuses persistent workers where there are none.
        workers = bool((cfg.get(name) or {}).get("num_workers"))
        complete_dataloader(cfg, name, not args.no_pin_memory, persistent_workers=workers)
        if args.no_persistent_workers and cfg.get(name) is not None:
            cfg[name].persistent_workers = False
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def main() -> None:
    args = parse_args()
    cfg = merge_args(load_config(args), args)
    require_checkpoint(cfg.get("load_from"))
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    runner = build_runner(cfg)
    if cfg.get("resume"):
        require_whole_checkpoint(runner)
    runner.train()


if __name__ == "__main__":
    run(main)
