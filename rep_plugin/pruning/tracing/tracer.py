"""Which channels of a model belong together: found by running it once, without numbers, and watching every operation.

The model runs in eval mode on the ``meta`` device: shapes are real, so that control flow on them resolves, values do not
exist, so that nothing is computed, no statistic and no random state moves, and a branch on values is an error. The rules
are in :mod:`rep_plugin.pruning.tracing.rules`. An operation without a rule freezes the channels it touches.
"""

import math
import sys
import traceback
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rep_plugin.arguments import Shape, checked
from rep_plugin.attached import own_forwards_inside
from rep_plugin.errors import ArgumentError, TraceError, first_line
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import MacCounter
from rep_plugin.measure.forward import Example, forward_of, require_bare, takes_examples
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.verify import flatten_outputs
from rep_plugin.pruning.tracing.features import FeatureWatch
from rep_plugin.pruning.tracing.graph import OUTPUT, Mark, Trace, is_quiet, member, tensors_in
from rep_plugin.pruning.tracing.labels import FIXED
from rep_plugin.pruning.tracing.numbers import note_attributes_, noted_sizes
from rep_plugin.pruning.tracing.recorder import Recorder
from rep_plugin.pruning.tracing.rules import OPEN, RULES, find_module_rule


def location_of(error: BaseException) -> str:
    """Return file and line of a model's code in which an error was raised; ``torch`` where no code is the model's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_quiet(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "torch"


class ShapesAlone(TorchFunctionMode):
    """Within it a model runs on the meta device, whatever tensors it has or makes for itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.follows(tensors_in((args, kwargs))):
            args, kwargs = _on_cpu((args, kwargs))
            return func(*args, **kwargs)
        if name_of(func) == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        return self.called(func, (args, kwargs), tree_map(self._as_meta, (args, kwargs)))

    def follows(self, given: list[Tensor]) -> bool:
        """Whether a function of these tensors is run without values."""
        return any(tensor.is_meta for tensor in given)

    def called(self, func: Callable, given: tuple[tuple, dict], meta: tuple[tuple, dict]) -> object:
        """Return what a function makes of its arguments, which are given as they are and without values."""
        args, kwargs = meta
        if name_of(func) != "batch_norm":
            return func(*args, **kwargs)
        sized = [value for value in args[1:5] if isinstance(value, Tensor)]
        if any(len(value) != args[0].shape[1] for value in sized):
            raise RuntimeError(f"batch_norm of {len(sized[0])} channels is given {args[0].shape[1]}")
        return torch.empty_like(args[0])  # torch takes 7 ms to find its shape

    def _as_meta(self, value: object) -> object:
        if not isinstance(value, Tensor) or value.is_meta:
            return torch.device("meta") if isinstance(value, torch.device) else value
        if value.dim() == 0 and not self.is_own(value):
            return value  # a number
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    def is_own(self, value: Tensor) -> bool:
        """Whether a tensor is one of the model's."""
        return False


