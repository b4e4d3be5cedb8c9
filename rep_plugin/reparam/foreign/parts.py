"""Recognising the blocks of other projects by their attributes: no import needed.

A layout names the children that a block must hold and those that it may hold; a block with any other child, or with a
parameter of its own, is not taken.
"""

from functools import lru_cache

from torch import nn


def live_children(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children that are not None, by name."""
    return {name: child for name, child in module._modules.items() if child is not None}


def has_layout(module: nn.Module, needed: str, allowed: str = "", parameters: str = "") -> bool:
    """Return whether a module's children have all the needed names and no others but the allowed ones.

    Args:
        module: the module.
        needed: names, separated by spaces.
        allowed: names of further children.
        parameters: names that its own parameters may have; there must be no others.

    Returns:
        Whether the layout fits.
    """
    must = _names(needed)
    if not must <= module._modules.keys():
        return False
    names = set(live_children(module))
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    return must <= names <= must | _names(allowed) and own <= _names(parameters)


@lru_cache
def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def in_sequence(block: nn.Module, parts: dict[str, nn.Module]) -> nn.Sequential:
    """Return modules in a row, to take the place of a block.

    Args:
        block: the block, whose mode is taken over.
        parts: name -> module.

    Returns:
        The Sequential.
    """
    merged = nn.Sequential()
    for name, part in parts.items():
        merged.add_module(name, part)
    merged.training = block.training
    return merged


def delete_children_(module: nn.Module, names: str) -> None:
    """Delete those of the named children that a module has.

    Args:
        module: the module.
        names: names, separated by spaces.
    """
    for name in names.split():
        if name in module._modules:
            delattr(module, name)
