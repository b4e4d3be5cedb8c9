"""Bilinear pooling as a module: a map (or two) becomes one vector of second-order statistics an image."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Channels, Count, In, OneOf, Seed, checked
from rep_plugin.bilinear.methods import METHODS, Triangle, build_pool
from rep_plugin.errors import ArgumentError, ArgumentTypeError
from rep_plugin.functional.bilinear import Steps, fold_to_triangle, signed_sqrt_l2
from rep_plugin.functional.kernels import autocast_enabled

Dim = Annotated[int, In("[1, 1048576]")]
LAYOUTS = {"NCHW": 4, "NHWC": 4, "NLC": 3}

# Leaves to torch.fx, like the functions below: their checks on shapes would stop a symbolic trace.
torch.fx.wrap("signed_sqrt_l2")


@torch.fx.wrap
def _pick(feats: Sequence[Tensor], index: int) -> Tensor:
    if not isinstance(feats, (tuple, list)):
        raise ArgumentTypeError(f"bilinear pooling takes a tuple of maps, got {type(feats).__name__}")
    if not -len(feats) <= index < len(feats):
        raise ArgumentError(f"in_index (={index}) is outside of the tuple of {len(feats)} maps")
    return feats[index]


@torch.fx.wrap
def _to_nchw(x: Tensor, layout: str, channels: int) -> Tensor:
    """View a map of any layout as (N, C, H, W), or (N, C, L, 1) where it has no rows and columns."""
    if x.dim() != LAYOUTS[layout]:
        raise ArgumentError(f"a {layout} map has {LAYOUTS[layout]} dimensions, got shape {tuple(x.shape)}")
    if layout == "NHWC":
        x = x.permute(0, 3, 1, 2)
    elif layout == "NLC":
        x = x.transpose(1, 2).unsqueeze(3)
    if not torch.jit.is_tracing() and x.shape[1] != channels:
        raise ArgumentError(f"map has {x.shape[1]} channels, expected in_channels (={channels}), layout {layout}")
    return x


@torch.fx.wrap
def _flatten(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H * W), as a view where channels come last in memory too."""
    if x.is_contiguous():
        return x.flatten(2)
    return x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)


@torch.fx.wrap
def _cast_back(pooled: Tensor, like: Tensor) -> Tensor:
    """A model in half precision goes on in it; under autocast the features stay float32."""
    half = like.dtype in (torch.float16, torch.bfloat16) and not autocast_enabled(like.device)
    return pooled.to(like.dtype) if half else pooled


def _projection(in_channels: int, out_channels: int) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(out_channels))
    layers.add_module("act", nn.ReLU(inplace=True))
    nn.init.kaiming_normal_(layers.conv.weight, mode="fan_out", nonlinearity="relu")
    return layers


