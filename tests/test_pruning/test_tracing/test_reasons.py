"""Why a layer stays: the reason names a layer, what holds it and what can be done, and never a file of ours."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rep_plugin
from rep_plugin import plan_pruning
from rep_plugin.backbones import RepMobileNetV2
from rep_plugin.bilinear import BilinearPooling
from rep_plugin.blocks import RepVGGBlock
from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.methods import plan_clusters
from rep_plugin.pruning.planning import Budget
from rep_plugin.pruning.tracing import trace_channels
from rep_plugin.pruning.tracing.groups import find_groups
from tests.test_pruning.nets import Call, ConvBN, Flat, Gate, Pooled, Residual

X = (1, 3, 16, 16)
OURS = {path.name for path in Path(rep_plugin.__file__).parent.rglob("*.py")}


class Used(nn.Module):
    """Uses a layer's weight by itself as well."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(x) * self.conv.weight.sum((0, 2, 3))[None, :, None, None]


PAIR = Call(lambda x: (x,))
NETS = {
    "a step without a rule": lambda: [ConvBN(3, 8), Call(lambda x: torch.cumsum(x, 1)), Pooled(8)],
    "a slice": lambda: [ConvBN(3, 8), Call(lambda x: x[:, :5]), Pooled(5)],
    "group norm": lambda: [ConvBN(3, 8), nn.GroupNorm(2, 8, affine=False), Pooled(8)],
    "softmax": lambda: [ConvBN(3, 8), nn.Softmax(1), Pooled(8)],
    "reduction": lambda: [ConvBN(3, 8), Call(lambda x: x.mean(1, keepdim=True)), Flat(1)],
    "reshape": lambda: [ConvBN(3, 8), Call(lambda x: x.flatten(2).transpose(1, 2).reshape(1, 8, 16, 16)), Pooled(8)],
    "added to the input": lambda: [ConvBN(3, 3), Call(lambda x: x + torch.ones(1, 3, 1, 1)), Pooled(3)],
    "added to a map that stays": lambda: [Call(lambda x: F.pad(x, (0, 0, 0, 0, 0, 5))), Residual(8, 4), Pooled(8)],
    "broadcast": lambda: [
        ConvBN(3, 8),
        Call(lambda x: x.mean((2, 3))[:, :, None] * x.mean((2, 3))[:, None]),
        Flat(1, 8),
    ],
    "used twice": lambda: [ConvBN(3, 8), Used(), Pooled(8)],
    "our backbone": lambda: [RepMobileNetV2(widen_factor=0.1)],
    "our block": lambda: [RepVGGBlock(3, 8), nn.GroupNorm(2, 8, affine=False), Pooled(8)],
    "bilinear": lambda: [ConvBN(3, 8), PAIR, BilinearPooling(8), Call(lambda x: x[0].cumsum(1)), nn.Linear(64, 3)],
    "bilinear of what is not zero": lambda: [ConvBN(3, 8), nn.Sigmoid(), PAIR, BilinearPooling(8)],
    "one channel": lambda: [ConvBN(3, 8), Gate(8, 1), ConvBN(8, 1), Flat(1)],
    "uneven groups": lambda: [ConvBN(3, 4), ConvBN(4, 6, groups=2), ConvBN(6, 6, groups=3), Pooled(6)],
}


def reasons_of(net):
    found = []
    for find in (
        lambda: plan_pruning(net, X, "l1", 0.0),
        lambda: plan_pruning(net, X, "random", 0.0, ignore=["*"]),
        lambda: plan_pruning(net, X, {next(n for n, m in net.named_modules() if hasattr(m, "weight")): [1.0]}, 0.0),
        lambda: plan_clusters(net, X, Budget(prune_fraction=0.1)).plan,
    ):
        try:
            found += find().frozen.values()
        except ArgumentError as error:
            if "can be pruned: " in str(error) or "can be merged: " in str(error):
                found.append(str(error).split(": ", 1)[1])
    return found


@pytest.mark.parametrize("name", NETS)
def test_reasons_name_a_layer_and_no_file_of_ours(name):
    net = nn.Sequential(*NETS[name]()).eval()
    layers, reasons = {n for n, _ in net.named_modules() if n}, reasons_of(net)
    assert reasons
    for reason in reasons:
        assert reason.split("'")[1] in layers, reason
        assert not OURS & set(re.findall(r"\w+\.py", reason)), reason
        assert "\n" not in reason and len(reason) < 220, reason


def reason(*layers, layer="0.conv"):
    groups = find_groups(trace_channels(nn.Sequential(*layers).eval(), X))
    return next(group.reason for group in groups if layer in group.layers)


def test_reasons_cite_the_users_file_and_say_what_to_do():
    text = reason(ConvBN(3, 8), Call(lambda x: torch.cumsum(x, 1)), Pooled(8))
    line = next(i for i, row in enumerate(Path(__file__).read_text().splitlines(), 1) if "text = reason(Conv" in row)
    assert text == (
        f"'0.conv' goes through cumsum in '1' (test_reasons.py:{line}), which pruning cannot follow: rewrite that step, or "
        "plan the parts around it alone"
    )
    text = reason(ConvBN(3, 8), nn.GroupNorm(2, 8, affine=False), Pooled(8))
    assert text.startswith("'0.conv' loses all of its 8 channels or none, by a group norm over channels in '1'")
    assert text.endswith(": take a narrower network for that")
    text = reason(*NETS["added to a map that stays"](), layer="1.second.conv")
    assert text.startswith("'1.second.conv' meets channels that stay, by add in '1' (nets.py:")
    assert reason(ConvBN(3, 8), layer="0.conv").endswith(
        "which keeps its width; prune_outputs=True lets maps lose channels"
    )


def test_files_of_installed_packages_are_told_from_site_packages():
    timm = pytest.importorskip("timm")
    plan = plan_pruning(timm.create_model("edgenext_xx_small", num_classes=3).eval(), (1, 3, 64, 64), "l1", 0.1)
    assert "in 'stages.2.blocks.5' (timm/models/edgenext.py:" in plan.frozen["stages.2.downsample.1"]
