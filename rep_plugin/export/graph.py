"""A PyTorch model as an ONNX graph in memory, the names of its outputs, and what its metadata tell."""

import json
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import BytesIO
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rep_plugin.arguments import checked
from rep_plugin.errors import ExportError, first_line
from rep_plugin.measure.branches import is_quiet, short_path
from rep_plugin.measure.differences import flatten_outputs, output_paths
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.optional import require

INPUT = "input"
# torch's exporters and the filters of warnings have one state for the process: one thread of ours at a time.
_EXPORTER = threading.Lock()


class _Flat(nn.Module):
    """A model whose output is a plain tuple of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten_outputs(self.model(x)))


class _Stable(TorchFunctionMode):
    """Writes what the exporters take apart into steps that overflow: log(sigmoid(x)) is minus infinity below -104."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return -F.softplus(-args[0]) if func is F.logsigmoid else func(*args, **(kwargs or {}))


def name_outputs(model: nn.Module, output: object) -> list[str]:
    """Return a name for each tensor of a model's output: valid in ONNX, and none twice.

    Args:
        model: the model. Its ``feature_info`` (timm) names maps by stride; a vector is ``features`` with 0 ``num_classes``.
        output: its output. Tensors of dicts, named tuples and dataclasses are named by their keys: ``out``, ``maps_0`` of a
            list in a dict, and ``output_0`` where a key is no name, as ``"0"``.

    Returns:
        Names such as ``stride4`` or ``map0`` of maps, and ``logits`` or ``features`` of one vector an image.
    """
    found = output_paths(output)
    if any(isinstance(part, str) for path, _ in found for part in path):
        return _valid_names(["_".join(map(str, path)) for path, _ in found])
    tensors = [tensor for _, tensor in found]
    if len(tensors) == 1 and tensors[0].dim() == 2:
        return ["features" if getattr(model, "num_classes", None) == 0 else "logits"]
    info = getattr(model, "feature_info", None)
    strides = info.reduction() if callable(getattr(info, "reduction", None)) else []
    if len(strides) == len(tensors) == len(set(strides)):
        return [f"stride{stride}" for stride in strides]
    kind = "map" if all(tensor.dim() == 4 for tensor in tensors) else "output"
    return [f"{kind}{index}" for index in range(len(tensors))]


def _valid_names(keys: Sequence[str]) -> list[str]:
    """The keys as identifiers; torch refuses numbers, and onnx names that stand twice."""
    names: list[str] = []
    for key in keys:
        name = re.sub(r"\W+", "_", key, flags=re.ASCII)
        name = name if name[:1].isalpha() else f"output_{name}".rstrip("_")
        taken = {INPUT, *names}
        names.append(next(one for one in chain([name], (f"{name}_{n}" for n in count(2))) if one not in taken))
    return names


def output_keys(output: object, names: Sequence[str]) -> dict[str, str]:
    """Return {name in the file: key in the model's output} of the tensors whose key could not be their name.

    Args:
        output: output of the model.
        names: the name of each tensor of it.

    Returns:
        The keys, of nested outputs joined by dots; nothing where no key is a string.
    """
    keys = [".".join(map(str, path)) for path, _ in output_paths(output)]
    if not any(isinstance(part, str) for path, _ in output_paths(output) for part in path):
        return {}
    return {name: key for name, key in zip(names, keys, strict=True) if name != key}


def open_dims(inputs: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], names: Sequence[str]) -> dict[str, dict]:
    """Return the dimensions that vary over several runs.

    Args:
        inputs: the input of each run.
        outputs: the output tensors of each run, alike in number and rank.
        names: names of the output tensors.

    Returns:
        {input or output: {dimension: name}}. A dimension that has in every run the size of one of the input's is named as
        that: ``batch``, ``height``, ``width``; others ``NAME_dim2``.
    """
    own = {0: "batch", 2: "height", 3: "width"}
    found = {INPUT: {dim: own.get(dim, f"{INPUT}_dim{dim}") for dim in _varying(inputs)}}
    for index, name in enumerate(names):
        runs = [run[index] for run in outputs]
        found[name] = {}
        for dim, sizes in _varying(runs).items():
            same = [at for at, theirs in _varying(inputs).items() if theirs == sizes]
            at = dim if dim in same else min(same, default=None)
            found[name][dim] = f"{name}_dim{dim}" if at is None else found[INPUT][at]
    return found


def _varying(tensors: Sequence[Tensor]) -> dict[int, list[int]]:
    """Return {dimension: its size in each run} of those that are not always the same."""
    sizes = {dim: [tensor.shape[dim] for tensor in tensors] for dim in range(tensors[0].dim())}
    return {dim: found for dim, found in sizes.items() if len(set(found)) > 1}


