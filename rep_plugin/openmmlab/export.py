"""mmpretrain models written as ONNX: images come through the config's own pipeline, which is written as metadata."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.export.export_onnx import export_images
from rep_plugin.export.preprocessing import find_images
from rep_plugin.measure.report import Report
from rep_plugin.measure.verify import default_inputs
from rep_plugin.openmmlab.artefacts import why_not_class_names
from rep_plugin.openmmlab.configs import plain_data, type_name
from rep_plugin.openmmlab.load import REAL_IMAGES

LOADER = "LoadImageFromFile"


def write_onnx(
    model: nn.Module,
    cfg: Config,
    path: str | Path,
    inputs: Tensor | None = None,
    dataset_meta: Mapping | None = None,
    batch: int | None = None,
    size: Sequence[int] | None = None,
    write: Callable[..., Report] = export_images,
    **options,
) -> Report:
    """Write the model that ``cfg.model`` builds, in eval mode, as :func:`rep_plugin.export_onnx` does: logits, no softmax.

    Args:
        model: the model, in eval mode.
        cfg: its config; the preprocessing comes from its pipeline and the model's data_preprocessor.
        path: the file to write.
        inputs: preprocessed images (N, C, H, W) to compare on; None for random ones, of ``size``.
        dataset_meta: meta data of the data set, for the class names.
        batch: the number of images to fix; None leaves it open.
        size: (H, W) of the input; None for that of the images.
        write: what writes the file: another function of the same arguments, as for int8.
        **options: as in :func:`rep_plugin.export_onnx`.

    Returns:
        The report.

    Raises:
        ArgumentError: neither images nor size are given.
        ExportError: as the export.
    """
    if inputs is None and size is None:
        raise ArgumentError("without validation images the input size is needed: size=(H, W)")
    channels = inputs.shape[1] if inputs is not None else default_inputs(model)[0].shape[1]
    shape = (channels, *(size or inputs.shape[2:]))
    names = (dataset_meta or {}).get("classes")
    metadata = {"preprocessing": preprocessing_of(model, cfg, shape)}
    if inputs is not None and shape != tuple(inputs.shape[1:]):
        metadata["preprocessing"]["then_resize"] = {"size": list(shape[1:]), "interpolation": "bilinear"}
    reason = why_not_class_names(names, model)
    if names and reason is None and hasattr(getattr(model, "head", None), "num_classes"):
        metadata["class_names"] = list(names)
    notes = [reason] if reason and "class_names" not in options else []
    return write(model, path, inputs, shape, batch, size, **({"notes": notes} | metadata | options))


def read_images(model: nn.Module, cfg: Config, folder: str | Path, count: int = REAL_IMAGES) -> Tensor:
    """Read images of a folder as the model sees them: through the config's pipeline, preprocessed.

    Args:
        model: the model.
        cfg: its config; a pipeline that expects loaded images gets a loader in front.
        folder: where the images are.
        count: how many at most.

    Returns:
        The images, (N, C, H, W).

    Raises:
        FileNotFoundError: there are none.
    """
    steps = pipeline_of(cfg)
    if not any(type_name(step) == LOADER for step in steps):
        grey = default_inputs(model)[0].shape[1] == 1
        steps = [dict(type=LOADER, color_type="grayscale" if grey else "color"), *steps]
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
        pipeline = Compose(steps)
    batch = pseudo_collate([pipeline({"img_path": str(path)}) for path in find_images(folder, count)])
    with torch.no_grad():
        return model.data_preprocessor(batch, False)["inputs"]


def pipeline_of(cfg: Config) -> list[dict]:
    """Return the steps of the config's test pipeline, else of its validation pipeline. Raises ArgumentError for neither."""
    for name in ("test_dataloader", "val_dataloader"):
        dataset = (cfg.get(name) or {}).get("dataset")
        while isinstance(dataset, Mapping) and "dataset" in dataset:  # RepeatDataset and its like
            dataset = dataset["dataset"]
        if isinstance(dataset, Mapping) and dataset.get("pipeline"):
            return list(dataset["pipeline"])
    raise ArgumentError("the config has no test_dataloader or val_dataloader with a pipeline")


def size_of(cfg: Config, default: tuple[int, int] = (224, 224)) -> tuple[int, int]:
    """Return the (height, width) that the config's pipeline gives images.

    Args:
        cfg: the config.
        default: where it has no pipeline, or the size is the image's own.

    Returns:
        Height and width.
    """
    try:
        steps = pipeline_of(cfg)
    except ArgumentError:
        return default
    for step in reversed(steps):
        kind = type_name(step)
        if kind == "CenterCrop" or (kind == "Resize" and step.get("scale") is not None and not step.get("keep_ratio")):
            height, width = _height_width(step["crop_size" if kind == "CenterCrop" else "scale"])
            return height, width
    return default


def preprocessing_of(model: nn.Module, cfg: Config, input_size: tuple[int, int, int]) -> dict:
    """Describe what is done to an image on its way into the model.

    In this order: ``resize`` its ``edge`` (short, long, both; ``fit``: the largest that fits) to ``size`` (H, W), ``crop``
    the centre (H, W), bring the channels in order, subtract ``mean``, divide by ``std``, white being ``white``.
    ``pipeline`` holds the config's own steps, also those that have no place in this list.

    Args:
        model: the model.
        cfg: its config.
        input_size: (C, H, W).

    Returns:
        The steps as plain data.
    """
    try:
        steps = pipeline_of(cfg)
    except ArgumentError:
        steps = []
    data = getattr(model, "data_preprocessor", None)
    to_rgb = getattr(data, "to_rgb", False)
    description = {
        "input_size": list(input_size),
        "channel_order": {1: "GRAY", 3: "RGB" if to_rgb else "BGR"}.get(input_size[0]),
        "white": 255.0,
        "pipeline": plain_data(steps),
    }
    if getattr(data, "_enable_normalize", False):
        description |= {name: _numbers(getattr(data, name)) for name in ("mean", "std")}
    for step in steps:
        kind = type_name(step)
        if kind == "ResizeEdge":
            description["resize"] = {"edge": step.get("edge", "short"), "size": [step["scale"]] * 2}
        elif kind == "Resize" and step.get("scale") is not None:
            edge = "fit" if step.get("keep_ratio") else "both"
            description["resize"] = {"edge": edge, "size": _height_width(step["scale"])}
        elif kind == "CenterCrop":
            description["crop"] = _height_width(step["crop_size"])
        if kind in ("ResizeEdge", "Resize"):
            description["interpolation"] = step.get("interpolation", "bilinear")
    return description


def _numbers(tensor: Tensor) -> list[float]:
    """The numbers of the config, 72.94, where float32 holds 72.94000244140625."""
    return [float(f"{value:.7g}") for value in tensor.flatten().tolist()]


def _height_width(value: int | Sequence[int]) -> list[int]:
    """mmcv writes sizes as one number or (width, height)."""
    return [value, value] if isinstance(value, int) else [value[1], value[0]]
