"""What the command line tools share: arguments, trained models and runners to work on, and errors in one line."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from rep_plugin.checkpoints.files import check_writable
from rep_plugin.checkpoints.strict import refuse_misfits
from rep_plugin.errors import ArgumentError, exit_on_user_errors
from rep_plugin.openmmlab.base_configs import read_config
from rep_plugin.openmmlab.checkpoint import enable_safe_loading
from rep_plugin.openmmlab.console import with_short_console
from rep_plugin.openmmlab.data import check_data, guard_dataloaders, name_broken_images
from rep_plugin.openmmlab.load import config_errors, load_model, real_inputs
from rep_plugin.optional import require
from rep_plugin.shipped import resolve_config as resolve_config

EXTRAS = {"mmpretrain": "openmmlab", "mmdet": "downstream", "mmseg": "downstream"}  # scope and package of a config


def run(main: Callable[[], None]) -> None:
    """Call ``main``; what a user can mend ends in one line, and a bug in a traceback."""
    with exit_on_user_errors():
        enable_safe_loading()
        name_broken_images()
        try:
            main()
        except IndexError as error:  # torch's cross entropy
            if not str(error).startswith("Target"):
                raise
            raise ArgumentError(f"{error} Labels must be below the head's num_classes") from error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            _leave()


def _leave() -> None:
    """End this process at once: torch 2.14 with gloo now and then aborts while Python takes it down, all work done."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _read_config(path: str) -> Config:
    """Read a config, and require the package whose types it names: mmdet and mmseg are also used without mmpretrain."""
    cfg = read_config(path)
    scope = cfg.get("default_scope", "mmpretrain")
    if scope in EXTRAS:
        require(scope, EXTRAS[scope], path)
    return cfg


# Tools that read a trained checkpoint.


class Trained(NamedTuple):
    """A trained model in eval mode, its config, validation images as it sees them (or None), the data set's meta data."""

    cfg: Config
    model: nn.Module
    inputs: Tensor | None
    dataset_meta: dict | None


def add_trained_arguments(parser: argparse.ArgumentParser, no_real_data: str) -> None:
    """Add the arguments of a tool that reads a trained checkpoint and writes what it makes of it.

    Args:
        parser: the tool's.
        no_real_data: the help of that flag.
    """
    parser.add_argument("config", help="config the checkpoint was trained with, or the name of a shipped one")
    parser.add_argument("checkpoint", help="trained checkpoint")
    parser.add_argument("--out-dir", help="folder for the files; default: the checkpoint's")
    parser.add_argument("--no-real-data", action="store_true", help=no_real_data)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config as key=value")


def output_folder(
    args: argparse.Namespace,
    outputs: Sequence[str],
    precious: Sequence[str] = (),
    more_files: Sequence[str | None] = (),
) -> Path:
    """Find the folder to write to, and check that nothing is replaced that should stay.

    Args:
        args: the parsed arguments of :func:`add_trained_arguments`.
        outputs: names of the files to write.
        precious: those of them that are replaced only in a folder that was asked for by name.
        more_files: what is read beside config and checkpoint.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: a file to read does not exist.
        OSError: the folder cannot be written to.
        ArgumentError: a file would be replaced that is read, or that is precious.
    """
    read = require_files(resolve_config(args.config), args.checkpoint, *more_files)
    folder = Path(args.out_dir or Path(args.checkpoint).resolve().parent)
    check_writable(folder)
    for path in (folder / name for name in outputs):
        if path.resolve() in read:
            raise ArgumentError(f"{path} is read and would be replaced: give another --out-dir")
        if path.exists() and not args.out_dir and path.name in precious:
            raise ArgumentError(f"{path} exists already: give --out-dir, another folder, or this one to replace it")
    return folder


def require_files(*paths: str | None) -> set[Path]:
    """Return the resolved paths of files, None left out. Raises FileNotFoundError for the first that does not exist."""
    given = [Path(path) for path in paths if path]
    for path in given:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, expected a file")
    return {path.resolve() for path in given}


