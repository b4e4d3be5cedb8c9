"""Bilinear (second-order) pooling and its compact forms, as pure tensor functions.

A map is ``x`` (N, C, L): N images, C channels, L = H * W positions. Everything runs in float32 (float64 stays float64)
with autocast off, and returns that type: sums of products over positions leave the range of half precision. Maps are
scaled by ``1 / sqrt(L)`` before they are multiplied, so that a Gram matrix is a mean over positions.

Sources: Lin et al., "Bilinear CNN Models" (ICCV 2015); Gao et al., "Compact Bilinear Pooling" (CVPR 2016); Kim et al.,
"Hadamard Product for Low-rank Bilinear Pooling" (ICLR 2017); Li et al., "Towards Faster Training of Global Covariance
Pooling Networks by Iterative Matrix Square Root Normalization" (CVPR 2018). The sketch from the Gram matrix, the
zero-preserving signed square root and the fold of a head to the triangle are derived here.
"""

import functools
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rep_plugin.arguments import Channels, Dims, In, Positive, That
from rep_plugin.errors import ArgumentError
from rep_plugin.functional.kernels import plain_ops, without_autocast

SQRT_EPS = 1e-5  # bounds the gradient of the signed square root by 1 / (2 sqrt(eps)) = 158
NORM_EPS = 1e-12  # torch.nn.functional.normalize's own
_HALF = (torch.float16, torch.bfloat16)

Map = Annotated[Tensor, Dims("(N, C, L)")]
SecondMap = Annotated[Tensor, Dims("(N, C2, L)")]
Square = Annotated[Tensor, Dims("(N, C, C)")]
Rows = Annotated[Tensor, Dims("(N, D)")]
Floats = Annotated[Tensor, That(torch.is_floating_point, "a float tensor")]
Steps = Annotated[int, In("[1, 100]")]
Signs = Annotated[Tensor, Dims("(C,)")]
SecondSigns = Annotated[Tensor, Dims("(C2,)")]


