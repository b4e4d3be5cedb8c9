"""The masked model: the same layers, with removed channels set to zero, which surgery must equal."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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


class _OfKept(TorchFunctionMode):
    """Norms, and means of norms, of some channels alone; the other channels of a norm come out as zeros."""

    def __init__(self, kept: dict[int, Tensor], means: dict[int, Tensor]):
        super().__init__()
        self.kept, self.means = kept, means
        self.norms: dict[int, Tensor] = {}  # norms of each channel, held: no other tensor has their ids
        self.number = 0  # of means of these

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("layer_norm", "rms_norm", "group_norm"):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            index = self.kept.get(id(given.get("weight")))
            return func(*args, **kwargs) if index is None else self._norm(func, given, index)
        if name == "mean" and id(args[0]) in self.norms:
            return self._mean(func, args, kwargs)
        out = func(*args, **kwargs)
        if name in ("norm", "linalg_vector_norm"):
            self.norms[id(out)] = out
        return out

    @staticmethod
    def _norm(func: Callable, given: dict, index: Tensor) -> Tensor:
        x, grouped = given["input"], func.__name__ == "group_norm"
        dim = 1 if grouped else -1
        own = {key: value[index] for key, value in given.items() if key in ("weight", "bias") and value is not None}
        own |= {"input": x.index_select(dim, index)} | ({} if grouped else {"normalized_shape": (len(index),)})
        return torch.zeros_like(x).index_copy(dim, index, func(**given | own))

    def _mean(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if not isinstance(dim, int):
            return func(*args, **kwargs)
        index = self.means.get(self.number)
        self.number += 1
        return func(*args, **kwargs) if index is None else func(args[0].index_select(dim, index), *args[1:], **kwargs)


class KeptNorms(nn.Module):
    """A masked model whose norms over channels normalise those that stay: zeros would count in their means.

    Args:
        model: With all channels, those that go set to zero.
        trace: Of the model.
        kept: The channels that stay.
    """

    def __init__(self, model: nn.Module, trace: Trace, kept: KeptChannels):
        super().__init__()
        self.model = model
        norms = trace.layer_norms | trace.group_norms
        self.index = {name: kept.index(labels) for name, labels in norms.items() if kept.changes(labels)}
        self.means = {number: kept.index(labels) for number, labels in trace.means.items() if kept.changes(labels)}

    def forward(self, *args, **kwargs) -> object:
        """Take what the model takes: images alone, or all of its arguments."""
        parameters = named_tensors(self.model)
        alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        device = next(iter(parameters.values())).device
        means = {number: index.to(device) for number, index in self.means.items()}
        index = {id(parameters[name]): index.to(parameters[name].device) for name, index in self.index.items()}
        with _OfKept(index, means):
            return run_model(self.model, args[0] if alone else args or kwargs)


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
