"""ONNX files that are read again: what they hold, and what they take and give."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rep_plugin.errors import ArgumentError, ExportError

FLOAT = 1  # onnx.TensorProto.FLOAT


def read_onnx(path: Path) -> Any:
    """Return what an ONNX file holds.

    Args:
        path: the file.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        ExportError: it is no ONNX file.
        FileNotFoundError: there is none.
    """
    if path.is_dir() or not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}, expected an ONNX file")
    try:
        proto = import_module("onnx").load(str(path))
    except import_module("google.protobuf.message").DecodeError:
        proto = None
    if proto is None or not proto.graph.node:
        raise ExportError(f"{path} is no ONNX file, expected one that rep-plugin export wrote")
    return proto


def interface_of(path: Path, proto: Any) -> tuple[str, tuple[int | None, ...], int | None]:
    """Return what a classifier's file takes and gives.

    Args:
        path: the file, for messages.
        proto: what :func:`read_onnx` returns.

    Returns:
        The input's name, its shape (None: open), and the number of classes, where the file tells.

    Raises:
        ArgumentError: the file is no classifier of images.
    """
    constants = {one.name for one in proto.graph.initializer}
    inputs = [one for one in proto.graph.input if one.name not in constants]  # old files name these too
    outputs = list(proto.graph.output)
    sides = [[dim.dim_value or None for dim in one.type.tensor_type.shape.dim] for one in (*inputs, *outputs)]
    if len(inputs) != 1 or len(sides[0]) != 4 or inputs[0].type.tensor_type.elem_type != FLOAT:
        raise ArgumentError(f"{path} takes {_listed(inputs)}, expected one batch of float32 images (N, C, H, W)")
    if len(outputs) != 1 or len(sides[1]) != 2:
        raise ArgumentError(f"{path} gives {_listed(outputs)}, expected the logits (N, classes) of a classifier")
    return inputs[0].name, tuple(sides[0]), sides[1][1]


def _listed(values: Sequence[Any]) -> str:
    kinds = import_module("onnx").TensorProto.DataType

    def listed(value: Any) -> str:
        kind = value.type.tensor_type
        sides = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in kind.shape.dim)
        return f"{value.name} {kinds.Name(kind.elem_type).lower()} ({sides})"

    return " and ".join(map(listed, values)) or "nothing"
