"""A PyTorch model as an ONNX graph in memory, the names of its outputs, and what its metadata tell."""

import json
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rep_plugin.arguments import checked
from rep_plugin.errors import ExportError, first_line
from rep_plugin.export.inputs import INPUT, Feed, call, unique_names, with_tensors
from rep_plugin.measure.branches import is_quiet, short_path
from rep_plugin.measure.differences import flatten_outputs, output_paths
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.optional import require

OPSET = 18
# torch's exporters and the filters of warnings have one state for the process: one thread of ours at a time.
_EXPORTER = threading.Lock()


class _Called(nn.Module):
    """A model that takes the tensors of a call alone, and gives a plain tuple of them."""

    def __init__(self, model: nn.Module, arguments: Any):
        super().__init__()
        self.model, self.arguments = model, arguments
        self.training = False  # the exporter gives all modules the mode of the outermost one in the end

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten_outputs(call(self.model, with_tensors(self.arguments, tensors))))


def _mish(x: Tensor) -> Tensor:
    """x * tanh(softplus(x)) with one exponential: n / (n + 2) is the tanh, n = e^x (e^x + 2)."""
    grown = torch.exp(x.clamp(max=20.0))  # from there it is x
    n = grown * (grown + 2)
    return x * (n / (n + 2))


class _Stable(TorchFunctionMode):
    """Writes in other operators what the exporters take apart badly.

    log(sigmoid(x)) would be minus infinity below -104; Mish would take ONNX Runtime 4 times as long. Notes the lines in which
    a size or a value of what is traced decides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        if func is Tensor.__bool__ and torch.jit.is_tracing() and not is_quiet(frame.f_code.co_filename):
            self.lines[f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}"] = None
        if func is F.logsigmoid:
            return -F.softplus(-args[0])
        return _mish(args[0]) if func is F.mish else func(*args, **(kwargs or {}))


def name_outputs(model: nn.Module, output: object, taken: Collection[str] = (INPUT,)) -> list[str]:
    """Return a name for each tensor of a model's output: valid in ONNX, and none twice.

    Args:
        model: the model. Its ``feature_info`` (timm) names maps by stride; a vector is ``features`` with 0 ``num_classes``.
        output: its output. Tensors of dicts, named tuples and dataclasses are named by their keys: ``out``, ``maps_0`` of a
            list in a dict, and ``output_0`` where a key is no name, as ``"0"``.
        taken: names of the inputs.

    Returns:
        Names such as ``stride4`` or ``map0`` of maps, and ``logits`` or ``features`` of one vector an image.
    """
    return unique_names(_keys(model, output), "output", taken)


def _keys(model: nn.Module, output: object) -> list[str]:
    found = output_paths(output)
    if any(isinstance(part, str) for path, _ in found for part in path):
        return ["_".join(map(str, path)) for path, _ in found]
    tensors = [tensor for _, tensor in found]
    if len(tensors) == 1 and tensors[0].dim() == 2:
        return ["features" if getattr(model, "num_classes", None) == 0 else "logits"]
    info = getattr(model, "feature_info", None)
    strides = info.reduction() if callable(getattr(info, "reduction", None)) else []
    if len(strides) == len(tensors) == len(set(strides)):
        return [f"stride{stride}" for stride in strides]
    kind = "map" if all(tensor.dim() == 4 for tensor in tensors) else "output"
    return [f"{kind}{index}" for index in range(len(tensors))]


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


def _declare(
    proto: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Sequence[int]], dims: Mapping
) -> list[str]:
    """Write all inputs and the measured shapes into a graph; return the inputs that no operator reads.

    The exporters guess shapes, and call a 2 the batch because there were two images; the tracing one leaves out what is not
    read.
    """
    helper, graph = import_module("onnx").helper, proto.graph
    kinds = {name: helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype) for name, tensor in inputs.items()}
    del graph.input[:]
    graph.input.extend(helper.make_tensor_value_info(name, kind, []) for name, kind in kinds.items())
    shapes = {**{name: tuple(tensor.shape) for name, tensor in inputs.items()}, **outputs}
    for entry in (*graph.input, *graph.output):
        shape = entry.type.tensor_type.shape
        del shape.dim[:]
        for dim, size in enumerate(shapes[entry.name]):
            if dim in dims[entry.name]:
                shape.dim.add(dim_param=dims[entry.name][dim])
            else:
                shape.dim.add(dim_value=size)
    read = {entry.name for entry in graph.output} | set(_names_read(graph))
    return [name for name in inputs if name not in read]


def _names_read(graph: Any) -> Iterator[str]:
    """Names that the operators of a graph read, in their branches and loops too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names_read(inner)


