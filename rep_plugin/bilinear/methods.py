"""The variants of bilinear pooling, before normalisation: ``pool(x (N, C1, L), y (N, C2, L) or None) -> (N, D)``.

Each has ``out_channels`` (D) and ``keep_(keep1, keep2)``, which removes the other channels and returns the outputs that
stay.
"""

import torch
from torch import Tensor, nn

from rep_plugin.errors import ArgumentError
from rep_plugin.functional.bilinear import (
    draw_signs,
    full_columns,
    gram,
    isqrt_cov,
    low_rank,
    random_maclaurin,
    take_triangle,
    tensor_sketch,
    triangle_columns,
    triangle_index,
    triangle_multiplicity,
    triangle_size,
)

# Leaves to torch.fx: their checks on shapes would stop a symbolic trace.
for _name in ("gram", "isqrt_cov", "low_rank", "random_maclaurin", "take_triangle", "tensor_sketch"):
    torch.fx.wrap(_name)


class Full(nn.Module):
    """All products of two channels: D = C1 * C2.

    Args:
        channels1, channels2: channels of the maps; ``channels2`` None: one map.
    """

    def __init__(self, channels1: int, channels2: int | None):
        super().__init__()
        self.channels2 = channels2 or channels1
        self.out_channels = channels1 * self.channels2

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return gram(x, y).flatten(1)

    def keep_(self, keep1: Tensor, keep2: Tensor) -> Tensor:
        columns = full_columns(keep1, keep2, self.channels2)
        self.channels2, self.out_channels = len(keep2), len(columns)
        return columns


