"""``export_int8``: a model as a quantised ONNX file, whose agreement with float was measured on images that it has not seen.

The quantiser is ONNX Runtime's, static, in the QDQ format: stock operators, between which stand pairs of QuantizeLinear and
DequantizeLinear. What is added here is the choice and the check: how activations are calibrated, and whether weights have
one scale or one for each channel, is tried and compared on images that were held out.
"""

import io
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from rep_plugin.arguments import In, OneOf, That, checked
from rep_plugin.checkpoints.files import write_atomic, write_contents
from rep_plugin.errors import ArgumentError, EquivalenceError, NothingToMergeError
from rep_plugin.export.equalize import equalize
from rep_plugin.export.export_onnx import IMAGES_AT_ONCE, check_path, export_onnx, require_eval, scaled_to
from rep_plugin.export.inputs import INPUT
from rep_plugin.export.nncf import quantise_by_nncf
from rep_plugin.export.ranges import Before, output_ranges, weight_widths
from rep_plugin.export.report import ExportReport, Int8Layer, Int8Report, Int8Trial
from rep_plugin.export.runtimes import RUNTIMES, Session, open_model
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import require_numbers
from rep_plugin.measure.latency import interleaved_medians
from rep_plugin.measure.progress import track, working
from rep_plugin.measure.report import Report
from rep_plugin.optional import is_missing, require
from rep_plugin.reparam.reparameterize import reparameterize

METHODS = ("MinMax", "Percentile", "Entropy")  # names of onnxruntime's CalibrationMethod
NNCF = "NNCF"  # OpenVINO's quantiser, which corrects biases and chooses scales by itself
LEAST = 10  # images: eight to calibrate with and two held out
EVERY = 5  # one image of as many is held out
QUANTISED = {"Conv", "Gemm", "MatMul", "ConvTranspose"}  # layers with weights
Calibration = Annotated[Tensor | Iterable, That(lambda value: True, "images (N, C, H, W), or batches of them")]


