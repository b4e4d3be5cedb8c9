"""``export_onnx``: a model as an ONNX file that was first run in other runtimes and computes the same function there."""

import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rep_plugin.arguments import In, Name, OneOf, Positive, checked
from rep_plugin.checkpoints.files import check_writable, write_atomic, write_contents
from rep_plugin.errors import (
    ArgumentError,
    EquivalenceError,
    ExportError,
    NothingToMergeError,
    TrainModeError,
    first_line,
)
from rep_plugin.export.graph import OPSET, name_outputs, opsets, output_keys, shapes_of, to_onnx
from rep_plugin.export.inputs import Feed, constants_of, feed_of, open_dims, other_values, require_data
from rep_plugin.export.preprocessing import metadata_of
from rep_plugin.export.report import ExportReport, RuntimeReport
from rep_plugin.export.runtimes import RUNTIMES, check_runtimes, compare_runtime, open_model
from rep_plugin.measure.branches import Branches, Place, find_branches
from rep_plugin.measure.copies import copy_inputs, copy_model, copy_values
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.differences import flatten_outputs, output_paths, sensitivity_of
from rep_plugin.measure.forward import Example, require_bare, require_numbers, takes_examples
from rep_plugin.measure.latency import eager_calls, interleaved_medians
from rep_plugin.measure.progress import track, working
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.verify import Equivalence
from rep_plugin.optional import require
from rep_plugin.reparam.merge_blocks import find_mergeable
from rep_plugin.reparam.reparameterize import reparameterize as merge

TOLERANCE = 1e-4  # relative, in float32
IMAGES_AT_ONCE = 8


