"""Training and testing as a command line asks for."""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

from rep_plugin.errors import ArgumentError, RepPluginError
from rep_plugin.openmmlab.checkpoint import find_latest_checkpoint
from rep_plugin.openmmlab.cli import (
    build_runner,
    complete_dataloader,
    explain_misfits,
    is_another_network,
    load_config,
    merge_options,
    require_checkpoint,
    require_whole_checkpoint,
    use_amp,
)
from rep_plugin.openmmlab.data import check_data
from rep_plugin.openmmlab.hooks.runner_utils import log_advice
from rep_plugin.openmmlab.resuming import require_resumable


def train(args: argparse.Namespace) -> None:
    """Train as the arguments of ``rep-plugin train`` say."""
    cfg = merge_train_args(load_config(args), args)
    require_checkpoint(cfg.get("load_from"))
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    if cfg.get("resume"):
        require_resumable(cfg)
    with no_empty_folder(cfg.work_dir):
        runner = build_runner(cfg)
        if cfg.get("resume") or is_another_network(cfg):
            require_whole_checkpoint(runner)
        else:
            explain_misfits(runner)
        log_advice(runner)
        runner.train()


@contextmanager
def no_empty_folder(work_dir: str) -> Iterator[None]:
    """Remove a work folder that is new where nothing comes of a run but its config and log: a Runner makes it at once."""
    fresh = not os.path.exists(work_dir)
    try:
        yield
    except (RepPluginError, OSError):
        if fresh and not any(path.suffix in (".pth", ".json") for path in Path(work_dir).rglob("*")):
            shutil.rmtree(work_dir, ignore_errors=True)
        raise


def test(args: argparse.Namespace) -> None:
    """Test as the arguments of ``rep-plugin test`` say, and write the results."""
    cfg = merge_test_args(load_config(args), args)
    require_checkpoint(cfg.load_from)
    check_data(cfg, ("test_dataloader",))
    if args.onnx:
        use_onnx(cfg, args.runtime or "onnxruntime", args.tta)
    with no_empty_folder(cfg.work_dir):
        runner = build_runner(cfg)
        if not args.onnx:
            require_whole_checkpoint(runner)
        if args.out and args.out_item != "metrics":
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
        metrics = runner.test()
    if args.out and args.out_item == "metrics":
        mmengine.dump(metrics, args.out)


def merge_train_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Work the command line into the config.

    Args:
        cfg: the config; it is changed.
        args: the command line.

    Returns:
        The config.

    Raises:
        ArgumentError: the config lacks what a flag needs.
    """
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        use_amp(cfg)
    if args.resume == "auto" and find_latest_checkpoint(cfg.work_dir) is None:
        cfg.resume = False  # nothing to resume from yet: the training begins, with the weights it begins with
    elif args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    if args.auto_scale_lr:
        if not (cfg.get("auto_scale_lr") or {}).get("base_batch_size"):
            raise ArgumentError(
                f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set"
            )
        cfg.auto_scale_lr.enable = True
    merge_options(cfg, args.cfg_options)  # now, for num_workers, and once more at the end: options win
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        # torch refuses persistent workers where there are none.
        workers = bool((cfg.get(name) or {}).get("num_workers"))
        complete_dataloader(cfg, name, not args.no_pin_memory, persistent_workers=workers)
        if args.no_persistent_workers and cfg.get(name) is not None:
            cfg[name].persistent_workers = False
    merge_options(cfg, args.cfg_options)
    return cfg


def merge_test_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Work the command line into the config.

    Args:
        cfg: the config; it is changed.
        args: the command line.

    Returns:
        The config.

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
    merge_options(cfg, args.cfg_options)
    return cfg


def use_onnx(cfg: Config, runtime: str, tta: bool = False) -> None:
    """Put the ONNX file that is named as the checkpoint in the place of the network.

    Args:
        cfg: the config; it is changed.
        runtime: what runs the file.
        tta: the network is inside of test-time augmentation.

    Raises:
        ArgumentError: the config is not one of mmpretrain.
    """
    if (scope := cfg.get("default_scope", "mmpretrain")) != "mmpretrain":
        raise ArgumentError(
            f"{cfg.load_from} can be tested as a classifier alone, expected a config of mmpretrain, got {scope}"
        )
    place, key = (cfg.model, "module") if tta else (cfg, "model")
    place[key] = dict(type="rep_plugin.OnnxClassifier", path=cfg.load_from, model=place[key], runtime=runtime)
    cfg.load_from = None


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
        if not cfg.test_dataloader.dataset.get("pipeline"):
            raise ArgumentError(
                "--tta needs a pipeline in test_dataloader.dataset, or tta_pipeline in the config, got none"
            )
        *head, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
        flips = [dict(type="RandomFlip", prob=prob) for prob in (1.0, 0.0)]
        cfg.tta_pipeline = [*head, dict(type="TestTimeAug", transforms=[flips, [pack]])]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
