"""Milliseconds of segments as they are and merged, each as a small network of its own, and of whole networks.

What a small network costs besides its layers (a call, a change of memory layout) is the same for both forms, and cancels in
what a segment saves. Both are timed in turns. In the network their maps are less near; so the network is timed as it is and
with all merged that pays, and what segments save is brought to that scale. On one thread processor time is taken: that is
the latency of an idle machine.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rep_plugin.arguments import Count, In, OneOf, Positive, checked
from rep_plugin.blocks.annealed_layers import set_segments_
from rep_plugin.checkpoints.files import write_text
from rep_plugin.checkpoints.plain import read_json, require_fields
from rep_plugin.depth.importance import Images, linear_copy
from rep_plugin.depth.segments import Segment, find_segments
from rep_plugin.depth.selection import Item, best_choices, most_saving
from rep_plugin.errors import ArgumentError, NothingToMergeError
from rep_plugin.export.graph import OPSET, to_onnx
from rep_plugin.export.inputs import INPUT, Feed
from rep_plugin.export.runtimes import RUNTIMES, open_model
from rep_plugin.functional.kernels import pair
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.costs import count_macs
from rep_plugin.measure.forward import eval_mode, of_user, require_bare, run_model
from rep_plugin.measure.latency import interleaved_medians, torch_threads
from rep_plugin.measure.progress import track, working
from rep_plugin.measure.randomness import private_random
from rep_plugin.optional import require
from rep_plugin.reparam.reparameterize import reparameterize

EAGER = "eager"
ALL_RUNTIMES = (EAGER, *RUNTIMES)
Threads = Annotated[int, In("[1, 1024]")]
Runtime = Annotated[str, OneOf(ALL_RUNTIMES)]
FASTER = 0.98  # of the time before: less is noise
WORTH_TIMING = 2.0  # multiply-adds merged against those before: what costs more never was faster
SECONDS = 6.0  # spent on timing all segments, about
PASSES = 3  # over all, minutes of a busy machine apart
ROUNDS = 9, 100


@checked
@dataclass(frozen=True)
class LatencyTable:
    """What was measured on one machine, as plain data.

    Args:
        runtime: ``eager``, ``onnxruntime`` or ``openvino``.
        threads: inside an operator.
        input_shape: (N, C, H, W).
        whole: milliseconds of the network with its BNs folded.
        segments: {what a segment computes, see :func:`signature`: (milliseconds as it is, merged)}.
        scale: what all that pays saves in the network, against the sum of what its segments save by themselves.
        macs: multiply-adds of the network for one image, by which it is known again; 0: unknown.

    Example:
        >>> LatencyTable("eager", 1, (1, 3, 224, 224), 7.9).whole
        7.9
    """

    runtime: Runtime
    threads: Threads
    input_shape: tuple[Count, ...]
    whole: Positive
    segments: dict[str, tuple[Positive, Positive]] = field(default_factory=dict)
    scale: Positive = 1.0
    macs: Annotated[int, In("[0, inf)")] = 0


class Separate(nn.Module):
    """The layers of a segment as they run in a deployed network: BNs folded, and the sum with the other branch.

    Args:
        layers: one after the other.
        shortcut: those of the other branch; none: its input as it is; None: there is no sum.
    """

    def __init__(self, layers: Sequence[nn.Module], shortcut: Sequence[nn.Module] | None):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.shortcut = None if shortcut is None else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.shortcut is None else y + self.shortcut(x)


def _plain(conv: nn.Module) -> nn.Conv2d:
    outputs, inputs, height, width = conv.weight.shape
    groups = conv.groups
    return nn.Conv2d(
        inputs * groups, outputs, (height, width), pair(conv.stride), pair(conv.padding), pair(conv.dilation), groups
    )


@private_random()
def both_forms(model: nn.Module, segment: Segment) -> tuple[nn.Module, nn.Module]:
    """Return a segment's layers as a network of its own, and what they become; the weights mean nothing.

    Args:
        model: the model.
        segment: of it.

    Returns:
        Both, in eval mode.
    """
    layers: list[nn.Module] = []
    for name in segment.layers:
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            layers.append(_plain(module))
        elif name in segment.activations:
            layers.append(module)
    others = [model.get_submodule(name) for name in segment.shortcut_layers]
    shortcut = [_plain(conv) for conv in others if isinstance(conv, nn.Conv2d)] if segment.shortcut else None
    if segment.skip:
        return Separate(layers, shortcut).eval(), nn.Identity()
    outputs, inputs, height, width = segment.merged
    merged = nn.Conv2d(
        inputs * segment.groups, outputs, (height, width), segment.stride, segment.padding, 1, segment.groups
    )
    return Separate(layers, shortcut).eval(), merged.eval()


def signature(segment: Segment, model: nn.Module, size: Sequence[int]) -> str:
    """Return what decides a segment's time, as text.

    Args:
        segment: the segment.
        model: its model.
        size: shape of its input.

    Returns:
        The size, the layers and the one convolution.
    """
    before, merged = both_forms(model, segment)
    text = "; ".join(repr(layer) for part in (before.layers, before.shortcut or ()) for layer in part)
    return f"{'x'.join(map(str, size))}: {text}{' + x' if segment.shortcut else ''} -> {merged}"


def input_sizes(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of what layers are given.

    Args:
        model: their model.
        x: images (N, C, H, W).
        names: of the layers.

    Returns:
        {name: shape}.
    """
    copied, sizes = copy_model(model, training=False), {}
    for name in names:

        def keep(module: nn.Module, args: tuple, name: str = name) -> None:
            sizes.setdefault(name, tuple(args[0].shape))

        copied.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        run_model(copied, copy_inputs(x))
    return sizes


