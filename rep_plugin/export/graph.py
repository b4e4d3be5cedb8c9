"""A PyTorch model as an ONNX graph in memory, the names of its outputs, and what its metadata tell."""

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rep_plugin.errors import ExportError, first_line
from rep_plugin.measure.verify import flatten_outputs
from rep_plugin.optional import require

INPUT = "input"


class _Flat(nn.Module):
    """A model whose output is a plain tuple of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten_outputs(self.model(x)))


def name_outputs(model: nn.Module, output: object) -> list[str]:
    """Return a name for each tensor of a model's output.

    Args:
        model: the model. Its ``feature_info`` (timm) names maps by stride; a vector is ``features`` with 0 ``num_classes``.
        output: its output. Tensors of a dict keep their names.

    Returns:
        Names such as ``stride4`` or ``map0`` of maps, and ``logits`` or ``features`` of one vector an image.
    """
    tensors = flatten_outputs(output)
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        return [str(key) for key, value in output.items() if value.is_floating_point()]
    if len(tensors) == 1 and tensors[0].dim() == 2:
        return ["features" if getattr(model, "num_classes", None) == 0 else "logits"]
    info = getattr(model, "feature_info", None)
    strides = info.reduction() if callable(getattr(info, "reduction", None)) else []
    if len(strides) == len(tensors) == len(set(strides)):
        return [f"stride{stride}" for stride in strides]
    kind = "map" if all(tensor.dim() == 4 for tensor in tensors) else "output"
    return [f"{kind}{index}" for index in range(len(tensors))]


def open_dims(inputs: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], names: Sequence[str]) -> dict[str, dict]:
    """Return the dimensions that vary over several runs.

    Args:
        inputs: the input of each run.
        outputs: the output tensors of each run.
        names: names of the output tensors.

    Returns:
        {input or output: {dimension: name}}; names are ``batch``, ``height``, ``width`` or, of others, ``NAME_dim2``.
    """
    found = {INPUT: _varying([tuple(x.shape) for x in inputs], {0: "batch", 2: "height", 3: "width"}, INPUT)}
    batches = [x.shape[0] for x in inputs]
    for index, name in enumerate(names):
        shapes = [tuple(run[index].shape) for run in outputs]
        known = {0: "batch"} if [shape[0] for shape in shapes] == batches else {}
        found[name] = _varying(shapes, known, name)
    return found


def _varying(shapes: list[tuple[int, ...]], known: Mapping[int, str], name: str) -> dict[int, str]:
    return {
        dim: known.get(dim, f"{name}_dim{dim}")
        for dim in range(len(shapes[0]))
        if len({shape[dim] for shape in shapes}) > 1
    }


def to_onnx(
    model: nn.Module, x: Tensor, names: Sequence[str], dims: Mapping[str, Mapping], opset: int, dynamo: bool
) -> Any:
    """Return the graph (``onnx.ModelProto``) of a model.

    Args:
        model: a model in eval mode.
        x: images (N, C, H, W) to trace it on.
        names: names of the outputs.
        dims: the open dimensions, see :func:`open_dims`.
        opset: version of the ONNX operators.
        dynamo: use torch's newer exporter.

    Returns:
        The graph, checked by onnx.

    Raises:
        MissingPackageError: onnx, or onnxscript with ``dynamo``, is not installed.
        ExportError: torch cannot write the model, or not in this opset, or the result is not valid ONNX.
    """
    for package in ("onnx", *(["onnxscript"] if dynamo else [])):
        require(package, "export", "exporting")
    onnx = import_module("onnx")
    if 0 in dims[INPUT] and len(x) == 1:
        x = x.expand(2, *x.shape[1:])  # a 1 would be taken for a constant
    names = list(names)
    common = {"input_names": [INPUT], "output_names": names, "opset_version": opset, "verbose": False}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that become constants: the comparison finds those that matter
            output = model(x.clone())
            several = list(output) if isinstance(output, (tuple, list)) else [output]
            # What is not floating point is not compared, and so not written.
            plain = all(isinstance(one, Tensor) and one.is_floating_point() for one in several)
            written = model if plain else _Flat(model)
            if dynamo:
                shapes = {dim: torch.export.Dim.DYNAMIC for dim in dims[INPUT]}
                program = torch.onnx.export(written, (x,), dynamo=True, dynamic_shapes=(shapes,), **common)
                proto = program.model_proto
            else:
                buffer = BytesIO()
                torch.onnx.export(written, (x.clone(),), buffer, dynamo=False, dynamic_axes=dims, **common)
                proto = onnx.load_from_string(buffer.getvalue())
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # torch, onnxscript and onnx have dozens of kinds
        raise ExportError(f"{type(model).__name__} cannot be written as ONNX: {first_line(error)}") from error
    found = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(f"torch wrote opset {found}, not opset (={opset}) as asked")
    return proto


def shapes_of(entries: Sequence[Any]) -> dict[str, list[int | str]]:
    """Return {name: shape} of a graph's inputs or outputs, with names for the dimensions that vary."""
    return {
        entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in entries
    }


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of an exported file: ``class_names`` (a list) and ``preprocessing`` (a dict), where known.

    Raises:
        MissingPackageError: onnx is not installed.

    Example:
        >>> import onnx
        >>> _ = onnx.save(onnx.ModelProto(metadata_props=[{"key": "class_names", "value": '["cat"]'}]), "model.onnx")
        >>> read_metadata("model.onnx")
        {'class_names': ['cat']}
    """
    require("onnx", "export", "exporting")
    proto = import_module("onnx").load(str(path), load_external_data=False)
    return {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
