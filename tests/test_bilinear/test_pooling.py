"""The pooling module: layouts, streams, masked equals removed, buffers, ONNX, half precision, refusals."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from rep_plugin.bilinear.methods import METHODS
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.functional import bilinear as B

C, C2, DIM, RANK = 10, 6, 13, 4
TWO_MAPS = ("full", "tensor_sketch", "random_maclaurin", "low_rank")
SHAPES = {"full": C * C, "triu": 55, "tensor_sketch": DIM, "random_maclaurin": DIM, "low_rank": RANK, "isqrt_cov": 55}
EXACT = 1e-12


def build(method, in_channels=C, **options):
    return BilinearPooling(in_channels, method, dim=DIM, rank=RANK, **options).double().eval()


def maps(channels=C, side=5, batch=3):
    return torch.randn(batch, channels, side, side, dtype=torch.float64).relu()


def difference(a, b):
    assert a.shape == b.shape and torch.isfinite(a).all() and b.abs().max() > 1e-3
    return (a - b).abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_a_tuple_goes_in_and_a_tuple_of_one_vector_comes_out(method):
    neck, x = build(method), maps()
    out = neck((maps(4), x))
    assert isinstance(out, tuple) and len(out) == 1
    assert out[0].shape == (3, neck.out_channels) == (3, SHAPES[method])
    assert torch.equal(neck([x])[0], out[0])  # the last map counts
    assert difference(neck((maps(),))[0] + 1, out[0] + 1) > 1e-3


def test_normalised_features_have_norm_one():
    x = maps()
    full, triangle = build("full")((x,))[0], build("triu")((x,))[0]
    assert torch.allclose(full.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert difference(full[:, B.triangle_index(C)], triangle) < EXACT
    raw = build("full", normalize=False)((x,))[0]
    assert difference(raw, B.gram(x.flatten(2)).flatten(1)) < EXACT
    assert difference(build("isqrt_cov")((x,))[0], B.isqrt_cov(x.flatten(2), B.triangle_index(C))) < EXACT


@pytest.mark.parametrize("method", METHODS)
def test_layouts_agree(method):
    neck, x = build(method, layout="NCHW"), maps()
    expected = neck((x,))[0]
    for layout, y in (
        ("NHWC", x.permute(0, 2, 3, 1).contiguous()),
        ("NLC", x.flatten(2).transpose(1, 2).contiguous()),
        ("NCHW", x.contiguous(memory_format=torch.channels_last)),
    ):
        other = build(method, layout=layout)
        other.load_state_dict(neck.state_dict())
        assert difference(other((y,))[0], expected) < EXACT


@pytest.mark.parametrize("method", TWO_MAPS)
def test_two_streams_and_two_layers(method):
    neck, x, y = build(method, (C, C2)), maps(), maps(C2)
    out = neck((x, y))[0]
    assert out.shape == (3, neck.out_channels)
    layers = build(method, (C, C2), in_index=(2, 0))
    layers.load_state_dict(neck.state_dict())
    assert difference(layers((y, maps(3), x))[0], out) == 0
    if method == "full":
        reference = torch.einsum("nihw,njhw->nij", x, y).flatten(1) / 25
        assert difference(out, B.signed_sqrt_l2(reference)) < EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projection", [None, 5])
def test_masked_equals_removed(method, projection):
    neck, x, keep = build(method, projection=projection), maps(), [0, 1, 4, 5, 8]
    masked = x.clone()
    masked[:, [c for c in range(C) if c not in keep]] = 0
    expected = neck((masked,))[0]
    assert difference(neck((x,))[0], expected) > 1e-3
    columns = neck.keep_channels_(keep)
    assert neck.in_channels == 5 and len(columns) == neck.out_channels
    assert difference(neck((x[:, keep],))[0], expected[:, columns]) < EXACT
    gone = torch.ones(expected.shape[1], dtype=torch.bool)
    gone[columns] = False
    assert not expected[:, gone].any()


@pytest.mark.parametrize("method", TWO_MAPS)
def test_masked_equals_removed_of_two_streams(method):
    neck, x, y = build(method, (C, C2)), maps(), maps(C2)
    keep, keep_second = [0, 3, 5, 7, 9], [1, 2, 3, 5]
    masked, masked_second = torch.zeros_like(x), torch.zeros_like(y)
    masked[:, keep], masked_second[:, keep_second] = x[:, keep], y[:, keep_second]
    expected = neck((masked, masked_second))[0]
    columns = neck.keep_channels_(keep, keep_second)
    assert neck.in_channels == (5, 4)
    assert difference(neck((x[:, keep], y[:, keep_second]))[0], expected[:, columns]) < EXACT


def test_kept_factors_stay_in_their_optimizer():
    neck = build("low_rank")
    optimizer = torch.optim.SGD(neck.parameters(), lr=1.0)
    neck.keep_channels_([1, 2, 3, 4])
    before = neck.pool.factor1.clone()
    neck((maps(4),))[0].sum().backward()
    optimizer.step()
    assert neck.pool.factor1.shape == (4, RANK) and not torch.equal(before, neck.pool.factor1)


@pytest.mark.parametrize("method", ["tensor_sketch", "random_maclaurin"])
def test_random_tables_are_buffers_from_their_own_generator(method):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build(method, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is left alone
    torch.manual_seed(2)
    again, other, x = build(method, seed=4), build(method, seed=5), maps()
    assert torch.equal(first((x,))[0], again((x,))[0])
    assert difference(other((x,))[0], first((x,))[0]) > 1e-3
    assert not list(other.parameters())
    other.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(other((x,))[0], first((x,))[0])
    sides = [t for name, t in first.state_dict().items() if name.endswith("1")]
    seconds = [t for name, t in first.state_dict().items() if name.endswith("2")]
    assert not any(torch.equal(a, b) for a, b in zip(sides, seconds))  # equal hashes on both sides would bias it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, dtype):
    neck = BilinearPooling(C, method, dim=DIM, rank=RANK)
    x = (torch.rand(2, C, 28, 28) * 20 + 90).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = neck((x.to(dtype),))[0]
    out.sum().backward()
    assert out.dtype is torch.float32 and torch.isfinite(out).all() and torch.isfinite(x.grad).all()
    out = neck.to(dtype)((x.detach().to(dtype),))[0]  # a model in half precision goes on in it
    assert out.dtype is dtype and torch.isfinite(out).all() and out.abs().max() > 0


def export(neck, inputs, path, dynamo):
    names = [f"x{i}" for i in range(len(inputs))]
    options = {} if dynamo else {"dynamic_axes": {name: {0: "n"} for name in names}, "opset_version": 17}
    torch.onnx.export(neck, (inputs,), path, input_names=names, dynamo=dynamo, verbose=False, **options)
    session = onnxruntime.InferenceSession(path)
    return lambda feeds: session.run(None, {k: v.numpy() for k, v in zip(names, feeds, strict=True)})[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train_grad", [True, False])
def test_onnx_runtime_agrees(method, train_grad, tmp_path):
    """Also where gradients are on while exporting, which must not record the custom backward passes."""
    neck = build(method, projection=8).float()
    run = export(neck, (maps().float().requires_grad_(train_grad),), str(tmp_path / "m.onnx"), dynamo=False)
    x = maps(batch=2).float()  # another batch size
    expected = neck((x,))[0].detach().numpy()
    found = run((x,))
    assert found.shape == expected.shape and np.abs(expected).max() > 1e-2
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_onnx_runtime_agrees_by_the_new_exporter(method, tmp_path):
    neck, x = build(method).float(), maps().float()
    run = export(neck, (x,), str(tmp_path / "m.onnx"), dynamo=True)
    assert np.abs(run((x,)) - neck((x,))[0].detach().numpy()).max() < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_agrees_on_two_streams(tmp_path):
    neck, x, y = build("tensor_sketch", (C, C2)).float(), maps().float(), maps(C2).float()
    run = export(neck, (x, y), str(tmp_path / "m.onnx"), dynamo=False)
    assert np.abs(run((x, y)) - neck((x, y))[0].numpy()).max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_torch_fx_traces_it(method):
    neck, x = build(method, projection=8), maps()
    graph = torch.fx.symbolic_trace(neck)
    assert torch.equal(graph((x,))[0], neck((x,))[0])
    assert any(node.target == "projection.conv" for node in graph.graph.nodes)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains(method):
    neck = BilinearPooling(C, method, dim=DIM, rank=RANK, projection=8)
    neck((maps().float(),))[0].pow(3).sum().backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_deploy_builds_the_triangle_of_a_symmetric_full_pooling_alone():
    assert build("full", deploy=True).method == "triu"
    assert not build("full", deploy=True).state_dict()
    assert build("full", (C, C2), deploy=True).method == "full"
    assert build("low_rank", deploy=True).method == "low_rank"


def test_the_triangle_needs_its_classifier_to_fold():
    neck = build("full")
    assert not hasattr(neck, "switch_to_deploy")  # converters would call it on the pooling alone
    with pytest.raises(ValueError, match=r"100 columns, got weight \(4, 90\)"):
        neck.fold_to_triangle_(nn.Linear(90, 4))
    with pytest.raises(ValueError, match="two-stream full"):
        build("full", (C, C2)).fold_to_triangle_(nn.Linear(60, 4))
    assert neck.method == "full"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="fisher"), "method must be one of .*got 'fisher'"),
        (dict(method="tensor_sketch", dim=0), "dim must be a whole number in .*got 0"),
        (dict(method="random_maclaurin", dim=-3), "dim must be a whole number in .*got -3"),
        (dict(method="low_rank", rank=11), r"rank must lie in 1\.\.10 .*got 11"),
        (dict(method="low_rank", rank=0), "got 0"),
        (dict(method="low_rank", in_channels=(C, C2), rank=7), r"1\.\.6 .*got 7"),
        (dict(method="low_rank", projection=4, rank=5), r"1\.\.4 .*got 5"),
        (dict(method="triu", in_channels=(C, C2)), "two of 10 and 6"),
        (dict(method="isqrt_cov", in_channels=(C, C2)), "two of 10 and 6"),
        (dict(method="isqrt_cov", iterations=0), "iterations must be a whole number in .*got 0"),
        (dict(in_channels=0), "got 0"),
        (dict(in_channels=(1, 2, 3)), r"\(1, 2, 3\)"),
        (dict(layout="NCL"), "layout must be one of .*got 'NCL'"),
        (dict(projection=0), "projection"),
        (dict(in_index=(0, 1)), "in_index"),
    ],
)
def test_bad_options_are_refused_with_their_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        BilinearPooling(**{"in_channels": C, **options})


@pytest.mark.parametrize(
    ("options", "feats", "message"),
    [
        ({}, (), "tuple of 0 maps"),
        ({"in_channels": (C, C2)}, (torch.zeros(1, C, 2, 2),), "tuple of 1 maps"),
        ({}, (torch.zeros(2, C),), r"4 dimensions, got shape \(2, 10\)"),
        ({"layout": "NLC"}, (torch.zeros(2, C),), r"3 dimensions, got shape \(2, 10\)"),
        ({}, (torch.zeros(2, 9, 3, 3),), r"9 channels, expected in_channels \(=10\)"),
        ({"layout": "NHWC"}, (torch.zeros(2, C, 3, 4),), "4 channels.*NHWC"),
        (
            {"in_channels": (C, C2)},
            (torch.zeros(2, C, 4, 4), torch.zeros(2, C2, 2, 2)),
            r"\(2, 10, 16\) and \(2, 6, 4\)",
        ),
        ({"in_channels": (C, C2)}, (torch.zeros(2, C, 2, 2), torch.zeros(3, C2, 2, 2)), r"\(3, 6, 4\)"),
    ],
)
def test_bad_maps_are_refused_with_their_numbers(options, feats, message):
    with pytest.raises(ValueError, match=message):
        BilinearPooling(**{"in_channels": C, **options})(feats)


def test_a_bare_tensor_is_refused():
    with pytest.raises(TypeError, match="tuple of maps, got Tensor"):
        BilinearPooling(C)(torch.zeros(2, C, 3, 3))


@pytest.mark.parametrize("keep", [[], [3, 1], [0, 10], [-1, 2], [2, 2]])
def test_bad_channels_to_keep_are_refused(keep):
    with pytest.raises(ValueError, match=r"0\.\.9"):
        BilinearPooling(C).keep_channels_(keep)
