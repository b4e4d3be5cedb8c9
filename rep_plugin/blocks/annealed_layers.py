"""Layers of any network that are annealed where they stand, until several of them are one convolution.

A *segment* is a run of convolutions, BNs and activations. Stock pads zeros in front of every convolution, *behind* the shift
of the BN and the activation before it; one convolution pads once, in front of all. So the head pads for the whole segment,
and the maps inside are as much larger: round each lies the ring that stock does not have. From alpha 0 to 1:

    inside     (1 - alpha) * act(x) + alpha * x
    the ring   alpha * x, where a convolution that padded zeros reads it

    a branch   (1 - alpha) * f(x), of a residual block ``x + f(x)`` that is skipped whole

At 0 the segment is stock's, borders included; at 1 it is one zero-padded convolution, or nothing. A BN in train mode takes
its statistics without the ring, as stock does. The modules stay the same objects with the same parameters and keys: only
their class is a subclass of their own, and an ``alpha`` is added.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.annealed import ALPHA, Annealed, AnnealedActivation
from rep_plugin.blocks.batch_norm import run_bn

# Elementwise, without parameters; timm and mmcv have some of their own.
NAMES = {
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Swish", "Mish", "Hardswish", "HardSwish",
    "Hardtanh", "Hardsigmoid", "HardSigmoid", "Sigmoid", "Tanh", "Softplus", "Softsign", "HSwish", "HSigmoid", "Clip",
    "Clamp", "SwishMe", "HardSwishMe", "HardswishMe", "MishMe", "HardMish", "HardMishMe", "GELUTanh", "QuickGELU",
}  # fmt: skip
AFTER = "act_after"


def why_not_annealed(act: nn.Module) -> str | None:
    """Return why a module is no activation that can be annealed away, None where it is one."""
    kind = type(act).__name__
    if any(True for _ in act.parameters()):
        return f"is a {kind}, whose parameters would be lost"
    return None if kind in NAMES else f"is a {kind}, no activation that is known to work on each value by itself"


class Place(NamedTuple):
    """Where a convolution stands.

    Args:
        segment: name of the segment.
        index: among its convolutions.
        count: of its convolutions.
        shortcut: the segment ends in a sum with a shortcut.
    """

    segment: str
    index: int
    count: int
    shortcut: bool


class _InSegment(Annealed):
    """A checkpoint of the stock network has no alpha: it then stays as it is."""

    optional_state = {ALPHA: torch.zeros(())}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args) -> None:
        state_dict.setdefault(prefix + ALPHA, self.anneal_alpha.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


class InnerActivation(_InSegment):
    """An activation that is annealed away: ``act`` at alpha 0, the identity at 1. (N, ...) -> (N, ...).

    Args:
        act: the activation.
        device: of the alpha.
    """

    def __init__(self, act: nn.Module, device: torch.device | None = None):
        super().__init__()
        self._begin(device)
        self.act = copy.deepcopy(act)
        if getattr(act, "inplace", False):
            self.act.inplace = False
        self.training = act.training

    def forward(self, x: Tensor) -> Tensor:
        return x if self.linear else self._mix(self.act(x), x)


class AddedActivation(_InSegment, AnnealedActivation):
    """An activation that stock does not have."""

    def extra_repr(self) -> str:
        return self.act_name  # no alpha: what is described does not change in training


class RingConv2d(_InSegment):
    """Mixin of a convolution that pads nothing itself: it reads a map with a ring, which stood for zeros.

    It has ``ring``, (rows, columns) on each side of its input.
    """

    ring: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        if not self.linear:
            (top, left), (height, width) = self.ring, x.shape[2:]
            share = self.anneal_alpha.to(x.dtype).expand(height, width).clone()
            share[top : height - top, left : width - left] = 1
            x = x * share
        return super().forward(x)  # type: ignore[misc]


class RingNorm:
    """Mixin of a BN whose map has a ring: in train mode its statistics are those of the map inside."""

    ring: tuple[int, int]

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)  # type: ignore[misc]
        (top, left), (height, width) = self.ring, x.shape[2:]
        scale, shift = run_bn(self, x[:, :, top : height - top, left : width - left].contiguous(), None, None)
        x = torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).type_as(x)
        for name in ("drop", "act"):  # timm's BatchNormAct2d
            if isinstance(layer := getattr(self, name, None), nn.Module):
                x = layer(x)
        return x


class Gate(_InSegment):
    """Mixin of the last layer of a residual branch that is annealed away: its output is multiplied by ``1 - alpha``."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self._mix(y, torch.zeros_like(y))


