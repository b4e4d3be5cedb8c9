"""The online form: the same branches without BN, merged in every step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.families import ACBlock, DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.blocks.layers import NormedConv2d, Scale
from rep_plugin.functional.kernels import merge_sum
from rep_plugin.reparam import reparameterize
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import examples, relative_error

FAMILIES = (RepVGGBlock, ACBlock, DiverseBranchBlock, MobileOneBlock, LargeKernelBlock)


def scramble_(block: nn.Module, seed: int = 0) -> None:
    """Gains of either sign, none near zero: at their start they hide a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    for module in block.modules():
        if isinstance(module, (Scale, NormedConv2d)):
            gain = module.weight if isinstance(module, Scale) else module.gain
            gain.data = (torch.rand(gain.shape, generator=generator) + 0.5).to(gain.dtype)
            gain.data[::3] *= -1


@settings(max_examples=examples(40), deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    kernel=st.sampled_from([3, 5, (3, 5)]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    widths=st.sampled_from([(4, 4), (4, 8), (8, 4)]),
    size=st.tuples(st.integers(9, 13), st.integers(9, 13)),
)
def test_merged_step_equals_running_the_branches(family, kernel, stride, dilation, groups, widths, size):
    torch.manual_seed(0)
    small = {"small_kernel": 3} if family is LargeKernelBlock else {}
    block = family(*widths, kernel, stride, None, dilation, groups, online=True, **small).double()
    scramble_(block)
    x = torch.randn(2, widths[0], *size, dtype=torch.float64)
    merged, branches = block._run_merged(x), block._run_branches(x)
    assert relative_error(merged, branches) < 1e-12

    # One step's gradients are those of running the branches.
    target = torch.randn_like(merged)
    ours = torch.autograd.grad((merged * target).sum(), list(block.branches.parameters()))
    theirs = torch.autograd.grad((branches * target).sum(), list(block.branches.parameters()))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(ours, theirs))

    calibrate_random_bn_(block, x)
    expected = block(x)
    block.switch_to_deploy()
    assert relative_error(block(x), expected) < 1e-12
    assert sum(1 for m in block.modules() if isinstance(m, nn.Conv2d)) == 1


@pytest.mark.parametrize("branches", [("bottleneck", "identity"), ("bottleneck", "conv3x3", "conv1x1", "avgpool")])
@pytest.mark.parametrize("stride", [1, 2])
def test_inverted_residual_online(branches, stride):
    block = RepInvertedResidual(8, 8, stride, branches=branches, online=True).double()
    scramble_(block)
    x = torch.randn(2, 8, 11, 13, dtype=torch.float64)
    assert relative_error(block._run_merged(x), block._run_branches(x)) < 1e-12


def test_no_branch_keeps_a_bn_and_one_follows_the_sum():
    block = DiverseBranchBlock(8, 8, online=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.branches.modules())
    assert block.output_bns() == [block.post_bn]
    assert {key.split(".", 1)[1] for key in block.state_dict() if key.startswith("branches.")} == {
        "conv.conv.weight", "conv.conv.gain", "point.conv.weight", "point.conv.gain",
        "sequence.reduce.weight", "sequence.reduce.gain", "sequence.conv.weight", "sequence.conv.gain",
        "average.reduce.weight", "average.reduce.gain", "average.scale.weight",
    }  # fmt: skip


def test_branches_start_at_unit_gain():
    block = DiverseBranchBlock(16, 16, online=True)
    nn.init.constant_(block.branches["conv"].conv.weight, 3.0)
    block.init_gains_()
    for chain in block.branches.values():
        gain = chain.merge().kernel.flatten(1).norm(dim=1)
        torch.testing.assert_close(gain, torch.ones(16), rtol=1e-3, atol=1e-3)


def test_a_filter_of_zeros_stays_zero_and_can_grow_again():
    block = ACBlock(4, 4, online=True)
    conv = block.branches["square"].conv
    conv.weight.data[1] = 0
    block.init_gains_()
    assert not conv.kernel()[1].any()
    (block(torch.randn(2, 4, 5, 5)) * torch.randn(2, 4, 5, 5)).sum().backward()
    assert torch.isfinite(conv.weight.grad).all() and conv.weight.grad[1].any()