class _Tracer(ShapesAlone):
    """Runs a model on the meta device and asks a rule about every operation."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], makers: Collection[str] | None = None):
        super().__init__()
        # Parameters are shared, buffers are not: a forward pass may write to them.
        memo = {id(p): p for p in model.parameters()} | {id(b): b.detach().clone() for b in model.buffers()}
        self.model = copy_model(model, memo, training=False)
        self.recorder = Recorder(self.model, shape, makers)
        self.trace = self.recorder.trace
        self.watch = FeatureWatch(self.model, self.recorder)
        note_attributes_(self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.momentum is None:
                module.momentum = 0.1  # else train mode asks how many batches there were
            if (rule := find_module_rule(module)) is not None:
                module.forward = self._as_one_unit(rule, name, module, own_forwards_inside(module))

    def run(self) -> Trace:
        """Trace the forward pass in eval mode; once more in train mode where parameters, or a map, were not used (auxiliary
        heads).

        Where heads are left that no run reaches, as of some detectors, all maps that they may read stay as they are.
        """
        forward = forward_of(self.model)
        self.trace.outputs = self._outputs(forward.run, self.trace.shape)
        self.watch.close()
        if not self.trace.outputs:
            raise TraceError(f"{type(self.model).__name__} gives no tensor that depends on its input")
        if self._unused() or self.recorder.holds_unread():
            costs = list(self.trace.costs)
            shape = (max(2, self.trace.shape[0]), *self.trace.shape[1:])
            for module in self.model.modules():
                module.training = True
            self.trace.train_outputs = self._outputs(forward.run_auxiliary, shape)
            if unused := self._unused():
                maps = self._outputs(partial(forward.run_unreached, unused=unused), shape)
                self.trace.train_outputs += maps
                if not maps:
                    self._freeze_unreached(unused)
            self.trace.costs = costs
        self.recorder.finish()
        return self.trace

    def _freeze_unreached(self, unused: Collection[str]) -> None:
        """Layers that no run reaches may read any map of as many channels as they take: all of these stay."""
        for name, module in self.model.named_modules():
            if member(name, "weight") not in unused:
                continue
            takes = getattr(module, "in_channels", getattr(module, "in_features", None))
            if not isinstance(takes, int):
                continue
            reason = (
                f"may feed {name!r}, which the example's forward does not reach and which takes {takes} channels: plan "
                "with an example, or a wrapper, that reaches it"
            )
            readers = 0
            for layer in self.trace.layers.values():
                width = len(layer.labels)
                if takes == width or (isinstance(module, nn.Linear) and _is_square(takes, width)):
                    self.recorder.channels.freeze(layer.labels, reason)
                    readers += 1
            if readers:
                self.trace.unreached[name] = takes

    def _unused(self) -> list[str]:
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return [name for name in trained if name not in self.recorder.used_names]

    def _outputs(self, run: Callable[[nn.Module, Tensor], object], shape: tuple[int, ...]) -> list[Tensor]:
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        x = torch.empty(shape, dtype=dtype, device="meta")
        self.recorder.caller = sys._getframe().f_code
        self.recorder.set_mark(x, Mark(torch.tensor(FIXED).expand(x.shape), False))
        try:
            with torch.no_grad(), private_random(), self:
                output = run(self.model, x)
        except TraceError:
            raise
        except Exception as error:  # whatever the model's own code raises
            text = first_line(error)
            if isinstance(error, NotImplementedError) and "nonzero" in text:  # torch would advise to pretend
                text = (
                    "values decide which rows of a tensor go on, not shapes alone: plan the part in front of it by itself "
                    "(a detector's backbone, for example)"
                )
            what = f"{type(self.model).__name__} on an input {tuple(shape)}"
            raise TraceError(f"cannot trace {what} at {location_of(error)}: {text}") from error
        self.recorder.note_reads(flatten_outputs(output))
        return [self.recorder.mark_of(t).labels for t in flatten_outputs(output) if self.recorder.is_tracked(t)]

    def follows(self, given: list[Tensor]) -> bool:
        self.recorder.used_names.update(self.recorder.names[id(t)] for t in given if self.is_own(t))
        return any(self.recorder.is_tracked(t) or self.is_own(t) for t in given)

    def called(self, func: Callable, given: tuple[tuple, dict], meta: tuple[tuple, dict]) -> object:
        (args, kwargs), name = given, name_of(func)
        rule, out = RULES.get(name), super().called(func, given, meta)
        made = tensors_in(out)
        if not made and name != "__setitem__":  # the answer to a question: size, dim, is_contiguous ...
            known = self.recorder.known_labels(args[0]) if args else None
            return out if known is None else noted_sizes(func, args, known, out)
        self.recorder.function, self.recorder.function_name = func, name
        self.recorder.count_macs = partial(_count_macs, func, meta)
        self.recorder.note_reads(tensors_in(given))
        if name not in OPEN:
            for tensor in tensors_in(given):
                self.recorder.close(tensor)
        marks = None if rule is None else rule(self.recorder, out, *args, **kwargs)
        if marks is None:
            self.recorder.freeze_maps(self.recorder.operation(), tensors_in(given))
            if macs := self.recorder.count_macs():
                self.recorder.add_cost((), lambda: macs)
            marks = [Mark(torch.tensor(FIXED).expand(t.shape), False) for t in made]
        for tensor, mark in zip(made, [marks] if isinstance(marks, Mark) else marks, strict=True):
            self.recorder.set_mark(tensor, mark)
            if name in OPEN:
                self.recorder.leave_open(tensor)
        return out

    def is_own(self, value: Tensor) -> bool:
        return id(value) in self.recorder.names

    def _as_one_unit(self, rule, name: str, module: nn.Module, attached: str | None):
        def forward(*args):
            self.recorder.used_names.update(member(name, key) for key, _ in module.named_parameters())
            with torch._C.DisableTorchFunction():
                out, marks = rule(self.recorder, name, module, *args)
                if attached is not None:  # the rule is of the class
                    why = f"goes through {name!r}, which {attached}: pruning cannot follow that, take it off"
                    for mark in (
                        *map(self.recorder.mark_of, filter(self.recorder.is_tracked, tensors_in(args))),
                        *marks,
                    ):
                        self.recorder.channels.freeze(mark.labels, why)
                for tensor, mark in zip(tensors_in(out), marks, strict=True):
                    self.recorder.set_mark(tensor, mark)
                return out

        return forward


def _count_macs(func: Callable, meta: tuple[tuple, dict]) -> int:
    """Multiply-adds of a function, which is run once more for them."""
    with MacCounter() as counter:
        func(*meta[0], **meta[1])
    return counter.total


def _is_square(takes: int, width: int) -> bool:
    """Whether a linear layer may read a flattened square map of this many channels."""
    side = math.isqrt(takes // width)
    return side > 1 and side * side * width == takes


def name_of(func) -> str:
    """Return the plain name of a torch function: ``relu_`` is relu, an attribute is called by its own name."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
        return name if name in ("T", "mT", "data") else "__get__"
    return name if name.endswith("__") else name.rstrip("_")


