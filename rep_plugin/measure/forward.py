"""How a model is run on images alone: ``model(x)``, unless a :class:`Forward` is registered for models of its kind."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Forward:
    """How models of one kind are run: the default, ``model(x)``. A subclass for another kind is registered with
    :func:`register_forward`.
    """

    def matches(self, model: nn.Module) -> bool:
        """Return whether a model is of this kind."""
        return True

    def run(self, model: nn.Module, x: Tensor) -> object:
        """Return the outputs of ``model`` for images alone.

        Args:
            model: a model of this kind.
            x: images (N, C, H, W).
        """
        return model(x)

    def run_auxiliary(self, model: nn.Module, x: Tensor) -> object:
        """Return the outputs that only training reads, as :meth:`run` does."""
        return self.run(model, x)

    def run_unreached(self, model: nn.Module, x: Tensor, unused: list[str]) -> object:
        """Return the maps that parts which no forward reaches may read; the default is none.

        Args:
            model: a model of this kind.
            x: images (N, C, H, W).
            unused: names of the parameters that no forward used.
        """
        return []


_FORWARDS = [Forward()]


def register_forward(forward: Forward) -> None:
    """Add how models of one kind are run; later ones are asked first.

    Example:
        >>> class OnPairs(Forward):
        ...     def matches(self, model): return hasattr(model, "compare")
        ...     def run(self, model, x): return model(x, x)
        >>> register_forward(OnPairs())
        >>> type(forward_of(nn.Identity())).__name__
        'Forward'
    """
    _FORWARDS.insert(0, forward)


def forward_of(model: nn.Module) -> Forward:
    """Return how a model is run."""
    return next(forward for forward in _FORWARDS if forward.matches(model))


def run_model(model: nn.Module, x: Tensor) -> object:
    """Return the outputs of a model for images alone.

    Args:
        model: any model.
        x: images (N, C, H, W).

    Returns:
        ``model(x)``, or what the registered :class:`Forward` of its kind gives.

    Example:
        >>> import torch
        >>> run_model(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """
    return forward_of(model).run(model, x)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
