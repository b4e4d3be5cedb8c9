"""timm models by name, with a checkpoint and images as timm itself reads them, written as ONNX."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from rep_plugin.arguments import Name, checked, shown
from rep_plugin.checkpoints.strict import require_fit
from rep_plugin.checkpoints.tensors import read_tensors
from rep_plugin.errors import ArgumentError, first_line
from rep_plugin.export.export_onnx import export_images
from rep_plugin.export.preprocessing import find_images, timm_preprocessing
from rep_plugin.measure.report import Report

IMAGES = 8


def export_timm(
    name: str,
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    model_args: Mapping | None = None,
    folder: str | Path | None = None,
    size: Sequence[int] | None = None,
    batch: int | None = None,
    count: int = IMAGES,
    write: Callable[..., Report] = export_images,
    **options,
) -> Report:
    """Build ``timm.create_model(name)``, load it, and write it as :func:`rep_plugin.export_onnx` does.

    Args:
        name: timm's name, or ``local-dir:FOLDER``, which comes with its weights.
        path: the file to write.
        checkpoint: weights to load.
        pretrained: load timm's own weights.
        model_args: arguments of ``timm.create_model``.
        folder: images to compare on, preprocessed by timm's evaluation transform; None for random ones.
        size: (H, W) of the input; None for the model's own.
        batch: the number of images to fix; None leaves it open.
        count: how many images are read at most.
        write: what writes the file: another function of the same arguments, as for int8.
        **options: as in :func:`rep_plugin.export_onnx`.

    Returns:
        The report.

    Raises:
        ArgumentError: timm does not know the name or the arguments.
        FileNotFoundError: a file or folder does not exist.
        CheckpointMismatchError: the checkpoint is not the model's.
        ExportError: as the export.
    """
    model = load_timm(name, checkpoint, pretrained, model_args)
    cfg = resolve_data_config({}, model=model)
    shape = (next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3), *cfg["input_size"][1:])
    if size is not None:
        shape = (shape[0], *size)
    known = len(cfg["mean"]) == shape[0]
    if folder is not None and not known:
        raise ArgumentError(f"{name} takes {shape[0]} channels, but its pretrained_cfg has {len(cfg['mean'])} means")
    images = None if folder is None else read_images(folder, cfg | {"input_size": shape}, count)
    if known:
        options = {"preprocessing": timm_preprocessing(cfg, shape)} | options
    return write(model, path, images, shape, batch, **options)


@checked
def load_timm(
    name: Name, checkpoint: str | Path | None = None, pretrained: bool = False, model_args: Mapping | None = None
) -> nn.Module:
    """Build a timm model and load a checkpoint, which must fit exactly.

    Args:
        name: timm's name, or ``local-dir:FOLDER``.
        checkpoint: weights to load; EMA weights come first.
        pretrained: load timm's own weights.
        model_args: arguments of ``timm.create_model``.

    Returns:
        The model in eval mode.

    Raises:
        ArgumentError: timm does not know the name or the arguments.
        FileNotFoundError: a file or folder does not exist.
        CheckpointMismatchError: the checkpoint is not the model's.

    Example:
        >>> from rep_plugin.timm import load_timm
        >>> model = load_timm("rep_mobilenetv2_035", model_args={"num_classes": 2})
        >>> model.num_classes, model.training
        (2, False)
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"{checkpoint} does not exist, expected a file")
    local = name.startswith("local-dir:")
    if local and not (folder := Path(name.removeprefix("local-dir:"))).is_dir():
        raise FileNotFoundError(f"{folder} does not exist, expected a folder with config.json")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.3)
        raise ArgumentError(f"timm has no model {name!r}, expected one as {', '.join(near) or 'rep_mobilenetv2_100'}")
    try:
        model = timm.create_model(name, pretrained=pretrained or local, **(model_args or {}))
    except Exception as error:  # what a network does not take it refuses in a way of its own
        raise ArgumentError(
            f"{name} cannot be built with model_args {shown(dict(model_args or {}))}: {first_line(error)}"
        ) from error
    if checkpoint is not None:
        state = read_tensors(checkpoint)
        require_fit(model, state, str(checkpoint))
        model.load_state_dict(state)
    return model.eval()


def size_of_timm(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) that a timm model is used with."""
    return tuple(resolve_data_config({}, model=model)["input_size"][1:])


def read_images(folder: str | Path, cfg: Mapping, count: int = IMAGES) -> Tensor:
    """Read images as timm's evaluation transform gives them.

    Args:
        folder: where they are.
        cfg: timm's data config.
        count: how many at most.

    Returns:
        The images, (N, *cfg['input_size']).
    """
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = create_transform(**{key: cfg[key] for key in keys}, is_training=False)
    mode = "L" if cfg["input_size"][0] == 1 else "RGB"
    return torch.stack([transform(Image.open(path).convert(mode)) for path in find_images(folder, count)])
