"""``FakeQuantization``: a network is trained with the rounding that int8 will do, under its own names.

A mode of torch stands around the forward and rounds what convolutions and linear layers read, maps and weights. Nothing is
put into the network: its modules, parameters and keys stay the stock ones.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from rep_plugin.arguments import In, checked
from rep_plugin.measure.forward import require_bare

# Function -> the axis of the output's channels in its weights: what ONNX Runtime gives scales to.
LAYERS = {F.linear: 0, F.conv1d: 0, F.conv2d: 0, F.conv3d: 0}
LAYERS |= {F.conv_transpose1d: 1, F.conv_transpose2d: 1, F.conv_transpose3d: 1}
Averaging = Annotated[float, In("(0, 1]")]
TINY = 1e-12


@checked
class FakeQuantization:
    """Round weights and inputs of all convolutions and linear layers as int8 does; gradients pass where nothing is clipped.

    Weights are symmetric, -127 to 127 steps of their largest value; -64 to 64 where each channel has a scale, as ONNX Runtime
    takes them where sums of products must not overflow. What a layer reads is 0 to 255 steps of its range, which
    holds 0. Ranges are moving averages of the smallest and largest value of each batch in train mode.
    :func:`rep_plugin.export_int8` then writes the file: detach first.

    Args:
        model: the network, merged, in the form that will be exported.
        per_channel: weights have a scale for each channel of a layer's output; else one for the layer.
        averaging: share of the newest batch in a range.

    Attributes:
        observing: ranges move; set False to let them stay.
        layers: names of the layers whose weights were met in a forward.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> quantization = FakeQuantization(net)
        >>> quantization.attach(net)
        >>> _ = net(torch.randn(2, 3, 8, 8))  # a step of training
        >>> quantization.layers, list(net.state_dict())[:2], quantization.detach()
        (['0', '2'], ['0.weight', '0.bias'], None)
    """

    def __init__(self, model: nn.Module, per_channel: bool = True, averaging: Averaging = 0.01):
        require_bare(model)
        self.per_channel, self.averaging = per_channel, averaging
        self.observing = True
        self.layers: list[str] = []
        self._own = weakref.ref(model)
        self._ranges: dict[str, Tensor] = {}  # layer -> lowest and highest value that it read
        self._handles: list[RemovableHandle] = []

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Layer -> the lowest and the highest value that it reads. Set it to go on from an earlier training."""
        return {name: (float(pair[0]), float(pair[1])) for name, pair in self._ranges.items()}

    @ranges.setter
    def ranges(self, ranges: Mapping[str, Iterable[float]]) -> None:
        self._ranges = {name: torch.tensor([*pair], dtype=torch.float32) for name, pair in ranges.items()}

    def attach(self, *models: nn.Module) -> None:
        """Round in every forward of these from now on; ranges are those of the first forward and of the model's own training.

        Args:
            models: the model, and copies of it with the same names, as averages of its weights.
        """
        for model in models:
            self._handles += self._around(model)

    def detach(self) -> None:
        """Compute in float again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _around(self, model: nn.Module) -> list[RemovableHandle]:
        names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
        this, entered = weakref.ref(model), []  # a copy of the model takes the hooks along, and is not meant

        def before(module: nn.Module, args: tuple) -> None:
            if module is this():
                mode = _Rounding(self, names, self.observing and module.training and module is self._own())
                mode.__enter__()
                entered.append(mode)

        def after(module: nn.Module, args: tuple, output: object) -> None:
            if module is this() and entered:
                entered.pop().__exit__(None, None, None)

        return [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),  # also where the forward raises
        ]

    def rounded(self, name: str, x: Tensor, weight: Tensor, axis: int, observe: bool) -> tuple[Tensor, Tensor]:
        """Return what a layer reads, rounded.

        Args:
            name: of the layer.
            x: its input.
            weight: its weights.
            axis: of the output's channels in the weights.
            observe: let the range follow ``x``.

        Returns:
            Input and weights.
        """
        if name not in self.layers:
            self.layers.append(name)
        if observe:
            found = torch.stack(torch.aminmax(x.detach().float()))
            known = self._ranges.get(name)
            self._ranges[name] = found if known is None else torch.lerp(known.to(found.device), found, self.averaging)
        if name in self._ranges:
            x = _round_map(x, self._ranges[name].to(x.device))
        return x, _round_weight(weight, axis if self.per_channel else None)


class _Rounding(TorchFunctionMode):
    """Rounds what the layers of these names read."""

    def __init__(self, quantization: FakeQuantization, names: Mapping[int, str], observe: bool):
        super().__init__()
        self.quantization, self.names, self.observe = quantization, names, observe

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LAYERS:
            given = {**dict(zip(("input", "weight"), args)), **kwargs}
            name = self.names.get(id(given["weight"]))
            if name is not None:
                x, weight = given.pop("input"), given.pop("weight")
                pair = self.quantization.rounded(name, x, weight, LAYERS[func], self.observe)
                return func(*pair, *args[2:], **given)
        return func(*args, **kwargs)


def _round_map(x: Tensor, pair: Tensor) -> Tensor:
    """0 to 255 steps of a range that holds 0, which is a step itself."""
    low, high = pair[0].clamp(max=0.0), pair[1].clamp(min=0.0)
    scale = ((high - low) / 255).clamp_min(TINY)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, 255)


def _round_weight(weight: Tensor, axis: int | None) -> Tensor:
    """-127 to 127 steps of the largest weight of all, or -64 to 64 of that of each channel."""
    sizes = weight.detach().float().abs()
    if axis is None:
        scale = (sizes.amax() / 127).clamp_min(TINY)
        return torch.fake_quantize_per_tensor_affine(
            weight.float(), scale, torch.zeros_like(scale, dtype=torch.int32), -127, 127
        )
    scale = (sizes.transpose(0, axis).flatten(1).amax(1) / 64).clamp_min(TINY)
    return torch.fake_quantize_per_channel_affine(
        weight.float(), scale, torch.zeros_like(scale, dtype=torch.int32), axis, -64, 64
    )
