"""The published blocks, over random configurations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rep_plugin.blocks.families import ACBlock, DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, RepVGGBlock
from tests.helpers import block_by_hand, examples, randomise_bn_, relative_error

FAMILIES = [RepVGGBlock, ACBlock, DiverseBranchBlock, MobileOneBlock, LargeKernelBlock]


@st.composite
def configurations(draw):
    """A family with any odd window, stride, padding, dilation, groups (depthwise too), and its own options."""
    family = draw(st.sampled_from(FAMILIES))
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    inputs, outputs = draw(st.sampled_from([(8, 8), (8, 16), (16, 8)]))
    sides = st.sampled_from([1, 3, 5])
    options = dict(
        kernel_size=(draw(sides), draw(sides)),
        stride=draw(st.sampled_from([1, 2, (2, 1)])),
        padding=draw(st.sampled_from([None, 0, 1, (1, 3)])),
        dilation=draw(st.sampled_from([1, 2, (1, 2)])),
        groups=groups,
        act=draw(st.sampled_from([None, nn.ReLU()])),
    )
    if family is RepVGGBlock:
        options["post_bn"] = draw(st.booleans())
    if family is MobileOneBlock:
        options["copies"] = draw(st.integers(1, 3))
    if family is DiverseBranchBlock:
        options["mid_channels"] = draw(st.sampled_from([None, 8, 24]))
    if family is LargeKernelBlock:
        small = tuple(draw(st.sampled_from([s for s in (1, 3, 5) if s <= side])) for side in options["kernel_size"])
        options["small_kernel"] = draw(st.sampled_from([None, small]))
    return family, (inputs, outputs), options, draw(st.integers(0, 10**6))


@settings(max_examples=examples(250), deadline=None)
@given(configurations())
def test_trained_and_deployed_blocks_agree(case):
    family, channels, options, seed = case
    torch.manual_seed(seed)
    block = randomise_bn_(family(*channels, **options).double()).eval()
    x = torch.randn(2, channels[0], 13, 12, dtype=torch.float64)
    expected = block(x)
    if not options.get("post_bn"):
        assert relative_error(block_by_hand(block, x), expected) < 1e-11
    plain = nn.Conv2d(*channels, **{k: options[k] for k in ("kernel_size", "stride", "dilation", "groups")})
    plain.padding = block.padding
    assert plain.double()(x).shape == expected.shape
    block.switch_to_deploy()
    assert relative_error(expected, block(x)) < 1e-11
    built = family(*channels, **options, deploy=True).double()
    built.load_state_dict(block.state_dict(), strict=True)
    assert torch.equal(built(x), block(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_reaches_every_parameter(family):
    block = family(8, 8, 3, small_kernel=1) if family is LargeKernelBlock else family(8, 8, 3)
    block.train()
    weights = torch.randn(4, 8, 6, 6)
    (block(torch.randn(4, 8, 6, 6)) * weights).sum().backward()
    still = [name for name, p in block.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    # A constant that the next BN takes out again: zero by its nature on a map padded at the chain's head.
    assert still == [name for name, _ in block.named_parameters() if name.endswith("reduce_bn.bias")]


def test_post_bn_is_one_bn_after_the_sum():
    block = RepVGGBlock(8, 8, post_bn=True)
    assert [type(m).__name__ for m in block.branches["identity"].children()] == ["Identity"]
    assert block.output_bns() == [block.post_bn]
    with pytest.raises(RuntimeError, match="train mode"):
        block.eval()
        block.post_bn.train()
        block.switch_to_deploy()
    assert not block.deployed


def test_depthwise_dbb_has_no_point_branch_and_twice_the_width():
    block = DiverseBranchBlock(8, 8, groups=8)
    assert set(block.branches) == {"conv", "sequence", "average"}
    assert block.branches["sequence"].reduce.weight.shape == (16, 1, 1, 1)


def test_bad_arguments_are_named():
    for family in FAMILIES:
        with pytest.raises(ValueError, match=rf"{family.__name__} needs odd kernel sides, got \(3, 4\)"):
            family(8, 8, (3, 4))
        with pytest.raises(ValueError, match=r"out_channels \(=9\) must be divisible by groups \(=2\)|divisible"):
            family(8, 9, 5, groups=2)
    with pytest.raises(ValueError, match="copies must be a whole number in .*got 0"):
        MobileOneBlock(8, 8, copies=0)
    with pytest.raises(ValueError, match=r"mid_channels \(=9\) must be divisible by groups \(=2\)"):
        DiverseBranchBlock(8, 8, groups=2, mid_channels=9)
    with pytest.raises(ValueError, match=r"'small'.*\(5, 5\).*\(3, 3\)"):
        LargeKernelBlock(8, 8, 3, small_kernel=5)
