"""TorchScript and torch.fx of training blocks: the same numbers as the blocks themselves."""

import copy

import pytest
import torch
from torch import fx, nn

from rep_plugin.backbones.repvgg import RepVGG
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.families import DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.blocks.layers import DilatedAvgPool2d, Scale
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(3, 4, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def odd_chains() -> RepBlock:
    """Two windows in a chain, a factor in front of one, a bias, a strided 1x1, an average, and more padding than "same"."""
    conv = nn.Conv2d(4, 6, 3, 2, dilation=2, groups=2)
    average = DilatedAvgPool2d(3, 2, 2)
    return RepBlock(
        4,
        6,
        3,
        {
            "scaled": Chain({"scale": Scale(4, 0.7), "bn": nn.BatchNorm2d(4), "conv": conv, "out": nn.Conv2d(6, 6, 1)}),
            "point": Chain({"conv": nn.Conv2d(4, 6, 1, 2, bias=False), "bn": nn.BatchNorm2d(6)}),
            "average": Chain({"conv": nn.Conv2d(4, 6, 1), "bn": nn.BatchNorm2d(6), "pool": average}),
        },
        stride=2,
        padding=3,
        dilation=2,
    )


BLOCKS = {
    "repvgg": lambda: RepVGGBlock(4, 4, post_bn=True),
    "mobileone": lambda: MobileOneBlock(4, 8, 3, 2, groups=4),
    "large": lambda: LargeKernelBlock(4, 4, 7, groups=4),
    "dbb": lambda: DiverseBranchBlock(4, 6, 3),
    "dbb strided": lambda: DiverseBranchBlock(4, 6, 3, 2, dilation=2),
    "dbb unpadded": lambda: DiverseBranchBlock(4, 6, 3, padding=0),
    "bottleneck": lambda: RepInvertedResidual(4, 4, 1, 6, ("bottleneck", "identity", "avgpool", "conv1x1", "conv3x3"), True),
    "odd chains": odd_chains,
}  # fmt: skip


def trained(name: str) -> nn.Sequential:
    net = nn.Sequential(BLOCKS[name](), nn.ReLU()).double()
    return calibrate_random_bn_(net, X)


@pytest.mark.parametrize("name", BLOCKS)
def test_scripted_blocks_compute_train_and_save(name, tmp_path):
    net = trained(name)
    scripted = torch.jit.script(copy.deepcopy(net))
    assert relative_error(net(X), scripted(X)) < 1e-12
    grads = []
    for model in (net.train(), scripted.train()):
        model(X).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(*grads, strict=True) if a.abs().max() > 1e-6)
    states = net.state_dict(), scripted.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(a.double(), states[1][key].double(), rtol=1e-12) for key, a in states[0].items())
    scripted.eval().save(tmp_path / "block.pt")
    assert relative_error(net.eval()(X), torch.jit.load(tmp_path / "block.pt")(X)) < 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_a_traced_block_is_one_node(name):
    net = trained(name)
    traced = fx.symbolic_trace(net)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1"] and torch.equal(traced(X), net(X))
    net[0].switch_to_deploy()
    targets = [node.target for node in fx.symbolic_trace(net).graph.nodes if node.op == "call_module"]
    assert targets == ["0.reparam_conv", "0.act", "1"]  # so that passes over graphs see the convolution


def test_deployed_networks_script(tmp_path):
    small = dict(depths=(1, 1, 1, 1), widths=(0.25,) * 4)
    net = calibrate_random_bn_(RepVGG(small).double().requires_grad_(False), torch.randn(4, 3, 33, 32).double())
    stem = copy.deepcopy(net.stem)
    stem.switch_to_deploy()
    x = torch.randn(2, 3, 33, 32).double()
    torch.jit.script(stem).save(tmp_path / "stem.pt")
    assert relative_error(net.stem(x), torch.jit.load(tmp_path / "stem.pt")(x)) < 1e-12


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: RepVGGBlock(4, 4, online=True), "the online form"),
        (lambda: RepInvertedResidual(4, 4, anneal=True), "AnnealedBottleneck"),
    ],
)
def test_forms_that_torchscript_does_not_take(make, kind):
    with pytest.raises(TypeError, match=f"TorchScript does not take {kind}: call rep_plugin.reparameterize first"):
        torch.jit.script(make())
