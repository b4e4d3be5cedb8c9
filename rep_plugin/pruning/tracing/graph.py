"""What a trace of a model holds: its layers, and which channels every dimension of every tensor follows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from rep_plugin.pruning.tracing.labels import Channels

OUTPUT = "makes the model output"  # begins the reason of what makes it
_QUIET = (Path(torch.__file__).parent, Path(__file__).parent, Path(__file__).parents[2] / "measure")


@dataclass(frozen=True)
class Mark:
    """What is known of a map.

    Attributes:
        labels: Of its elements.
        zero: Removed channels are zero here once the layers that make them are set to zero.
    """

    labels: Tensor
    zero: bool = True


@dataclass
class Layer:
    """A layer that makes channels.

    Attributes:
        name: Of the module.
        kind: ``conv``, ``conv_transpose``, ``linear`` or ``block``.
        labels: Of its outputs.
        inputs: Labels of its inputs.
        weight: Name of its kernel, None for a block.
        groupwise: Every group of the convolution is kept or removed as a whole, as in a depthwise one.
        groups: Of the convolution.
        taps: Of the window.
    """

    name: str
    kind: str
    labels: Tensor
    inputs: Tensor
    weight: str | None = None
    groupwise: bool = False
    groups: int = 1
    taps: int = 1

    @property
    def inputs_per_group(self) -> Tensor:
        return self.inputs[: len(self.inputs) // self.groups]


@dataclass
class Cost:
    """Multiply-adds: ``count(*kept)`` for the kept numbers of each of ``labels``."""

    labels: tuple[Tensor, ...]
    count: Callable[..., int]


@dataclass
class Trace:
    """The channels of one model.

    Attributes:
        shape: Of the traced input, (1, C, ...) where the model takes one image alone.
        channels: The labels.
        slices: {tensor name: {dimension: labels}}, all that is sliced when channels are removed; the inputs of a grouped
            kernel are labelled (groups, I / groups).
        layers: {name: layer that makes channels}, in order of execution.
        norms: {name of a BN: labels}.
        layer_norms: {weight of a layer norm: labels}: it normalises the channels that stay.
        group_norms: {weight of a group norm: labels}, likewise.
        means: {which mean of norms over channels, in order of execution: labels}, likewise: global response normalisation.
        makers: (tensor, dimension) that make a channel: it is zero once they are.
        groupwise: Kernels that lose whole groups.
        sizes: {parameter name: shape}.
        masked_inputs: (tensor, dimension) that still see something of a channel once its makers are zero.
        block_parameters: {block that is one unit: names of the parameters inside}.
        pools: {bilinear pooling: (labels of its maps, labels of what it multiplies)}.
        counted: (labels, what counts them): there two equal channels are not one of twice the weight.
        costs: Multiply-adds.
        outputs: Labels of the outputs.
        train_outputs: Labels of the outputs in train mode, where that runs more layers.
        conv_of_norm: {norm: the convolution whose outputs it reads, and nothing else does}.
        unreached: {layer that no run reaches: its input channels}, where others of that width stay for its sake.
        numbers: {(module, attribute, place in it or None): labels}: the attribute is how many of these channels there are.
        described: {(module, what it says of itself): labels}: an index into timm's ``feature_info``, or ``num_features``.
    """

    shape: tuple[int, ...]
    channels: Channels = field(default_factory=Channels)
    slices: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    layer_norms: dict[str, Tensor] = field(default_factory=dict)
    group_norms: dict[str, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    makers: set[tuple[str, int]] = field(default_factory=set)
    groupwise: set[str] = field(default_factory=set)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    masked_inputs: set[tuple[str, int]] = field(default_factory=set)
    block_parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pools: dict[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = field(default_factory=dict)
    counted: list[tuple[Tensor, str]] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    train_outputs: list[Tensor] = field(default_factory=list)
    conv_of_norm: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, int] = field(default_factory=dict)
    numbers: dict[tuple[str, str, int | None], Tensor] = field(default_factory=dict)
    described: dict[tuple[str, int | str], Tensor] = field(default_factory=dict)

    def averaged(self) -> list[Tensor]:
        """Return the channels of which the masked model has to leave some out of an average."""
        return [*self.layer_norms.values(), *self.group_norms.values(), *self.means.values()]


@lru_cache
def is_quiet(filename: str) -> bool:
    """True for torch's own code, the tracer's and what measures a forward: no line of a model is there."""
    return filename.startswith("<") or any(Path(filename).is_relative_to(folder) for folder in _QUIET)


def owner_of(name: str) -> str:
    """Return the module name of a parameter name; the root's is empty."""
    return name.rpartition(".")[0]


def member(module: str, name: str) -> str:
    """Return the name of a parameter or a child of a module.

    Args:
        module: Its name, empty for the root.
        name: Inside of the module.

    Returns:
        The whole name.
    """
    return f"{module}.{name}" if module else name


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors_in(values: object) -> list[Tensor]:
    """Return the tensors of nested arguments, in order."""
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