@checked
class BilinearPooling(nn.Module):
    """Pool one map with itself, or two maps with each other, into a vector: tuple of maps -> tuple of one (N, D).

    ``out_channels`` is D:

    * ``full``              C1 * C2
    * ``triu``              C (C + 1) / 2: ``full`` without the mirrored half, its norm counting off-diagonals twice
    * ``tensor_sketch``, ``random_maclaurin``  ``dim``; random tables are buffers, drawn from ``seed``
    * ``low_rank``          ``rank``, two learned factors
    * ``isqrt_cov``         C (C + 1) / 2, ``iterations`` Newton-Schulz steps

    A channel that is zero everywhere adds nothing in any method, so that removing it (:meth:`keep_channels_`) changes
    nothing.

    Args:
        in_channels: channels C of the map, or a pair for two streams or two layers (equal N, H, W).
        method: one of the above.
        dim: length of sketches and of Maclaurin features.
        rank: rank of ``low_rank`` (default: the channels).
        iterations: Newton-Schulz steps.
        projection: channels of a 1x1 convolution, BN and ReLU before the pooling (a pair: one each), as wide backbones need
            (Li et al., CVPR 2018, use 256).
        in_index: which map(s) of the tuple (default: the last one, of a pair the last two).
        layout: of the maps: ``NCHW``, ``NHWC`` or ``NLC``.
        normalize: end in the zero-preserving signed square root and L2 norm (default: all but ``isqrt_cov``).
        seed: of the random tables.
        deploy: build what folding a trained symmetric ``full`` head leaves, ``triu``; other forms have nothing to fold.

    Raises:
        ArgumentError: unknown methods and layouts, numbers out of range, a pair where one map is needed; in the forward pass
            maps of another shape.
        ArgumentTypeError: anything but a tuple, in the forward pass.

    Example:
        >>> import torch
        >>> from rep_plugin.bilinear import BilinearPooling
        >>> BilinearPooling(8, "triu")((torch.ones(2, 8, 7, 7),))[0].shape
        torch.Size([2, 36])
    """

    def __init__(
        self,
        in_channels: Channels | Sequence[Channels],
        method: Annotated[str, OneOf(METHODS)] = "full",
        dim: Dim = 8192,
        rank: Count | None = None,
        iterations: Steps = 5,
        projection: Channels | Sequence[Channels] | None = None,
        in_index: int | Sequence[int] | None = None,
        layout: Annotated[str, OneOf(LAYOUTS)] = "NCHW",
        normalize: bool | None = None,
        seed: Seed = 0,
        deploy: bool = False,
    ):
        super().__init__()
        channels = (in_channels,) if isinstance(in_channels, int) else tuple(in_channels)
        if len(channels) not in (1, 2) or min(channels) < 1:
            raise ArgumentError(f"in_channels must be one or two numbers >= 1, got {in_channels}")
        if layout not in LAYOUTS:
            raise ArgumentError(f"unknown layout {layout!r}, expected one of {tuple(LAYOUTS)}")
        if in_index is None:
            in_index = (-2, -1) if len(channels) == 2 else (-1,)
        self.in_index = (in_index,) if isinstance(in_index, int) else tuple(in_index)
        if len(self.in_index) != len(channels):
            raise ArgumentError(f"in_index (={in_index}) must name one map for each of in_channels (={in_channels})")
        self.in_channels = in_channels if isinstance(in_channels, int) else channels
        self.layout = layout

        widths = channels
        if projection is not None:
            widths = (projection,) * len(channels) if isinstance(projection, int) else tuple(projection)
            if len(widths) != len(channels) or min(widths) < 1:
                raise ArgumentError(
                    f"projection (={projection}) must be >= 1, one for each of in_channels (={in_channels})"
                )
            self.projection = _projection(channels[0], widths[0])
            if len(channels) == 2:
                self.projection_second = _projection(channels[1], widths[1])
        second = widths[1] if len(channels) == 2 else None
        self.method = "triu" if deploy and method == "full" and second is None else method
        self.pool = build_pool(self.method, widths[0], second, dim, rank, iterations, seed)
        self.normalize = method != "isqrt_cov" if normalize is None else normalize

    @property
    def symmetric(self) -> bool:
        """Return True where one map is pooled with itself."""
        return len(self.in_index) == 1

    @property
    def out_channels(self) -> int:
        """Return the length D of the pooled vector."""
        return int(self.pool.out_channels)

    def _map(self, feats: Sequence[Tensor], stream: int) -> Tensor:
        channels = self.in_channels if self.symmetric else self.in_channels[stream]
        x = _to_nchw(_pick(feats, self.in_index[stream]), self.layout, channels)
        name = ("projection", "projection_second")[stream]
        if hasattr(self, name):
            x = getattr(self, name)(x)
        return x

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor]:
        x = self._map(feats, 0)
        y = None if self.symmetric else _flatten(self._map(feats, 1))
        pooled = self.pool(_flatten(x), y)
        if self.normalize:
            pooled = signed_sqrt_l2(pooled, self.pool.multiplicity if self.method == "triu" else None)
        return (_cast_back(pooled, x),)

    @torch.no_grad()
    def keep_channels_(self, keep: Sequence[int], keep_second: Sequence[int] | None = None) -> Tensor:
        """Go on with these channels of the map(s) alone, in place. Where there is a projection, its inputs go and D stays.

        Args:
            keep: ascending indices of the first map.
            keep_second: of the second map; None: all.

        Returns:
            Which of the D outputs stay, for the classifier.

        Raises:
            ArgumentError: no or unknown indices.
        """
        old = (self.in_channels,) if self.symmetric else self.in_channels
        kept = []
        for channels, wanted in zip(old, (keep, keep_second)):
            index = torch.arange(channels) if wanted is None else torch.as_tensor(wanted, dtype=torch.long)
            if not len(index) or index.min() < 0 or index.max() >= channels or (index.diff() <= 0).any():
                raise ArgumentError(f"channels to keep must ascend within 0..{channels - 1}, got {index.tolist()}")
            kept.append(index)
        self.in_channels = len(kept[0]) if self.symmetric else tuple(len(index) for index in kept)
        if not hasattr(self, "projection"):
            device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
            return self.pool.keep_(kept[0].to(device), kept[-1].to(device))
        for index, name in zip(kept, ("projection", "projection_second")):
            conv = getattr(self, name).conv
            conv.weight.data = conv.weight.data[:, index.to(conv.weight.device)]
            conv.weight.grad, conv.in_channels = None, len(index)
        return torch.arange(self.out_channels)

    @torch.no_grad()
    def fold_to_triangle_(self, classifier: nn.Linear) -> None:
        """Fold this full symmetric pooling and the linear layer on it to the upper triangle, without loss, in place.

        Not ``switch_to_deploy``: converters call that on every module alone, and a pooling must not change without its
        classifier.

        Raises:
            ArgumentError: the pooling is of another kind, or the layer does not fit.
        """
        if self.method != "full" or not self.symmetric:
            kind = self.method if self.symmetric else f"two-stream {self.method}"
            raise ArgumentError(f"only a symmetric 'full' pooling folds to its triangle, got {kind!r}")
        weight = fold_to_triangle(classifier.weight, self.pool.channels2)
        classifier.weight = nn.Parameter(weight, requires_grad=classifier.weight.requires_grad)
        classifier.in_features = weight.shape[1]
        self.pool = Triangle(self.pool.channels2, None).to(weight.device, weight.dtype).train(self.training)
        self.method = "triu"

    def extra_repr(self) -> str:
        return f"{self.in_channels}, method={self.method!r}, out_channels={self.out_channels}, layout={self.layout!r}"
