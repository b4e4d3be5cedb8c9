"""Every pooling against a plain float64 reference; gradients, triangle algebra, hashes, half precision."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from rep_plugin import functional
from rep_plugin.functional import bilinear as B

N, C1, C2, POSITIONS, DIM = 3, 7, 5, 12, 11


def random_map(channels=C1, positions=POSITIONS, **options):
    """Signed values with mean off zero, so that Gram entries of both signs and sizes occur."""
    return torch.randn(N, channels, positions, dtype=torch.float64, **options) * 2 + 0.3


def reference_normalize(z):
    root = torch.sqrt(z.clamp(min=0) + 1e-5) - torch.sqrt((-z).clamp(min=0) + 1e-5)
    return root / root.norm(dim=1, keepdim=True)


def tables(channels1=C1, channels2=C2, dim=DIM):
    generator = torch.Generator().manual_seed(3)
    hashes = [torch.randint(dim, (c,), generator=generator) for c in (channels1, channels2)]
    signs = [B.draw_signs((c,), generator).double() for c in (channels1, channels2)]
    return *hashes, *signs


def fft_sketch(x, y, h1, h2, s1, s2, dim):
    """Gao et al.: count sketches of every position, circular convolution by FFT, mean over positions."""

    def count_sketch(z, h, s):
        out = z.new_zeros(z.shape[0], z.shape[2], dim)
        for c in range(z.shape[1]):
            out[:, :, h[c]] += s[c] * z[:, c]
        return out

    product = torch.fft.fft(count_sketch(x, h1, s1)) * torch.fft.fft(count_sketch(y, h2, s2))
    return torch.fft.ifft(product).real.mean(1)


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert expected.abs().max() > 1e-3
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("needs_grad", [True, False])
def test_gram_equals_einsum(needs_grad):
    x, y = random_map().requires_grad_(needs_grad), random_map(C2)
    assert_same(B.gram(x), torch.einsum("nil,njl->nij", x, x) / POSITIONS)
    assert_same(B.gram(x, y), torch.einsum("nil,njl->nij", x, y) / POSITIONS)


def test_gram_takes_maps_whose_channels_come_last_in_memory():
    x = random_map().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not x.is_contiguous()
    B.gram(x).square().sum().backward()
    same = x.detach().contiguous().requires_grad_()
    (torch.einsum("nil,njl->nij", same, same) / POSITIONS).square().sum().backward()
    assert_same(x.grad, same.grad)


def test_gradient_of_the_symmetric_gram_is_that_of_einsum():
    x = random_map().requires_grad_()
    upstream = torch.randn(N, C1, C1, dtype=torch.float64)  # not symmetric, as a trained head's
    expected = torch.autograd.grad(torch.einsum("nil,njl->nij", x, x) / POSITIONS, x, upstream)[0]
    assert_same(torch.autograd.grad(B.gram(x), x, upstream)[0], expected)


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_signed_sqrt_l2_equals_its_formula(needs_grad, weighted):
    z = torch.randn(N, 9, dtype=torch.float64).pow(3).requires_grad_(needs_grad)
    weight = torch.rand(9, dtype=torch.float64) + 0.5 if weighted else torch.ones(9, dtype=torch.float64)
    root = torch.sqrt(z.clamp(min=0) + 1e-5) - torch.sqrt((-z).clamp(min=0) + 1e-5)
    expected = root / (weight * root**2).sum(1, keepdim=True).sqrt()
    assert_same(B.signed_sqrt_l2(z, weight if weighted else None), expected, 1e-12)


def test_signed_sqrt_keeps_zero_and_bounds_its_gradient():
    z = torch.tensor([[0.0, 1e-12, -1e-7, 0.5]], dtype=torch.float64, requires_grad=True)
    out = B.signed_sqrt_l2(z)
    assert out[0, 0] == 0
    assert B.signed_sqrt(z)[0, 0] == 0
    norm = B.signed_sqrt(z).norm().item()
    for column in range(3):
        grad = torch.autograd.grad(out[0, column], z, retain_graph=True)[0]
        # The norm hardly depends on tiny entries: the slope is that of the root alone.
        assert grad[0, column].item() * norm == pytest.approx(1 / (2 * math.sqrt(1e-5)), rel=1e-2)


def test_a_map_of_zeros_gives_zeros_and_a_zero_gradient():
    x = torch.zeros(N, C1, POSITIONS, requires_grad=True)
    out = B.signed_sqrt_l2(B.gram(x).flatten(1))
    out.sum().backward()
    assert out.abs().max() == 0
    assert x.grad.abs().max() == 0
    matrix = B.newton_schulz_sqrt(B.covariance(x))
    assert matrix.abs().max() == 0
    grad = torch.autograd.grad(matrix.sum(), x)[0]
    assert torch.isfinite(grad).all()


def test_a_row_of_zeros_has_no_gradient_and_leaves_the_others_alone():
    z = torch.randn(3, 5, dtype=torch.float64)
    z[1] = 0
    z.requires_grad_()
    upstream = torch.randn(3, 5, dtype=torch.float64)
    grad = torch.autograd.grad(B.signed_sqrt_l2(z), z, upstream)[0]
    assert grad[1].abs().max() == 0
    assert_same(grad[::2], torch.autograd.grad(reference_normalize(z[::2]), z, upstream[::2])[0][::2])


def test_tensor_sketch_equals_the_fft_form():
    x, y, hashes = random_map(), random_map(C2), tables()
    assert_same(B.tensor_sketch(B.gram(x, y), *hashes, DIM), fft_sketch(x, y, *hashes, DIM))
    hashes = tables(C1, C1)
    assert_same(B.tensor_sketch(B.gram(x), *hashes, DIM), fft_sketch(x, x, *hashes, DIM))


def test_tensor_sketch_is_unbiased_for_the_kernel():
    """<sketch(G), sketch(H)> averages to <G, H> over hashes: the property that makes it a pooling."""
    g, h = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    estimates = []
    for seed in range(4000):
        generator = torch.Generator().manual_seed(seed)
        hashes = [torch.randint(16, (4,), generator=generator) for _ in range(2)]
        signs = [B.draw_signs((4,), generator).double() for _ in range(2)]
        a, b = B.tensor_sketch(torch.cat([g, h]), *hashes, *signs, 16)
        estimates.append(a @ b)
    estimates = torch.stack(estimates)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - (g * h).sum()) < 4 * error
    assert estimates.std() > 0


@pytest.mark.parametrize("positions", [3, 12])  # fewer and more positions than channels: both routes
def test_random_maclaurin_equals_its_sum_over_positions(positions):
    x, y = random_map(positions=positions), random_map(C2, positions)
    generator = torch.Generator().manual_seed(1)
    w1, w2 = B.draw_signs((DIM, C1), generator).double(), B.draw_signs((DIM, C2), generator).double()
    expected = torch.einsum("dc,ncl,de,nel->nd", w1, x, w2, y) / positions / math.sqrt(DIM)
    assert_same(B.random_maclaurin(x, y, w1, w2), expected)
    w3 = B.draw_signs((DIM, C1), generator).double()
    expected = torch.einsum("dc,ncl,de,nel->nd", w1, x, w3, x) / positions / math.sqrt(DIM)
    assert_same(B.random_maclaurin(x, None, w1, w3), expected)


def test_low_rank_equals_einsum():
    x, y = random_map(), random_map(C2)
    u, v = torch.randn(C1, 4, dtype=torch.float64), torch.randn(C2, 4, dtype=torch.float64)
    assert_same(B.low_rank(x, y, u, v), torch.einsum("cr,ncl,er,nel->nr", u, x, v, y) / POSITIONS)
    w = torch.randn(C1, 4, dtype=torch.float64)
    assert_same(B.low_rank(x, None, u, w), torch.einsum("cr,ncl,er,nel->nr", u, x, w, x) / POSITIONS)


def newton_schulz_reference(matrix, steps):
    """Textbook coupled iteration on one matrix, every product written out."""
    trace = torch.trace(matrix)
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    y, z = matrix / trace, identity
    for _ in range(steps):
        y, z = 0.5 * y @ (3 * identity - z @ y), 0.5 * (3 * identity - z @ y) @ z
    return y * trace.sqrt()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_newton_schulz_equals_its_own_steps(steps):
    x = random_map()
    centred = x - x.mean(2, keepdim=True)
    cov = torch.einsum("nil,njl->nij", centred, centred) / POSITIONS
    assert_same(B.covariance(x), cov)
    assert_same(B.newton_schulz_sqrt(cov, steps), torch.stack([newton_schulz_reference(m, steps) for m in cov]))


def test_isqrt_cov_tends_to_the_eigendecomposition():
    x = random_map(4, 200)
    values, vectors = torch.linalg.eigh(B.covariance(x))
    exact = vectors @ torch.diag_embed(values.sqrt()) @ vectors.transpose(1, 2)
    index = B.triangle_index(4)
    assert_same(B.isqrt_cov(x, index, 30), exact.flatten(1)[:, index])
    five = (B.isqrt_cov(x, index) - exact.flatten(1)[:, index]).abs().max()
    assert 1e-9 < five < 0.05 * exact.abs().max()


def pooled(name, x, y=None):
    """Each pooling as a function of its maps alone, followed by the normalisation it is used with."""
    other = C1 if y is None else C2
    generator = torch.Generator().manual_seed(5)
    if name == "full":
        return B.signed_sqrt_l2(B.gram(x, y).flatten(1))
    if name == "triu":
        return B.signed_sqrt_l2(B.take_triangle(B.gram(x), B.triangle_index(C1)), B.triangle_multiplicity(C1))
    if name == "tensor_sketch":
        return B.signed_sqrt_l2(B.tensor_sketch(B.gram(x, y), *tables(C1, other), DIM))
    if name == "random_maclaurin":
        w1, w2 = B.draw_signs((DIM, C1), generator), B.draw_signs((DIM, other), generator)
        return B.signed_sqrt_l2(B.random_maclaurin(x, y, w1, w2))
    if name == "low_rank":
        u, v = torch.randn(C1, 4, generator=generator), torch.randn(other, 4, generator=generator)
        return B.signed_sqrt_l2(B.low_rank(x, y, u.to(x.dtype), v.to(x.dtype)))
    return B.isqrt_cov(x, B.triangle_index(C1))


ONE_MAP = ["full", "triu", "tensor_sketch", "random_maclaurin", "low_rank", "isqrt_cov"]
TWO_MAPS = ["full", "tensor_sketch", "random_maclaurin", "low_rank"]


@pytest.mark.parametrize("name", ONE_MAP)
def test_gradients_of_one_map(name):
    x = random_map(positions=9)[:2].contiguous().requires_grad_()
    assert gradcheck(lambda z: pooled(name, z), x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", TWO_MAPS)
def test_gradients_of_two_maps(name):
    x = random_map(positions=4)[:2].contiguous().requires_grad_()
    y = random_map(C2, 4)[:2].contiguous().requires_grad_()
    assert gradcheck(lambda a, b: pooled(name, a, b), (x, y), atol=1e-6, rtol=1e-5)


def test_gradients_of_the_learned_factors():
    x, y = random_map(), random_map(C2)
    factors = [torch.randn(c, 3, dtype=torch.float64, requires_grad=True) for c in (C1, C2)]
    assert gradcheck(lambda u, v: B.low_rank(x, y, u, v), factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ONE_MAP)
def test_half_precision_survives_activations_of_100(name, dtype):
    """28 x 28 positions of magnitude 100: their sum of products is 7.8e6, where float16 ends at 65504."""
    x = (torch.rand(2, C1, 784) * 20 + 90).to(dtype).requires_grad_()
    assert not torch.isfinite(torch.einsum("nil,njl->nij", x, x)).all() or dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=dtype):
        out = pooled(name, x)
    out.sum().backward()
    assert out.dtype is torch.float32
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
    exact = pooled(name, x.detach().double())
    assert (out - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("name", ["full", "triu"])
def test_backward_under_autocast_stays_in_float32(name):
    x = (torch.rand(2, C1, 784) * 100).requires_grad_()
    out = pooled(name, x)
    upstream = torch.randn_like(out)
    exact = torch.autograd.grad(out, x, upstream)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(pooled(name, x), x, upstream)[0]
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()  # bfloat16 would be off by 1e-2


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_triangle_offsets_list_the_triangle_row_by_row(channels):
    pairs = [(i, j) for i in range(channels) for j in range(i, channels)]
    assert [B.triangle_offset(i, j, channels) for i, j in pairs] == list(range(B.triangle_size(channels)))
    assert B.triangle_index(channels).tolist() == [i * channels + j for i, j in pairs]
    assert B.triangle_multiplicity(channels).tolist() == [1 if i == j else 2 for i, j in pairs]


def test_triangle_fold_is_lossless():
    x, classes = random_map(), 6
    weight = torch.randn(classes, C1 * C1, dtype=torch.float64)
    full = reference_normalize((torch.einsum("nil,njl->nij", x, x) / POSITIONS).flatten(1)) @ weight.t()
    folded = B.fold_to_triangle(weight, C1)
    assert folded.shape == (classes, C1 * (C1 + 1) // 2)
    assert_same(pooled("triu", x) @ folded.t(), full, 1e-12)


def test_kept_columns_are_those_of_the_smaller_map():
    x, y = random_map(), random_map(C2)
    keep1, keep2 = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4])
    small = B.gram(x[:, keep1], y[:, keep2]).flatten(1)
    assert_same(B.gram(x, y).flatten(1)[:, B.full_columns(keep1, keep2, C2)], small, 1e-14)
    small = B.take_triangle(B.gram(x[:, keep1]), B.triangle_index(4))
    large = B.take_triangle(B.gram(x), B.triangle_index(C1))
    assert_same(large[:, B.triangle_columns(keep1, C1)], small, 1e-14)


def test_a_second_derivative_is_refused_not_wrong():
    x = random_map().requires_grad_()
    grad = torch.autograd.grad(pooled("full", x).square().sum() + x.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: B.gram(torch.zeros(2, 3)), r"\(2, 3\)"),
        (lambda: B.gram(torch.zeros(2, 3, 0)), r"\(2, 3, 0\)"),
        (lambda: B.gram(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), r"\(2, 3, 4\) and \(2, 3, 5\)"),
        (lambda: B.gram(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)), r"\(2, 3, 4\) and \(1, 3, 4\)"),
        (lambda: functional.tensor_sketch(torch.zeros(1, 2, 2), *tables(2, 2), 0), "got 0"),
        (lambda: functional.newton_schulz_sqrt(torch.eye(2)[None], 0), "got 0"),
        (lambda: B.fold_to_triangle(torch.zeros(4, 10), 3), r"9 columns, got weight \(4, 10\)"),
        (lambda: B.triangle_offset(2, 1, 4), r"\(2, 1\)"),
    ],
)
def test_bad_input_is_refused_with_its_numbers(call, numbers):
    with pytest.raises(ValueError, match=numbers):
        call()
