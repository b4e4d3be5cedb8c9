"""Which of a network's own BNs are folded, and where: on the graph of the model or of its traceable parts."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import rep_plugin
from rep_plugin.reparam.fold_bn import find_pairs_by_parts, fold_conv_bn_
from rep_plugin.reparam.fx_parts import trace_parts
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error


class Untraceable(nn.Module):
    """Its forward asks a value; its children do not."""

    def __init__(self, *children: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        for part in self.parts:
            x = part(x) if x.abs().sum() > -1 else x
        return x


def conv_bn(c_in=4, c_out=4, k=3, padding=1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, padding=padding), nn.BatchNorm2d(c_out), nn.ReLU())


def check(model: nn.Module, folds: set, size=(4, 9, 9)) -> None:
    calibrate_random_bn_(model, torch.randn(4, *size)).double()
    x = torch.randn(2, *size).double()
    expected = model(x)
    pairs, _ = fold_conv_bn_(model)
    assert set(pairs) == folds and relative_error(expected, model(x)) < 1e-12


def test_parts_of_an_untraceable_model():
    model = Untraceable(conv_bn(), Untraceable(conv_bn(), nn.BatchNorm2d(4)), nn.Sequential(conv_bn()))
    parts, failures = trace_parts(model)
    assert [part.name for part in parts] == ["parts.0", "parts.1.parts.0", "parts.2"]
    assert len(failures) == 1 and failures[0].startswith(
        "1 module(s), first 'parts.1': torch.fx cannot trace Untraceable:"
    )
    names = ["parts.0.0", "parts.1.parts.0.0", "parts.2.0.0"]
    assert find_pairs_by_parts(model)[0] == [(name, f"{name[:-1]}1") for name in names]
    check(model, {(name, f"{name[:-1]}1", False) for name in names})
    assert isinstance(model.parts[1].parts[1], nn.BatchNorm2d)


def test_a_layer_that_stands_elsewhere_too_is_not_folded():
    shared = nn.Conv2d(4, 4, 1)
    model = Untraceable(nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(shared, nn.ReLU()))
    check(model, set())


def test_arguments_keep_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x, skip=None, norm: bool = True):
            x = self.conv(x)
            x = x if skip is None else self.other(x)
            return self.norm(x) if norm else x

    check(Optional(), {("conv", "norm", False)})


def test_bn_in_front_of_unpadded_convolutions():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
            self.a, self.b = nn.Conv2d(4, 6, 3, 2), nn.Conv2d(4, 6, 3, 2, groups=2)

        def forward(self, x):
            x = self.drop(self.norm(torch.relu(x)))
            return self.a(x) + self.b(x)

    check(Two(), {("a", "norm", True), ("b", "norm", True)})


def test_bn_in_front_of_padding_or_of_another_reader_stays():
    class Read(nn.Module):
        def __init__(self, padding):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1 + 2 * padding, padding=padding)

        def forward(self, x):
            x = self.norm(x)
            return self.conv(x) + (0 if self.conv.padding[0] else x)

    check(Read(1), set())
    check(Read(0), set())


def test_bns_on_both_sides_are_folded_at_once():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    calibrate_random_bn_(model, torch.randn(4, 4, 9, 9))
    _, report = rep_plugin.reparameterize(model)  # float32 weights must be the proven ones, rounded once
    assert [block.kind for block in report.blocks] == ["BN-Conv (0)", "Conv-BN (2)"] and report.max_rel_error < 1e-12


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("conv", [Standardised(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
def test_look_alikes_are_not_folded(conv):
    check(nn.Sequential(conv, nn.BatchNorm2d(4)), set())


BEHIND = {
    "Linear": (nn.Sequential(nn.Flatten(), nn.Linear(8 * 25, 6, bias=False), nn.BatchNorm1d(6)), 2),
    "Conv1d": (nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6)), 2),
    "Conv3d": (nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Conv3d(4, 6, (1, 3, 3)), nn.BatchNorm3d(6)), 2),
    "ConvTranspose2d": (nn.Sequential(nn.Identity(), nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)), 2),
    "grouped": (nn.Sequential(nn.Identity(), nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)), 2),
    "frozen": (nn.Sequential(nn.Identity(), nn.Conv2d(8, 6, 3), FrozenBatchNorm2d(6)), 2),
}


@pytest.mark.parametrize("name", BEHIND)
def test_bns_behind_other_layers_and_frozen_ones_are_folded(name):
    net, index = BEHIND[name]
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    net = net.double().eval()
    for key, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5) if "running_var" in key else tensor.data.normal_()
    merged, report = rep_plugin.reparameterize(net, x)
    assert isinstance(merged[index], nn.Identity) and len(report.blocks) == 1
    assert torch.allclose(merged(x), net(x), rtol=1e-12, atol=1e-12)
    if name != "frozen":
        return
    kept = nn.Sequential(nn.ReLU(), net[index]).eval()  # nothing before it takes it in: it stays what it was
    assert fold_conv_bn_(kept)[0] == [] and kept[1] is net[index]
