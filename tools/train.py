#!/usr/bin/env python
"""Train a model from a config of mmpretrain, mmdet or mmseg, with the flags of mmpretrain's own tool.

Checkpoints are read without unpickling code and written in one step. On a machine without a graphics card ``--amp``
trains in bfloat16.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _needs as _needs
import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from rep_plugin.backbones.loading import CheckpointMismatchError, refuse_misfits
from rep_plugin.blocks.annealed import AnnealError
from rep_plugin.checkpoint import UnreadableCheckpointError, UnsafeCheckpointError
from rep_plugin.hooks.live import HookError
from rep_plugin.mm_checkpoint import enable_safe_loading
from rep_plugin.mm_data import DataError, check_data, guard_dataloaders, name_broken_pictures, one_line

CHECKPOINT_ERRORS = (UnsafeCheckpointError, UnreadableCheckpointError, CheckpointMismatchError)


class UsageError(ValueError):
    """A flag or a path on the command line does not fit; the message is one line."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags which training and testing share."""
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", help="folder for logs and results; default: work_dirs/<name of the config>")
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision (bfloat16 on the CPU)")
    parser.add_argument("--no-pin-memory", action="store_true", help="set pin_memory=False in the dataloaders")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help='changes to the config as key=value; lists as key="[a,b]" or key=a,b, in quotes and without blanks',
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="job launcher")
    # torch.distributed.launch passes the spelling with a hyphen.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a model")
    add_common_arguments(parser)
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


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and settle what both tools settle alike.

    Raises:
        UsageError: there is no such file.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not os.path.isfile(args.config):
        raise UsageError(f"config {args.config} does not exist, expected a file")
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    return cfg


def require_checkpoint(path: Any) -> None:
    """Raises UsageError if ``path`` is neither an address, nor a file, nor (deepspeed) a folder."""
    if path and "://" not in str(path) and not os.path.exists(os.path.expanduser(path)):
        raise UsageError(f"checkpoint {path} does not exist, expected a file")


def complete_dataloader(cfg: Config, name: str, **defaults: Any) -> None:
    """Fill in the defaults of one dataloader where the config says nothing: those of the stock tool of its scope.

    mmpretrain's pictures are of one size and stacked here; mmdet's and mmseg's go to the data preprocessor as a list.
    """
    if cfg.get(name) is not None:
        if cfg.get("default_scope", "mmpretrain") == "mmpretrain":
            defaults["collate_fn"] = dict(type="default_collate")
        for key, value in {"pin_memory": get_device() != "cpu", **defaults}.items():
            cfg[name].setdefault(key, value)


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Work the command line into the config.

    Raises:
        UsageError: the config lacks what a flag needs.
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
            raise UsageError(f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set")
        cfg.auto_scale_lr.enable = True
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)  # now, for num_workers, and once more at the end: options win
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        # torch refuses persistent workers where there are none.
        complete_dataloader(cfg, name, persistent_workers=bool((cfg.get(name) or {}).get("num_workers")))
        if cfg.get(name) is not None:
            if args.no_pin_memory:
                cfg[name].pin_memory = False
            if args.no_persistent_workers:
                cfg[name].persistent_workers = False
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision.

    Raises:
        UsageError: the config has no optim_wrapper, or asks for another type than bfloat16 on the CPU.
    """
    wrapper = cfg.get("optim_wrapper")
    if wrapper is None:
        raise UsageError("--amp needs optim_wrapper in the config, which is not set")
    if get_device() != "cpu":
        wrapper.type = "AmpOptimWrapper"
        wrapper.setdefault("loss_scale", "dynamic")
        return
    if str(wrapper.get("dtype") or "bfloat16") not in ("bfloat16", "torch.bfloat16"):
        raise UsageError(f"optim_wrapper.dtype is {wrapper.dtype}, expected bfloat16: the CPU has no other")
    wrapper.type = "rep_plugin.CpuAmpOptimWrapper"
    for key in ("loss_scale", "dtype", "use_fsdp"):
        wrapper.pop(key, None)


def connect_on_cpu(cfg: Config) -> None:
    """Join the other processes, which mmengine does not do without calling CUDA.

    Raises:
        UsageError: the backend is nccl.
    """
    backend = (cfg.get("env_cfg") or {}).get("dist_cfg", {}).get("backend", "nccl")
    if backend == "nccl":
        raise UsageError(
            "env_cfg.dist_cfg.backend is nccl, expected gloo: this machine has no graphics card (--cfg-options "
            "env_cfg.dist_cfg.backend=gloo)"
        )
    torch.distributed.init_process_group(backend=backend)
    wrapper = cfg.get("model_wrapper_cfg") or dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )
    # mmengine would hand the wrapper a device number, which a model on the CPU refuses.
    cfg.model_wrapper_cfg = dict(device_ids=None) | dict(wrapper)


def build_runner(cfg: Config) -> Any:
    """The runner which the config asks for; its dataloaders refuse empty data sets.

    Raises:
        UsageError: the config wants to connect processes through graphics cards where there are none.
    """
    if cfg.launcher == "pytorch" and get_device() == "cpu":
        connect_on_cpu(cfg)
    try:
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    except (ValueError, TypeError, KeyError) as error:  # what a config's values raise when they are built
        raise UsageError(f"the config cannot be built: {one_line(error)}") from error
    guard_dataloaders(runner)
    return runner


def require_whole_checkpoint(runner: Any) -> None:
    """Make the runner refuse a checkpoint that is not exactly its model's: mmengine would only warn."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    refuse_misfits(model)


def leave() -> None:
    """End this process at once: torch 2.14 with gloo now and then aborts while Python takes it down, all work done."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(main: Callable[[], None], *also: type[Exception]) -> None:
    """Call ``main``; errors a user can mend (and those of ``also``) end in one line instead of a traceback."""
    try:
        enable_safe_loading()
        name_broken_pictures()
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            leave()
    except (UsageError, DataError, *CHECKPOINT_ERRORS, OSError, *also) as error:
        sys.exit(f"error: {one_line(error)}")
    except IndexError as error:  # torch's cross entropy
        if not str(error).startswith("Target"):
            raise
        sys.exit(f"error: {one_line(error)} Labels must be below the head's num_classes")


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
    run(main, AnnealError, HookError)
