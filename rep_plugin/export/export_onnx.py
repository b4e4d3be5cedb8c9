"""``export_onnx``: a model as an ONNX file that was first run in other runtimes and computes the same function there."""

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.checkpoints.files import check_writable, write_atomic
from rep_plugin.errors import ArgumentError, EquivalenceError, TrainModeError, first_line
from rep_plugin.export.graph import INPUT, name_outputs, open_dims, shapes_of, to_onnx
from rep_plugin.export.preprocessing import metadata_of
from rep_plugin.export.report import ExportReport, RuntimeReport
from rep_plugin.export.runtimes import (
    RUNTIMES,
    check_runtimes,
    compare_runtime,
    open_model,
    require,
    version_of,
)
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.latency import eager_calls, interleaved_medians
from rep_plugin.measure.verify import Equivalence, flatten_outputs, sensitivity_of
from rep_plugin.reparam import NothingToMergeError, find_adapter
from rep_plugin.reparam import reparameterize as merge

TOLERANCE = 1e-4  # relative, in float32
OPSET = 18
PICTURES_AT_ONCE = 8


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor,
    *,
    reparameterize: bool = True,
    images: Tensor | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int = OPSET,
    dynamo: bool = False,
    output_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    tolerance: float = TOLERANCE,
    rounds: int = 20,
) -> ExportReport:
    """Write ``model`` to ``path`` as ONNX once its outputs in every runtime agree with PyTorch's; return a report.

    ``model`` must be in eval mode and float32, and is left as it is: a copy is merged first, with the proof of
    :func:`rep_plugin.reparameterize` (``reparameterize=False`` writes the model as it stands). The file's outputs are what
    ``model(x)`` returns: logits of a classifier, without softmax; one output for each map of a backbone.
    ``output_names`` replaces the names :func:`rep_plugin.export.graph.name_outputs` gives.

    ``example_input`` (N, C, H, W) are preprocessed pictures, best real ones; ``images`` (M, C, H, W) are more of them to
    compare on. ``dynamic_batch`` leaves the number of pictures open (else it is N), ``dynamic_size`` height and width. What
    is open is compared at other values too: one picture and three, an odd size and a larger one of another aspect. Errors
    are relative to the largest value of each output. Then a call on one picture is timed, the median of ``rounds`` (0:
    not timed), with as many threads as torch has.

    ``class_names`` and ``preprocessing`` (plain data; by default a timm model's own) go into the file as metadata, for
    :func:`rep_plugin.export.graph.read_metadata`. ``dynamo=True`` takes torch's newer exporter in the place of the one that
    traces, which torch calls legacy: both write all of our networks and measure equally exact, but it takes 10 to 1000
    times as long (six minutes for an EfficientNet of open size).

    Raises RuntimeError in train mode; ValueError for arguments that do not fit; ImportError, naming the extra, where a
    runtime is not installed; what ``reparameterize`` raises;
    :class:`rep_plugin.errors.ExportError` where torch cannot write the model or a runtime cannot run it;
    :class:`rep_plugin.errors.EquivalenceError` over ``tolerance`` or on a non-finite value; OSError where the file cannot
    be written. The file gets its name when all is proven: until then an older one stays.
    """
    started = time.perf_counter()
    path = Path(path)
    check_runtimes(runtimes)
    require("onnx", *runtimes)
    _check(model, path, example_input, images, dynamic_size)
    if not 0 < tolerance < math.inf:
        raise ArgumentError(f"tolerance must be a finite number > 0, got {tolerance}")
    x = example_input.detach().cpu()
    single = x[:1] if dynamic_batch else x
    report = ExportReport("export_onnx", count_params(model), 0, input_shape=tuple(single.shape), path=str(path))
    report.tolerance, report.opset = tolerance, opset
    written = copy.deepcopy(model).cpu()
    report.macs_before = count_macs(written, single)
    if reparameterize:
        written = _merged(written, x[:PICTURES_AT_ONCE], report)
    elif left := [name for name, module in written.named_modules() if find_adapter(module) is not None]:
        report.notes.append(f"written as it stands: {len(left)} modules could be merged, first {left[0]!r}")
    report.params_after, report.macs_after = count_params(written), count_macs(written, single)

    inputs = _inputs(x, images, dynamic_batch)
    expected = [_reference(written, one) for one in inputs]
    if dynamic_size:
        others, found = _other_sizes(written, inputs[0][:2] if dynamic_batch else inputs[0], report)
        inputs, expected = inputs + others, expected + found
    tensors = [flatten_outputs(one) for one in expected]
    if not tensors[0] or not all(tensor.dim() for tensor in tensors[0]):
        got = [tuple(tensor.shape) for tensor in tensors[0]]
        raise ArgumentError(f"the model must give floating-point tensors (N, ...), got shapes {got}")
    report.compared = list(dict.fromkeys(tuple(one.shape) for one in inputs))
    proof = Equivalence(sensitivity=_sensitivity(expected))
    proof.warn()
    names = list(output_names or name_outputs(model, expected[0]))
    if len(names) != len(tensors[0]) or len(set(names)) != len(names) or {"", INPUT} & set(names):
        raise ArgumentError(f"output_names must be {len(tensors[0])} different names (not {INPUT!r}), got {names}")
    proto = to_onnx(written, x, names, open_dims(inputs, tensors, names), opset, dynamo)
    report.inputs, report.outputs = shapes_of(proto.graph.input), shapes_of(proto.graph.output)
    report.metadata = metadata_of(model, x.shape[1:], tensors[0], class_names, preprocessing)
    for key, value in report.metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    data = proto.SerializeToString()
    report.size_bytes = len(data)

    calls = dict(eager_calls({"PyTorch": written}, single))
    for runtime in runtimes:
        session = open_model(runtime, data, torch.get_num_threads())
        found = compare_runtime(runtime, session, written, inputs, expected, tolerance)
        proof.total.include(found)
        report.runtimes.append(RuntimeReport(runtime, version_of(runtime), found.max_abs, found.max_rel))
        calls[runtime] = lambda session=session: session(single)
    report.add_proof(proof)
    if rounds:
        medians = {name: seconds * 1e3 for name, seconds in interleaved_medians(calls, rounds).items()}
        report.pytorch_milliseconds = medians["PyTorch"]
        for one in report.runtimes:
            one.milliseconds = medians[one.name]
    write_atomic(path, lambda file: file.write(data))
    report.seconds = time.perf_counter() - started
    return report


