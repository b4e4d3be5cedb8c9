"""The equivalence check itself: it must see what is wrong."""

import copy
import dataclasses
import math
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rep_plugin
from rep_plugin.errors import ArgumentError, EquivalenceError, InconclusiveWarning
from rep_plugin.measure.differences import compare_outputs
from rep_plugin.measure.verify import default_inputs, verify_equivalence
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import randomise_bn_


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1, groups=8)
    )
    return calibrate_random_bn_(model, torch.randn(4, 3, 12, 12))


def test_equal_models_pass_and_are_left_as_they_are():
    model = net()
    state = copy.deepcopy(model.state_dict())
    found = verify_equivalence(model, copy.deepcopy(model), default_inputs(model), ["0", "1", "3"])
    assert found.total.max_abs == 0 and found.conclusive and set(found.blocks) == {"0", "1", "3"}
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in model.state_dict().items())


def test_the_first_block_that_is_off_is_named():
    model = net()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[1].running_mean[3] += 1e-6
        wrong[3].weight[0] += 1
    with pytest.raises(EquivalenceError, match=r"block '1' differs by .*e-0[567] relative .* in channel 3 of image"):
        verify_equivalence(model, wrong, default_inputs(model), ["0", "1", "3"])


def test_a_fault_outside_the_blocks_is_found_end_to_end():
    model = net()
    wrong = copy.deepcopy(model)
    wrong[2] = nn.ReLU6()
    model[1].weight.data *= 20
    wrong[1].weight.data *= 20
    with pytest.raises(EquivalenceError, match="whole model differs"):
        verify_equivalence(model, wrong, default_inputs(model), ["0", "1", "3"])


def test_a_fault_of_the_border_alone_is_told_apart():
    inside = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    expected = inside(torch.ones(1, 1, 6, 6))
    got = expected.clone()
    got[..., 0, 0] += 1
    difference = compare_outputs(expected, got)
    assert difference.border_rel == difference.max_rel > 0 and difference.interior_rel == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_outputs_fail_even_where_both_agree(value):
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = value
    with pytest.raises(EquivalenceError):
        verify_equivalence(model, copy.deepcopy(model), default_inputs(model))


def test_shapes_must_agree():
    with pytest.raises(EquivalenceError, match=r"expected \[\(1, 2\)\], got \[\(2, 1\)\]"):
        compare_outputs(torch.zeros(1, 2), torch.zeros(2, 1))
    with pytest.raises(EquivalenceError, match="shapes differ"):
        compare_outputs((), ())


@dataclasses.dataclass
class Found:
    scores: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class Labeller(nn.Module):
    """Gives numbers of every kind, in a container of the user's choice; ``flip`` changes one kind alone."""

    def __init__(self, pack, flip=""):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pack, self.flip = nn.Conv2d(3, 4, 3), pack, flip

    def forward(self, x):
        y = self.conv(x)
        labels, mask = y.argmax(1), y > 0.5
        wave = torch.complex(y, y)
        if self.flip == "labels":
            labels[:, 0, 0] += 1
        if self.flip == "mask":
            mask = mask ^ (torch.arange(mask.shape[-1]) == 2)
        if self.flip == "wave":
            wave = wave.conj()
        return self.pack(y, labels, mask, wave)


PACKS = {
    "dict": lambda y, labels, mask, wave: dict(y=y, labels=labels, mask=mask, wave=wave),
    "tuple": lambda y, labels, mask, wave: (y, [labels, (mask, wave)]),
    "dataclass": lambda y, labels, mask, wave: (Found(y, labels, mask), wave),
    "UserDict": lambda y, labels, mask, wave: UserDict(y=y, labels=labels, rest=UserDict(mask=mask, wave=wave)),
}


