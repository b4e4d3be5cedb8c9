"""Reading the blocks of other projects by their attributes, and building their merged forms: no import needed.

A layout names the children that a block must hold and those that it may hold; a block with any other child, or with a
parameter of its own, is not taken.
"""

from functools import lru_cache

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.layers import is_idle
from rep_plugin.functional.padded import PaddedConv, add_padded, scale_padded
from rep_plugin.reparam.border_conv import build_conv
from rep_plugin.reparam.linear_layers import after_affine, bn_affine, identity_conv, is_plain_bn, read_chain


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


def replace_by(name: str, conv: PaddedConv, block: nn.Module, after: str = "") -> nn.Sequential:
    """Return a convolution, followed by those children of a block that compute something after its sum.

    Args:
        name: name of the convolution.
        conv: the convolution.
        block: the block.
        after: names of the children after the sum. A BN that comes first of these is merged as well.

    Returns:
        The Sequential that takes the block's place.
    """
    children = live_children(block)
    rest = {key: children[key] for key in after.split() if key in children and not is_idle(children[key])}
    while rest and is_plain_bn(next(iter(rest.values()))):
        conv = after_affine(conv, *bn_affine(rest.pop(next(iter(rest)))))
    sources = [child for key, child in children.items() if key not in rest]
    return in_sequence(block, {name: build_conv(conv, sources)} | rest)


def merge_branches(block: nn.Module, names: str) -> PaddedConv:
    """Return the sum of a block's parallel branches as one padded convolution.

    Args:
        block: the block.
        names: names of the branches, where it has them; a ModuleList holds several. A branch without a channel number
            (Identity, a pooling) takes it from the others.

    Returns:
        The convolution.
    """
    children = live_children(block)
    branches = []
    for name in names.split():
        child = children.get(name)
        branches += list(child) if isinstance(child, nn.ModuleList) else [] if child is None else [child]
    sized = [b for b in branches if isinstance(next(iter(_leaves(b)), None), (nn.Conv2d, _BatchNorm))]
    read = {branch: read_chain(branch) for branch in sized}
    channels = next((conv.params.in_channels for conv in read.values()), None)
    return add_padded([read[branch] if branch in read else read_chain(branch, channels) for branch in branches])


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if not live_children(m) and not is_idle(m)]


def pop_branches_(block: nn.Module, names: str) -> nn.Conv2d:
    """Merge a block's parallel branches and delete them.

    Args:
        block: the block, changed in place.
        names: names of the branches, as for :func:`merge_branches`.

    Returns:
        The layer that computes their sum.
    """
    children = live_children(block)
    conv = build_conv(merge_branches(block, names), [children[name] for name in names.split() if name in children])
    delete_children_(block, names)
    return conv


def delete_children_(module: nn.Module, names: str) -> None:
    """Delete those of the named children that a module has.

    Args:
        module: the module.
        names: names, separated by spaces.
    """
    for name in names.split():
        if name in module._modules:
            delattr(module, name)


def plus_identity(conv: PaddedConv, gain: Tensor | float = 1.0, skip: Tensor | float = 1.0) -> PaddedConv:
    """Return ``gain * conv(x) + skip * x`` as one padded convolution.

    Args:
        conv: the convolution.
        gain: a number, or one for each channel (C,).
        skip: likewise.

    Returns:
        The convolution.
    """
    eye = identity_conv(conv.params.in_channels, conv.params.bias.device)
    return add_padded([scale_padded(conv, gain), scale_padded(eye, skip)])