def export_pictures(
    model: nn.Module,
    path: str | Path,
    pictures: Tensor | None,
    shape: Sequence[int],
    batch: int | None = None,
    size: Sequence[int] | None = None,
    **options,
) -> ExportReport:
    """Call :func:`export_onnx` on preprocessed pictures (N, C, H, W), or on random ones of ``shape`` (C, H, W) where None.

    ``batch`` fixes the number of pictures of a call (None: open), ``size`` (H, W) scales the pictures first; ``options`` are
    those of :func:`export_onnx`. Raises ValueError for numbers < 1, and what :func:`export_onnx` raises.
    """
    if batch is not None and batch < 1:
        raise ArgumentError(f"batch must be >= 1, got {batch}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ArgumentError(f"size must be two numbers >= 1, got {tuple(size)}")
    notes = [] if pictures is not None else ["compared on random pictures, as none were given"]
    if pictures is None:
        pictures = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if size is not None and tuple(size) != tuple(pictures.shape[2:]):
        pictures = F.interpolate(pictures, tuple(size), mode="bilinear", antialias=True)
    if batch is not None:
        index = torch.arange(batch) % len(pictures)
        options |= {"images": pictures, "dynamic_batch": False}
        report = export_onnx(model, path, pictures[index], **options)
    else:
        report = export_onnx(model, path, pictures, **options)
    report.notes += notes
    return report


def _check(model: nn.Module, path: Path, x: Tensor, images: Tensor | None, dynamic_size: bool) -> None:
    """Refuse what cannot end well before anything costly begins."""
    if path.suffix != ".onnx" or path.is_dir():
        raise ArgumentError(f"path must be that of a file ending in .onnx, got {path}")
    check_writable(path.parent)
    for name, module in model.named_modules():
        if module.training:
            raise TrainModeError(f"{name or type(module).__name__!r} is in train mode: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ArgumentError(f"the model must be float32, but {name!r} is {tensor.dtype}: call model.float() first")
    for name, pictures in {"example_input": x, "images": images}.items():
        if pictures is None and name == "images":
            continue
        if (
            not isinstance(pictures, Tensor)
            or pictures.dtype != torch.float32
            or pictures.dim() < 2
            or not len(pictures)
        ):
            got = (
                f"{pictures.dtype} {tuple(pictures.shape)}" if isinstance(pictures, Tensor) else type(pictures).__name__
            )
            raise ArgumentError(f"{name} must be a float32 tensor (N, C, ...), N >= 1, got {got}")
    if images is not None and images.shape[1:] != x.shape[1:]:
        raise ArgumentError(
            f"images are {tuple(images.shape[1:])}, but example_input is {tuple(x.shape[1:])} a picture"
        )
    if dynamic_size and x.dim() != 4:
        raise ArgumentError(f"dynamic_size needs an example_input (N, C, H, W), got {tuple(x.shape)}")


def _merged(model: nn.Module, x: Tensor, report: ExportReport) -> nn.Module:
    """Return what merging makes of a model, in place, or the model where there is nothing to merge."""
    try:
        merged, done = merge(model, x, inplace=True)
    except NothingToMergeError as error:
        report.notes.append(f"nothing to merge: {error}")
        return model
    report.blocks, report.notes, report.merge_rel_error = done.blocks, list(done.notes), done.max_rel_error
    return merged


def _inputs(x: Tensor, images: Tensor | None, dynamic_batch: bool) -> list[Tensor]:
    """Return the batches to compare: all pictures, and the first of them at other numbers where these are open."""
    pictures = x if images is None else torch.cat((x, images.detach().cpu()))
    if dynamic_batch and len(pictures) == 1:  # repeated, it would not tell whether the output depends on it
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        pictures = torch.cat((pictures, pictures.mean() + noise * (pictures.std() if pictures.std() > 0 else 1)))
    count = min(len(pictures), PICTURES_AT_ONCE) if dynamic_batch else len(x)

    def take(start: int, number: int) -> Tensor:
        return pictures[torch.arange(start, start + number) % len(pictures)]

    batches = [take(start, count) for start in range(0, len(pictures), count)]
    if dynamic_batch:
        batches += [take(0, number) for number in (1, 3) if number != count]
    return batches


def _other_sizes(model: nn.Module, x: Tensor, report: ExportReport) -> tuple[list[Tensor], list]:
    """Return pictures at two other sizes, odd ones where the model takes them, else multiples of 32, with a note; and the
    model's outputs for them.

    Raises ValueError where it takes neither.
    """
    height, width = x.shape[2:]
    odd = ((height - 1 - height % 2, width - 1 - width % 2), ((5 * height // 4) | 1, (9 * width // 8) | 1))
    even = ((height // 32 * 32 + 32, width // 32 * 32 + 32), (height // 32 * 32 + 64, width // 32 * 32 + 32))
    refused = None
    for sizes in (odd, even):
        batches = [F.interpolate(x, [max(1, side) for side in size], mode="bilinear") for size in sizes]
        try:
            found = [_reference(model, batch) for batch in batches]
        except ValueError as error:
            refused = refused or error
            continue
        if refused:
            report.notes.append(f"compared at multiples of 32 alone: {refused}")
        return batches, found
    raise refused


def _reference(model: nn.Module, x: Tensor) -> object:
    """Return PyTorch's output, copied: some models hand out the tensors they work on."""
    try:
        with torch.no_grad():
            output = copy.deepcopy(model(x.clone()))  # a model may work in place
    except Exception as error:  # a size that a network does not take is refused in as many ways as there are networks
        raise ArgumentError(
            f"the model does not take an input of shape {tuple(x.shape)}: {first_line(error)}"
        ) from error
    if not all(torch.isfinite(out).all() for out in flatten_outputs(output)):
        raise EquivalenceError(f"PyTorch's own output for an input of shape {tuple(x.shape)} is not finite")
    return output


def _sensitivity(expected: Sequence[object]) -> float | None:
    """Return how much the outputs depend on the input; None where each is of one image, which says nothing of another."""
    sizes = [len(flatten_outputs(output)[0]) for output in expected]
    return max((sensitivity_of(output, size) for output, size in zip(expected, sizes) if size > 1), default=None)
