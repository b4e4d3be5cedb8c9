#!/usr/bin/env python
"""Test a model on the data set of its config (mmpretrain's, mmdet's or mmseg's), with the flags of mmpretrain's own tool."""

import argparse
from copy import deepcopy

from rep_plugin.optional import require_or_exit

require_or_exit("mmengine", "mmcv", extra="openmmlab")

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

from rep_plugin.errors import ArgumentError
from rep_plugin.openmmlab.cli import (
    add_runner_arguments,
    build_runner,
    complete_dataloader,
    load_config,
    require_checkpoint,
    require_whole_checkpoint,
    run,
)
from rep_plugin.openmmlab.data import check_data


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Test a model")
    add_runner_arguments(parser)
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument("--out", help="file for the results: .pkl for predictions, .json too for metrics")
    parser.add_argument("--out-item", choices=["metrics", "pred"], help="what goes into --out; default: pred")
    parser.add_argument("--show-dir", help="folder for the images with their predictions")
    parser.add_argument("--show", action="store_true", help="show the images with their predictions in a window")
    parser.add_argument("--interval", type=int, default=1, help="show every so many images")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds a window stays")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation by tta_model and tta_pipeline of the config; default: average with the mirrored",
    )
    args = parser.parse_args(argv)
    if args.out_item is not None and args.out is None:
        parser.error(f"--out-item {args.out_item} needs --out, which is not given")
    if args.out is not None and args.out_item != "metrics" and not args.out.endswith((".pkl", ".pickle")):
        parser.error(f"--out is {args.out}, expected a name ending in .pkl or .pickle for predictions")
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Work the command line into the config.

    Raises:
        ArgumentError: the config lacks what a flag needs.
    """
    cfg.load_from = args.checkpoint
    if cfg.get("test_dataloader") is None or cfg.get("test_cfg") is None:
        raise ArgumentError(f"config {args.config} has no test_dataloader or test_cfg, expected both")
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir is not None:
        if args.tta:
            # VisualizationHook takes the list of augmented images for one image and fails.
            raise ArgumentError("--tta does not go with --show or --show-dir, expected one of them")
        hook = (cfg.get("default_hooks") or {}).get("visualization")
        if hook is None:
            raise ArgumentError(
                "--show and --show-dir need default_hooks.visualization in the config, which is not set"
            )
        hook.update(
            enable=True, show=args.show, wait_time=args.wait_time, out_dir=args.show_dir, interval=args.interval
        )
    if args.tta:
        use_tta(cfg)
    complete_dataloader(cfg, "test_dataloader", not args.no_pin_memory)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def use_tta(cfg: Config) -> None:
    """Wrap the model and the pipeline for test-time augmentation.

    Raises:
        ArgumentError: a config that is not mmpretrain's has no tta_model or tta_pipeline.
    """
    scope = cfg.get("default_scope", "mmpretrain")
    if scope != "mmpretrain" and not ("tta_model" in cfg and "tta_pipeline" in cfg):
        raise ArgumentError(f"--tta needs tta_model and tta_pipeline in a config of {scope}, expected both")
    cfg.setdefault("tta_model", dict(type="mmpretrain.AverageClsScoreTTA"))
    if "tta_pipeline" not in cfg:
        *head, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
        flips = [dict(type="RandomFlip", prob=prob) for prob in (1.0, 0.0)]
        cfg.tta_pipeline = [*head, dict(type="TestTimeAug", transforms=[flips, [pack]])]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    args = parse_args()
    cfg = merge_args(load_config(args), args)
    require_checkpoint(cfg.load_from)
    check_data(cfg, ("test_dataloader",))
    runner = build_runner(cfg)
    require_whole_checkpoint(runner)
    if args.out and args.out_item != "metrics":
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out and args.out_item == "metrics":
        mmengine.dump(metrics, args.out)


if __name__ == "__main__":
    run(main)
