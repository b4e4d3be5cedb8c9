"""From stock MobileNetV2's block to the mergeable one without a jump: activations whose place moves with ``alpha``.

Stock's inverted residual has an activation after expand and after depthwise, none after the sum, and pads the middle map
with zeros. The mergeable block has none inside, one after the sum, and padding that holds the expand's shift (the zeros are
padded in front of it). Between them, for alpha from 0 to 1:

    inside     (1 - alpha) * act(x) + alpha * x
    after      (1 - alpha) * x + alpha * act(x)
    padding    alpha * shift

At 0 the block is stock's, borders included; at 1 it is the chain of :mod:`rep_plugin.blocks.chain`, and runs as such.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.arguments import In, checked
from rep_plugin.blocks.activations import FUNCTIONS, build_activation
from rep_plugin.blocks.batch_norm import run_bn
from rep_plugin.blocks.chain import Chain, run_conv
from rep_plugin.errors import AnnealError, ArgumentError
from rep_plugin.functional.kernels import ConvParams

ALPHA = "anneal_alpha"  # the buffer's name in checkpoints


class Annealed(nn.Module):
    """What carries an ``alpha`` in a buffer, so that checkpoints hold it. Set it with :meth:`set_alpha` alone."""

    def _start(self, act: str) -> None:
        if act not in FUNCTIONS:
            raise ArgumentError(f"activation {act!r} cannot be annealed, expected one of {sorted(FUNCTIONS)}")
        self.act_name = act
        self._begin()

    def _begin(self, device: torch.device | None = None) -> None:
        self.register_buffer(ALPHA, torch.zeros((), device=device))
        self.linear = False  # alpha == 1, known without asking the device

    @property
    def alpha(self) -> float:
        """Share of the way to the mergeable form."""
        return float(self.anneal_alpha)

    @torch.no_grad()
    def set_alpha(self, alpha: float) -> None:
        """Set the share, 0 to 1. Raises ArgumentError for any other number."""
        if not 0 <= alpha <= 1:
            raise ArgumentError(f"alpha must lie in 0..1, got {alpha}")
        self.anneal_alpha.fill_(alpha)
        self.linear = alpha == 1

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.linear = self.alpha == 1

    def _require_finished(self) -> None:
        if self.alpha != 1:
            raise AnnealError(
                f"alpha is {self.alpha:.4g}, expected 1: activations that are not annealed away cannot be merged (see "
                "rep_plugin.LinearizeHook)"
            )

    def _act(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.act_name](x)

    def _mix(self, start: Tensor, end: Tensor) -> Tensor:
        return torch.lerp(start, end, self.anneal_alpha.to(start.dtype))


class AnnealedBottleneck(Annealed, Chain):
    """A linear bottleneck that begins as stock's: ``act`` after ``expand_bn`` and ``depthwise_bn`` at alpha 0.

    A merge raises AnnealError below alpha 1.

    Args:
        bottleneck: the chain of :func:`rep_plugin.blocks.branches.linear_bottleneck`, whose layers and keys it has.
        act: name of an activation without parameters.

    Raises:
        ArgumentError: another activation.
    """

    def __init__(self, bottleneck: Chain, act: str):
        super().__init__(dict(bottleneck.named_children()))
        self._start(act)

    def _inner(self, y: Tensor, bn: _BatchNorm, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """BN and the annealed activation of ``y + shift``; also the BN's shift: what it makes of a zero."""
        scale, offset = run_bn(bn, y, None, shift)
        value = torch.addcmul(offset.view(1, -1, 1, 1), y, scale.view(1, -1, 1, 1))
        return self._mix(self._act(value), value).type_as(y), offset

    def run(self, x: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.linear:
            return super().run(x, padding)
        edge = None
        if hasattr(self, "expand"):
            y, shift = run_conv(self.expand, x, None, None, (0, 0))
            x, shift = self._inner(y, self.expand_bn, shift)
            # The convolution pads zeros: carried as (x - edge) + edge, they stand for `edge`.
            edge = (shift * self.anneal_alpha.to(shift.dtype)).type_as(x)
            x = x - edge.view(1, -1, 1, 1)
        y, shift = run_conv(self.depthwise, x, None, edge, padding)
        x, _ = self._inner(y, self.depthwise_bn, shift)
        y, shift = run_conv(self.project, x, None, None, (0, 0))
        return y, *run_bn(self.project_bn, y, None, shift)

    def merge(self, in_channels: int | None = None, dtype: torch.dtype | None = None) -> ConvParams:
        self._require_finished()
        return super().merge(in_channels, dtype)


class AnnealedActivation(Annealed):
    """The activation after the sum: the identity at alpha 0, ``act`` at 1. (N, ...) -> (N, ...)."""

    def __init__(self, act: str):
        super().__init__()
        self._start(act)

    def forward(self, x: Tensor) -> Tensor:
        return self._act(x) if self.linear else self._mix(x, self._act(x))

    def finished(self) -> nn.Module:
        """Return the plain activation. Raises AnnealError below alpha 1."""
        self._require_finished()
        return build_activation(self.act_name, 0)

    def extra_repr(self) -> str:
        return f"{self.act_name}, alpha={self.alpha:.4g}"


def annealed_modules(model: nn.Module) -> Iterator[Annealed]:
    """Yield all that carries an alpha."""
    return (module for module in model.modules() if isinstance(module, Annealed))


@checked
def set_alpha_(model: nn.Module, alpha: Annotated[float, In("[0, 1]")]) -> None:
    """Set every alpha of a model.

    Args:
        model: the model, changed in place.
        alpha: share of the way to the mergeable form, 0 to 1.

    Raises:
        ArgumentError: any other number.

    Example:
        >>> import rep_plugin
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> annealed, _ = rep_plugin.linearize(model, ["1"])
        >>> rep_plugin.set_alpha_(annealed, 0.5)
        >>> annealed[1].alpha
        0.5
    """
    for module in annealed_modules(model):
        module.set_alpha(alpha)