class Triangle(nn.Module):
    """Products i <= j of a symmetric map: D = C (C + 1) / 2, what a full head is once it is deployed.

    Args:
        channels1: channels of the map.
        channels2: None: there is no second map.

    Raises:
        ArgumentError: two maps.
    """

    def __init__(self, channels1: int, channels2: int | None):
        super().__init__()
        if channels2 is not None:
            raise ArgumentError(f"{type(self).__name__} needs one map, got two of {channels1} and {channels2} channels")
        self._set_channels(channels1)

    def _set_channels(self, channels: int, device: torch.device | None = None) -> None:
        self.channels, self.out_channels = channels, triangle_size(channels)
        self.register_buffer("index", triangle_index(channels, device), persistent=False)
        self.register_buffer("multiplicity", triangle_multiplicity(channels, device), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return take_triangle(gram(x), self.index)

    def keep_(self, keep1: Tensor, keep2: Tensor) -> Tensor:
        columns = triangle_columns(keep1, self.channels)
        self._set_channels(len(keep1), self.index.device)
        return columns


class ISqrtCov(Triangle):
    """The triangle of the matrix square root of the covariance; no signed square root and no L2 after it.

    Args:
        channels1: channels of the map.
        channels2: None: there is no second map.
        iterations: Newton-Schulz steps, >= 1.

    Raises:
        ArgumentError: two maps, or iterations < 1.
    """

    def __init__(self, channels1: int, channels2: int | None, iterations: int):
        super().__init__(channels1, channels2)
        if iterations < 1:
            raise ArgumentError(f"iterations must be >= 1, got {iterations}")
        self.iterations = iterations

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return isqrt_cov(x, self.index, self.iterations)


class Projected(nn.Module):
    """A random or learned linear map of the products: tensors of one entry a channel, D = ``out_channels``."""

    def _keep(self, name: str, dim: int, keep: Tensor) -> None:
        tensor = getattr(self, name)
        tensor.data = tensor.data.index_select(dim, keep)  # a parameter stays the same object, for its optimizer
        tensor.grad = None

    def keep_(self, keep1: Tensor, keep2: Tensor) -> Tensor:
        for names, keep in zip(self.tables, (keep1, keep2)):
            for name in names:
                self._keep(name, self.channel_dim, keep)
        return torch.arange(self.out_channels, device=keep1.device)


class TensorSketch(Projected):
    """Tensor Sketch (Gao et al., CVPR 2016): hashes and signs are buffers drawn from ``seed``.

    Args:
        channels1, channels2: channels of the maps; ``channels2`` None: one map.
        dim: D, the length of a sketch.
        seed: of the buffers.
    """

    tables, channel_dim = (("hash1", "sign1"), ("hash2", "sign2")), 0

    def __init__(self, channels1: int, channels2: int | None, dim: int, seed: int):
        super().__init__()
        self.out_channels = dim
        generator = torch.Generator().manual_seed(seed)
        for number, channels in (("1", channels1), ("2", channels2 or channels1)):
            self.register_buffer("hash" + number, torch.randint(dim, (channels,), generator=generator))
            self.register_buffer("sign" + number, draw_signs((channels,), generator))

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return tensor_sketch(gram(x, y), self.hash1, self.hash2, self.sign1, self.sign2, self.out_channels)


class RandomMaclaurin(Projected):
    """Random Maclaurin features (Gao et al., CVPR 2016): signs are buffers drawn from ``seed``.

    Args:
        channels1, channels2: channels of the maps; ``channels2`` None: one map.
        dim: D, the number of features.
        seed: of the buffers.
    """

    tables, channel_dim = (("signs1",), ("signs2",)), 1

    def __init__(self, channels1: int, channels2: int | None, dim: int, seed: int):
        super().__init__()
        self.out_channels = dim
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("signs1", draw_signs((dim, channels1), generator))
        self.register_buffer("signs2", draw_signs((dim, channels2 or channels1), generator))

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return random_maclaurin(x, y, self.signs1, self.signs2)


class LowRank(Projected):
    """Low-rank bilinear pooling (Kim et al., ICLR 2017) with two learned factors.

    Args:
        channels1, channels2: channels of the maps; ``channels2`` None: one map.
        rank: D (default: the smaller number of channels).

    Raises:
        ArgumentError: a rank outside of 1 and the smaller number of channels.
    """

    tables, channel_dim = (("factor1",), ("factor2",)), 0

    def __init__(self, channels1: int, channels2: int | None, rank: int | None):
        super().__init__()
        channels2 = channels2 or channels1
        rank = min(channels1, channels2) if rank is None else rank
        if not 1 <= rank <= min(channels1, channels2):
            raise ArgumentError(f"rank must lie in 1..{min(channels1, channels2)} (the channels), got {rank}")
        self.out_channels = rank
        # Unit variance in, unit variance out, so that the signed square root starts where it bends.
        self.factor1 = nn.Parameter(torch.randn(channels1, rank) * channels1**-0.5)
        self.factor2 = nn.Parameter(torch.randn(channels2, rank) * channels2**-0.5)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return low_rank(x, y, self.factor1, self.factor2)


METHODS = ("full", "triu", "tensor_sketch", "random_maclaurin", "low_rank", "isqrt_cov")


def build_pool(
    method: str, channels1: int, channels2: int | None, dim: int, rank: int | None, iterations: int, seed: int
) -> nn.Module:
    """Return the variant of a name.

    Args:
        method: name in METHODS.
        channels1, channels2: channels of the maps; ``channels2`` None: one map.
        dim: length of sketches and of Maclaurin features.
        rank: rank of ``low_rank`` (default: the channels).
        iterations: Newton-Schulz steps.
        seed: of the random tables.

    Returns:
        Module ``pool(x, y)`` -> (N, D).

    Raises:
        ArgumentError: an unknown name, or numbers out of range.
    """
    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}, expected one of {METHODS}")
    if dim < 1:
        raise ArgumentError(f"dim must be >= 1, got {dim}")
    if method == "tensor_sketch":
        return TensorSketch(channels1, channels2, dim, seed)
    if method == "random_maclaurin":
        return RandomMaclaurin(channels1, channels2, dim, seed)
    if method == "low_rank":
        return LowRank(channels1, channels2, rank)
    if method == "isqrt_cov":
        return ISqrtCov(channels1, channels2, iterations)
    return (Full if method == "full" else Triangle)(channels1, channels2)
