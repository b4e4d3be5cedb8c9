"""Random numbers of our own: what is done to a model neither reads on nor moves the random state of the process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SWAP = threading.RLock()  # one of these inside another, as a verb inside a verb, swaps twice


class _OwnGenerators(TorchDispatchMode):
    """Operators of this thread that draw are given generators; those that take none find the state swapped for the call."""

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        tensor = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        device = torch.device(kwargs.get("device") or (tensor.device if tensor is not None else "cpu"))
        if device.type not in ("cpu", "cuda"):  # on meta nothing is drawn
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        if "generator" in names[len(args) :]:
            return func(*args, **{**kwargs, "generator": self._of(device)})
        other = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
        if "generator" not in names and other in func.overloadpacket.overloads():
            return getattr(func.overloadpacket, other)(*args, **kwargs, generator=self._of(device))
        return self._swapped(device, func, args, kwargs)

    @property
    def drew(self) -> bool:
        """Whether anything was drawn."""
        return bool(self._generators)

    def _of(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).set_state(_state(device))
        return self._generators[device]

    def _swapped(self, device: torch.device, func, args: tuple, kwargs: dict):
        own = self._of(device)
        with _SWAP:
            before = _state(device)
            try:
                _set_state(device, own.get_state())
                return func(*args, **kwargs)
            finally:
                own.set_state(_state(device))
                _set_state(device, before)


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def private_random() -> Iterator[_OwnGenerators]:
    """Let this thread draw from copies of torch's generators: ``torch.manual_seed`` counts, and the state stays as it was.

    Another thread that draws meanwhile draws what it would have. Also a decorator.

    Yields:
        What tells whether anything was drawn (``drew``).

    Example:
        >>> with private_random():
        ...     first = torch.rand(3)
        >>> bool((torch.rand(3) == first).all())
        True
    """
    with _OwnGenerators() as own:
        yield own
