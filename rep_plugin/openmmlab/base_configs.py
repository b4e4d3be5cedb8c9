"""Reading configs: shipped ones by name, and ``_base_ = "rep_plugin::NAME.py"``."""

import functools
from typing import Any

from mmengine.config import Config

from rep_plugin.arguments import checked
from rep_plugin.errors import ArgumentError, RepPluginError, first_line
from rep_plugin.shipped import find_config, resolve_config

PREFIX = "rep_plugin::"


def accept_our_bases() -> None:
    """Let configs inherit shipped ones as ``_base_ = "rep_plugin::rep_mbv2_cub.py"``. Idempotent.

    mmengine has a fixed table of packages, asks for a folder in the name, finds no editable install, and would build all
    that such a base holds in our scope, where mmpretrain's types are not.
    """
    stock = Config._get_cfg_path
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(PREFIX):
            return str(find_config(cfg_path.removeprefix(PREFIX))), None
        return stock(cfg_path, filename)

    Config._get_cfg_path = staticmethod(get_cfg_path)


def read_config(path_or_name: str) -> Config:
    """Read a config file, or a shipped config by its name. Raises ArgumentError where neither is there, or it is broken."""
    accept_our_bases()
    path = resolve_config(path_or_name)
    try:
        return Config.fromfile(path)
    except RepPluginError:
        raise
    except Exception as error:  # a config is code of the user's, which may raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        text = f"{type(error).__name__}: {first_line(error)}{line}"
        raise ArgumentError(f"config {path_or_name} cannot be read: {text}") from error


@checked
def get_config(name: str, **options: Any) -> Config:
    """Read a shipped config.

    Args:
        name: its name, with or without its folder, with or without ``.py``; :func:`rep_plugin.list_configs` has them.
        **options: changes to the config, key by key, as ``merge_from_dict`` takes them; dicts are merged.

    Returns:
        The config; its ``filename`` can stand in a ``_base_``.

    Raises:
        ArgumentError: there is no such config; the message has the nearest names.

    Example:
        >>> import rep_plugin
        >>> cfg = rep_plugin.get_config("rep_mbv2_mini_cub", train_cfg=dict(max_epochs=1))
        >>> cfg.model.backbone.type, cfg.train_cfg.max_epochs
        ('rep_plugin.RepMobileNetV2', 1)
    """
    accept_our_bases()
    cfg = Config.fromfile(str(find_config(name)))
    cfg.merge_from_dict(options)
    return cfg
