"""TorchScript takes deployed blocks and networks; to torch.fx a training block is one node."""

import copy

import pytest
import timm
import torch
from torch import fx, nn

from rep_plugin.blocks.families import DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.errors import NotMergeableError
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(3, 4, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BLOCKS = {
    "repvgg": lambda: RepVGGBlock(4, 4, post_bn=True),
    "online": lambda: RepVGGBlock(4, 4, online=True),
    "mobileone": lambda: MobileOneBlock(4, 8, 3, 2, groups=4, act=nn.ReLU()),
    "large": lambda: LargeKernelBlock(4, 4, 7, groups=4),
    "dbb": lambda: DiverseBranchBlock(4, 6, 3, 2, dilation=2),
    "bottleneck": lambda: RepInvertedResidual(4, 4, 1, 6, ("bottleneck", "identity", "avgpool", "conv1x1", "conv3x3")),
    "annealed": lambda: RepInvertedResidual(4, 4, anneal=True),
}


def trained(name: str) -> nn.Sequential:
    return calibrate_random_bn_(nn.Sequential(BLOCKS[name](), nn.ReLU()).double(), X)


@pytest.mark.parametrize("name", BLOCKS)
def test_training_forms_are_refused_in_one_line_and_deployed_ones_script(name, tmp_path):
    net = trained(name)
    kind = type(net[0]).__name__
    with pytest.raises(NotMergeableError, match=f"call rep_plugin.reparameterize first, got {kind}") as caught:
        torch.jit.script(net)
    assert str(caught.value).startswith("TorchScript takes deployed models only") and "\n" not in str(caught.value)
    if name == "annealed":
        net[0].branches["bottleneck"].set_alpha(1.0)
        net[0].act.set_alpha(1.0)
    expected = net(X)
    net[0].switch_to_deploy()
    scripted = torch.jit.script(net)
    scripted.save(tmp_path / "block.pt")
    for form in (net, scripted, torch.jit.load(tmp_path / "block.pt")):
        assert relative_error(expected, form(X)) < 1e-12
    assert scripted.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_traced_block_is_one_node(name):
    net = trained(name)
    traced = fx.symbolic_trace(net)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1"] and torch.equal(traced(X), net(X))
    if name == "annealed":
        return
    net[0].switch_to_deploy()
    targets = [node.target for node in fx.symbolic_trace(net).graph.nodes if node.op == "call_module"]
    assert targets == ["0.reparam_conv", "0.act", "1"]  # so that passes over graphs see the convolution


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "online"])
def test_training_forms_are_traced_and_exported(name):
    net = trained(name).eval()
    for form in (torch.jit.trace(copy.deepcopy(net), X), torch.export.export(net, (X,)).module()):
        assert relative_error(net(X), form(X)) < 1e-12


@pytest.mark.parametrize("name", ["rep_mobilenetv2_035", "rep_repvgg_d2se", "rep_mobileone_s4", "rep_replknet_31b"])
def test_deployed_networks_script(name):
    net = timm.create_model(name, num_classes=3, deploy=True).eval()
    x = torch.randn(1, 3, 33, 32)
    assert relative_error(net(x), torch.jit.script(net)(x)) < 1e-5
    with pytest.raises(NotMergeableError, match="TorchScript takes deployed models only"):
        torch.jit.script(timm.create_model("rep_mobilenetv2_035"))
