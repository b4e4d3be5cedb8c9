"""What a network computes, and how far rounding alone moves it: the fuzzer's own measure, apart from the package's proof."""

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FACTOR = 20.0  # times what noise does
SIZES = ((0, 0), (0, 0), (0, 0), (0, 0), (3, 1), (28, 41), (-1, -2))  # added to the height and width of the example
BATCHES = (2, 1, 5, 2, 1, 2, 5)
SCALES = (1.0, 30.0, 1e3, 1e-3, 1.0, 30.0, 1.0)


def leaves(output: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output, with its path."""
    if isinstance(output, Tensor):
        yield "", output
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from ((f".{field.name}{path}", leaf) for path, leaf in leaves(getattr(output, field.name)))
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from ((f"[{key!r}]{path}", leaf) for path, leaf in leaves(value))
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from ((f"[{index}]{path}", leaf) for path, leaf in leaves(value))


def evaluate(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run a model; what it draws is drawn from one seed, and no state of the process is changed."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return {path: leaf.detach().clone() for path, leaf in leaves(model(x.clone()))}


class Noise(TorchFunctionMode):
    """Moves what every operation gives by a relative amount: rounding, made large enough to be measured."""

    def __init__(self, amount: float, seed: int):
        self.amount, self.generator = amount, torch.Generator().manual_seed(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() and not out.requires_grad:
            storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if out.untyped_storage().data_ptr() not in storages:
                out = self.moved(out)
        return out

    def moved(self, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64).to(tensor.dtype)
        return tensor * (1 + self.amount * noise)


def disturbed(model: nn.Module, x: Tensor, amount: float, seed: int) -> dict[str, Tensor]:
    """The same run with noise in every parameter, buffer and operation."""
    noise, other = Noise(amount, seed), copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(noise.moved(tensor.detach()))
        torch.manual_seed(0)
        x = noise.moved(x)
        with noise:
            return {path: leaf.detach().clone() for path, leaf in leaves(other(x))}


def per_channel(tensor: Tensor) -> Tensor:
    """The largest value of every sample and channel."""
    return tensor.abs().flatten(2).amax(2) if tensor.dim() > 2 and tensor.numel() else tensor.abs()


class Reference:
    """A model's outputs on several inputs, in float64, and how far each may be moved."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], amount: float, count: int = len(SIZES)):
        self.model, self.amount = copy.deepcopy(model).double(), amount
        self.inputs, self.outputs, self._floors = [], [], {}
        for index in range(count):
            size = [side + more for side, more in zip(shape[1:], SIZES[index])]
            generator = torch.Generator().manual_seed(1000 + index)
            x = torch.randn(BATCHES[index], shape[0], *size, generator=generator, dtype=torch.float64) * SCALES[index]
            x = x.abs() if index == 4 else x
            try:
                self.outputs.append(evaluate(self.model, x))
            except Exception:  # a size that the network does not take
                continue
            self.inputs.append(x)

    def floor(self, index: int, seeds: range) -> dict[str, Tensor]:
        """Largest change of each sample and channel, or of which elements where an output is exact."""
        x, output, floors = self.inputs[index], self.outputs[index], {}
        for path, leaf in output.items():
            floors[path] = torch.zeros_like(per_channel(leaf)) if leaf.is_floating_point() else leaf != leaf
        for seed in seeds:
            other = disturbed(self.model, x, self.amount, seed)
            for path, leaf in output.items():
                if path not in other or other[path].shape != leaf.shape:
                    change = torch.full_like(leaf, torch.inf, dtype=torch.float64)
                    change = per_channel(change) if leaf.is_floating_point() else change > 0
                elif leaf.is_floating_point():
                    change = per_channel(torch.nan_to_num(other[path] - leaf, nan=torch.inf))
                else:
                    change = other[path] != leaf
                floors[path] = torch.maximum(floors[path], change)
        return floors

    def compare(self, model: nn.Module) -> str | None:
        """Return where a model computes something else, None where it does not."""
        model = copy.deepcopy(model).double()
        for index, x in enumerate(self.inputs):
            where = f"on {tuple(x.shape)} of up to {x.abs().max():.2g}"
            try:
                got = evaluate(model, x)
            except Exception as error:
                return f"{where}: {type(error).__name__}: {error}"
            if wrong := self.judge(index, got):
                return f"{where}: {wrong}"
        return None

    def judge(self, index: int, got: Mapping, expected: Mapping | None = None) -> str | None:
        """Compare what came out for one input; rounding is measured where it may be to blame, and then more closely."""
        expected, wrong = self.outputs[index] if expected is None else expected, None
        for seeds in (range(0), range(3), range(100, 125)):
            if (index, seeds) not in self._floors:
                self._floors[index, seeds] = self.floor(index, seeds)
            if (wrong := self.difference(expected, got, self._floors[index, seeds])) is None:
                return None
        return wrong

    def difference(self, expected: Mapping, got: Mapping, floors: Mapping) -> str | None:
        if list(expected) != list(got):
            return f"outputs {list(got)}, expected {list(expected)}"
        for path, want in expected.items():
            leaf = got[path]
            if leaf.shape != want.shape or leaf.is_floating_point() != want.is_floating_point():
                return f"output{path} is {leaf.dtype} {tuple(leaf.shape)}, expected {want.dtype} {tuple(want.shape)}"
            if not want.is_floating_point():
                off = (leaf != want) & ~floors[path]
                if off.any():
                    return f"output{path}: {int(off.sum())} of {off.numel()} values differ"
                continue
            finite = torch.isfinite(per_channel(want)) & torch.isfinite(floors[path])
            gap = torch.nan_to_num(per_channel(leaf - want), nan=torch.inf)
            allowed = FACTOR * (floors[path] + self.amount * per_channel(want))
            off = finite & (gap > allowed)
            if off.any():
                worst = torch.where(off, gap / per_channel(want).clamp(min=1e-300), 0.0).flatten()
                index = int(worst.argmax())
                return (
                    f"output{path} differs by {worst[index]:.1e} of its own channel ({gap.flatten()[index]:.1e}, allowed "
                    f"{allowed.flatten()[index]:.1e})"
                )
        return None


def fingerprint(model: nn.Module) -> dict[str, object]:
    """What a verb must leave as it was."""
    kept: dict[str, object] = {"model": id(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        kept[f"{name}: mode"] = module.training
        kept[f"{name}: class"] = type(module)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks)
        kept[f"{name}: hooks"] = tuple(len(hook) for hook in hooks)
        kept[f"{name}: attributes"] = sorted(key for key in module.__dict__ if key != "_rep_plugin_history")
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        state = (id(tensor), tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.grad is None)
        kept[f"{name}: tensor"] = (*state, tensor.detach().cpu().clone().contiguous().numpy().tobytes())
    return kept


def process_state() -> dict[str, object]:
    """State of the process that no verb may change."""
    return {
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "random state": hash(random.getstate()),
        "numpy random state": numpy.random.get_state()[1].tobytes(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "nn.Module.__call__": nn.Module.__call__,
        "nn.Module.__getattr__": nn.Module.__getattr__,
    }


def changed(before: Mapping, after: Mapping) -> str | None:
    """Name the first thing that is no longer what it was."""
    for key in (*before, *after):
        if before.get(key) != after.get(key):
            return key
    return None