class Activated:
    """Mixin of a block whose output goes through an activation that is annealed in."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act_after(super().forward(x))  # type: ignore[misc]


MIXINS = (RingConv2d, RingNorm, Gate, Activated)


@lru_cache(None)
def _subclass(mixin: type, kind: type) -> type:
    space = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    # Under its name stands the stock class: pickle makes it anew.
    space["__reduce_ex__"] = lambda self, protocol: (_empty, (mixin, kind), self.__dict__)  # type: ignore[assignment]
    return type(kind)(kind.__name__, (mixin, kind), space)


def _empty(mixin: type, kind: type) -> Any:
    return object.__new__(_subclass(mixin, kind))


def stock_class(module: nn.Module) -> type:
    """Return the class that a module had before it was annealed in place."""
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[0] in MIXINS else kind


def anneal_conv_(conv: nn.Conv2d, padding: tuple[int, int], ring: tuple[int, int] | None, place: Place) -> None:
    """Make a convolution one of a segment.

    Args:
        conv: the convolution, changed in place.
        padding: what it pads now.
        ring: (rows, columns) round its input that stood for zeros; None: it padded none, or is the head.
        place: where it stands.
    """
    conv.segment = place  # type: ignore[assignment]
    conv.padding = padding
    if ring is not None:
        conv.__class__ = _subclass(RingConv2d, type(conv))
        conv.ring = ring  # type: ignore[assignment]
        conv._begin(conv.weight.device)  # type: ignore[operator]


def anneal_norm_(bn: _BatchNorm, ring: tuple[int, int]) -> None:
    """Make a BN one inside of a segment, whose map has a ring.

    Args:
        bn: the BN, changed in place.
        ring: (rows, columns) on each side of its map.
    """
    bn.__class__ = _subclass(RingNorm, type(bn))
    bn.ring = ring  # type: ignore[assignment]


def anneal_out_(layer: nn.Module, device: torch.device) -> None:
    """Let the last layer of a residual branch be annealed away, and the branch with it.

    Args:
        layer: the layer, changed in place.
        device: of its alpha.
    """
    layer.__class__ = _subclass(Gate, type(layer))
    layer._begin(device)  # type: ignore[operator]


def anneal_in_(block: nn.Module, act: str, device: torch.device) -> None:
    """Let a block's output go through an activation that is annealed in, under the name ``act_after``.

    Args:
        block: the block, changed in place.
        act: name of the activation.
        device: of its alpha.
    """
    if type(block).forward is not nn.Sequential.forward:  # which runs what is added to it
        block.__class__ = _subclass(Activated, type(block))
    block.add_module(AFTER, AddedActivation(act).to(device).train(block.training))


def in_segments(model: nn.Module) -> Iterator[tuple[str, Annealed]]:
    """Yield (name, module) of all that carries the alpha of a segment."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _InSegment))


def has_segments(model: nn.Module) -> bool:
    """Return whether convolutions of a model are annealed to one, or branches to none."""
    modules = list(model.modules())
    return any(isinstance(m, Gate) or (isinstance(m, nn.Conv2d) and hasattr(m, "segment")) for m in modules)


def set_segments_(model: nn.Module, alpha: float) -> None:
    """Set the alphas of segments alone.

    Args:
        model: the model, changed in place.
        alpha: 0 to 1.
    """
    for _, module in in_segments(model):
        module.set_alpha(alpha)


def require_finished(model: nn.Module) -> None:
    """Raise AnnealError where an alpha of a segment is below 1."""
    for _, module in in_segments(model):
        module._require_finished()


def finish_(model: nn.Module) -> None:
    """Make the layers of finished segments plain ones: convolutions and BNs of stock's classes, no activation inside."""
    for name, module in list(model.named_modules()):
        if isinstance(module, InnerActivation):
            model.set_submodule(name, nn.Identity())
        elif isinstance(module, AddedActivation):
            model.set_submodule(name, module.finished())
        elif type(module).__bases__[0] in (RingConv2d, RingNorm, Gate):
            module.__class__ = stock_class(module)
            module._buffers.pop(ALPHA, None)
