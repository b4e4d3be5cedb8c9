"""Chains: merged == run == layer by layer on a padded map."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.layers import DilatedAvgPool2d, Scale
from rep_plugin.blocks.merge import merge_chain, merge_ops
from tests.helpers import chain_by_hand, examples, randomise_bn_, relative_error


@st.composite
def chains(draw):
    """A random linear chain: 1x1s, one or two windows, poolings, BNs, scales, any groups; a stride on the last window."""
    width = draw(st.sampled_from([4, 6]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    kinds = draw(st.lists(st.sampled_from(["1x1", "bn", "scale", "identity"]), max_size=3))
    kinds += draw(st.sampled_from([["window"], ["depthwise"], ["avg"], ["1x1"], ["window", "bn", "depthwise"]]))
    kinds += draw(st.lists(st.sampled_from(["1x1", "bn", "scale", "identity"]), max_size=3))
    windows = [i for i, kind in enumerate(kinds) if kind in ("window", "depthwise", "avg")]
    ops, channels = {}, width
    for index, kind in enumerate(kinds):
        stride = draw(st.sampled_from([1, 2, (2, 1)])) if windows and index == windows[-1] else 1
        size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        out = draw(st.sampled_from([4, 6, 12]))
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if channels % g == 0 and out % g == 0]))
        bias = draw(st.booleans())
        if kind in ("1x1", "window"):
            size = (1, 1) if kind == "1x1" else size
            ops[f"{index}_{kind}"] = nn.Conv2d(channels, out, size, stride, 0, dilation, groups, bias)
            channels = out
        elif kind == "depthwise":
            ops[f"{index}_{kind}"] = nn.Conv2d(channels, channels, size, stride, 0, dilation, channels, bias)
        elif kind == "avg":
            ops[f"{index}_{kind}"] = DilatedAvgPool2d(size, stride, dilation)
        elif kind == "bn":
            ops[f"{index}_{kind}"] = nn.BatchNorm2d(channels, affine=bias)
        else:
            ops[f"{index}_{kind}"] = Scale(channels, 1.7) if kind == "scale" else nn.Identity()
    return width, ops, draw(st.tuples(st.integers(0, 3), st.integers(0, 3))), draw(st.integers(0, 10**6))


@settings(max_examples=examples(300), deadline=None)
@given(chains())
def test_merged_chain_equals_layers_on_a_padded_map(case):
    width, ops, padding, seed = case
    torch.manual_seed(seed)
    chain = randomise_bn_(Chain(ops).double()).eval()
    x = torch.randn(2, width, 19, 16, dtype=torch.float64)
    expected = chain_by_hand(list(ops.values()), x, padding)
    merged = merge_ops(ops.values(), width, torch.float64)
    assert merged.kernel.dtype == torch.float64
    got = F.conv2d(x, merged.kernel, merged.bias, merged.stride, padding, merged.dilation, merged.groups)
    assert relative_error(expected, got) < 1e-11
    assert relative_error(expected, chain(x, padding)) < 1e-11


@settings(max_examples=examples(100), deadline=None)
@given(chains())
def test_training_step_equals_layers_on_a_padded_map(case):
    """Outputs and gradients with batch statistics; one window, since only then both count the same positions."""
    width, ops, padding, seed = case
    if sum(op.weight.shape[2:] != (1, 1) for op in ops.values() if isinstance(op, nn.Conv2d)) > 1:
        padding = (0, 0)
    torch.manual_seed(seed)
    chain = randomise_bn_(Chain(ops).double()).train()
    x = torch.randn(3, width, 17, 15, dtype=torch.float64, requires_grad=True)  # two windows reach over 13
    has_window = chain.kernel_size != (1, 1)
    if not has_window:
        padding = (0, 0)
    leaves = [x, *chain.parameters()]
    expected, got = chain_by_hand(list(ops.values()), x, padding), chain(x, padding)
    assert relative_error(expected, got) < 1e-10
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-8 * max(1.0, b.abs().max().item())


def test_running_statistics_follow_torch():
    conv = nn.Conv2d(3, 5, 3, bias=True, dtype=torch.float64)
    ours, theirs = (nn.BatchNorm2d(5, momentum=m, dtype=torch.float64) for m in (0.3, 0.3))
    chain = Chain({"conv": conv, "bn": ours}).train()
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        assert relative_error(theirs(conv(x)), chain(x)) < 1e-12
    assert relative_error(theirs.running_mean, ours.running_mean) < 1e-12
    assert relative_error(theirs.running_var, ours.running_var) < 1e-12
    assert ours.num_batches_tracked == 3


def test_cumulative_average_of_statistics():
    ours, theirs = (nn.BatchNorm2d(4, momentum=None, dtype=torch.float64) for _ in range(2))
    chain = Chain({"bn": ours}).train()
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        theirs(x), chain(x)
    assert relative_error(theirs.running_var, ours.running_var) < 1e-12


def test_gradient_of_merge():
    ops = nn.ModuleList(
        [nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)]
    ).double()
    randomise_bn_(ops).eval()
    leaves = list(ops.parameters())

    def merged(*tensors):
        for p, t in zip(leaves, tensors):
            assert p.shape == t.shape
        return torch.func.functional_call(
            _Merge(ops), {f"ops.{n}": t for (n, _), t in zip(ops.named_parameters(), tensors)}, ()
        )

    assert torch.autograd.gradcheck(merged, [p.detach().clone().requires_grad_() for p in leaves])


class _Merge(nn.Module):
    def __init__(self, ops):
        super().__init__()
        self.ops = ops

    def forward(self):
        return merge_chain(self.ops)


def test_merge_is_computed_in_full_precision_under_autocast():
    ops = [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3)]
    expected = merge_chain(ops)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merge_chain(ops)[0], expected)


def test_autocast_step_is_finite_and_close():
    chain = Chain({"conv": nn.Conv2d(8, 8, 3), "bn": nn.BatchNorm2d(8)}).train()
    x = torch.randn(4, 8, 9, 9) * 100
    expected = chain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chain(x)
    assert relative_error(expected, got.float()) < 0.05


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (nn.ReLU(), "ReLU is not linear"),
        (nn.AvgPool2d(3, count_include_pad=False), "count_include_pad"),
        (nn.AvgPool2d(3, ceil_mode=True), "ceil_mode"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), r"padding_mode.*'reflect'"),
        (nn.GroupNorm(2, 4), "GroupNorm is not linear"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(op, message):
    with pytest.raises(TypeError, match=message):
        Chain({"op": op})
    with pytest.raises(TypeError, match=message):
        merge_chain([nn.Conv2d(4, 4, 1), op])


def test_train_mode_empty_chain_and_early_stride_are_refused():
    with pytest.raises(RuntimeError, match="train mode"):
        merge_chain([nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)])
    with pytest.raises(ValueError, match="at least one layer"):
        Chain({})
    with pytest.raises(ValueError, match="channel number"):
        merge_chain([nn.AvgPool2d(3)])
    with pytest.raises(ValueError, match=r"'late'.*'early'"):
        Chain({"early": nn.Conv2d(2, 2, 1, stride=2), "late": nn.Conv2d(2, 2, 3)})
    with pytest.raises(ValueError, match="more than 1 value"):
        Chain({"bn": nn.BatchNorm2d(2)}).train()(torch.randn(1, 2, 1, 1))


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5)])
def test_sync_batchnorm_of_two_processes_is_batchnorm_of_the_joined_batch(sizes, tmp_path):
    """Two real processes with gloo, float32, a mean of a thousand deviations: E[x^2] - E[x]^2 would be noise there."""
    code = """
