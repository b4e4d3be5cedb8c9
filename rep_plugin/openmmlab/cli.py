"""What the command line tools share: arguments, configs, runners, and errors in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from rep_plugin.checkpoints.files import check_writable
from rep_plugin.checkpoints.strict import refuse_misfits
from rep_plugin.errors import (
    ArgumentError,
    CheckpointMismatchError,
    DataError,
    UnreadableCheckpointError,
    UnsafeCheckpointError,
    first_line,
)
from rep_plugin.openmmlab.checkpoint import enable_safe_loading
from rep_plugin.openmmlab.data import check_data, guard_dataloaders, name_broken_pictures
from rep_plugin.openmmlab.load import load_model, real_inputs


def add_arguments(parser: argparse.ArgumentParser, no_real_data: str) -> None:
    """Add what :func:`open_trained` reads; ``no_real_data`` is the help of that flag."""
    parser.add_argument("config", help="config the checkpoint was trained with")
    parser.add_argument("checkpoint", help="trained checkpoint")
    parser.add_argument("--out-dir", help="folder for the files; default: the checkpoint's")
    parser.add_argument("--no-real-data", action="store_true", help=no_real_data)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config as key=value")


def _check_outputs(
    args: argparse.Namespace, out_dir: Path, read: Sequence[str], outputs: Sequence[str], precious: Sequence[str]
) -> None:
    """Refuse to replace what is read; and, in a folder that was not asked for by name, ``precious`` ones of before."""
    if outputs:
        check_writable(out_dir)
    for path in (out_dir / name for name in outputs):
        if path.resolve() in {Path(one).resolve() for one in read}:
            raise ArgumentError(f"{path} is read and would be replaced: give another --out-dir")
        if path.exists() and not args.out_dir and path.name in precious:
            raise ArgumentError(f"{path} exists already: give --out-dir, another folder, or this one to replace it")


def open_trained(
    args: argparse.Namespace,
    more_files: Sequence[str | None] = (),
    outputs: Sequence[str] = (),
    precious: Sequence[str] = (),
) -> tuple[Config, nn.Module, Tensor | None, dict | None, Path]:
    """Return (config, model, validation pictures or None, the data set's meta data, folder for the ``outputs``).

    Raises FileNotFoundError for a file, of ``more_files`` too, that does not exist, OSError where ``outputs`` cannot be
    written, ValueError where one of them would replace what it should not, and what loading raises.
    """
    read = [path for path in (args.config, args.checkpoint, *more_files) if path]
    for path in read:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist, expected a file")
    out_dir = Path(args.out_dir or Path(args.checkpoint).resolve().parent)
    _check_outputs(args, out_dir, read, outputs, precious)
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
    return cfg, model, inputs, dataset_meta, out_dir


CHECKPOINT_ERRORS = (UnsafeCheckpointError, UnreadableCheckpointError, CheckpointMismatchError)


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


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and settle what both tools settle alike.

    Raises:
        ArgumentError: there is no such file.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not os.path.isfile(args.config):
        raise ArgumentError(f"config {args.config} does not exist, expected a file")
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    return cfg


def require_checkpoint(path: Any) -> None:
    """Raises ArgumentError if ``path`` is neither an address, nor a file, nor (deepspeed) a folder."""
    if path and "://" not in str(path) and not os.path.exists(os.path.expanduser(path)):
        raise ArgumentError(f"checkpoint {path} does not exist, expected a file")


def complete_dataloader(cfg: Config, name: str, **defaults: Any) -> None:
    """Fill in the defaults of one dataloader where the config says nothing: those of the stock tool of its scope.

    mmpretrain's pictures are of one size and stacked here; mmdet's and mmseg's go to the data preprocessor as a list.
    """
    if cfg.get(name) is not None:
        if cfg.get("default_scope", "mmpretrain") == "mmpretrain":
            defaults["collate_fn"] = dict(type="default_collate")
        for key, value in {"pin_memory": get_device() != "cpu", **defaults}.items():
            cfg[name].setdefault(key, value)


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision.

    Raises:
        ArgumentError: the config has no optim_wrapper, or asks for another type than bfloat16 on the CPU.
    """
    wrapper = cfg.get("optim_wrapper")
    if wrapper is None:
        raise ArgumentError("--amp needs optim_wrapper in the config, which is not set")
    if get_device() != "cpu":
        wrapper.type = "AmpOptimWrapper"
        wrapper.setdefault("loss_scale", "dynamic")
        return
    if str(wrapper.get("dtype") or "bfloat16") not in ("bfloat16", "torch.bfloat16"):
        raise ArgumentError(f"optim_wrapper.dtype is {wrapper.dtype}, expected bfloat16: the CPU has no other")
    wrapper.type = "rep_plugin.CpuAmpOptimWrapper"
    for key in ("loss_scale", "dtype", "use_fsdp"):
        wrapper.pop(key, None)


def connect_on_cpu(cfg: Config) -> None:
    """Join the other processes, which mmengine does not do without calling CUDA.

    Raises:
        ArgumentError: the backend is nccl.
    """
    backend = (cfg.get("env_cfg") or {}).get("dist_cfg", {}).get("backend", "nccl")
    if backend == "nccl":
        raise ArgumentError(
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
        ArgumentError: the config wants to connect processes through graphics cards where there are none.
    """
    if cfg.launcher == "pytorch" and get_device() == "cpu":
        connect_on_cpu(cfg)
    try:
        runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    except (ValueError, TypeError, KeyError) as error:  # what a config's values raise when they are built
        raise ArgumentError(f"the config cannot be built: {first_line(error)}") from error
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
    except (ArgumentError, DataError, *CHECKPOINT_ERRORS, OSError, *also) as error:
        sys.exit(f"error: {first_line(error)}")
    except IndexError as error:  # torch's cross entropy
        if not str(error).startswith("Target"):
            raise
        sys.exit(f"error: {first_line(error)} Labels must be below the head's num_classes")
