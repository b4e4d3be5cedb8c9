"""What the tools that change a trained model begin with: its config, the model, and pictures for the proof."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import _needs as _needs
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from rep_plugin.checkpoint import check_writable
from rep_plugin.mm_artefact import load_model, real_inputs
from rep_plugin.mm_data import check_data


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
            raise ValueError(f"{path} is read and would be replaced: give another --out-dir")
        if path.exists() and not args.out_dir and path.name in precious:
            raise ValueError(f"{path} exists already: give --out-dir, another folder, or this one to replace it")


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
