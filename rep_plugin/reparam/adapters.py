"""Which modules can be merged into fewer layers, and how: one adapter a kind of module."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.conv_like import ConvLike


@dataclass(frozen=True)
class Adapter:
    """How one kind of module is merged.

    ``matches(module)`` says whether the adapter is for it; ``merge(module)`` returns the module that takes its place,
    which may be the same one, changed. It may rely on eval mode, and must raise where the merge would not be exact.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    merge: Callable[[nn.Module], nn.Module]


ADAPTERS: list[Adapter] = []


def register_adapter(adapter: Adapter) -> Adapter:
    """Add an adapter; later ones are asked first, so that a user's overrides ours."""
    ADAPTERS.insert(0, adapter)
    return adapter


def adapts(name: str, matches: Callable[[nn.Module], bool]) -> Callable:
    """Decorate ``merge(module) -> module`` as an :class:`Adapter`.

    Args:
        name: kind of module, for reports.
        matches: whether the adapter is for a module.

    Returns:
        The decorator.
    """

    def register(merge: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
        register_adapter(Adapter(name, matches, merge))
        return merge

    return register


def find_adapter(module: nn.Module) -> Adapter | None:
    """Return the adapter for a module, or None where it is not one that merges."""
    return next((adapter for adapter in ADAPTERS if adapter.matches(module)), None)


@adapts("bilinear head", lambda module: isinstance(module, BilinearHead) and module.foldable)
@adapts("rep_plugin block", lambda module: isinstance(module, RepBlock) and not module.deployed)
def _switch(module: nn.Module) -> nn.Module:
    module.switch_to_deploy()
    return module


@adapts("conv look-alike", lambda module: isinstance(module, ConvLike))
def _plain_conv(module: ConvLike) -> nn.Conv2d:
    module.switch_to_deploy()
    return module.reparam_conv
