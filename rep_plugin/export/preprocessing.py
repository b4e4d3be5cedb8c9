"""How images become a network's input, as plain data that an exported file can carry, and where to find images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from rep_plugin.errors import ArgumentError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def find_images(folder: str | Path, count: int) -> list[Path]:
    """Return images of a folder and the folders below it, evenly spread over their sorted names.

    Args:
        folder: where to look.
        count: largest number of images.

    Returns:
        Their paths.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} does not exist, expected a folder of images")
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    if not found:
        raise FileNotFoundError(f"{folder} holds 0 images, expected files ending in {', '.join(IMAGE_ENDINGS)}")
    return found[:: max(1, len(found) // count)][:count]


def timm_preprocessing(cfg: Mapping, input_size: tuple[int, int, int]) -> dict:
    """Return the steps of timm's evaluation transform as plain data.

    In this order: resize ``resize.edge`` (short, long or both) to ``resize.size`` (H, W) by ``interpolation``, crop the
    centre to ``crop`` (or pad it with ``fill``, 0 to 255 a channel, where the edge is the long one), scale so that white is
    ``white``, subtract ``mean``, divide by ``std``.

    Args:
        cfg: a ``pretrained_cfg``.
        input_size: (C, H, W) of the network's input.

    Returns:
        The steps, in the order above.
    """
    channels, height, width = input_size
    share = cfg.get("crop_pct") or 0.875
    edge = {"squash": "both", "border": "long"}.get(cfg.get("crop_mode"), "short")
    steps = {
        "input_size": [channels, height, width],
        "channel_order": {1: "GRAY", 3: "RGB"}.get(channels),
        "interpolation": cfg.get("interpolation", "bilinear"),
        "resize": {"edge": edge, "size": [math.floor(height / share), math.floor(width / share)]},
        "crop": [height, width],
        "white": 1.0,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
    }
    return steps | ({"fill": [round(255 * value) for value in cfg["mean"]]} if edge == "long" else {})


def metadata_of(
    model: nn.Module,
    input_shape: Sequence[int],
    outputs: Sequence[Tensor],
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping | None = None,
) -> dict:
    """Return the metadata of a file: the given ones, else those of a timm model's ``pretrained_cfg``.

    Args:
        model: the model.
        input_shape: shape (C, H, W) of one image.
        outputs: its output tensors.
        class_names: one for each logit.
        preprocessing: plain data.

    Returns:
        ``class_names`` and ``preprocessing``, where known.

    Raises:
        ArgumentError: the names are not as many as the logits.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    classes = outputs[0].shape[1] if len(outputs) == 1 and outputs[0].dim() == 2 else None
    if class_names is not None and len(class_names) != classes:
        raise ArgumentError(
            f"class_names holds {len(class_names)} names, expected one for each of the {classes} logits"
        )
    metadata = {}
    names = class_names if class_names is not None else cfg.get("label_names")
    if isinstance(names, Mapping):  # timm takes {number: name} as well
        names = [names[number] for number in sorted(names, key=int)]
    if names and len(names) == classes:
        metadata["class_names"] = [str(name) for name in names]
    if preprocessing is None and len(input_shape) == 3 and len(cfg.get("mean") or ()) == input_shape[0]:
        preprocessing = timm_preprocessing(cfg, tuple(input_shape))
    if preprocessing is not None:
        metadata["preprocessing"] = dict(preprocessing)
    return metadata