def _declare_shapes(proto: Any, shapes: Mapping[str, Sequence[int]], dims: Mapping[str, Mapping]) -> None:
    """Write the measured shapes into a graph: the exporters guess, and call a 2 the batch because there were two images."""
    for entry in (*proto.graph.input, *proto.graph.output):
        shape = entry.type.tensor_type.shape
        del shape.dim[:]
        for dim, size in enumerate(shapes[entry.name]):
            if dim in dims[entry.name]:
                shape.dim.add(dim_param=dims[entry.name][dim])
            else:
                shape.dim.add(dim_value=size)


def to_onnx(
    model: nn.Module,
    x: Tensor,
    outputs: Mapping[str, Sequence[int]],
    dims: Mapping[str, Mapping],
    opset: int,
    dynamo: bool,
) -> tuple[Any, list[str]]:
    """Return the graph (``onnx.ModelProto``) of a model, and the lines in which its forward makes a decision.

    Args:
        model: a model in eval mode.
        x: images (N, C, H, W) to trace it on.
        outputs: name -> shape of each output, for the images ``x``.
        dims: the open dimensions, see :func:`open_dims`.
        opset: version of the ONNX operators.
        dynamo: use torch's newer exporter.

    Returns:
        The graph, checked by onnx; and the lines, as ``net.py:12``, where the tracing exporter saw a size or a value decide.

    Raises:
        MissingPackageError: onnx, or onnxscript with ``dynamo``, is not installed.
        ExportError: torch cannot write the model, or not in this opset, or the result is not valid ONNX.
    """
    for package in ("onnx", *(["onnxscript"] if dynamo else [])):
        require(package, "export", "exporting")
    onnx = import_module("onnx")
    shapes = {INPUT: tuple(x.shape), **outputs}
    if 0 in dims[INPUT] and len(x) == 1:
        x = x.expand(2, *x.shape[1:])  # a 1 would be taken for a constant
    common = {"input_names": [INPUT], "output_names": list(outputs), "opset_version": opset, "verbose": False}
    try:
        with (
            _EXPORTER,
            torch.no_grad(),
            warnings.catch_warnings(record=True) as told,
            working("writing the graph"),
            _Stable(),
        ):
            warnings.simplefilter("ignore")
            # Of shapes that become constants the comparison finds those that matter.
            warnings.filterwarnings("always", "Converting a tensor to a Python boolean", torch.jit.TracerWarning)
            with private_random() as own:
                output = model(x.clone())
            several = list(output) if isinstance(output, (tuple, list)) else [output]
            # What is not floating point is not compared, and so not written.
            plain = all(isinstance(one, Tensor) and one.is_floating_point() for one in several)
            written = model if plain else _Flat(model)
            if dynamo:
                free = {dim: torch.export.Dim.DYNAMIC for dim in dims[INPUT]}
                program = torch.onnx.export(written, (x,), dynamo=True, dynamic_shapes=(free,), **common)
                proto = program.model_proto
            else:
                buffer, state = BytesIO(), torch.get_rng_state()
                torch.onnx.export(written, (x.clone(),), buffer, dynamo=False, dynamic_axes=dims, **common)
                if own.drew:  # torch's exporter does so with the generators of the process alone
                    torch.set_rng_state(state)
                proto = onnx.load_from_string(buffer.getvalue())
        _declare_shapes(proto, shapes, dims)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # torch, onnxscript and onnx have dozens of kinds
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX of opset {opset}: {first_line(error)}"
        ) from error
    found = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(f"torch wrote opset {found}, not opset (={opset}) as asked")
    lines = [f"{short_path(one.filename)}:{one.lineno}" for one in told if not is_quiet(one.filename)]
    return proto, list(dict.fromkeys(lines))


def shapes_of(entries: Sequence[Any]) -> dict[str, list[int | str]]:
    """Return {name: shape} of a graph's inputs or outputs, with names for the dimensions that vary."""
    return {
        entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in entries
    }


@checked
def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of an exported file, where known: ``class_names`` (a list), ``preprocessing`` (a dict) and
    ``output_keys`` (output -> its key in the model's output, where that could not be its name).

    Raises:
        MissingPackageError: onnx is not installed.
        ExportError: it is no ONNX file.

    Example:
        >>> import onnx
        >>> _ = onnx.save(onnx.ModelProto(metadata_props=[{"key": "class_names", "value": '["cat"]'}]), "model.onnx")
        >>> read_metadata("model.onnx")
        {'class_names': ['cat']}
    """
    require("onnx", "export", "exporting")
    onnx = import_module("onnx")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except import_module("google.protobuf.message").DecodeError:
        raise ExportError(f"{path} is no ONNX file, expected one that export_onnx wrote") from None
    return {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