@checked
@working("quantizing")
def export_int8(
    model: nn.Module,
    path: str | Path,
    calibration: Calibration,
    labels: Tensor | Sequence[int] | None = None,
    *,
    runtime: Annotated[str, OneOf(RUNTIMES)] = "onnxruntime",
    methods: Sequence[Annotated[str, OneOf((*METHODS, NNCF))]] | None = None,
    per_channel: bool | None = None,
    equalise: bool = True,
    min_agreement: Annotated[float, In("[0, 1]")] = 0.9,
    keep_float: Annotated[int, In("[0, 10000]")] = 0,
    layers: bool = True,
    rounds: Annotated[int, In("[0, 10000]")] = 50,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping | None = None,
    with_report: bool = False,
    notes: Sequence[str] = (),
) -> Int8Report:
    """Write a model as an int8 ONNX file, once it agrees with float on images that were held out; return a report.

    A copy is merged and written as float first, with the proofs of :func:`rep_plugin.export_onnx`. Of the images every fifth
    is held out, the others calibrate. Each method of calibration is tried with one scale for a layer's weights and with one
    for each channel, and the best of these once more after :func:`rep_plugin.export.equalize`, where that is exact. The best
    on the held-out images is kept, by the signal-to-noise ratio of the outputs: agreement and top-1 of some hundred images
    are too coarse to tell trials apart. The file is written when all is measured: until then an older one stays.

    Activations and weights have 8 bits (uint8 and int8), biases 32. Where each channel has a scale, weights use 7: with 8,
    sums overflow on processors without int8 instructions (AVX2 alone), which costs more than the bit. How fast the file is
    depends on the processor's instructions; what it computes may differ in the last bit between runtimes.

    Args:
        model: a classifier or backbone in eval mode and float32; it stays as it is.
        path: file to write, ending in ``.onnx``.
        calibration: preprocessed images (N, C, H, W) like those of training, 10 or more, best some hundred; or an iterable of
            such batches.
        labels: class of each image (N,), for top-1 on those held out; None: not measured.
        runtime: where the file is run, compared and timed: ``onnxruntime`` or ``openvino``.
        methods: how activations are calibrated, of ``MinMax``, ``Percentile`` and ``Entropy``; ``NNCF`` is OpenVINO's own
            quantiser (``pip install 'rep-plugin[nncf]'``). Default: the first three, for ``openvino`` ``NNCF`` too where it
            is installed.
        per_channel: weights have one scale for each channel, or one for a layer; None: both are tried.
        equalise: try :func:`rep_plugin.export.equalize` too.
        min_agreement: share of the held-out images that must have the same largest logit as in float. For outputs that are
            not logits (N, classes) nothing is refused.
        keep_float: as many layers stay in float: those which cost most.
        layers: measure for each layer what the outputs gain where it alone stays in float.
        rounds: how often a call on one image is timed, on one thread; 0: not timed.
        class_names, preprocessing: as for :func:`rep_plugin.export_onnx`.
        with_report: write the report to ``path`` + ``.json`` and ``.html`` as well, all files together or none.
        notes: sentences for the report, after its own.

    Returns:
        The report: what was tried, what agrees, what each layer costs, sizes and times.

    Raises:
        ArgumentError: too few images or labels, or others than images.
        EquivalenceError: less than ``min_agreement``.
        MissingPackageError: a runtime is not installed.
        ExportError, TrainModeError: as :func:`rep_plugin.export_onnx`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> report = export_int8(model, "int8.onnx", torch.randn(10, 3, 8, 8), methods=["MinMax"], rounds=0)
        >>> report.sqnr > 20, report.size_bytes < report.size_float
        (True, False)
    """
    started = time.perf_counter()
    for package in ("onnx", "onnxruntime", runtime):
        require(package, "export", "quantizing")
    if methods is None:
        methods = (*METHODS, NNCF) if runtime == "openvino" and not is_missing("nncf") else METHODS
    if not methods:
        raise ArgumentError(f"methods must name some of {', '.join(METHODS)}, {NNCF}, got none")
    if NNCF in methods:
        require("nncf", "nncf", "quantizing by NNCF")
    combined = [(method, each) for method in methods for each in _scales(method, per_channel)]
    if not combined:
        raise ArgumentError(f"per_channel=False does not go with methods={[*methods]}: NNCF chooses scales by itself")
    path = Path(path)
    check_path(path)
    images = _images_of(calibration)
    truth = _labels_of(labels, len(images))
    held = torch.arange(len(images)) % EVERY == EVERY - 1
    written, done = _merged(model, images[:2])
    more = list(done.notes)
    with tempfile.TemporaryDirectory() as folder:
        runtimes = list(dict.fromkeys(("onnxruntime", runtime)))

        def write(name: str, form: nn.Module) -> tuple[_Quantiser, ExportReport]:
            plain = Path(folder) / name / "float.onnx"
            plain.parent.mkdir()
            exported = export_onnx(
                form, plain, images[:2], reparameterize=False, runtimes=runtimes, rounds=0, class_names=class_names,
                preprocessing=preprocessing,
            )  # fmt: skip
            return _Quantiser(plain, images[~held]), exported

        quantiser, exported = write("merged", written)
        judge = _Judge(runtime, quantiser.plain.read_bytes(), images[held], None if truth is None else truth[held])

        trials: list[Int8Trial] = []
        chosen: list[_Made] = []  # the best so far

        def attempt(form: nn.Module, quantiser: _Quantiser, method: str, each: bool, equalised: bool = False) -> None:
            data = quantiser.quantise(method, each)
            trial = replace(judge.judge(data), method=method, per_channel=each, equalised=equalised)
            trials.append(trial)
            if not chosen or trial.sqnr > chosen[0].trial.sqnr:
                chosen[:] = [_Made(trial, form, quantiser, data)]

        for method, each in track(combined, "trying calibrations"):
            attempt(written, quantiser, method, each)
        if equalise:
            try:
                even, _ = equalize(written, images[:2])
                evened, _ = write("equalised", even)
                method = chosen[0].trial.method
                for each in _scales(method, per_channel):
                    attempt(even, evened, method, each, True)
            except NothingToMergeError as error:
                more += [f"not equalised: {note}" for note in error.notes]
        best, form, quantiser, data = chosen[0]
        final, found = best, []
        if layers or keep_float:
            before = Before(model, [block.name for block in done.blocks], images[~held])
            ranges = output_ranges(form, images[~held])
            for node in track(quantiser.nodes, "judging layers"):
                without = judge.judge(quantiser.quantise(best.method, best.per_channel, [node]))
                layer, name = Int8Layer(node, *quantiser.widths(node), without.sqnr - best.sqnr), quantiser.layer(node)
                layer.range = ranges.get(name)
                layer.largest_before, layer.spread_before, layer.range_before = before.of(name)
                found.append(layer)
        worst = sorted(found, key=lambda layer: -layer.gain)[:keep_float]
        if worst:
            data = quantiser.quantise(best.method, best.per_channel, [layer.name for layer in worst])
            final = judge.judge(data)
        report = Int8Report("export_int8", done.params_before, done.params_after, done.macs_before, done.macs_after)
        report.input_shape, report.blocks = tuple(images[:1].shape), done.blocks
        for name in ("max_abs_error", "max_rel_error", "border_rel_error", "interior_rel_error", "sensitivity"):
            setattr(report, name, getattr(done, name))  # of the merge
        report.path, report.runtime, report.size_bytes, report.size_float = (
            str(path),
            runtime,
            len(data),
            exported.size_bytes,
        )
        report.images, report.held_out = int((~held).sum()), int(held.sum())
        report.method, report.per_channel, report.equalised = best.method, best.per_channel, best.equalised
        report.kept_float = [one.name for one in worst]
        report.agreement, report.sqnr = final.agreement, final.sqnr
        report.top1_float, report.top1 = judge.top1_float, final.top1
        report.trials, report.layers = trials, found
        report.notes = list(dict.fromkeys([*more, *exported.notes, *notes]))
        if final.agreement is not None and final.agreement < min_agreement:
            raise EquivalenceError(
                f"int8 agrees with float on {final.agreement:.1%} of {report.held_out} held-out images, expected "
                f"min_agreement={min_agreement:g}; {_advice(found, keep_float)}"
            )
        if rounds:
            report.milliseconds_float, report.milliseconds = judge.time(data, rounds)
    report.seconds = time.perf_counter() - started
    if with_report:
        write_contents(path.parent, {path.name: data, **report.files(path.name)})
    else:
        write_atomic(path, lambda file: file.write(data))
    return report


