"""OnnxClassifier: an exported file in the place of the network, for stock test loops, metrics and dumps."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from rep_plugin.arguments import Name, OneOf, checked
from rep_plugin.errors import ArgumentError, ExportError
from rep_plugin.export.reading import interface_of, read_onnx
from rep_plugin.export.runtimes import RUNTIMES, open_model
from rep_plugin.openmmlab.configs import drop_pretrained_, typed_dicts
from rep_plugin.openmmlab.load import Typed, build_part
from rep_plugin.optional import require
from rep_plugin.registry import MODELS


@checked
@MODELS.register_module()
class OnnxClassifier(BaseModel):
    """Classify images with an ONNX file, float or int8; all else is what the network's config says.

    The data preprocessor and what makes predictions of logits (softmax, or a sigmoid for several labels) are those of
    ``model``, whose own weights are not used.

    Args:
        path: the file: one input, images (N, C, H, W) as the network gets them; one output, logits (N, classes).
        model: config of the network that was exported.
        runtime: what runs the file, on the CPU: ``onnxruntime`` or ``openvino``.
        data_preprocessor: config of the preprocessor, where ``model`` has none.

    Raises:
        ArgumentError: the file takes or gives something else, or has another number of classes.
        ExportError: it is no ONNX file, or the runtime refuses it.
        FileNotFoundError: there is none.

    Example:
        >>> test_cfg, model = dict(), dict(type="rep_plugin.OnnxClassifier", path="bird8.onnx", model="cfg.model")
    """

    def __init__(
        self,
        path: Name | Path,
        model: Typed,
        runtime: Annotated[str, OneOf(RUNTIMES)] = "onnxruntime",
        data_preprocessor: Mapping | nn.Module | None = None,
    ):
        for package in ("onnx", runtime):
            require(package, "export", "OnnxClassifier")
        self.path = Path(path)
        proto = read_onnx(self.path)
        network = _network(model, data_preprocessor)
        super().__init__(data_preprocessor=network.data_preprocessor)
        self.head = getattr(network, "head", network)  # a wrapped network of timm is its own
        if not hasattr(self.head, "_get_predictions"):
            raise ArgumentError(
                f"{type(network).__name__} is no classifier of mmpretrain, expected one: of ONNX files only logits are tested"
            )
        self.name, self.shape, classes = interface_of(self.path, proto)
        own = _classes_of(self.head)
        if None not in (own, classes) and own != classes:
            raise ArgumentError(f"{self.path} gives {classes} classes, expected the {own} of the config's head")
        try:
            self._session = open_model(runtime, proto.SerializeToString(), torch.get_num_threads())
        except ExportError as error:
            raise ExportError(f"{self.path}: {error}") from None
        kind = "int8" if any(node.op_type == "DequantizeLinear" for node in proto.graph.node) else "float"
        print_log(f"OnnxClassifier: {self.path}, {kind}, in {runtime}", logger="current")

    def forward(self, inputs: Tensor, data_samples: Sequence | None = None, mode: str = "tensor") -> Any:
        """Return logits, or for ``mode='predict'`` the data samples with scores and labels.

        Args:
            inputs: preprocessed images (N, C, H, W).
            data_samples: one for each image.
            mode: ``tensor`` or ``predict``.

        Returns:
            Logits (N, classes), or the data samples.

        Raises:
            ArgumentError: images of another shape than the file's, or another ``mode``.
        """
        if mode not in ("tensor", "predict"):
            raise ArgumentError(
                f"mode must be 'tensor' or 'predict' for an ONNX file, which cannot be trained, got {mode!r}"
            )
        logits = self._logits(inputs)
        return logits if mode == "tensor" else self.head._get_predictions(logits, data_samples)

    def _logits(self, inputs: Tensor) -> Tensor:
        own, given = self.shape[1:], tuple(inputs.shape[1:])
        if len(own) != len(given) or any(side not in (None, other) for side, other in zip(own, given)):
            raise ArgumentError(
                f"{self.path} takes images {_words(own)}, but the config's are {_words(given)}: export it from this config"
            )
        images, count = inputs.detach().cpu().float(), len(inputs)
        if (fixed := self.shape[0]) is not None:  # the last call is filled up with images that were there before
            images = images[torch.arange(-(-count // fixed) * fixed) % count]
        parts = [self._session({self.name: part})[0] for part in images.split(fixed or count)]
        return torch.cat(parts)[:count].to(inputs.device)


def _words(sides: Sequence[int | None]) -> str:
    return " x ".join("any" if side is None else str(side) for side in sides)


def _network(model: Mapping, data_preprocessor: Mapping | nn.Module | None) -> nn.Module:
    cfg: Any = copy.deepcopy(dict(model))
    for part in typed_dicts(cfg):
        drop_pretrained_(part)
    if data_preprocessor is not None and not isinstance(data_preprocessor, nn.Module):
        cfg.setdefault("data_preprocessor", data_preprocessor)
    return build_part(cfg, ROOT_MODELS)


def _classes_of(head: nn.Module) -> int | None:
    return getattr(head, "num_classes", None) or getattr(getattr(head, "model", None), "num_classes", None)
