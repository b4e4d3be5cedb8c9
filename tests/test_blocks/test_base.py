"""The block contract, on Rep-MobileNetV2's block and on blocks made here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.inverted_residual import BRANCHES, RepInvertedResidual
from rep_plugin.blocks.layers import DilatedAvgPool2d
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import block_by_hand, examples, randomise_bn_, relative_error


def conv_bn(inputs: int, outputs: int, size, stride=1, dilation=1, groups=1) -> Chain:
    conv = nn.Conv2d(inputs, outputs, size, stride, 0, dilation, groups, bias=False)
    return Chain({"conv": conv, "bn": nn.BatchNorm2d(outputs)})


@st.composite
def blocks(draw):
    """A block of several chains whose windows differ: any groups, stride, dilation, padding and size, also even."""
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = draw(st.sampled_from([(4, 4), (4, 8), (8, 4)]))
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.sampled_from([1, 2, (1, 2)]))
    dilation = draw(st.sampled_from([1, 2, (2, 1)]))
    padding = draw(st.sampled_from([None, 0, 1, (2, 0), 3]))
    shape = (stride, dilation, groups)
    other = tuple(draw(st.sampled_from([side, side - 2] if side > 2 else [side])) for side in size)
    branches = {"full": conv_bn(inputs, outputs, size, *shape), "small": conv_bn(inputs, outputs, other, *shape)}
    if size[0] % 2 and size[1] % 2:
        branches["point"] = conv_bn(inputs, outputs, 1, *shape)
        steps = stride if isinstance(stride, tuple) else (stride, stride)
        branches["average"] = Chain(
            {
                "conv": nn.Conv2d(inputs, outputs, 1, groups=groups, bias=True),
                "conv_bn": nn.BatchNorm2d(outputs),
                "avg": DilatedAvgPool2d(size, steps, dilation),
                "bn": nn.BatchNorm2d(outputs),
            }
        )
        if inputs == outputs and stride == 1:
            branches["identity"] = Chain({"bn": nn.BatchNorm2d(outputs)})
    block = RepBlock(inputs, outputs, size, branches, *((stride, padding, dilation, groups)), act=nn.LeakyReLU())
    return block, draw(st.integers(0, 10**6))


@settings(max_examples=examples(200), deadline=None)
@given(blocks())
def test_deploy_computes_the_same_function(case):
    block, seed = case
    torch.manual_seed(seed)
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        conv.reset_parameters()  # a failure can be repeated
    block = randomise_bn_(block.double()).eval()
    x = torch.randn(2, block.in_channels, 17, 14, dtype=torch.float64)
    expected = block_by_hand(block, x)
    assert relative_error(expected, block(x)) < 1e-11
    kernel, bias = block.merged_kernel()
    block.switch_to_deploy()
    assert torch.equal(kernel, block.reparam_conv.weight) and torch.equal(bias, block.reparam_conv.bias)
    assert relative_error(expected, block(x)) < 1e-11


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sets(st.sampled_from(BRANCHES), min_size=1),
    st.sampled_from([(8, 8, 1), (8, 8, 2), (8, 16, 1), (16, 8, 2)]),
    st.sampled_from([1, 3, 6]),
    st.booleans(),
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.integers(0, 10**6),
)
def test_inverted_residual_in_training_and_deployed(branches, shape, expand_ratio, shortcut, size, seed):
    if branches == {"identity"} and shape != (8, 8, 1):
        branches = {"identity", "conv3x3"}
    torch.manual_seed(seed)
    block = RepInvertedResidual(*shape, expand_ratio, sorted(branches), shortcut, act="hardswish").double()
    randomise_bn_(block).train()
    x = torch.randn(3, shape[0], *size, dtype=torch.float64, requires_grad=True)
    expected, got = block_by_hand(block, x), block(x)
    assert relative_error(expected, got) < 1e-10
    weights = torch.randn_like(expected)
    leaves = [x, *block.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, expected))):
        assert (a - b).abs().max() <= 1e-8 * max(1.0, b.abs().max().item())

    block.eval()
    trained = block(x)
    assert relative_error(block_by_hand(block, x), trained) < 1e-11
    block.switch_to_deploy()
    assert relative_error(trained, block(x)) < 1e-11
    assert [type(m).__name__ for m in block.children()] == ["Hardswish", "Conv2d"]


def test_deploying_leaves_one_trainable_convolution_and_is_idempotent():
    block = RepInvertedResidual(8, 8).eval()
    block.switch_to_deploy()
    conv = block.reparam_conv
    block.switch_to_deploy()
    assert block.reparam_conv is conv and not hasattr(block, "branches")
    assert all(p.requires_grad for p in block.parameters()) and conv.weight.shape == (8, 8, 3, 3)
    block(torch.randn(2, 8, 5, 5)).sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    assert set(block.state_dict()) == set(RepInvertedResidual(8, 8, deploy=True).state_dict())


def test_merged_kernel_changes_nothing():
    block = randomise_bn_(RepInvertedResidual(8, 8)).eval()
    before = copy.deepcopy(block.state_dict())
    block.merged_kernel()
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items()) and not block.deployed


def test_deploying_draws_no_random_numbers():
    block = RepInvertedResidual(8, 8).eval()
    state = torch.get_rng_state()
    block.switch_to_deploy()
    assert torch.equal(torch.get_rng_state(), state)


def test_train_mode_is_refused_and_loses_nothing():
    block = RepInvertedResidual(8, 8).train()
    for call in (block.merged_kernel, block.switch_to_deploy):
        with pytest.raises(RuntimeError, match=r"train mode.*model.eval\(\)"):
            call()
    assert not block.deployed and block.branches["bottleneck"].expand.weight.shape == (48, 8, 1, 1)


def test_a_pruned_block_merges_by_its_live_weights():
    block = randomise_bn_(RepInvertedResidual(8, 8, branches=("bottleneck", "conv3x3", "avgpool", "identity"))).eval()
    keep = torch.tensor([0, 2, 3, 5, 7])
    for chain in block.branches.values():
        ops = list(chain.children())
        for op in ops:
            if isinstance(op, nn.Conv2d):
                if op is ops[0]:
                    op.weight.data = op.weight.data[:, keep] if op.weight.shape[1] == 8 else op.weight.data
                if op.weight.shape[0] == 8:
                    op.weight.data = op.weight.data[keep]
            if isinstance(op, nn.BatchNorm2d) and op.weight.numel() == 8:
                for name in ("weight", "bias"):
                    getattr(op, name).data = getattr(op, name).data[keep]
                op.running_mean, op.running_var = op.running_mean[keep], op.running_var[keep]
    x = torch.randn(2, 5, 7, 7)
    expected = block(x)
    block.switch_to_deploy()
    assert block.reparam_conv.in_channels == block.reparam_conv.out_channels == block.in_channels == 5
    assert relative_error(expected, block(x)) < 1e-5


def test_a_pruned_depthwise_block_keeps_one_channel_a_group():
    chain = conv_bn(8, 8, 3, groups=8)
    block = randomise_bn_(
        RepBlock(8, 8, 3, {"conv": chain, "identity": Chain({"bn": nn.BatchNorm2d(8)})}, groups=8)
    ).eval()
    for bn in (chain.bn, block.branches["identity"].bn):
        bn.weight.data, bn.bias.data = bn.weight.data[:5], bn.bias.data[:5]
        bn.running_mean, bn.running_var = bn.running_mean[:5], bn.running_var[:5]
    chain.conv.weight.data = chain.conv.weight.data[:5]
    x = torch.randn(2, 5, 6, 6)
    expected = block(x)
    block.switch_to_deploy()
    assert block.reparam_conv.groups == 5 and relative_error(expected, block(x)) < 1e-5


def test_sync_batchnorm_merges():
    block = randomise_bn_(RepInvertedResidual(8, 8)).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    for ours, theirs in zip(block.merged_kernel(), synced.merged_kernel()):
        assert torch.equal(ours, theirs)


def test_half_precision_models_merge_in_double():
    block = calibrate_random_bn_(RepInvertedResidual(8, 8), torch.randn(4, 8, 9, 9))
    half = copy.deepcopy(block).half()
    exact = copy.deepcopy(half).double().merged_kernel()[0]
    kernel = half.merged_kernel()[0]
    assert kernel.dtype == torch.float16
    assert (kernel.double() - exact).abs().max() <= exact.abs().max() * 2**-11


def test_autocast_step_trains_in_half_precision():
    block = RepInvertedResidual(8, 8).train()
    x = torch.randn(4, 8, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


def test_both_forms_can_be_traced():
    block, x = randomise_bn_(RepInvertedResidual(8, 8)).eval(), torch.randn(2, 8, 9, 9)
    expected = block(x)
    assert relative_error(expected, torch.jit.trace(block, x)(x)) < 1e-6
    assert relative_error(expected, torch.export.export(block, (x,)).module()(x)) < 1e-6
    block.switch_to_deploy()
    assert relative_error(expected, torch.fx.symbolic_trace(block)(x)) < 1e-5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"in_channels \(=6\) must be divisible by groups \(=4\)"):
        RepBlock(6, 8, 3, {"conv": conv_bn(6, 8, 3)}, groups=4)
    with pytest.raises(ValueError, match=r"out_channels \(=6\) must be divisible by groups \(=4\)"):
        RepBlock(8, 6, 3, {"conv": conv_bn(8, 6, 3)}, groups=4)
    with pytest.raises(ValueError, match=r"'wide'.*\(5, 5\).*\(3, 3\)"):
        RepBlock(4, 4, 3, {"wide": conv_bn(4, 4, 5)})
    with pytest.raises(ValueError, match="got none"):
        RepBlock(4, 4, 3, {})
    with pytest.raises(
        ValueError, match=r"branches.1. must be one of .*bottleneck.*got 'conv5x5', did you mean 'conv3x3'"
    ):
        RepInvertedResidual(8, 8, branches=("bottleneck", "conv5x5"))
    with pytest.raises(ValueError, match=r"8 -> 16"):
        RepInvertedResidual(8, 16, branches=("identity",))
    with pytest.raises(ValueError, match="act must be one of .*got 'relu7', did you mean 'relu'"):
        RepInvertedResidual(8, 8, act="relu7")


def test_branches_that_contradict_the_block_are_refused():
    strided = RepBlock(4, 4, 3, {"conv": conv_bn(4, 4, 3, stride=2)}, stride=1).eval()
    with pytest.raises(ValueError, match=r"stride \(2, 2\), the block \(1, 1\)"):
        strided.merged_kernel()
    dilated = RepBlock(4, 4, 3, {"conv": conv_bn(4, 4, 3, dilation=2)}, padding=2).eval()
    with pytest.raises(ValueError, match=r"dilation \(2, 2\), the block \(1, 1\)"):
        dilated.merged_kernel()


def test_border_is_exact_where_naive_padding_is_not():
    """Zero-padding the middle convolution instead of the input is off at the border only: the reason for the design."""
    block = randomise_bn_(RepInvertedResidual(8, 8, branches=("bottleneck",), act="identity").double()).eval()
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    ops = block.branches["bottleneck"]
    middle = F.pad(ops.expand_bn(ops.expand(x)), (1, 1, 1, 1))
    naive = ops.project_bn(ops.project(ops.depthwise_bn(ops.depthwise(middle))))
    gap = (naive - block(x)).abs()
    assert gap[..., 1:-1, 1:-1].max() < 1e-12 and gap.max() > 1e-2


def test_frozen_blocks_and_memory_format_survive_the_merge():
    block = RepInvertedResidual(8, 8, branches=("bottleneck", "conv3x3")).eval().requires_grad_(False)
    block.to(memory_format=torch.channels_last)
    block.switch_to_deploy()
    assert not any(p.requires_grad for p in block.parameters())
    assert block.reparam_conv.weight.is_contiguous(memory_format=torch.channels_last)