import sys, torch, torch.distributed as dist
from torch import nn
from rep_plugin.blocks.chain import Chain
rank, folder, sizes = int(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3].split(",")]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
x, weights = torch.randn(sum(sizes), 3, 5, 5) + 1000, torch.randn(sum(sizes), 3, 5, 5)
mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
chain = Chain({"bn": nn.SyncBatchNorm(3)}).train()
leaf = x[mine].clone().requires_grad_()
y = chain(leaf)
(y * weights[mine]).sum().backward()
torch.save({"y": y.detach(), "dx": leaf.grad, "var": chain.bn.running_var}, f"{folder}/{rank}.pt")
"""
    sizes_text = ",".join(map(str, sizes))
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path), sizes_text], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    x, weights = torch.randn(sum(sizes), 3, 5, 5) + 1000, torch.randn(sum(sizes), 3, 5, 5)
    bn, joined = nn.BatchNorm2d(3).double().train(), x.double().requires_grad_()
    expected = bn(joined)
    (expected * weights.double()).sum().backward()
    assert relative_error(expected, torch.cat([p["y"] for p in parts]).double()) < 5e-4
    assert relative_error(joined.grad, torch.cat([p["dx"] for p in parts]).double()) < 5e-4
    assert all(relative_error(bn.running_var, p["var"].double()) < 1e-4 for p in parts)


def test_layers_whose_own_forward_would_be_passed_over_are_refused():
    from timm.layers import BatchNormAct2d, ScaledStdConv2d

    for op in (BatchNormAct2d(4), ScaledStdConv2d(4, 4, 3)):
        with pytest.raises(TypeError, match="computes something else"):
            Chain({"op": op})
    with pytest.raises(TypeError, match="set by a hook"):
        Chain({"conv": nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))})


def test_parametrized_weights_run_and_merge():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, bias=False))
    x = torch.randn(1, 4, 6, 6)
    kernel, _ = merge_chain([conv])
    assert (
        relative_error(conv(x), F.conv2d(x, kernel)) < 1e-6 and relative_error(conv(x), Chain({"conv": conv})(x)) < 1e-6
    )


def test_strided_1x1_of_a_stem_trains_in_channels_last():
    """torch's own kernel corrupts memory here (uxlfoundation/oneDNN#6035): the gradients must be those of float64."""
    torch.manual_seed(0)
    chain = Chain({"conv": nn.Conv2d(3, 48, 1, 2, bias=False), "bn": nn.BatchNorm2d(48)})
    x = torch.randn(4, 3, 224, 224)
    target = torch.randn(4, 48, 112, 112)

    def gradient(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad((module(x) * target.to(x.dtype)).sum(), module.conv.weight)
        return found

    expected = gradient(copy.deepcopy(chain).double(), x.double())
    got = gradient(chain.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    assert relative_error(expected, got.double()) < 1e-4
