"""NNCF, OpenVINO's quantiser, where it is installed."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from rep_plugin.export.inputs import INPUT
from rep_plugin.measure.randomness import private_random


@private_random()
def quantise_by_nncf(proto: Any, images: Tensor, leave: Sequence[str] = ()) -> Any:
    """Return a quantised graph: QDQ, weights with a scale for each channel, biases corrected.

    Args:
        proto: the float graph.
        images: that calibrate, (N, C, H, W).
        leave: nodes that stay in float.

    Returns:
        The graph.
    """
    nncf = import_module("nncf")
    return nncf.quantize(
        proto, nncf.Dataset([{INPUT: image[None].numpy()} for image in images]),
        preset=nncf.QuantizationPreset.MIXED, subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=list(leave)) if leave else None,
    )  # fmt: skip