class _OneOutput(nn.Module):
    """A model run as the package runs it, for an exporter."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return next(leaf for leaf in tree_leaves(run_model(self.model, x)) if isinstance(leaf, Tensor))


def call_of(runtime: str, model: nn.Module, x: Tensor, threads: int) -> Callable[[], object]:
    """Return a call of a model in a runtime.

    Args:
        runtime: one of ``ALL_RUNTIMES``.
        model: in eval mode and float32.
        x: images (N, C, H, W).
        threads: inside an operator.

    Returns:
        The call.

    Raises:
        ExportError: the runtime cannot run it.
    """
    if runtime == EAGER:
        return partial(torch.inference_mode()(run_model), model, x)
    whole = _OneOutput(model).eval()
    with torch.no_grad():
        shape = tuple(whole(x.clone()).shape)
    feed = Feed(x, x, [INPUT])
    graph = to_onnx(whole, feed, {"output": shape}, {INPUT: {}, "output": {}}, OPSET, False)
    session = open_model(runtime, graph.proto.SerializeToString(), threads)
    return lambda: session(feed.tensors)


def time_in_turns(calls: Mapping[Any, Callable[[], object]], threads: int, share: float = 1.0) -> dict[Any, float]:
    """Return the median milliseconds of each call, all in turns, in about this share of ``SECONDS``.

    On one thread it is processor time: what other processes take of a busy machine is not counted.

    Args:
        calls: {key: what is called}.
        threads: inside an operator.
        share: of the time that all is given.

    Returns:
        {key: milliseconds}.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    with torch_threads(threads):
        one = sum(interleaved_medians(calls, 1).values())
        least, most = ROUNDS
        rounds = min(most, max(least, int(share * SECONDS / max(one, 1e-9))))
        return {name: value * 1e3 for name, value in interleaved_medians(calls, rounds, clock).items()}