@pytest.mark.parametrize("flip", ["", "labels", "mask", "wave"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_every_tensor_of_an_output_is_compared(pack, flip):
    model, other = Labeller(pack).eval(), Labeller(pack, flip).eval()
    inputs = default_inputs(model)
    if not flip:
        assert verify_equivalence(model, other, inputs).total.max_rel == 0
        return
    words = {
        "labels": "values of an output of torch.int64 differ",
        "mask": "output of torch.bool differ",
        "wave": "model",
    }
    with pytest.raises(EquivalenceError, match=words[flip]):
        verify_equivalence(model, other, inputs)


class Comparer(nn.Module):
    """Compares two maps that are equal but for rounding, beside a comparison that is none."""

    def __init__(self, rounding=0.0, shift=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 4, 3)
        self.b = copy.deepcopy(self.a)
        self.rounding, self.shift = rounding, shift

    def forward(self, x):
        a, b = self.a(x), self.b(x) * (1 + self.rounding)
        return dict(a=a, tie=a > b, clear=a > self.shift)


def test_what_rounding_decides_is_no_difference():
    model, rounded = Comparer().eval(), Comparer(rounding=1e-15).eval()
    inputs = default_inputs(model)
    x = inputs[0].double()
    assert not torch.equal(*(copy.deepcopy(one).double()(x)["tie"] for one in (model, rounded)))
    assert verify_equivalence(model, rounded, inputs).total.max_rel == 0
    with pytest.raises(EquivalenceError, match="output of torch.bool differ"):
        verify_equivalence(model, Comparer(rounding=1e-15, shift=1e-3).eval(), inputs)


def test_types_must_agree():
    with pytest.raises(EquivalenceError, match="types differ: expected torch.float32, got torch.complex64"):
        compare_outputs(torch.ones(2), torch.ones(2, dtype=torch.complex64))


def test_a_blind_check_says_so():
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(1e-9)
    with pytest.warns(InconclusiveWarning, match="another input changes the output by .* only"):
        verify_equivalence(model, copy.deepcopy(model), default_inputs(model))


def test_an_odd_size_that_the_reference_cannot_take_is_left_out():
    class EvenOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.pixel_unshuffle(self.conv(x), 2)

    model = EvenOnly()
    found = verify_equivalence(model, copy.deepcopy(model), default_inputs(model), ["conv"])
    assert found.conclusive
    with pytest.raises(ArgumentError, match=r"^inputs\[0\].*does not go through EvenOnly"):
        verify_equivalence(model, copy.deepcopy(model), default_inputs(model, torch.randn(1, 3, 9, 9)))


def test_default_inputs_follow_example_then_timm_then_first_convolution():
    model = net()
    assert [tuple(x.shape) for x in default_inputs(model)] == [(1, 3, 64, 64), (1, 3, 63, 63)]
    model.pretrained_cfg = {"input_size": (3, 96, 96)}
    assert [tuple(x.shape) for x in default_inputs(model)] == [(1, 3, 96, 96), (1, 3, 95, 95)]
    example = torch.randn(1, 3, 31, 20)
    inputs = default_inputs(model, example)
    assert torch.equal(inputs[0], example) and inputs[0] is not example and tuple(inputs[1].shape) == (1, 3, 31, 19)
    with pytest.raises(ValueError, match="float tensor"):
        default_inputs(model, [1, 2])


@pytest.mark.parametrize("bias", [True, False])
def test_fast_depthwise_of_the_check_is_torchs(bias):
    from rep_plugin.measure.verify import _run

    for stride, padding, dilation in [(1, 1, 1), (2, (0, 2), 2), ((2, 1), 3, (1, 2))]:
        conv = nn.Conv2d(6, 6, (3, 2), stride, padding, dilation, groups=6, bias=bias).double()
        x = torch.randn(2, 6, 13, 12, dtype=torch.float64)
        assert (_run(conv, x) - conv(x)).abs().max() < 1e-13


def test_calibrated_bn_is_random_fitting_and_in_eval_mode():
    model = net()
    bn = model[1]
    assert not model.training and (bn.weight < 0).any() and bn.momentum == 0.1
    x = model[0](torch.randn(64, 3, 12, 12))
    assert (x.mean((0, 2, 3)) - bn.running_mean).abs().max() < 0.5


CASTS = {
    "float()": lambda conv, x: conv(x.float()),
    "to": lambda conv, x: conv(x.to(torch.float32)).to(dtype=torch.float32),
    "grid": lambda conv, x: F.grid_sample(conv(x), F.affine_grid(torch.eye(2, 3)[None].repeat(len(x), 1, 1), x.shape)),
    "buffer": lambda conv, x: conv(x) * torch.linspace(0, 1, x.shape[-1], dtype=torch.float32),
    "in the middle": lambda conv, x: torch.sigmoid(conv(x).float()).type(torch.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_forward_that_casts_to_float32_is_proven_in_float64(name):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))

        def forward(self, x):
            return CASTS[name](self.conv, x)

    model = randomise_bn_(Casting()).eval()
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 9, 11))
    assert 0 < report.max_rel_error < 1e-12 and len(report.blocks) == 1
    merged.conv[0].bias.data += 1e-3
    with pytest.raises(EquivalenceError):
        verify_equivalence(model, merged, [torch.randn(2, 3, 9, 11)])
