"""What the commands share: trained models and runners to work on, and errors in one line."""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import OPTIMIZERS, RUNNERS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rep_plugin.checkpoints.files import check_writable, refuse_existing
from rep_plugin.checkpoints.strict import refuse_misfits
from rep_plugin.errors import ArgumentError, CheckpointMismatchError, UnreadableCheckpointError, first_line
from rep_plugin.openmmlab.base_configs import read_config as read_any_config
from rep_plugin.openmmlab.checkpoint import enable_safe_loading
from rep_plugin.openmmlab.configs import optimizers_of
from rep_plugin.openmmlab.console import with_short_console
from rep_plugin.openmmlab.data import check_data, guard_dataloaders, name_broken_images
from rep_plugin.openmmlab.load import build_model, config_errors, load_model, read_state_dict, real_inputs, require_type
from rep_plugin.openmmlab.origin import changed_in_training, explain_misfit, kind_of_checkpoint, kind_of_config
from rep_plugin.optional import require
from rep_plugin.shipped import resolve_config as resolve_config

# Launcher -> the program, and what its processes have in their environment.
LAUNCHERS = {
    "pytorch": ("torchrun", "RANK"),
    "slurm": ("srun", "SLURM_PROCID"),
    "mpi": ("mpirun", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
EXTRAS = {"mmpretrain": "openmmlab", "mmdet": "downstream", "mmseg": "downstream"}  # scope and package of a config


@contextmanager
def session() -> Iterator[None]:
    """What surrounds a command's work: safe loading, errors that name the image or the label, and an end of all ranks."""
    enable_safe_loading()
    name_broken_images()
    try:
        yield
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


def read_config(path: str) -> Config:
    """Read a config, and require the package whose types it names: mmdet and mmseg are also used without mmpretrain."""
    cfg = read_any_config(path)
    if not isinstance(cfg.get("model"), Mapping):
        raise ArgumentError(f"config {path} has no model, expected model = dict(type=...)")
    scope = cfg.get("default_scope", "mmpretrain")
    if scope in EXTRAS:
        require(scope, EXTRAS[scope], path)
    return cfg


# Tools that read a trained checkpoint.


class Trained(NamedTuple):
    """A trained model in eval mode, its config, and of the validation set, where it was read, images as the model sees them.

    ``dataset_meta`` is the data set's meta data, ``val_loader`` its loader.
    """

    cfg: Config
    model: nn.Module
    inputs: Tensor | None
    dataset_meta: dict | None
    val_loader: DataLoader | None


def output_folder(args: argparse.Namespace, outputs: Sequence[str], more_files: Sequence[str | None] = ()) -> Path:
    """Find the folder to write to, and check that nothing is replaced that should stay.

    Args:
        args: the parsed arguments of :func:`rep_plugin.commands.parser.add_trained_arguments`.
        outputs: names of the files to write.
        more_files: what is read beside config and checkpoint.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: a file to read does not exist.
        OSError: the folder cannot be written to.
        ArgumentError: a file would be replaced that is read, or any without ``--overwrite``.
    """
    read = require_files(resolve_config(args.config), args.checkpoint, *more_files)
    folder = Path(args.out_dir or Path(args.checkpoint).resolve().parent)
    check_writable(folder)
    for path in (folder / name for name in outputs):
        if path.resolve() in read:
            raise ArgumentError(f"{path} is read and would be replaced: give another --out-dir")
    refuse_existing(folder, outputs, args.overwrite)
    return folder


def require_files(*paths: str | None) -> set[Path]:
    """Return the resolved paths of files, None left out. Raises FileNotFoundError for the first that does not exist."""
    given = [Path(path) for path in paths if path]
    for path in given:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, expected a file")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, expected a file")
    return {path.resolve() for path in given}


def open_trained(
    config: str, checkpoint: str | None, cfg_options: Sequence[str] = (), real_data: bool = True
) -> Trained:
    """Build a config's model and load a checkpoint into it strictly; take images of the validation set.

    Args:
        config: path of the config, or the name of a shipped one.
        checkpoint: path of the checkpoint; None: the weights are random.
        cfg_options: changes to the config, ``key=value`` each.
        real_data: read the validation set, where the config has one.

    Returns:
        The model, and what came with it.

    Raises:
        FileNotFoundError: a file does not exist.
        ArgumentError: the config cannot be built.
        CheckpointMismatchError: the checkpoint is not exactly the model's.
        DataError: the validation set is missing, empty or broken.
    """
    cfg = read_config(config)
    require_files(checkpoint)
    merge_options(cfg, cfg_options)
    model, meta = load_model(cfg, checkpoint) if checkpoint else (build_model(cfg), {})
    inputs, dataset_meta, loader = None, meta.get("dataset_meta"), None
    if real_data and cfg.get("val_dataloader"):
        check_data(cfg, ("val_dataloader",))
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")), config_errors():
            loader = Runner.build_dataloader(cfg.val_dataloader)
        inputs, dataset_meta = real_inputs(model, loader), dataset_meta or loader.dataset.metainfo
    return Trained(cfg, model, inputs, dataset_meta, loader)


# Tools that run a Runner.


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments of training and testing name, with their launcher and work folder.

    Raises:
        ArgumentError: there is neither such a file nor a shipped config of that name.
        MissingPackageError: the package of its ``default_scope`` is not installed.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    return cfg


def parse_options(words: Sequence[str]) -> dict:
    """Return the {key: value} of ``key=value`` words, values as mmengine reads them. Raises ArgumentError for others."""
    if odd := [word for word in words if "=" not in word]:
        raise ArgumentError(f"--cfg-options takes key=value, got {odd[0]!r}")
    space = argparse.Namespace(options=None)
    if words:
        for word in words:
            try:
                DictAction([], "options")(argparse.ArgumentParser(), space, [word])
            except (AssertionError, ValueError, SyntaxError) as error:
                raise ArgumentError(f"{word!r} is no key=value: {first_line(error)}") from error
    return space.options or {}


def merge_options(cfg: Config, words: Sequence[str]) -> None:
    """Change a config as ``--cfg-options`` says.

    Args:
        cfg: the config; it is changed.
        words: ``key=value``, each.

    Raises:
        ArgumentError: a word is no ``key=value``, or its key leads nowhere.
    """
    options = parse_options(words)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:  # mmengine's words for a list that is too short, or no list
        raise ArgumentError(f"--cfg-options {' '.join(words)}: {first_line(error)}") from error


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
    if path and "://" in str(path):
        if not (address := urlsplit(str(path))).path.strip("/") or not address.scheme:
            raise ArgumentError(f"checkpoint {path} is no address of a file, expected as https://host/name.pth")
    elif path and not os.path.exists(os.path.expanduser(path)):
        raise ArgumentError(f"checkpoint {path} does not exist, expected a file")


def build_runner(cfg: Config) -> Runner:
    """Return the runner that the config asks for; its dataloaders refuse empty data sets.

    Raises:
        ArgumentError: the config cannot be built, or connects processes through graphics cards where there are none.
    """
    starter, variable = LAUNCHERS.get(cfg.launcher, ("", None))
    if variable and variable not in os.environ:
        raise ArgumentError(
            f"--launcher {cfg.launcher} is for what {starter} starts: {variable} is not set, as it sets it"
        )
    if cfg.launcher == "pytorch" and get_device() == "cpu":
        _connect_on_cpu(cfg)
    scope = cfg.get("default_scope", "mmpretrain")
    with DefaultScope.overwrite_default_scope(scope):
        for key, part in optimizers_of(cfg.get("optim_wrapper") or {}):
            require_type(part.get("type"), OPTIMIZERS, key)  # mmengine would ask None for its signature
    with config_errors():
        runner_class = RUNNERS.get(cfg.get("runner_type", "Runner"))
        if runner_class is None:
            raise ArgumentError(f"runner_type is {cfg.runner_type!r}, expected the name of a registered runner")
        runner = with_short_console(runner_class).from_cfg(cfg)
    guard_dataloaders(runner)
    for name in LAZILY_BUILT:
        if hasattr(runner, name):
            setattr(runner, name, _told_in_one_line(getattr(runner, name)))
    return runner


# What a Runner builds once it is asked to train or test.
LAZILY_BUILT = ("build_train_loop", "build_val_loop", "build_test_loop", "build_optim_wrapper", "build_param_scheduler")


def _told_in_one_line(build: Callable) -> Callable:
    @functools.wraps(build)
    def building(*args: Any, **kwargs: Any) -> Any:
        with config_errors():
            return build(*args, **kwargs)

    return building


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


def explain_misfits(runner: Runner) -> None:
    """Let a runner that refuses a checkpoint say what was done to its network, and which config builds that."""
    load = runner.load_checkpoint

    @functools.wraps(load)
    def load_checkpoint(filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(filename, *args, **kwargs)
        except CheckpointMismatchError as error:
            known = "" if "://" in str(filename) else explain_misfit(filename, read_state_dict(filename)[1], runner.cfg)
            text = str(error).replace("the checkpoint does not fit", f"checkpoint {filename} does not fit", 1)
            raise CheckpointMismatchError(f"{text}{known}") from None
        except UnreadableCheckpointError as error:  # of a hook, which does not know the file
            raise UnreadableCheckpointError(
                str(error) if str(filename) in str(error) else f"checkpoint {filename}: {error}"
            ) from None

    runner.load_checkpoint = load_checkpoint


def is_another_network(cfg: Config) -> bool:
    """Whether ``cfg.load_from`` holds weights of a network that was pruned, merged or expanded otherwise than the config's.

    Of such weights mmengine would load the few that fit, and only warn. Another head is not meant: fine-tuning has one.
    """
    path = cfg.get("load_from")
    if not path or "://" in str(path):
        return False
    meta = read_state_dict(os.path.expanduser(path))[1]
    return changed_in_training(meta) is not None or kind_of_checkpoint(meta) not in (None, kind_of_config(cfg))


def require_whole_checkpoint(runner: Runner) -> None:
    """Make the runner refuse a checkpoint that is not exactly its model's: mmengine would only warn."""
    explain_misfits(runner)
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    refuse_misfits(model)
