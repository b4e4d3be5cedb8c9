"""Which runs are found in real networks, by tracing alone."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from mmpretrain.registry import MODELS
from torch import nn

from rep_plugin.depth.segments import find_segments
from tests.test_depth.nets import ZOO, build, segments_of

X = torch.randn(1, 3, 33, 33)


def whole_blocks(model: nn.Module) -> dict[str, bool]:
    """Inverted residuals that become one convolution: block -> it ends in a sum."""
    found = segments_of(model, X)
    return {s.block: s.shortcut for s in found if s.block and len(s.shapes) == 3 and s.macs_after < s.macs_before}


def test_inverted_residuals_of_three_libraries_are_found_alike():
    timms = whole_blocks(timm.create_model("mobilenetv2_035"))
    mm = MODELS.build(dict(type="ImageClassifier", backbone=dict(type="MobileNetV2", widen_factor=0.35)))
    assert len(timms) == 16 and sum(timms.values()) == 10
    assert list(whole_blocks(mm).values()) == list(timms.values())
    torchs = torchvision.models.mobilenet_v2(width_mult=0.35)
    assert list(whole_blocks(torchs).values()) == list(timms.values())


@pytest.mark.parametrize("name", ZOO)
def test_costs_are_those_of_the_layers(name):
    model = build(name)
    found, _ = find_segments(model, X)
    assert found
    for one in found:
        names = [name for name in one.layers if isinstance(model.get_submodule(name), nn.Conv2d)]
        convs = [model.get_submodule(name) for name in names]
        assert [tuple(conv.weight.shape) for conv in convs] == list(one.shapes)
        assert one.merged[0] == one.shapes[-1][0] and one.merged[1] * one.groups == convs[0].in_channels
        assert one.activations and one.macs_after > 0 and one.name == f"{names[0]}..{names[-1]}"


def test_residual_blocks_end_in_their_sum_and_shortcut():
    found = {s.block or s.name: s for s in segments_of(timm.create_model("resnet18"), X)}
    plain = next(s for s in found.values() if s.layers[0] == "layer1.0.conv1" and s.shortcut)
    assert plain.merged == (64, 64, 5, 5) and plain.activations == ("layer1.0.act1",) and not plain.shortcut_layers
    strided = next(s for s in found.values() if s.layers[0] == "layer2.0.conv1" and s.shortcut)
    assert strided.shortcut_layers == ("layer2.0.downsample.0", "layer2.0.downsample.1")
    assert (strided.merged, strided.stride, strided.padding) == ((128, 64, 7, 7), (2, 2), (3, 3))


def test_runs_go_across_blocks():
    names = {s.name for s in segments_of(timm.create_model("mobilenetv2_035"), X)}
    assert "conv_stem..blocks.1.0.conv_pwl" in names and "blocks.6.0.conv_pw..conv_head" in names
    assert not any(
        s.layers[0].startswith("blocks.1.1") and "blocks.2" in s.name
        for s in segments_of(timm.create_model("mobilenetv2_035"))
    )


class Functional(nn.Module):
    """Activations without a name, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.c(self.act(F.relu(self.b(self.a(x))))))


def test_what_no_name_stands_for_is_said():
    found, notes = find_segments(Functional().eval())
    assert not found
    assert "1 activations are functions in a forward" in notes[0]
    assert "1 activations are called more than once, first 'act'" in notes[1]


class Read(nn.Module):
    """Two convolutions; something else reads what is between them, or they are hooked, or normalise a group."""

    def __init__(self, how: str):
        super().__init__()
        self.a, self.act, self.b, self.how = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), how
        if how == "parameters":
            self.act = nn.PReLU()
        if how == "hook":
            self.act.register_forward_hook(lambda module, args, output: output * 2)
        if how == "reflect":
            self.b = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        y = self.act(self.a(x))
        return self.b(y) + y.mean() if self.how == "read" else self.b(y)


@pytest.mark.parametrize("how", ["read", "hook", "parameters", "reflect"])
def test_what_would_compute_something_else_is_left_alone(how):
    assert not find_segments(Read(how).eval())[0] and find_segments(Read("plain").eval())[0]