def _scales(method: str, per_channel: bool | None) -> list[bool]:
    """Whether weights have a scale for each channel: what is tried."""
    possible = (True,) if method == NNCF else (False, True)
    return [each for each in possible if per_channel in (None, each)]


def _merged(model: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
    """A merged copy and the report of it; a plain copy where there is nothing to merge."""
    require_eval(model)
    try:
        return reparameterize(model, x)
    except NothingToMergeError as error:
        count, macs = count_params(model), count_macs(model, x[:1])
        return copy_model(model), Report("export_int8", count, count, macs, macs, notes=list(error.notes))


def _images_of(calibration: Any) -> Tensor:
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    wrong = next((b for b in batches if not isinstance(b, Tensor) or b.dim() != 4 or b.dtype != torch.float32), None)
    if wrong is not None or not batches or len({tuple(batch.shape[1:]) for batch in batches}) > 1:
        got = "none" if not batches else "several sizes" if wrong is None else type(wrong).__name__
        if isinstance(wrong, Tensor):
            got = f"{wrong.dtype} {tuple(wrong.shape)}"
        raise ArgumentError(
            f"calibration must be float32 images (N, C, H, W) of one size, or batches of them, got {got}"
        )
    images = torch.cat(batches).detach()
    if len(images) < LEAST:
        raise ArgumentError(f"calibration must be {LEAST} images or more, best some hundred, got {len(images)}")
    require_numbers("calibration", images)
    return images.cpu()


def _labels_of(labels: Any, count: int) -> Tensor | None:
    if labels is None:
        return None
    found = torch.as_tensor(labels)
    if found.dim() != 1 or len(found) != count or found.is_floating_point():
        raise ArgumentError(f"labels must be the classes of {count} images, got {found.dtype} {tuple(found.shape)}")
    require_numbers("labels", found)
    return found.cpu()


def _advice(layers: Sequence[Int8Layer], kept: int) -> str:
    dearest = sorted(layers, key=lambda layer: -layer.gain)[:3]
    words = (
        f"the layers that cost most are {', '.join(layer.name for layer in dearest)}: keep them in float "
        f"(keep_float={kept + 3}, --keep-float {kept + 3}), "
        if layers
        else ""
    )
    return f"{words}take more training images, or train with the rounding (QATHook)"


def int8_images(
    model: nn.Module,
    path: str | Path,
    images: Tensor | None,
    shape: Sequence[int],
    batch: int | None = None,
    size: Sequence[int] | None = None,
    **options,
) -> Int8Report:
    """Call :func:`export_int8`, as :func:`rep_plugin.export.export_onnx.export_images` calls its function.

    Args:
        model: as for :func:`export_int8`, as is ``path``.
        path: file to write.
        images: preprocessed images (N, C, H, W).
        shape: not used: images are needed.
        batch: must be None, as the number of images stays open.
        size: (H, W) to scale the images to.
        options: the others of :func:`export_int8`.

    Returns:
        The report.

    Raises:
        ArgumentError: no images, or a fixed number; and what :func:`export_int8` raises.
    """
    if images is None:
        raise ArgumentError("int8 needs images to calibrate with, got none")
    if batch is not None:
        raise ArgumentError(f"int8 leaves the number of images open, got batch={batch}")
    return export_int8(model, path, scaled_to(images, size), **options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Quantisers print, and log, what is no user's business; NNCF would also report to its makers."""
    loggers = [logging.getLogger(name) for name in ("", "nncf")]
    levels, told = [logger.level for logger in loggers], os.environ.get("NNCF_CI")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ["NNCF_CI"] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        os.environ.pop("NNCF_CI")
        if told is not None:
            os.environ["NNCF_CI"] = told


class _Quantiser:
    """ONNX Runtime's static quantiser on one float file; each method calibrates once."""

    def __init__(self, plain: Path, images: Tensor):
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.plain, self.folder, self.images = plain, plain.parent, images
        self.prepared = self.folder / "prepared.onnx"
        with _quiet():
            quant_pre_process(str(plain), str(self.prepared), skip_symbolic_shape=True)
        self.metadata = onnx.load(plain).metadata_props
        self.graph = onnx.load(self.prepared).graph
        self.weights = {one.name: one for one in self.graph.initializer}
        self.nodes = [
            node.name for node in self.graph.node
            if node.op_type in QUANTISED and any(name in self.weights for name in node.input)
        ]  # fmt: skip

    def _reader(self) -> Any:
        from onnxruntime.quantization import CalibrationDataReader

        class Reader(CalibrationDataReader):
            def __init__(self, images: Tensor):
                size = math.ceil(len(images) / math.ceil(len(images) / IMAGES_AT_ONCE))
                whole = torch.arange(math.ceil(len(images) / size) * size) % len(images)
                self.batches = iter(images[whole].split(size))  # of one size, as the histograms want them

            def get_next(self) -> dict | None:
                batch = next(self.batches, None)
                return None if batch is None else {INPUT: batch.numpy()}

        return Reader(self.images)

    def quantise(self, method: str, per_channel: bool, leave: Sequence[str] = ()) -> bytes:
        """Return the quantised file; ``leave`` are nodes that stay in float."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        if method == NNCF:
            with _quiet():
                return self._finished(quantise_by_nncf(onnx.load(self.prepared), self.images, leave))
        written = self.folder / "int8.onnx"
        with _quiet():
            quantize_static(
                str(self.prepared), str(written), self._reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=list(leave),
                reduce_range=per_channel,
                calibrate_method=CalibrationMethod[method], calibration_cache_path=str(self.folder / f"{method}.cache"),
            )  # fmt: skip
        return self._finished(onnx.load(written))

    def _finished(self, proto: Any) -> bytes:
        del proto.metadata_props[:]
        proto.metadata_props.extend(self.metadata)
        return proto.SerializeToString()

    def _weight(self, node: str) -> str:
        found = next(one for one in self.graph.node if one.name == node)
        return next(name for name in found.input if name in self.weights)

    def layer(self, node: str) -> str:
        """The name of a node's layer in the model, by that of its weights."""
        return self._weight(node).removesuffix(".weight")

    def widths(self, node: str) -> tuple[float, float]:
        """The largest weight of a layer, and how much larger its widest channel is than its narrowest."""
        from onnx import numpy_helper

        return weight_widths(torch.tensor(numpy_helper.to_array(self.weights[self._weight(node)])))


class _Made(NamedTuple):
    """A file that was tried, and what it was made of."""

    trial: Int8Trial
    form: nn.Module
    quantiser: _Quantiser
    data: bytes


@dataclass
class _Judge:
    """Compares quantised files with the float one on the held-out images."""

    runtime: str
    plain: bytes
    images: Tensor
    labels: Tensor | None
    expected: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self._run(self._open(self.plain))

    def _open(self, data: bytes) -> Session:
        return open_model(self.runtime, data, 1)

    def _run(self, session: Session) -> list[Tensor]:
        outputs = [session({INPUT: batch}) for batch in self.images.split(IMAGES_AT_ONCE)]
        return [torch.cat(parts) for parts in zip(*outputs)]

    @property
    def top1_float(self) -> float | None:
        return self._top1(self.expected)

    def _classes(self, outputs: Sequence[Tensor]) -> Tensor | None:
        logits = outputs[0]
        return logits.argmax(1) if logits.dim() == 2 and logits.shape[1] > 1 else None

    def _top1(self, outputs: Sequence[Tensor]) -> float | None:
        classes = self._classes(outputs)
        if classes is None or self.labels is None:
            return None
        return (classes == self.labels).double().mean().item()

    def judge(self, data: bytes) -> Int8Trial:
        found = self._run(self._open(data))
        noise = sum((a.double() - b.double()).square().sum().item() for a, b in zip(self.expected, found))
        signal = sum(a.double().square().sum().item() for a in self.expected)
        mine, theirs = self._classes(found), self._classes(self.expected)
        agreement = None if mine is None or theirs is None else (mine == theirs).double().mean().item()
        sqnr = 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-12 * max(signal, 1e-288)))
        return Int8Trial("", False, agreement, sqnr, self._top1(found))

    def time(self, data: bytes, rounds: int) -> tuple[float, float]:
        """Milliseconds for one image in float and in int8, on one thread, in turns."""
        one = {INPUT: self.images[:1].contiguous()}
        sessions = {"float": self._open(self.plain), "int8": self._open(data)}
        calls: dict[str, Callable[[], object]] = {
            name: (lambda session=session: session(one)) for name, session in sessions.items()
        }
        times = interleaved_medians(calls, rounds)
        return times["float"] * 1e3, times["int8"] * 1e3