def deployed(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in eval mode with all merged and its BNs folded; nothing is proven.

    Args:
        model: the model.
        x: images (N, C, H, W) that it takes.

    Returns:
        The copy.
    """
    copied = copy_model(model, training=False)
    set_segments_(copied, 1.0)
    try:
        return reparameterize(copied, x, inplace=True, verify=False)[0]
    except NothingToMergeError:
        return copied


def needed(runtime: str) -> None:
    """Raise MissingPackageError where a runtime is not installed."""
    for package in () if runtime == EAGER else ("onnx", runtime):
        require(package, "export", f"runtime={runtime!r}")


def time_segments(model: nn.Module, x: Tensor, segments: Sequence[Segment], runtime: str, threads: int) -> LatencyTable:
    """Time the segments of a model, equal ones once, and the whole of it.

    Args:
        model: the model, in float32 on the CPU.
        x: images (N, C, H, W).
        segments: of the model.
        runtime: where.
        threads: inside an operator.

    Returns:
        The table.
    """
    needed(runtime)
    if x.device.type != "cpu":
        raise ArgumentError(f"latency is measured on the CPU, example_input is on {x.device}: move it and the model")
    worth = [s for s in segments if s.macs_after <= WORTH_TIMING * s.macs_before]
    sizes = input_sizes(model, x, [segment.layers[0] for segment in worth])
    calls: dict[Any, Callable[[], object]] = {}
    x, model = x.float(), copy_model(model).float()
    generator = torch.Generator().manual_seed(0)
    names: list[str] = []
    for segment in track(worth, "building segments"):
        size = sizes[segment.layers[0]]
        key = signature(segment, model, size)
        names.append(key)
        if (key, 0) in calls:
            continue
        given = torch.randn(size, generator=generator)
        for form, module in enumerate(both_forms(model, segment)):
            calls[key, form] = call_of(runtime, module, given, threads)
    keys = list(dict.fromkeys(key for key, _ in calls))
    passes: dict[Any, list[float]] = {}
    for _ in track(range(PASSES), "timing segments"):  # a pair at a time: its maps are as near as in the network
        for key in keys:
            pair_of = {form: calls[key, form] for form in (0, 1)}
            for form, value in time_in_turns(pair_of, threads, 1 / PASSES / len(keys)).items():
                passes.setdefault((key, form), []).append(value)
    times = {key: statistics.median(values) for key, values in passes.items()}
    table = {key: (times[key, 0], times[key, 1]) for key in keys}
    pairs = [(one, *table[key]) for one, key in zip(worth, names)]
    items = [Item(one, before - after, 0.0) for one, before, after in pairs if after < FASTER * before]
    whole, scale = _scale_whole(model, x, items, runtime, threads)
    return LatencyTable(runtime, threads, tuple(x.shape), whole, table, scale, count_macs(model, x))


def _scale_whole(model: nn.Module, x: Tensor, items: Sequence[Item], runtime: str, threads: int) -> tuple[float, float]:
    """Milliseconds of the network, and the scale of what segments save: by the network with all merged that pays."""
    most = most_saving(best_choices(items)) if items else None
    before, after = time_whole(model, x, [item.segment for item in most.items] if most else [], runtime, threads)
    return before, 1.0 if most is None or after >= before else (before - after) / most.saving


def time_whole(
    model: nn.Module, x: Tensor, segments: Sequence[Segment], runtime: str, threads: int
) -> tuple[float, float]:
    """Time a network and the same with segments merged, in turns.

    Args:
        model: the model, on the CPU.
        x: images (N, C, H, W), float32.
        segments: of the model; none: it is timed alone.
        runtime: where.
        threads: inside an operator.

    Returns:
        Milliseconds of both.
    """
    networks = {"before": model}
    if segments:
        networks["after"] = linear_copy(model, segments, None, ())
    calls = {name: call_of(runtime, deployed(net, x).float(), x, threads) for name, net in networks.items()}
    times = time_in_turns(calls, threads)
    return times["before"], times.get("after", times["before"])


@checked
@working("timing")
def write_latency_table(
    model: nn.Module,
    example_input: Images,
    path: str | Path,
    runtime: Runtime = EAGER,
    threads: Threads = 1,
) -> LatencyTable:
    """Time a network's segments on this machine and write them, for ``plan_depth(latency_table=...)`` on another one.

    Args:
        model: the model, on the CPU; it stays as it is.
        example_input: images (N, C, H, W) of the size to be timed.
        path: of the JSON file.
        runtime: ``eager``, ``onnxruntime`` or ``openvino``.
        threads: inside an operator.

    Returns:
        The table.

    Raises:
        MissingPackageError: the runtime is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1)).eval()
        >>> table = write_latency_table(net, torch.zeros(1, 3, 8, 8), "table.json")
        >>> len(table.segments), read_latency_table("table.json") == table
        (1, True)
    """
    require_bare(model)
    with eval_mode(model):
        with of_user(model, example_input):
            run_model(copy_model(model), copy_inputs(example_input))
        table = time_segments(model, example_input, find_segments(model, example_input)[0], runtime, threads)
    write_text(path, json.dumps(asdict(table), indent=1))
    return table


@checked
def read_latency_table(path: str | Path) -> LatencyTable:
    """Return the table that :func:`write_latency_table` wrote.

    Raises:
        ArgumentError: the file holds something else; it names it.
        FileNotFoundError: there is none.
    """
    hints = {
        "runtime": str,
        "threads": int,
        "input_shape": list[int],
        "whole": float,
        "segments": dict[str, list[float]],
        "scale": float,
        "macs": int,
    }
    data = require_fields(read_json(path), hints, str(path))
    try:
        shape, segments = tuple(data["input_shape"]), {key: tuple(value) for key, value in data["segments"].items()}
        return LatencyTable(**data | {"input_shape": shape, "segments": segments})
    except ArgumentError as error:
        raise ArgumentError(f"{path} is no latency table: {error}") from None