def open_trained(config: str, checkpoint: str, cfg_options: dict | None = None, real_data: bool = True) -> Trained:
    """Build a config's model and load a checkpoint into it strictly; take images of the validation set.

    Args:
        config: path of the config, or the name of a shipped one.
        checkpoint: path of the checkpoint.
        cfg_options: changes to the config.
        real_data: read the validation set, where the config has one.

    Returns:
        The model, and what came with it.

    Raises:
        FileNotFoundError: a file does not exist.
        ArgumentError: the config cannot be built.
        CheckpointMismatchError: the checkpoint is not exactly the model's.
        DataError: the validation set is missing, empty or broken.
    """
    cfg = _read_config(config)
    require_files(checkpoint)
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    model, meta = load_model(cfg, checkpoint)
    inputs, dataset_meta = None, meta.get("dataset_meta")
    if real_data and cfg.get("val_dataloader"):
        check_data(cfg, ("val_dataloader",))
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
            loader = Runner.build_dataloader(cfg.val_dataloader)
        inputs, dataset_meta = real_inputs(model, loader), dataset_meta or loader.dataset.metainfo
    return Trained(cfg, model, inputs, dataset_meta)


# Tools that run a Runner.


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument("config", help="config file, or the name of a shipped one (rep_mbv2_mini_cub)")
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
    """Read the config of the arguments of :func:`add_runner_arguments`, with its launcher and work folder.

    Raises:
        ArgumentError: there is neither such a file nor a shipped config of that name.
        MissingPackageError: the package of its ``default_scope`` is not installed.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = _read_config(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    return cfg


def complete_dataloader(cfg: Config, name: str, pin_memory: bool = True, **defaults: Any) -> None:
    """Fill in the defaults of one dataloader where the config says nothing: those of the stock tool of its scope.

    mmpretrain's images are of one size and stacked here; mmdet's and mmseg's go to the data preprocessor as a list.

    Args:
        cfg: the config; it is changed.
        name: ``train_dataloader`` and its like; one that the config does not have is passed over.
        pin_memory: False switches it off whatever the config says.
        **defaults: more defaults.
    """
    if cfg.get(name) is None:
        return
    if cfg.get("default_scope", "mmpretrain") == "mmpretrain":
        defaults["collate_fn"] = dict(type="default_collate")
    for key, value in {"pin_memory": get_device() != "cpu", **defaults}.items():
        cfg[name].setdefault(key, value)
    if not pin_memory:
        cfg[name].pin_memory = False


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


def require_checkpoint(path: str | os.PathLike | None) -> None:
    """Raise ArgumentError if ``path`` is neither an address, nor a file, nor (deepspeed) a folder."""
    if path and "://" not in str(path) and not os.path.exists(os.path.expanduser(path)):
        raise ArgumentError(f"checkpoint {path} does not exist, expected a file")


def build_runner(cfg: Config) -> Runner:
    """Return the runner that the config asks for; its dataloaders refuse empty data sets.

    Raises:
        ArgumentError: the config cannot be built, or connects processes through graphics cards where there are none.
    """
    if cfg.launcher == "pytorch" and get_device() == "cpu":
        _connect_on_cpu(cfg)
    with config_errors():
        runner_class = RUNNERS.get(cfg.get("runner_type", "Runner"))
        if runner_class is None:
            raise ArgumentError(f"runner_type is {cfg.runner_type!r}, expected the name of a registered runner")
        runner = with_short_console(runner_class).from_cfg(cfg)
    guard_dataloaders(runner)
    return runner


def _connect_on_cpu(cfg: Config) -> None:
    """Join the other processes, which mmengine does not do without calling CUDA."""
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


def require_whole_checkpoint(runner: Runner) -> None:
    """Make the runner refuse a checkpoint that is not exactly its model's: mmengine would only warn."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    refuse_misfits(model)