@checked
@takes_examples
@working("exporting")
def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Example,
    *,
    reparameterize: bool = True,
    images: Tensor | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: Annotated[int, In("[1, 100]")] = OPSET,
    dynamo: bool = False,
    output_names: Sequence[Name] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping | None = None,
    runtimes: Sequence[Annotated[str, OneOf(RUNTIMES)]] = RUNTIMES,
    tolerance: Positive = TOLERANCE,
    rounds: Annotated[int, In("[0, 10000]")] = 20,
    with_report: bool = False,
    notes: Sequence[str] = (),
) -> ExportReport:
    """Write a model as ONNX once its outputs in every runtime agree with PyTorch's; return a report.

    A copy is merged first, with the proof of :func:`rep_plugin.reparameterize`; the model is left as it is. The outputs of
    the file are those of ``model(x)``: logits of a classifier, without softmax; one output for each map of a backbone. The
    file is written when all is proven: until then an older one stays. Where the forward decides by a value, the file holds
    the path of the example alone, and the notes name the line.

    Several threads may call this: one writes its graph at a time. Models in other threads run on undisturbed, but one that
    asks ``torch.onnx.is_in_onnx_export()`` is told True meanwhile; with ``dynamo`` torch itself is patched while it writes.

    Args:
        model: a model in eval mode and float32.
        path: file to write, ending in ``.onnx``.
        example_input: preprocessed images (N, C, H, W), best real ones; or a tuple or a dict of all that the model is called
            with. Then each tensor is an input of the file, named as the parameter of the forward (``maps_0``, ``extra_mask``
            inside of lists and dicts), and all else is a constant. The images are the first float tensor of most dimensions.
        reparameterize: merge first; False writes the model as it is.
        images: more images (M, C, H, W) to compare on.
        dynamic_batch: leave the number of images open (else N), in all inputs that are as long; compared with one and three
            images too, and with others for which the forward takes another path.
        dynamic_size: leave height and width open, in other float maps (N, C, H, W) in proportion; compared at an odd size, at
            a larger one of another aspect, and at sizes for which the forward takes another path.
        opset: version of the ONNX operators.
        dynamo: use torch's newer exporter, 10 to 1000 times as slow and as exact as the tracing one.
        output_names: names of the outputs; the default is :func:`rep_plugin.export.graph.name_outputs`.
        class_names: written as metadata; the default is a timm model's own.
        preprocessing: plain data, written as metadata; the default is a timm model's own.
        runtimes: where to run the file, of ``onnxruntime`` and ``openvino``.
        tolerance: largest allowed difference, relative to the largest value of each output.
        rounds: how often a call on one image is timed, with as many threads as torch has; 0: not timed.
        with_report: write the report to ``path`` + ``.json`` and ``.html`` as well, all files together or none.
        notes: sentences for the report, after its own.

    Returns:
        The report of the file, its errors and its latency.

    Raises:
        ArgumentError: an argument does not fit.
        TrainModeError: a module is in train mode.
        MissingPackageError: a runtime is not installed.
        ExportError: torch cannot write the model, or a runtime cannot run it.
        EquivalenceError: over the tolerance, or a value is not finite; or the forward takes another path for other sizes,
            which the file does not. It names the line.
        OSError: the file cannot be written.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
        >>> report = export_onnx(model, "model.onnx", torch.randn(2, 3, 8, 8), runtimes=["onnxruntime"], rounds=0)
        >>> report.outputs["map0"]
        ['batch', 4, 8, 8]
    """
    started = time.perf_counter()
    path = Path(path)
    require_bare(model)
    check_runtimes(runtimes)
    for package in ("onnx", *runtimes):
        require(package, "export", "exporting")
    _check(model, path, example_input, images, dynamic_size, opset, dynamo)
    x = copy_inputs(example_input).cpu()
    single = x[:1] if dynamic_batch else x
    example = feed_of(model, x)
    require_data(example)
    report = ExportReport("export_onnx", count_params(model), 0, input_shape=tuple(single.shape), path=str(path))
    report.tolerance, report.opset = tolerance, opset
    written = copy_model(model).cpu()
    _refuse_post_processing(written, example.with_images(single))
    report.macs_before = count_macs(written, single)
    if reparameterize:
        written = _merged(written, x[:IMAGES_AT_ONCE], report)
    elif left := find_mergeable(written):
        report.notes.append(f"written as it stands: {len(left)} modules could be merged, first {left[0]!r}")
    report.params_after, report.macs_after = count_params(written), count_macs(written, single)

    inputs = [example.with_images(one) for one in _inputs(x, images, dynamic_batch)]
    expected = [_reference(written, one) for one in track(inputs, "running PyTorch")]
    if dynamic_size:
        first = inputs[0].images
        others, outputs = _other_sizes(written, example, first[:2] if dynamic_batch else first, report)
        inputs, expected = inputs + others, expected + outputs
    tensors = [flatten_outputs(one) for one in expected]
    if not tensors[0] or not all(tensor.dim() for tensor in tensors[0]):
        got = [tuple(tensor.shape) for tensor in tensors[0]]
        raise ArgumentError(f"the model must give floating-point tensors (N, ...), got shapes {got}")
    branches = find_branches(written, single, dynamic_size, dynamic_batch)
    paths = _other_paths(written, branches, example.with_images(single), report)
    every, results = [*inputs, *(one.feed for one in paths)], [*expected, *(one.output for one in paths)]
    _refuse_changing_outputs(model, every, results)
    report.compared = list(dict.fromkeys(tuple(one.images.shape) for one in every))
    proof = Equivalence(sensitivity=_sensitivity(expected))
    proof.warn(stacklevel=6)  # past the decorators
    names = list(output_names or name_outputs(model, expected[0], example.names))
    invalid = {"", *example.names} & set(names) or any(name.isdigit() for name in names)
    if len(names) != len(tensors[0]) or len(set(names)) != len(names) or invalid:
        inputs_named = ", ".join(map(repr, example.names))
        raise ArgumentError(
            f"output_names must be {len(tensors[0])} different names (no numbers, not {inputs_named}), got {names}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, tensors[0])}
    runs = zip(*(flatten_outputs(one) for one in results))
    dims = open_dims(every, dict(zip(names, runs)))
    proto, sizes, unread = to_onnx(written, example, shapes, dims, opset, dynamo)
    sizes = [line for line in sizes if line not in {place.line for place in branches.values}]
    if dynamic_size and sizes:
        report.notes.append(f"the forward decides by sizes in {', '.join(sizes)}: proven at the compared ones")
    if constants := constants_of(example.arguments):
        report.notes.append(f"constants of the file, as given: {', '.join(constants)}")
    report.notes += [f"no output depends on the input {name!r}" for name in unread]
    report.inputs, report.outputs = shapes_of(proto.graph.input), shapes_of(proto.graph.output)
    report.input_types = {name: str(one.dtype).removeprefix("torch.") for name, one in example.tensors.items()}
    report.metadata = metadata_of(model, x.shape[1:], tensors[0], class_names, preprocessing)
    if "preprocessing" in report.metadata and len(example.names) > 1:
        report.metadata["preprocessing_input"] = example.image_name
    if keys := output_keys(expected[0], names):
        report.metadata["output_keys"] = keys
    for key, value in report.metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    data = proto.SerializeToString()
    report.size_bytes = len(data)

    varied = None if isinstance(example.arguments, Tensor) else _varied(written, inputs[0], report)
    timed = example.with_images(single)
    calls = dict(eager_calls({"PyTorch": written}, timed.arguments))
    for runtime in track(runtimes, "comparing runtimes"):
        session = open_model(runtime, data, torch.get_num_threads())
        found = compare_runtime(runtime, session, written, inputs, expected, tolerance)
        for one in paths:
            try:
                found.include(compare_runtime(runtime, session, written, [one.feed], [one.output], tolerance))
            except (EquivalenceError, ExportError) as error:
                raise EquivalenceError(
                    f"the file holds one path of the forward, which takes another one for such inputs, in {one.place}: "
                    f"{error}; export with {_fixed(one.feed.images, single)}, or write the forward without that decision"
                ) from None
        if varied is not None:
            try:
                found.include(compare_runtime(runtime, session, written, *varied, tolerance))
            except (EquivalenceError, ExportError) as error:
                raise EquivalenceError(
                    f"with other values of the inputs {error}; what the forward takes for a number, as by int(), is in the "
                    "file as in the example: give it as a number, or write the forward with tensors alone"
                ) from None
        proof.total.include(found)
        report.runtimes.append(RuntimeReport(runtime, version(runtime), found.max_abs, found.max_rel))
        calls[runtime] = lambda session=session: session(timed.tensors)
    report.add_proof(proof)
    report.border_rel_error = report.interior_rel_error = None  # a report's are in float64
    if rounds:
        medians = {name: seconds * 1e3 for name, seconds in interleaved_medians(calls, rounds).items()}
        report.pytorch_milliseconds = medians["PyTorch"]
        for measured in report.runtimes:
            measured.milliseconds = medians[measured.name]
    report.seconds = time.perf_counter() - started
    report.notes += notes
    if with_report:
        write_contents(path.parent, {path.name: data, **report.files(path.name)})
    else:
        write_atomic(path, lambda file: file.write(data))
    return report


def export_images(
    model: nn.Module,
    path: str | Path,
    images: Tensor | None,
    shape: Sequence[int],
    batch: int | None = None,
    size: Sequence[int] | None = None,
    **options,
) -> ExportReport:
    """Call :func:`export_onnx` on preprocessed images, or on random ones.

    Args:
        model: as for :func:`export_onnx`, as is ``path``.
        path: file to write.
        images: images (N, C, H, W); None: two random ones.
        shape: shape (C, H, W) of the random images.
        batch: fixed number of images of a call; None: open.
        size: (H, W) to scale the images to.
        options: the others of :func:`export_onnx`.

    Returns:
        The report of :func:`export_onnx`.

    Raises:
        ArgumentError: a number below 1; and what :func:`export_onnx` raises.
    """
    if batch is not None and batch < 1:
        raise ArgumentError(f"batch must be >= 1, got {batch}")
    if images is None:
        options["notes"] = ["compared on random images, as none were given", *options.get("notes", ())]
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    images = scaled_to(images, size)
    if batch is not None:
        options |= {"images": images, "dynamic_batch": False}
        images = images[torch.arange(batch) % len(images)]
    return export_onnx(model, path, images, **options)


def scaled_to(images: Tensor, size: Sequence[int] | None) -> Tensor:
    """Return images of another size.

    Args:
        images: images (N, C, H, W).
        size: (H, W); None: they stay.

    Returns:
        The images.

    Raises:
        ArgumentError: other than two numbers, or one below 1.
    """
    if size is None:
        return images
    if len(size) != 2 or min(size) < 1:
        raise ArgumentError(f"size must be two numbers >= 1, got {tuple(size)}")
    if tuple(size) == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def _check(
    model: nn.Module, path: Path, x: Tensor, images: Tensor | None, dynamic_size: bool, opset: int, dynamo: bool
) -> None:
    """Refuse what cannot end well before anything costly begins."""
    oldest, newest = opsets(dynamo)
    if not oldest <= opset <= newest:
        how = " with dynamo" if dynamo else ""
        raise ArgumentError(f"opset must be in [{oldest}, {newest}]{how}, got {opset}")
    check_path(path)
    require_eval(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ArgumentError(f"the model must be float32, but {name!r} is {tensor.dtype}: call model.float() first")
    for name, batch in {"example_input": x, **({} if images is None else {"images": images})}.items():
        if not isinstance(batch, Tensor) or batch.dtype != torch.float32 or batch.dim() < 2 or not len(batch):
            got = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ArgumentError(f"{name} must be a float32 tensor (N, C, ...), N >= 1, got {got}")
        require_numbers(name, batch)
    if images is not None and images.shape[1:] != x.shape[1:]:
        raise ArgumentError(f"images are {tuple(images.shape[1:])}, but example_input is {tuple(x.shape[1:])} an image")
    if dynamic_size and x.dim() != 4:
        raise ArgumentError(f"dynamic_size needs an example_input (N, C, H, W), got {tuple(x.shape)}")


def require_eval(model: nn.Module) -> None:
    """Refuse a model of which any module is in train mode."""
    for name, module in model.named_modules():
        if module.training:
            raise TrainModeError(f"{name or type(module).__name__!r} is in train mode: call model.eval() first")


def check_path(path: Path) -> None:
    """Refuse a path that is none of an ONNX file, or that cannot be written."""
    if path.suffix != ".onnx" or path.is_dir():
        raise ArgumentError(f"path must be that of a file ending in .onnx, got {path}")
    check_writable(path.parent)


def _refuse_post_processing(model: nn.Module, feed: Feed) -> None:
    """Refuse models that give one result for each image, as detectors do, before anything costly begins.

    Raises ExportError, which says what can be exported instead.
    """

    def one_each(feed: Feed) -> str | None:
        output = _reference(model, feed)
        if not isinstance(output, (list, tuple)) or len(output) != len(feed.images):
            return None
        return None if any(isinstance(one, (Tensor, list, tuple)) for one in output) else type(output[0]).__name__

    if (kind := one_each(feed)) and one_each(feed.with_images(torch.cat((feed.images, feed.images)))):
        raise ExportError(
            f"{type(model).__name__} gives one {kind} for each image: such post-processing has no fixed outputs; "
            f"{_instead(model)}"
        )


def _refuse_changing_outputs(model: nn.Module, inputs: Sequence[Feed], outputs: Sequence[object]) -> None:
    """Refuse outputs whose number, places or ranks depend on the input. Raises ExportError."""
    kinds = [[(path, tensor.dim()) for path, tensor in output_paths(output)] for output in outputs]
    for feed, kind in zip(inputs, kinds):
        if kind != kinds[0]:
            first, other = (f"{len(found)} of ranks {[rank for _, rank in found]}" for found in (kinds[0], kind))
            raise ExportError(
                f"{type(model).__name__} gives other outputs for {feed}, {other}, than for "
                f"{tuple(inputs[0].images.shape)}, {first}; {_instead(model)}"
            )


def _instead(model: nn.Module) -> str:
    parts = [name for name in ("backbone", "encoder", "body") if isinstance(getattr(model, name, None), nn.Module)]
    part = f"model.{parts[0]}" if parts else "its backbone"
    return f"export the part that gives maps, {part}, or take mmdeploy for a detector of mmdet"


def _merged(model: nn.Module, x: Tensor, report: ExportReport) -> nn.Module:
    """Return what merging makes of a model, in place, or the model where there is nothing to merge."""
    try:
        merged, done = merge(model, x, inplace=True)
    except NothingToMergeError as error:
        report.notes += error.notes  # that a model is merged already needs no note
        return model
    report.blocks, report.notes, report.merge_rel_error = done.blocks, list(done.notes), done.max_rel_error
    return merged


def _inputs(x: Tensor, images: Tensor | None, dynamic_batch: bool) -> list[Tensor]:
    """Return the batches to compare: all images, and the first of them at other numbers where these are open."""
    every = x if images is None else torch.cat((x, images.detach().cpu()))
    if dynamic_batch and len(every) == 1:  # repeated, it would not tell whether the output depends on it
        noise = torch.randn(every.shape, generator=torch.Generator().manual_seed(0))
        every = torch.cat((every, every.mean() + noise * (every.std() if every.std() > 0 else 1)))
    count = min(len(every), IMAGES_AT_ONCE) if dynamic_batch else len(x)

    def take(start: int, number: int) -> Tensor:
        return every[torch.arange(start, start + number) % len(every)]

    batches = [take(start, count) for start in range(0, len(every), count)]
    if dynamic_batch:
        batches += [take(0, number) for number in (1, 3) if number != count]
    return batches


def _other_sizes(model: nn.Module, example: Feed, x: Tensor, report: ExportReport) -> tuple[list[Feed], list]:
    """Return images at two other sizes, odd ones where the model takes them, else multiples of 32, with a note; and the
    model's outputs for them.

    Raises ValueError where it takes neither.
    """
    height, width = x.shape[2:]
    odd = ((height - 1 - height % 2, width - 1 - width % 2), ((5 * height // 4) | 1, (9 * width // 8) | 1))
    even = ((height // 32 * 32 + 32, width // 32 * 32 + 32), (height // 32 * 32 + 64, width // 32 * 32 + 32))
    refused: ArgumentError | None = None
    for sizes in (odd, even):
        scaled = [F.interpolate(x, [max(1, side) for side in size], mode="bilinear") for size in sizes]
        batches = [example.with_images(one) for one in scaled]
        try:
            found = [_reference(model, batch) for batch in batches]
        except ArgumentError as error:
            refused = refused or error
            continue
        if refused:
            report.notes.append(f"compared at multiples of 32 alone: {refused}")
        return batches, found
    raise refused


class _Path(NamedTuple):
    """Inputs for which a forward takes another path, the model's output for them, and where it decides."""

    feed: Feed
    output: object
    place: Place


def _other_paths(model: nn.Module, branches: Branches, single: Feed, report: ExportReport) -> list[_Path]:
    """Return inputs on the other sides of decisions by sizes; those that cannot be compared, and decisions by values, are
    noted.
    """
    report.notes = [
        note for note in report.notes if note not in branches.notes
    ]  # of the merge; what is written is told
    report.notes += [note.replace("is proven", "is in the file") for note in branches.notes]
    found = []
    for shape, place in branches.sizes.items():
        try:
            images = branches.input_of(shape, single.images)
            if images is not None:
                feed = single.with_images(images)
                found.append(_Path(feed, _reference(model, feed), place))
                continue
            reason = "they are too large to run"
        except ArgumentError as error:
            reason = str(error)
        report.notes.append(
            f"for inputs {shape} the forward takes another path in {place}, which is not in the file: {reason}"
        )
    return found


def _varied(model: nn.Module, feed: Feed, report: ExportReport) -> tuple[list[Feed], list] | None:
    """Return a call with other values, in a list, and the model's output for it; None, with a note, where it takes none."""
    other = other_values(feed)
    try:
        return [other], [_reference(model, other)]
    except (ArgumentError, EquivalenceError) as error:
        report.notes.append(f"other values of the inputs are not compared: {error}")
        return None


def _fixed(x: Tensor, single: Tensor) -> str:
    return "dynamic_size=False" if x.shape[1:] != single.shape[1:] else "dynamic_batch=False"


def _reference(model: nn.Module, feed: Feed) -> object:
    """Return PyTorch's output, copied: some models hand out the tensors they work on."""
    try:
        with torch.no_grad(), private_random():
            output = copy_values(feed.run(model))
    except Exception as error:  # a size that a network does not take is refused in as many ways as there are networks
        raise ArgumentError(f"the model does not take {feed}: {first_line(error)}") from error
    if not all(torch.isfinite(out).all() for out in flatten_outputs(output)):
        raise EquivalenceError(f"PyTorch's own output for {feed} is not finite")
    return output


def _sensitivity(expected: Sequence[object]) -> float | None:
    """Return how much the outputs depend on the input; None where each is of one image, which says nothing of another."""
    sizes = [len(flatten_outputs(output)[0]) for output in expected]
    return max((sensitivity_of(output, size) for output, size in zip(expected, sizes) if size > 1), default=None)
