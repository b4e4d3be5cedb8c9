"""Measured time on this machine: of whole models in turns, and of every layer by its widths, in a table."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rep_plugin.arguments import In, checked
from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.forward import run_model
from rep_plugin.measure.latency import interleaved_medians, torch_threads
from rep_plugin.pruning.surgery.remove import remove_channels_
from rep_plugin.pruning.tracing.graph import Trace, tensors_in
from rep_plugin.pruning.tracing.kept_channels import KeptChannels

_SECONDS = 0.4  # spent on timing some layers

Job = tuple[nn.Module, tuple]  # a module and its arguments
Timer = Callable[[Mapping[Hashable, Job], float], dict[Hashable, float]]  # of the jobs, given about so many seconds


Rounds = Annotated[int, In("[1, 10000]")]


@checked
@dataclass(frozen=True)
class EagerTimer:
    """Median seconds of eager calls on the CPU, in turns, as many rounds as fit into the given seconds.

    Args:
        threads: Inside an operator.
        rounds: (fewest, most).

    Raises:
        ArgumentError: When called, with a model that is not on the CPU.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning import EagerTimer
        >>> times = EagerTimer(rounds=(1, 3))({"conv": (torch.nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))}, 0.01)
        >>> times["conv"] > 0
        True
    """

    threads: Annotated[int, In("[1, 1024]")] = 1
    rounds: tuple[Rounds, Rounds] = (9, 50)

    def __call__(self, jobs: Mapping[Hashable, Job], seconds: float) -> dict[Hashable, float]:
        for _, args in jobs.values():
            if (odd := next((t.device for t in tensors_in(args) if t.device.type != "cpu"), None)) is not None:
                raise ArgumentError(f"latency is measured on the CPU, the model is on {odd}: move it, or give a timer")
        calls = {key: partial(_run, *job) for key, job in jobs.items()}
        with torch_threads(self.threads):
            one = sum(interleaved_medians(calls, 1).values())
            least, most = self.rounds
            return interleaved_medians(calls, min(most, max(least, int(seconds / one))))


@torch.inference_mode()
def _run(module: nn.Module, args: tuple) -> object:
    return run_model(module, *args) if len(args) == 1 else module(*args)


def timed_copy(model: nn.Module, trace: Trace, kept: KeptChannels) -> nn.Module:
    """Return a pruned copy in eval mode, as it would be deployed: every block one convolution.

    Args:
        model: The copy shares the memory of tensors that stay whole; nobody may train it.
        trace: Of the model.
        kept: The channels that stay.

    Returns:
        The copy.
    """
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    pruned = remove_channels_(copy_model(model, memo, training=False), trace, kept)
    for module in list(pruned.modules()):
        if isinstance(module, RepBlock):
            module.switch_to_deploy()
    return pruned


def _units(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return the modules that compute something: without children, or with tensors of their own."""
    children = dict(model.named_children())
    own = [*model.parameters(recurse=False), *model.buffers(recurse=False)]
    if prefix and (own or not children):
        return {prefix[:-1]: model}
    units = {}
    for name, child in children.items():
        units |= _units(child, f"{prefix}{name}.")
    return units


def _configuration(name: str, module: nn.Module, args: tuple) -> Hashable:
    """What a module's time depends on: layers of torch that are built alike count as one, others go by their name."""
    tensors = (*module.parameters(), *module.buffers(), *tensors_in(args))
    which = repr(module) if type(module).__module__.startswith("torch.nn.") else name
    return which, tuple((tuple(t.shape), t.stride()) for t in tensors)


@dataclass
class LatencyTable:
    """Seconds of layers by configuration, measured once.

    The slowest layer that was measured first is measured along with all that come later: times of a busy minute are
    brought to those of the first.

    Args:
        timer: Measures seconds.
        seconds: {configuration: seconds} that are known already.
    """

    timer: Timer
    seconds: dict[Hashable, float] = field(default_factory=dict)
    _reference: tuple[Hashable, Job] | None = None

    def add_up(self, models: Iterable[nn.Module], x: Tensor) -> list[float]:
        """Return for each model the sum of its layers; what is not known is measured, in turns.

        Args:
            models: In eval mode.
            x: The input (N, C, ...).

        Returns:
            Seconds of each model.
        """
        jobs: dict[Hashable, Job] = {}
        used = [self._calls(model, x, jobs) for model in models]
        if jobs:
            self._measure(jobs)
        return [sum(self.seconds[key] for key in keys) for keys in used]

    def _calls(self, model: nn.Module, x: Tensor, jobs: dict[Hashable, Job]) -> list[Hashable]:
        keys: list[Hashable] = []

        def note(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple) -> None:
                key = _configuration(name, module, args)
                keys.append(key)
                if key not in self.seconds and key not in jobs:
                    jobs[key] = (module, tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, args))

            return hook

        handles = [module.register_forward_pre_hook(note(name)) for name, module in _units(model).items()]
        try:
            with torch.inference_mode():
                run_model(model, x)
        finally:
            for handle in handles:
                handle.remove()
        return keys

    def _measure(self, jobs: dict[Hashable, Job]) -> None:
        if self._reference is None:
            self.seconds |= self.timer(jobs, _SECONDS)
            slowest = max(jobs, key=self.seconds.__getitem__)
            self._reference = (slowest, jobs[slowest])
            return
        key, job = self._reference
        seconds = self.timer({**jobs, key: job}, _SECONDS)
        factor = self.seconds[key] / seconds[key]
        self.seconds |= {name: seconds[name] * factor for name in jobs}