def full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function to run with autocast off and its half-precision arguments as float32."""

    @functools.wraps(function)
    def run(*args, **kwargs) -> Tensor:
        args = [a.float() if isinstance(a, Tensor) and a.dtype in _HALF else a for a in args]
        kwargs = {k: a.float() if isinstance(a, Tensor) and a.dtype in _HALF else a for k, a in kwargs.items()}
        with without_autocast(args[0].device):
            return function(*args, **kwargs)

    return run


def check_maps(x: Tensor, y: Tensor | None = None, channels: int | None = None) -> Tensor:
    """Raise ArgumentError unless maps are (N, C, L) of equal N and L, L >= 1.

    Args:
        x: map.
        y: second map, where there is one.
        channels: of the second map, where they are known.

    Returns:
        The second map, which may be the first.
    """
    for z in (x,) if y is None else (x, y):
        if z.dim() != 3 or z.shape[2] < 1:
            raise ArgumentError(f"a map must be (N, C, L) with at least one position, got shape {tuple(z.shape)}")
    if y is not None and (x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]):
        raise ArgumentError(
            f"both streams must have the same batch and positions, got {tuple(x.shape)} and {tuple(y.shape)} (N, C, L)"
        )
    second = x if y is None else y
    if channels not in (None, second.shape[1]):
        raise ArgumentError(f"y must be a map (N, C, L) of C = {channels}, got shape {tuple(second.shape)}")
    if second.dtype != x.dtype:
        raise ArgumentError(f"y must be of the type of x, {x.dtype}, got {second.dtype}")
    return second


class _SymmetricGram(torch.autograd.Function):
    """``x x^T / L``. The backward pass is one product, autograd's own takes two and adds them."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scaled = x * x.shape[2] ** -0.5
        ctx.save_for_backward(scaled)
        return torch.bmm(scaled, scaled.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        with without_autocast(grad.device):
            return torch.bmm(grad + grad.transpose(1, 2), scaled).mul_(scaled.shape[2] ** -0.5)


@full_precision
def gram(x: Map, y: SecondMap | None = None) -> Tensor:
    """Return the mean over positions of the outer products.

    Args:
        x: map (N, C1, L).
        y: map (N, C2, L) (default: ``x``).

    Returns:
        (N, C1, C2).

    Raises:
        ArgumentError: maps of other shapes.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import gram
        >>> gram(torch.ones(2, 3, 16), torch.ones(2, 5, 16)).shape
        torch.Size([2, 3, 5])
    """
    check_maps(x, y)
    if y is None and not plain_ops() and x.requires_grad:
        return _SymmetricGram.apply(x)
    scale = x.shape[2] ** -0.5
    first = x * scale
    second = first if y is None else y * scale
    return torch.bmm(first, second.transpose(1, 2))


@full_precision
def signed_sqrt(z: Floats, eps: Positive = SQRT_EPS) -> Tensor:
    """Return ``sqrt(relu(z) + eps) - sqrt(relu(-z) + eps)``: odd, and exactly 0 at 0, so that dead channels stay dead.

    Args:
        z: tensor of any shape.
        eps: bounds the gradient by ``1 / (2 sqrt(eps))``.

    Returns:
        Tensor of the same shape.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import signed_sqrt
        >>> signed_sqrt(torch.tensor([-4.0, 0.0, 4.0])).round().tolist()
        [-2.0, 0.0, 2.0]
    """
    return torch.sqrt(torch.relu(z) + eps) - torch.sqrt(torch.relu(-z) + eps)


def _norm(y: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(NORM_EPS)
    return (y * y * weight).sum(1, keepdim=True).sqrt().clamp_min(NORM_EPS)


class _SignedSqrtL2(torch.autograd.Function):
    """Signed square root and L2 in few passes over memory; only the output and one norm a row are kept.

    The derivative at 0 is the true one, 1 / (2 sqrt(eps)); autograd of the two ReLUs would say 0 there.
    """

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor | None) -> Tensor:
        y = z.abs().add_(SQRT_EPS).sqrt_().sub_(SQRT_EPS**0.5).copysign_(z)
        norm = _norm(y, weight)
        y.div_(norm)
        ctx.save_for_backward(y, norm, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, norm, weight = ctx.saved_tensors
        with without_autocast(grad.device):
            along = torch.linalg.vecdot(y, grad, dim=1).unsqueeze(1)
        out = torch.addcmul(grad, y if weight is None else y * weight, along, value=-1)
        slope = (y.abs() * (2 * norm * norm)).add_(2 * norm * SQRT_EPS**0.5)
        # A row of zeros has no direction: its gradient is 0, not 1e14.
        return out.div_(slope).mul_(norm > NORM_EPS), None


@full_precision
def signed_sqrt_l2(z: Rows, weight: Annotated[Tensor, Dims("(D,)")] | None = None) -> Tensor:
    """Return the signed square root, every row divided by its L2 norm; rows of zeros stay zeros. Differentiable once.

    Args:
        z: rows (N, D).
        weight: how often the norm counts each entry, (D,) (a triangle: off-diagonals twice).

    Returns:
        (N, D).

    Example:
        >>> import torch
        >>> from rep_plugin.functional import signed_sqrt_l2
        >>> signed_sqrt_l2(torch.eye(2)).round().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if weight is not None:
        weight = weight.to(z.dtype)
    if not plain_ops() and z.requires_grad:
        return _SignedSqrtL2.apply(z, weight)
    y = signed_sqrt(z)
    return y / _norm(y, weight)


# --- the upper triangle of a symmetric matrix, row by row ---


def triangle_size(channels: Channels) -> int:
    """Return the number of entries on and above the diagonal.

    Example:
        >>> from rep_plugin.functional import triangle_size
        >>> triangle_size(4)
        10
    """
    return channels * (channels + 1) // 2


def triangle_offset(i: int, j: int, channels: Channels) -> int:
    """Return the place of an entry in the flattened triangle.

    Args:
        i, j: row and column, i <= j.
        channels: rows and columns of the matrix.

    Returns:
        Index, from 0.

    Raises:
        ArgumentError: an entry outside of the triangle.

    Example:
        >>> from rep_plugin.functional import triangle_offset
        >>> [triangle_offset(i, j, 3) for i in range(3) for j in range(i, 3)]
        [0, 1, 2, 3, 4, 5]
    """
    if not 0 <= i <= j < channels:
        raise ArgumentError(f"entry ({i}, {j}) is not in the upper triangle of {channels} channels")
    return i * channels - i * (i - 1) // 2 + (j - i)


def triangle_index(channels: Channels, device: torch.device | str | None = None) -> Tensor:
    """Return the places i * C + j of the triangle's entries in the flattened C x C matrix.

    Args:
        channels: rows and columns C of the matrix.
        device: device of the result.

    Returns:
        (C (C + 1) / 2,), int64.

    Example:
        >>> from rep_plugin.functional import triangle_index
        >>> triangle_index(3).tolist()
        [0, 1, 2, 4, 5, 8]
    """
    rows, cols = torch.triu_indices(channels, channels, device=device)
    return rows * channels + cols


def triangle_multiplicity(channels: Channels, device: torch.device | str | None = None) -> Tensor:
    """Return how often the full matrix holds each entry of the triangle: 1 on the diagonal, else 2.

    Args:
        channels: rows and columns C of the matrix.
        device: device of the result.

    Returns:
        (C (C + 1) / 2,).

    Example:
        >>> from rep_plugin.functional import triangle_multiplicity
        >>> triangle_multiplicity(2).tolist()
        [1.0, 2.0, 1.0]
    """
    rows, cols = torch.triu_indices(channels, channels, device=device)
    return 2.0 - (rows == cols).to(torch.get_default_dtype())


@full_precision
def take_triangle(matrix: Square, index: Annotated[Tensor, Dims("(K,)", below="C C")]) -> Tensor:
    """Return the upper triangles, flattened.

    Args:
        matrix: (N, C, C).
        index: from :func:`triangle_index`.

    Returns:
        (N, C (C + 1) / 2).

    Example:
        >>> import torch
        >>> from rep_plugin.functional import take_triangle, triangle_index
        >>> take_triangle(torch.arange(4.0).view(1, 2, 2), triangle_index(2)).tolist()
        [[0.0, 1.0, 3.0]]
    """
    return matrix.flatten(1).index_select(1, index)


def fold_to_triangle(weight: Rows, channels: Channels) -> Tensor:
    """Fold the weight of a linear layer on full symmetric features, without loss.

    ``W'_ij = W_ij + W_ji`` for i < j; the diagonal and the layer's bias stay. The features' norm must go on counting
    off-diagonals twice (:func:`triangle_multiplicity`).

    Args:
        weight: (K, C * C).
        channels: C.

    Returns:
        (K, C (C + 1) / 2).

    Raises:
        ArgumentError: the columns are not C * C.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import fold_to_triangle
        >>> fold_to_triangle(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2).tolist()
        [[1.0, 5.0, 4.0]]
    """
    if weight.dim() != 2 or weight.shape[1] != channels * channels:
        raise ArgumentError(
            f"a full head on {channels} channels has {channels * channels} columns, got weight {tuple(weight.shape)}"
        )
    rows, cols = torch.triu_indices(channels, channels, device=weight.device)
    folded = weight[:, rows * channels + cols]
    mirrored = weight[:, cols * channels + rows]
    return torch.where(rows == cols, folded, folded + mirrored)


def full_columns(
    keep1: Annotated[Tensor, Dims("(K1,)", below="")],
    keep2: Annotated[Tensor, Dims("(K2,)", below="channels2")],
    channels2: Channels,
) -> Tensor:
    """Return the columns of a full head that stay where channels stay.

    Args:
        keep1, keep2: kept channels of the first and of the second map.
        channels2: channels of the second map before.

    Returns:
        (K1 * K2,), int64, for K1 and K2 kept channels.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import full_columns
        >>> full_columns(torch.tensor([1]), torch.tensor([0, 2]), 3).tolist()
        [3, 5]
    """
    return (keep1[:, None] * channels2 + keep2).reshape(-1)


def triangle_columns(keep: Annotated[Tensor, Dims("(K,)", below="channels")], channels: Channels) -> Tensor:
    """Return the columns of a triangle head that stay where channels stay.

    Args:
        keep: kept channels, ascending.
        channels: channels before.

    Returns:
        (K (K + 1) / 2,), int64, for K kept channels.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import triangle_columns
        >>> triangle_columns(torch.tensor([0, 2]), 3).tolist()
        [0, 2, 5]
    """
    rows, cols = (keep[part] for part in torch.triu_indices(len(keep), len(keep), device=keep.device))
    return rows * channels - rows * (rows - 1) // 2 + cols - rows


# --- compact forms ---


def draw_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random +1 and -1, as floats.

    Args:
        shape: shape of the result.
        generator: where they are drawn from.

    Returns:
        Tensor of this shape, in the default type.
    """
    return torch.randint(2, shape, generator=generator).to(torch.get_default_dtype()) * 2 - 1


@full_precision
def tensor_sketch(
    matrix: Annotated[Tensor, Dims("(N, C, C2)")],
    hash1: Annotated[Tensor, Dims("(C,)", below="")],
    hash2: Annotated[Tensor, Dims("(C2,)", below="")],
    sign1: Signs,
    sign2: SecondSigns,
    dim: Channels,
) -> Tensor:
    """Return sketches of Gram matrices: ``out[(h1_i + h2_j) mod dim] += s1_i s2_j G_ij``.

    Equal to the mean over positions of Tensor Sketches (Gao et al., algorithm 2) since pooling is linear, without their FFT
    and without a map of ``dim`` channels.

    Args:
        matrix: Gram matrices (N, C1, C2).
        hash1, hash2: (C1,) and (C2,), int64 in 0..dim-1.
        sign1, sign2: (C1,) and (C2,), +1 or -1.
        dim: length of a sketch.

    Returns:
        (N, dim).

    Raises:
        ArgumentError: dim < 1.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import tensor_sketch
        >>> hashes, signs = torch.tensor([0, 1]), torch.ones(2)
        >>> tensor_sketch(torch.ones(1, 2, 2), hashes, hashes, signs, signs, 3).tolist()
        [[1.0, 2.0, 1.0]]
    """
    place = (hash1[:, None] + hash2).remainder(dim).flatten()
    values = (matrix * (sign1[:, None] * sign2).to(matrix.dtype)).flatten(1)
    return values.new_zeros(values.shape[0], dim).scatter_add(1, place.expand(values.shape[0], -1), values)


@full_precision
def random_maclaurin(
    x: Map, y: SecondMap | None, signs1: Annotated[Tensor, Dims("(D, C)")], signs2: Annotated[Tensor, Dims("(D, C2)")]
) -> Tensor:
    """Return random Maclaurin features ``mean_l (W1 x_l) * (W2 y_l) / sqrt(D)`` (Gao et al., algorithm 1).

    Computed through the Gram matrix or the positions, whichever is the smaller; both are exact.

    Args:
        x: map (N, C1, L).
        y: map (N, C2, L); None: ``x``.
        signs1, signs2: W1 (D, C1) and W2 (D, C2), +1 or -1.

    Returns:
        (N, D).

    Raises:
        ArgumentError: maps of other shapes.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import random_maclaurin
        >>> random_maclaurin(torch.ones(1, 2, 9), None, torch.ones(4, 2), torch.ones(4, 2)).tolist()
        [[2.0, 2.0, 2.0, 2.0]]
    """
    second = check_maps(x, y, signs2.shape[1])
    signs1, signs2 = signs1.to(x.dtype), signs2.to(x.dtype)
    if second.shape[1] <= x.shape[2]:
        pooled = ((signs1 @ gram(x, y)) * signs2).sum(2)
    else:
        scale = x.shape[2] ** -0.5
        pooled = ((signs1 @ (x * scale)) * (signs2 @ (second * scale))).sum(2)
    return pooled * signs1.shape[0] ** -0.5


@full_precision
def low_rank(
    x: Map, y: SecondMap | None, factor1: Annotated[Tensor, Dims("(C, R)")], factor2: Annotated[Tensor, Dims("(C2, R)")]
) -> Tensor:
    """Return low-rank bilinear pooling ``mean_l (U^T x_l) * (V^T y_l)``: Kim et al., equation 4, without its P.

    The factors are learned; the classifier that follows is P. So every class is a bilinear form of rank <= R.

    Args:
        x: map (N, C1, L).
        y: map (N, C2, L); None: ``x``.
        factor1, factor2: U (C1, R) and V (C2, R).

    Returns:
        (N, R).

    Raises:
        ArgumentError: maps of other shapes.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import low_rank
        >>> low_rank(torch.ones(1, 4, 9), None, torch.ones(4, 2), torch.ones(4, 2)).round().tolist()
        [[16.0, 16.0]]
    """
    second = check_maps(x, y, len(factor2))
    scale, factor1, factor2 = x.shape[2] ** -0.5, factor1.to(x.dtype), factor2.to(x.dtype)
    return ((factor1.t() @ (x * scale)) * (factor2.t() @ (second * scale))).sum(2)


# --- matrix square root ---


@full_precision
def covariance(x: Map) -> Tensor:
    """Return the covariance over positions, divided by L.

    Args:
        x: map (N, C, L).

    Returns:
        (N, C, C).

    Raises:
        ArgumentError: a map of another shape.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import covariance
        >>> covariance(torch.ones(1, 2, 9)).tolist()
        [[[0.0, 0.0], [0.0, 0.0]]]
    """
    check_maps(x)
    return gram(x - x.mean(2, keepdim=True))


@full_precision
def newton_schulz_sqrt(matrix: Square, iterations: Steps = 5) -> Tensor:
    """Return approximate square roots of symmetric positive matrices, by coupled Newton-Schulz steps.

    Divides by the trace first and multiplies by its root after (Li et al., section 3.2). A zero matrix gives zeros.

    Args:
        matrix: (N, C, C).
        iterations: number of steps, >= 1.

    Returns:
        (N, C, C).

    Raises:
        ArgumentError: iterations < 1.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import newton_schulz_sqrt
        >>> newton_schulz_sqrt(4 * torch.eye(2)[None], 10).round().tolist()
        [[[2.0, 0.0], [0.0, 2.0]]]
    """
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1).clamp_min(NORM_EPS).view(-1, 1, 1)
    three = 3 * torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    y = matrix / trace
    z = None  # the identity: its products are left out
    for step in range(iterations):
        half = 0.5 * (three - (y if z is None else torch.bmm(z, y)))
        y = torch.bmm(y, half)
        if step < iterations - 1:  # the last z is not read
            z = half if z is None else torch.bmm(half, z)
    return y * trace.sqrt()


@full_precision
def isqrt_cov(x: Map, index: Annotated[Tensor, Dims("(K,)", below="C C")], iterations: Steps = 5) -> Tensor:
    """Return iSQRT-COV: the triangle of the square root of the covariance.

    Args:
        x: map (N, C, L).
        index: from :func:`triangle_index`.
        iterations: Newton-Schulz steps, >= 1.

    Returns:
        (N, C (C + 1) / 2).

    Raises:
        ArgumentError: a map of another shape or of a single position, or iterations < 1.

    Example:
        >>> import torch
        >>> from rep_plugin.functional import isqrt_cov, triangle_index
        >>> isqrt_cov(torch.ones(2, 3, 9), triangle_index(3)).shape
        torch.Size([2, 6])
    """
    if x.shape[-1] < 2:
        raise ArgumentError(
            f"x must have more than one position, got {tuple(x.shape)}: the covariance of one is zero, whatever the image; "
            "take larger images or an earlier map"
        )
    return take_triangle(newton_schulz_sqrt(covariance(x), iterations), index)
