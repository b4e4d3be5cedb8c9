"""MODEL arguments: a timm name, a folder that save_timm wrote, or a config. Only ``open_model`` imports anything heavy."""

import argparse
import ast
from typing import Any

from rep_plugin.commands.parser import add_cfg_options
from rep_plugin.errors import ArgumentError
from rep_plugin.optional import require
from rep_plugin.shipped import list_configs

TIMM = "timm name, or local-dir:FOLDER"
ANY = f"config (a file or a shipped name), {TIMM}"


def model_arg(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value as Python writes it, else a word."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def is_config(model: str) -> bool:
    """Return whether a MODEL argument names a config: a Python file, or a shipped one."""
    return model.endswith(".py") or bool(":" not in model and list_configs(model))


def require_packages(command: str, config: bool) -> None:
    """Raise MissingPackageError where what a command needs is not installed.

    Args:
        command: its name.
        config: its model comes from a config.
    """
    for package in ("mmengine", "mmcv") if config else ("timm",):
        require(package, "openmmlab" if config else "timm", f"rep-plugin {command}")


def add_timm_arguments(parser: Any, pretrained: bool = True) -> None:
    """Add what belongs to a timm name.

    Args:
        parser: the command's, or a group of it.
        pretrained: add ``--pretrained`` as well.
    """
    if pretrained:
        parser.add_argument("--pretrained", action="store_true", help="with a timm name: timm's own weights")
    parser.add_argument(
        "--model-args",
        type=model_arg,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="with a timm name: arguments of timm.create_model, as num_classes=20",
    )


def add_any_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that take a config or a timm name."""
    add_timm_arguments(parser)
    add_cfg_options(parser, what="the config, where one is given")


def open_model(args: argparse.Namespace) -> tuple[Any, Any, tuple[int, int]]:
    """Build the model that a command names, and load its checkpoint where one is given.

    Args:
        args: the command line: ``model checkpoint pretrained model_args cfg_options``.

    Returns:
        The model in eval mode, its config (None for timm), and the (height, width) that it is used with.

    Raises:
        ArgumentError: an argument does not go with the model, or the model cannot be built.
        CheckpointMismatchError: the checkpoint is not the model's.
    """
    if is_config(args.model):
        for name in ("pretrained", "model_args"):
            if getattr(args, name):
                raise ArgumentError(f"--{name.replace('_', '-')} does not go with the config {args.model}")
        from rep_plugin.openmmlab.cli import merge_options, read_config, require_files
        from rep_plugin.openmmlab.export import size_of
        from rep_plugin.openmmlab.load import build_model, load_model

        require_files(args.checkpoint)
        cfg = read_config(args.model)
        merge_options(cfg, args.cfg_options)
        model = load_model(cfg, args.checkpoint)[0] if args.checkpoint else build_model(cfg)
        return model, cfg, size_of(cfg)
    if args.cfg_options:
        raise ArgumentError(f"--cfg-options does not go with {args.model}, which is no config")
    from rep_plugin.timm.export import load_timm, size_of_timm

    model = load_timm(args.model, args.checkpoint, args.pretrained, dict(args.model_args))
    return model, None, size_of_timm(model)
