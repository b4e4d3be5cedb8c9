"""Runtimes that run ONNX models: each opens a model's bytes and gives back a function from named inputs to all outputs.

They are imported when they are asked for: the package works without them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from math import isfinite

from torch import Tensor, from_numpy, nn

from rep_plugin.errors import ArgumentError, EquivalenceError, ExportError, first_line
from rep_plugin.export.inputs import Feed, call
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.differences import Difference, Floor, compare_outputs, flatten_outputs
from rep_plugin.measure.verify import Call, doubled, measure_floor, rounding_error

Session = Callable[[Mapping[str, Tensor]], list[Tensor]]
ROUNDING = 4e-6  # relative: what float32 sums may lose, some ten units in the last place
ILL_CONDITIONED = 1e-2  # the share of a channel that float32 may change


def _open_onnxruntime(model: bytes, threads: int) -> Session:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors: what the graph could be is no user's business
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: [from_numpy(out) for out in session.run(None, _arrays(inputs, names))]


def _open_openvino(model: bytes, threads: int) -> Session:
    openvino = import_module("openvino")
    core = openvino.Core()
    # Left alone it computes in bfloat16 where the processor has it: another function, by 1e-2.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model=model), "CPU", options)

    ports = [port.names for port in compiled.inputs]  # of those that are read, each under several names

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = compiled(_arrays(inputs, [next(name for name in names if name in inputs) for names in ports]))
        return [from_numpy(found[port].copy()) for port in compiled.outputs]  # its buffers are used again

    return run


def _arrays(inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict:
    return {name: inputs[name].contiguous().numpy() for name in names}


OPENERS = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}
RUNTIMES = tuple(OPENERS)


def check_runtimes(names: Sequence[str]) -> None:
    """Raise ArgumentError for no runtime, one named twice, or an unknown one."""
    if isinstance(names, str) or not names or len(set(names)) != len(names) or not set(names) <= set(RUNTIMES):
        raise ArgumentError(f"runtimes must be some of {RUNTIMES}, got {names!r}")


def open_model(runtime: str, model: bytes, threads: int) -> Session:
    """Return a function {name: tensor} -> list of outputs that runs an ONNX model on the CPU, in float32.

    Args:
        runtime: one of RUNTIMES.
        model: the content of the file.
        threads: number of threads.

    Returns:
        The function.

    Raises:
        ExportError: the runtime refuses the model.
    """
    try:
        return OPENERS[runtime](model, threads)
    except Exception as error:  # each runtime has kinds of its own
        raise ExportError(f"{runtime} cannot open the graph: {first_line(error)}") from error


def compare_runtime(
    runtime: str,
    session: Session,
    model: nn.Module,
    inputs: Sequence[Feed],
    expected: Sequence[object],
    tolerance: float,
) -> Difference:
    """Return the largest differences between a model's outputs and those of a runtime.

    Args:
        runtime: its name, for messages.
        session: the function of :func:`open_model`.
        model: the model that was exported.
        inputs: what it is called with, one batch after the other.
        expected: the model's output for each.
        tolerance: largest allowed difference, relative to the channel of the image, or what float32 changes in it by itself.

    Returns:
        The largest differences over all inputs.

    Raises:
        EquivalenceError: over the tolerance, another shape, or a value is not finite. It names runtime and input.
        ExportError: the runtime fails.
    """
    total = Difference()
    for feed, wanted in zip(inputs, expected, strict=True):
        where = f"{runtime} on {feed}"
        try:
            got = session(feed.tensors)
        except Exception as error:  # each runtime has kinds of its own
            raise ExportError(f"{where}: {first_line(error)}") from error
        wanted, usual = flatten_outputs(wanted), flatten_outputs(expected[0])
        try:
            strict = found = compare_outputs(wanted, got, beside=usual)
        except EquivalenceError as error:
            raise EquivalenceError(f"{where}: {error}") from None
        for floor in _floors(model, feed, tolerance) if found.exceeds(tolerance) and isfinite(found.max_rel) else ():
            found = compare_outputs(wanted, got, floor, beside=usual)
            if not found.exceeds(tolerance):
                break
        if found.exceeds(tolerance):
            rounding = rounding_error(model, feed.arguments)
            raise EquivalenceError(
                f"{where} differs from PyTorch by {strict.max_rel:.2e} relative (tolerance {tolerance:.0e}) in "
                f"{strict.where}; PyTorch's own float32 differs from its float64 by {rounding:.2e}"
            )
        if found.rounding <= ILL_CONDITIONED:
            found.rounding = 0.0
        total.include(found)
    return total


def _floors(model: nn.Module, feed: Feed, tolerance: float) -> Iterator[Floor]:
    """What float32 may change in a model's outputs: its float64 form with numbers moved by as much."""
    exact = copy_model(model).double()
    once = Call(lambda module, arguments: flatten_outputs(call(module, arguments)), (doubled(feed.arguments),))
    return measure_floor(once, [(exact, once.run(exact))], tolerance, min(ROUNDING, tolerance / 25))
