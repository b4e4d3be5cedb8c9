"""What stays of every tensor once some channels are removed, and what that costs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rep_plugin.arguments import checked, shown
from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.tracing.graph import Layer, Trace


@checked
class KeptChannels:
    """The labels that stay when some units are removed.

    Args:
        trace: Of the model.
        removed: Roots of the units that are removed (U,); without any, everything stays.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.tracing import KeptChannels, trace_channels
        >>> trace = trace_channels(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)), (1, 3, 8, 8))
        >>> labels = trace.layers["0"].labels
        >>> KeptChannels(trace, labels[:3]).index(labels).tolist()
        [3, 4, 5, 6, 7]
    """

    def __init__(self, trace: Trace, removed: Sequence[int] | Tensor = ()):
        roots = trace.channels.roots()
        stays = torch.ones(len(roots), dtype=torch.bool)
        given = torch.as_tensor(removed, dtype=torch.long)
        if given.is_meta or (given.numel() and not 0 <= int(given.min()) <= int(given.max()) < len(roots)):
            raise ArgumentError(f"removed must be labels below {len(roots)}, got {shown(removed)}")
        stays[given] = False
        self.mask = stays[roots]
        for start, first, second in trace.channels.products:
            self.mask[start : start + len(first)] = self.mask[first] & self.mask[second]

    def count(self, labels: Tensor) -> int:
        """How many stay; of labels (groups, width), how many in each group."""
        return int(self.mask[labels[0] if labels.dim() == 2 else labels].sum())

    def index(self, labels: Tensor) -> Tensor:
        """Places that stay, ascending."""
        return self.mask[labels].nonzero().flatten()

    def removed(self, labels: Tensor) -> Tensor:
        """Places that go, ascending."""
        return (~self.mask[labels]).nonzero().flatten()

    def changes(self, labels: Tensor) -> bool:
        return not bool(self.mask[labels].all())


def slice_tensor(tensor: Tensor, dims: dict[int, Tensor], kept: KeptChannels) -> Tensor:
    """Return what stays of a tensor.

    Args:
        tensor: Of any shape.
        dims: {dimension: labels}, (groups, width) for a grouped kernel's inputs.
        kept: The channels that stay.

    Returns:
        The slice.
    """
    for dim, labels in sorted(dims.items(), reverse=True):
        if not kept.changes(labels):
            continue
        if labels.dim() == 1:
            tensor = tensor.index_select(dim, kept.index(labels).to(tensor.device))
            continue
        rows = tensor.unflatten(0, (len(labels), -1))
        parts = [row.index_select(1, kept.index(own).to(tensor.device)) for row, own in zip(rows, labels)]
        tensor = torch.cat(parts)
    return tensor


def zero_removed_(tensor: Tensor, dim: int, labels: Tensor, kept: KeptChannels) -> None:
    """Set the entries of the removed channels along a dimension to zero.

    Args:
        tensor: Changed in place.
        dim: The dimension.
        labels: Along it, (groups, width) for a grouped kernel's inputs.
        kept: The channels that stay.
    """
    if labels.dim() == 1:
        tensor.index_fill_(dim, kept.removed(labels).to(tensor.device), 0)
        return
    for row, own in zip(tensor.unflatten(0, (len(labels), -1)), labels):
        row.index_fill_(1, kept.removed(own).to(tensor.device), 0)


def _block_params(layer: Layer, kept: KeptChannels) -> int:
    outs = kept.count(layer.labels)
    width = len(layer.inputs_per_group) if layer.groupwise else kept.count(layer.inputs_per_group)
    return outs * width * layer.taps + outs


class Costs(NamedTuple):
    """Numbers of parameters, and of multiply-adds for one image."""

    params: int
    macs: int


@checked
def count_costs(trace: Trace, kept: KeptChannels | None = None) -> Costs:
    """Return the costs of what stays of a model; a block counts as its one convolution.

    Args:
        trace: Of the model.
        kept: The channels that stay, all by default.

    Returns:
        Parameters, and multiply-adds for one image.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.tracing import count_costs, trace_channels
        >>> count_costs(trace_channels(torch.nn.Conv2d(3, 8, 3), (1, 3, 8, 8)))
        Costs(params=224, macs=7776)
    """
    kept = kept or KeptChannels(trace)
    inner = {name for names in trace.block_parameters.values() for name in names}
    params = sum(_block_params(trace.layers[name], kept) for name in trace.block_parameters)
    for name, shape in trace.sizes.items():
        if name in inner:
            continue
        sizes = list(shape)
        for dim, labels in trace.slices.get(name, {}).items():
            sizes[dim] = kept.count(labels)
        params += torch.Size(sizes).numel()
    macs = sum(cost.count(*(kept.count(labels) for labels in cost.labels)) for cost in trace.costs)
    return Costs(params, macs // trace.shape[0] if trace.shape else macs)