class _Silent:
    """Switches off, while a model is traced, what the tracing exporter prints of its graph where it fails.

    It switches that on itself, for whatever level of detail is asked for.
    """

    def __init__(self, model: nn.Module):
        self.handle = model.register_forward_pre_hook(lambda *_: torch._C._jit_set_onnx_log_enabled(False))

    def __enter__(self) -> None:
        self.before = torch._C._jit_is_onnx_log_enabled()

    def __exit__(self, *_) -> None:
        self.handle.remove()
        torch._C._jit_set_onnx_log_enabled(self.before)


class Graph(NamedTuple):
    """What :func:`to_onnx` gives.

    Args:
        proto: the graph (``onnx.ModelProto``), checked by onnx.
        lines: as ``net.py:12``, where the tracing exporter saw a size or a value decide.
        unread: inputs that no operator reads.
    """

    proto: Any
    lines: list[str]
    unread: list[str]


def opsets(dynamo: bool) -> tuple[int, int]:
    """Return the oldest and the newest version of the operators that torch writes here.

    Args:
        dynamo: with its newer exporter; that writes versions before 18 by chance alone.
    """
    known = import_module("torch.onnx._constants")
    newest = import_module("onnx").defs.onnx_opset_version()
    return known.ONNX_BASE_OPSET, newest if dynamo else min(newest, known.ONNX_MAX_OPSET)


def to_onnx(
    model: nn.Module,
    feed: Feed,
    outputs: Mapping[str, Sequence[int]],
    dims: Mapping[str, Mapping],
    opset: int,
    dynamo: bool,
) -> Graph:
    """Return the graph of a model.

    Args:
        model: a model in eval mode.
        feed: what to trace it on.
        outputs: name -> shape of each output, for these inputs.
        dims: the open dimensions, see :func:`~rep_plugin.export.inputs.open_dims`.
        opset: version of the ONNX operators.
        dynamo: use torch's newer exporter.

    Returns:
        The graph, and what the exporter said.

    Raises:
        MissingPackageError: onnx, or onnxscript with ``dynamo``, is not installed.
        ExportError: torch cannot write the model, or not in this opset, or the result is not valid ONNX.
    """
    for package in ("onnx", *(["onnxscript"] if dynamo else [])):
        require(package, "export", "exporting")
    onnx = import_module("onnx")
    # A batch of 1 would be taken for a constant.
    tensors = [
        one.expand(2, *one.shape[1:]) if 0 in dims[name] and len(one) == 1 else one
        for name, one in feed.tensors.items()
    ]
    common = {"input_names": [*feed.names], "output_names": list(outputs), "opset_version": opset, "verbose": False}
    try:
        with (
            _EXPORTER,
            torch.no_grad(),
            warnings.catch_warnings(),
            working("writing the graph"),
            _Stable() as watch,
        ):
            warnings.simplefilter("ignore")  # of shapes that become constants the comparison finds those that matter
            with private_random() as own:
                output = call(model, with_tensors(feed.arguments, [one.clone() for one in tensors]))
            several = list(output) if isinstance(output, (tuple, list)) else [output]
            # What is not floating point is not compared, and so not written.
            plain = all(isinstance(one, Tensor) and one.is_floating_point() for one in several)
            alone = isinstance(feed.arguments, Tensor)
            written = model if plain and alone else _Called(model, feed.arguments)
            if dynamo:
                free = tuple(dict.fromkeys(dims[name], torch.export.Dim.DYNAMIC) for name in feed.names)
                shapes = free if written is model else (free,)
                program = torch.onnx.export(written, (*tensors,), dynamo=True, dynamic_shapes=shapes, **common)
                proto = program.model_proto
            else:
                buffer, state = BytesIO(), torch.get_rng_state()
                given = tuple(one.clone() for one in tensors)
                with _Silent(written):
                    torch.onnx.export(written, given, buffer, dynamo=False, dynamic_axes=dims, **common)
                if own.drew:  # torch's exporter does so with the generators of the process alone
                    torch.set_rng_state(state)
                proto = onnx.load_from_string(buffer.getvalue())
        unread = _declare(proto, feed.tensors, outputs, dims)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # torch, onnxscript and onnx have dozens of kinds
        more = f"; {opsets(dynamo)[0]} to {opsets(dynamo)[1]} can be asked for" if opset != OPSET else ""
        raise ExportError(
            f"{type(model).__name__} cannot be written as ONNX of opset {opset}: {first_line(error)}{more}"
        ) from error
    found = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(
            f"torch wrote opset {found}, not opset (={opset}) as asked: with dynamo take {OPSET} or newer"
        )
    return Graph(proto, list(watch.lines), unread)


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
