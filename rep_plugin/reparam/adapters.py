"""Which modules can be merged into fewer layers, and how: one adapter a kind of module."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rep_plugin.arguments import checked
from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.conv_like import ConvLike


@checked
@dataclass(frozen=True)
class Adapter:
    """How one kind of module is merged.

    Args:
        name: kind of module, for reports.
        matches: whether the adapter is for a module.
        merge: returns the module that takes the place of a given one, which may be the same one, changed. It may rely on eval
            mode, and must raise an error where the merge would not be exact.

    Example:
        >>> adapter = Adapter("doubled", lambda module: False, lambda module: module)
        >>> adapter.matches(nn.Identity())
        False
    """

    name: str
    matches: Callable[[nn.Module], bool]
    merge: Callable[[nn.Module], nn.Module]


ADAPTERS: list[Adapter] = []


@checked
def register_adapter(adapter: Adapter) -> Adapter:
    """Add an adapter; later ones are asked first, so that a user's adapter overrides ours.

    Example:
        >>> class Twice(nn.Conv2d): pass
        >>> adapter = Adapter("twice", lambda module: type(module).__name__ == "Twice", lambda module: module)
        >>> _ = register_adapter(adapter)
        >>> find_adapter(Twice(3, 3, 1)).name
        'twice'
    """
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
    """Return the adapter for a module, None where there is none.

    Example:
        >>> find_adapter(nn.ReLU()) is None
        True
    """
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
