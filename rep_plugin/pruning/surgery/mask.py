"""The masked model: the same layers, with removed channels set to zero, which surgery must equal."""

import torch
from torch import Tensor, nn

from rep_plugin.arguments import checked
from rep_plugin.measure.differences import flatten_outputs
from rep_plugin.measure.forward import run_model
from rep_plugin.pruning.surgery.remove import keep_filters_, measure_filters, require_same_layers
from rep_plugin.pruning.tracing.graph import Trace, named_tensors
from rep_plugin.pruning.tracing.kept_channels import KeptChannels, zero_removed_


@checked
@torch.no_grad()
def mask_channels_(model: nn.Module, trace: Trace, kept: KeptChannels) -> nn.Module:
    """Set to zero whatever makes a removed channel: kernels and biases, gammas and betas.

    A channel that is zero so stays zero through ReLU, h-swish, pooling and gates. Where it does not (behind a sigmoid that
    is no gate, a constant that is added), the layer that reads it gets zeros in the channel's columns instead: its
    contribution is removed there.

    Args:
        model: Changed in place.
        trace: Of the model.
        kept: The channels that stay.

    Returns:
        The model.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.surgery import mask_channels_
        >>> from rep_plugin.pruning.tracing import KeptChannels, trace_channels
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        >>> trace = trace_channels(net, (1, 3, 8, 8))
        >>> net = mask_channels_(net, trace, KeptChannels(trace, trace.layers["0"].labels[:3]))
        >>> int(net[0].weight.abs().sum((1, 2, 3)).count_nonzero())
        5
    """
    require_same_layers(model, trace)
    tensors = named_tensors(model)
    filters = measure_filters(model, trace)
    for name, dim in (*trace.makers, *trace.masked_inputs):
        zero_removed_(tensors[name], dim, trace.slices[name][dim], kept)
    keep_filters_(model, trace, kept, filters)
    return model


class KeptOutputs(nn.Module):
    """A model whose output maps lose the channels that its pruned form does not have: for comparison.

    Args:
        model: With all channels.
        trace: Of the model.
        kept: The channels that stay.
    """

    def __init__(self, model: nn.Module, trace: Trace, kept: KeptChannels):
        super().__init__()
        self.model, self.outputs, self.kept = model, trace.outputs, kept
        self.channels = trace.channels

    def forward(self, *args, **kwargs) -> list[Tensor]:
        """Take what the model takes: images alone, or all of its arguments."""
        alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        output, maps = run_model(self.model, args[0] if alone else args or kwargs), []
        for tensor, labels in zip(flatten_outputs(output), self.outputs, strict=True):
            channels = self.channels.along(labels, 1) if labels.dim() == 4 else None
            if channels is not None and self.kept.changes(channels):
                tensor = tensor.index_select(1, self.kept.index(channels).to(tensor.device))
            maps.append(tensor)
        return maps