def _on_cpu(values: object) -> object:
    """Constants that a forward makes for itself, on the device of its maps, keep their values."""
    cpu = torch.device("cpu")
    return tree_map(lambda value: cpu if isinstance(value, torch.device) and value.type == "meta" else value, values)


@checked
@takes_examples
def trace_channels(
    model: nn.Module,
    example_input: Example | Shape,
    prune_outputs: bool = False,
    makers: Collection[str] | None = None,
) -> Trace:
    """Return the channels of a model, as its forward pass ties them.

    The channels of the input and of the model's outputs are frozen. The model is left as it is, mode, statistics and
    random state included.

    Args:
        model: Not wrapped, not compiled.
        example_input: A tensor (N, C, ...) or its shape. One image is traced, N of them where the model takes no single one.
        prune_outputs: The channels of output *maps* (N, C, H, W) are free, as a backbone's are.
        makers: The only layers and norms behind which a removed channel is zero (default: all are set to zero);
            ``masked_inputs`` are then what still sees something of it.

    Returns:
        The trace.

    Raises:
        ArgumentError: The model is wrapped, or ``example_input`` is neither a tensor nor a shape.
        TraceError: The forward pass depends on values, leaves torch or fails; the message contains file and line.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning import trace_channels
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> {name: len(layer.labels) for name, layer in trace_channels(net, (1, 3, 8, 8)).layers.items()}
        {'0': 8, '1': 4}
    """
    require_bare(model, data=False)
    shape = example_input.shape if isinstance(example_input, Tensor) else example_input
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ArgumentError(f"example_input must be a tensor (N, C, ...) or its shape, got {example_input!r}")
    shape = tuple(shape)
    try:
        trace = _Tracer(model, (1, *shape[1:]), makers).run()  # costs are those of one image
    except TraceError:
        if shape[:1] == (1,):
            raise
        trace = _Tracer(model, shape, makers).run()  # frames of a video, say, come in batches of a certain size
    for labels in (*trace.outputs, *trace.train_outputs):
        if not (prune_outputs and labels.dim() == 4):
            maps = "; prune_outputs=True lets maps lose channels" if labels.dim() == 4 and not prune_outputs else ""
            trace.channels.freeze(labels, f"{OUTPUT}, which keeps its width{maps}")
    return trace