def test_filters_have_the_norm_of_their_gain_whatever_their_weights():
    conv = NormedConv2d(nn.Conv2d(6, 5, 3, bias=False)).double()
    conv.gain.data = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    kernel = conv.kernel()
    torch.testing.assert_close(kernel.flatten(1).norm(dim=1), conv.gain.abs(), rtol=1e-4, atol=0)
    conv.weight.data *= 7
    torch.testing.assert_close(conv.kernel(), kernel, rtol=1e-4, atol=0)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.kernel()))


def test_wide_branches_on_small_maps_are_run_not_merged():
    """Merging 160 -> 960 -> 160 costs more than running it on two 3x3 maps; on 64 large ones it pays."""
    block = RepInvertedResidual(160, 160, online=True)
    assert not block._merging_pays(torch.empty(2, 160, 3, 3))
    assert block._merging_pays(torch.empty(64, 160, 28, 28))


def test_half_precision_merges_in_float32():
    block = DiverseBranchBlock(8, 8, online=True)
    scramble_(block)
    x = torch.randn(2, 8, 9, 9)
    kernels = []
    original = block._sum_branches
    block._sum_branches = lambda dtype: kernels.append(original(dtype)) or kernels[-1]
    with torch.autocast("cpu", torch.bfloat16):
        out = block._run_merged(x)
    assert out.dtype == torch.bfloat16 and kernels[0].kernel.dtype == torch.float32
    torch.testing.assert_close(kernels[0].kernel, original(torch.float64).kernel.float())
    half = block.bfloat16()
    assert half._run_merged(x.bfloat16()).dtype == torch.bfloat16 and kernels[1].kernel.dtype == torch.float32


def test_network_trains_merges_and_loads():
    torch.manual_seed(0)
    net = RepMobileNetV2(0.35, online=True, out_indices=(2, 7))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(2):
        loss = sum((out * torch.randn_like(out)).sum() for out in net(torch.randn(2, 3, 64, 64)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())

    calibrate_random_bn_(net, torch.randn(4, 3, 64, 64))
    merged, report = reparameterize(net)
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    deployed = RepMobileNetV2(0.35, deploy=True, out_indices=(2, 7)).eval()
    deployed.load_state_dict(merged.state_dict())
    x = torch.randn(1, 3, 33, 47)
    assert all(torch.equal(a, b) for a, b in zip(deployed(x), merged(x)))


def test_train_mode_is_refused():
    with pytest.raises(RuntimeError, match="post_bn is in train mode"):
        RepVGGBlock(4, 4, online=True).merged_kernel()


def test_only_one_convolution_runs_in_a_step():
    block: RepBlock = DiverseBranchBlock(8, 8, online=True)
    calls = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        block(torch.randn(4, 8, 28, 28))
    assert calls.count(torch.conv2d) == 1


def test_gradients_of_normed_filters_and_of_the_merged_sum():
    torch.manual_seed(0)
    conv = NormedConv2d(nn.Conv2d(2, 3, 3, bias=False)).double()

    def kernel(weight, gain):
        return torch.func.functional_call(conv, {"weight": weight, "gain": gain}, (torch.eye(3).double()[None, None],))

    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    conv.forward = lambda _: conv.kernel()
    assert torch.autograd.gradcheck(kernel, (weight, gain))

    large = [torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    small = torch.randn(2, 3, 1, 3, dtype=torch.float64, requires_grad=True)
    for kernels in ([large[0], small], [*large, small], [small, large[0], small]):
        assert torch.autograd.gradcheck(lambda *ks: merge_sum([(k, None) for k in ks])[0], kernels)
    with torch.no_grad():
        plain = merge_sum([(k, None) for k in (*large, small)])[0]
    torch.testing.assert_close(merge_sum([(k, None) for k in (*large, small)])[0], plain)
