"""Errors are held against their own channel and image, and what rounding makes of a model is told apart from faults."""

import copy
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rep_plugin
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.errors import EquivalenceError, InconclusiveWarning
from rep_plugin.measure.differences import compare_outputs
from rep_plugin.measure.verify import default_inputs, require_rounded, verify_equivalence
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import examples

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """Three maps side by side, the first of them huge; ``fault`` is added to one channel of the second."""

    def __init__(self, fault=0.0, pack=lambda *maps: torch.cat(maps, 1), huge=1e13):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.y, self.z = (nn.Conv2d(3, 4, 3) for _ in range(3))
        self.fault, self.pack, self.huge = fault, pack, huge

    def forward(self, x):
        y = self.y(x)
        y[:, 1] = y[:, 1] + self.fault
        return self.pack(self.huge * self.a(x), y, self.z(x))


PACKS = {
    "maps": lambda *maps: torch.cat(maps, 1),
    "vectors": lambda *maps: torch.cat(maps, 1).mean((2, 3)),
    "channels last": lambda *maps: torch.cat(maps, 1).permute(0, 2, 3, 1),
    "sequences": lambda *maps: torch.cat(maps, 1).flatten(2).transpose(1, 2),
    "dict": lambda *maps: {"all": torch.cat(maps, 1), "first": maps[0]},
    "complex": lambda *maps: torch.complex(torch.cat(maps, 1), torch.cat(maps, 1)),
    "flat": lambda *maps: torch.cat(maps, 1)[0].flatten(),
}


@pytest.mark.parametrize("huge", [1e6, 1e13, 1e30])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_fault_in_a_channel_beside_huge_ones_is_found(pack, huge):
    right, wrong = Scaled(pack=pack, huge=huge), Scaled(2.3, pack, huge)
    assert verify_equivalence(right, Scaled(pack=pack, huge=huge), default_inputs(right)).total.max_rel == 0
    with pytest.raises(EquivalenceError, match=r"the whole model differs by .* relative \(tolerance 1e-09\) in "):
        verify_equivalence(right, wrong, default_inputs(right))
    with pytest.raises(EquivalenceError, match="the whole model differs"):
        verify_equivalence(right, Scaled(1e-5, pack, huge), default_inputs(right))


def test_the_channel_and_the_image_are_named():
    right = Scaled(pack=PACKS["dict"])
    with pytest.raises(EquivalenceError, match="in channel 5 of image [0-2] of output 'all'"):
        verify_equivalence(right, Scaled(2.3, PACKS["dict"]), default_inputs(right))


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_every_image_counts_beside_brighter_ones(row):
    expected = torch.randn(4, 5, 6, 6, dtype=torch.float64) * torch.tensor([1e-9, 1.0, 1e9, 1e-3]).view(4, 1, 1, 1)
    got = expected.clone()
    got[row, 2] *= 1 + 1e-6
    found = compare_outputs(expected, got)
    assert 1e-7 < found.max_rel < 1.1e-6 and found.where == f"channel 2 of image {row}"


class Clamped(nn.Module):
    def __init__(self, low=-math.inf, high=math.inf):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.limits = nn.Conv2d(3, 4, 3, padding=1), (low, high)

    def forward(self, x):
        return self.conv(x).clamp(*self.limits)


class Deadened(Clamped):
    """Small values become zero."""

    def forward(self, x):
        y = self.conv(x)
        return y * (y.abs() > 0.01)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("wrong", [Clamped(-28, 28), Clamped(high=100), Deadened()])
def test_faults_at_other_scales_are_found(wrong, images):
    with torch.no_grad():
        wrong.conv.bias.fill_(0.1)
    right = Clamped()
    right.conv = copy.deepcopy(wrong.conv)
    with pytest.raises(EquivalenceError, match="the whole model differs"):
        verify_equivalence(right, wrong, [X[:images]])


@pytest.mark.parametrize("number", [1, 3, 4])
def test_faults_of_batches_of_one_and_of_several_are_found(number):
    class Batches(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.wrong = nn.Conv2d(3, 4, 3), wrong

        def forward(self, x):
            return self.conv(x) * (1.01 if self.wrong and len(x) == number else 1)

    given = X if number == 4 else X[:1]
    with pytest.raises(EquivalenceError, match="the whole model differs"):
        verify_equivalence(Batches(False), Batches(True), default_inputs(Batches(False), given))


def test_one_image_runs_alone_where_no_other_size_is_taken():
    sizes = []

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 12 * 12, 4)

        def forward(self, x):
            if not x.is_meta:
                sizes.append(len(x))
            return self.fc(x.flatten(1))

    model = Fixed()
    verify_equivalence(model, copy.deepcopy(model), default_inputs(model, X))
    assert set(sizes) == {4, 1}


def test_a_model_of_one_number_of_images_gets_as_many_at_each_scale():
    largest = []

    class TwoOnly(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(2 * 3 * 12 * 12, 8)

        def forward(self, x):
            largest.append(x.abs().max().item())
            return self.fc(x.flatten()).view(2, 4)

    model = TwoOnly()
    found = verify_equivalence(model, copy.deepcopy(model), default_inputs(model, X))
    assert found.conclusive and [note.split(" in ")[0] for note in found.notes] == ["the forward decides by a value"]
    assert max(largest) > 1e3 and min(largest) < 1e-2


def test_scales_at_which_the_model_is_not_finite_are_left_out_and_said():
    class Overflowing(nn.Module):
        def __init__(self, factor=1.0):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

        def forward(self, x):
            return torch.exp(self.conv(x)) * self.factor

    model = Overflowing()
    found = verify_equivalence(model, Overflowing(), default_inputs(model))
    assert found.notes == [
        "images at 1000 times their values are not compared: the given model's own output is not finite"
    ]
    with pytest.raises(EquivalenceError, match="the whole model differs"):
        verify_equivalence(model, Overflowing(1 + 1e-8), default_inputs(model))


def badly_scaled(exponents, blocks=True, seed=0):
    """A network whose channels are spread over many magnitudes, and undone in the next layer."""
    torch.manual_seed(seed)
    width = len(exponents)
    first = RepVGGBlock(3, width) if blocks else nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    model = calibrate_random_bn_(nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, width, 1)), torch.randn(4, 3, 9, 9))
    scale = torch.tensor([10.0**e for e in exponents])
    with torch.no_grad():
        for bn in model.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.weight.mul_(scale)
                bn.bias.mul_(scale)
        model[2].weight.div_(scale.view(1, -1, 1, 1))
    return model


EXPONENTS = st.lists(st.floats(-8, 8), min_size=2, max_size=6)


@settings(max_examples=examples(25), deadline=None)
@given(EXPONENTS, st.booleans(), st.integers(0, 99))
def test_correct_merges_of_badly_scaled_networks_are_not_blamed(exponents, blocks, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = rep_plugin.reparameterize(badly_scaled(exponents, blocks, seed), torch.randn(1, 3, 9, 9))
    assert report.max_rel_error <= 1e-9 and not report.notes


@settings(max_examples=examples(25), deadline=None)
@given(EXPONENTS, st.integers(0, 5), st.sampled_from([1 + 1e-6, 1 - 1e-6]), st.integers(0, 99))
def test_a_merge_that_is_wrong_in_one_small_channel_is_found(exponents, channel, factor, seed):
    model = badly_scaled(exponents, seed=seed).double()
    merged, _ = rep_plugin.reparameterize(model, torch.randn(1, 3, 9, 9), fold_bn=False)
    channel %= len(exponents)
    with torch.no_grad():
        for parameter in merged[0].parameters():
            parameter[channel] *= factor
    with pytest.raises(EquivalenceError, match=f"block '0' differs by .* in channel {channel} of image"):
        verify_equivalence(model, merged, default_inputs(model, X), ["0"])


class IllConditioned(nn.Module):
    """The small difference of two large numbers, beside a channel that is not one."""

    def __init__(self, size=1e8, rounding=0.0, fault=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.size, self.rounding, self.fault = nn.Conv2d(3, 4, 3), size, rounding, fault

    def forward(self, x):
        y = self.conv(x)
        far = y + self.size * self.conv.weight.sum()
        return torch.cat([y + self.fault, far * (1 + self.rounding) - self.size * self.conv.weight.sum()], 1)


@pytest.mark.parametrize("size", [1e8, 1e11, 1e15])
def test_what_rounding_alone_decides_is_reported_and_not_blamed(size):
    model = IllConditioned(size)
    with pytest.warns(
        InconclusiveWarning, match="the model is ill-conditioned: rounding alone may change channel [4-7]"
    ):
        found = verify_equivalence(model, IllConditioned(size, 1e-15), default_inputs(model, X))
    assert found.total.max_rel <= 1e-9 and "equality proves little there" in found.notes[0]
    with pytest.raises(EquivalenceError, match="whole model differs .* in channel [0-3]"):
        verify_equivalence(model, IllConditioned(size, 1e-15, 1e-7), default_inputs(model, X))
    with pytest.raises(EquivalenceError, match="whole model differs"):
        verify_equivalence(model, IllConditioned(size, 1e-7), default_inputs(model, X))


def test_dead_channels_are_neither_blamed_nor_called_ill_conditioned():
    class Dead(nn.Module):
        def __init__(self, rounding=0.0):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.rounding = nn.Conv2d(3, 4, 3), rounding
            self.register_buffer("shift", torch.tensor([0.0, 0.0, 1e9, 0.0]).view(1, 4, 1, 1))

        def forward(self, x):
            return F.relu(self.conv(x) - self.shift) + self.rounding * (self.shift - self.shift * (1 - 1e-16))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verify_equivalence(Dead(), Dead(1e-9), default_inputs(Dead(), X))
    assert not found.notes


def test_random_numbers_are_the_same_on_both_sides_and_the_users_go_on():
    class Noisy(nn.Module):
        def __init__(self, factor=1.0):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

        def forward(self, x):
            x = x + torch.randn_like(x)
            return F.dropout(self.conv(x) * self.factor, 0.5, training=True)

    model, same, wrong = Noisy(), Noisy(), Noisy(1 + 1e-6)
    before = torch.get_rng_state()
    assert verify_equivalence(model, same, [X, X[:1]], ["conv"]).total.max_rel == 0
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(EquivalenceError, match="the whole model differs by 1.00e-06"):
        verify_equivalence(model, wrong, [X])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["numbers of Python", "a counter", "a mask"])
def test_a_model_that_is_not_equal_to_itself_is_refused_in_one_line(kind):
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.calls = nn.Conv2d(3, 4, 3), random.random()

        def forward(self, x):
            self.calls += random.random()
            y = self.conv(x)
            if kind == "a mask":
                return y, y > self.calls % 1 - 0.5
            return y * (self.calls if kind == "a counter" else random.random())

    with pytest.raises(EquivalenceError, match="gives another output each time it runs") as caught:
        verify_equivalence(Restless(), Restless(), [X])
    assert "\n" not in str(caught.value)


def test_detectors_whose_findings_rounding_decides_are_left_out_and_said():
    """Scores of one, all equal once they are saturated: which box comes first is a matter of the last digit."""

    class Finder(nn.Module):
        def __init__(self, rounding=0.0):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.rounding = nn.Conv2d(3, 1, 3), rounding

        def forward(self, x):
            scores = self.conv(x).flatten(1)
            best = scores.amax(1, keepdim=True)
            sure = best.abs() > 100
            chosen = torch.where(sure, scores * (1 + self.rounding) / best * 3 >= 3 * (1 - 2e-16), scores > 0.5)
            return [{"found": row[keep]} for row, keep in zip(scores, chosen)]

    found = verify_equivalence(Finder(), Finder(), default_inputs(Finder(), X))
    assert found.conclusive


def test_a_channel_that_vanishes_in_the_type_is_said():
    proven = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    with torch.no_grad():
        proven[0].weight[2] = 1e-50
        proven[0].bias[2] = 1e-60
    converted = copy.deepcopy(proven).float()
    with pytest.raises(
        EquivalenceError, match=r"channel 2 of '0.weight' .* loses .* in torch.float32: values underflow"
    ):
        require_rounded(converted, proven)
    with torch.no_grad():
        proven[0].bias[2] = 0.5  # beside which nobody sees it
    require_rounded(copy.deepcopy(proven).float(), proven)
    with torch.no_grad():
        proven[0].weight[2], proven[0].bias[2] = 0, 0
    require_rounded(copy.deepcopy(proven).float(), proven)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("verb", ["expand", "reparameterize"])
def test_verbs_say_what_their_type_cannot_hold_and_change_nothing(verb, inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    calibrate_random_bn_(model, X)
    model.half()
    with torch.no_grad():
        if verb == "expand":  # the branch's mean is the difference of two numbers that are in range
            model[0].bias[1], model[1].running_mean[1] = -6e4, 6e4
        else:
            model[1].running_var[1], model[1].eps = 1e-7, 0.0
            model[1].weight[1], model[0].bias[1] = 6e4, 6e4
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EquivalenceError, match="channel 1 of .* is out of the range of torch.float16"):
        getattr(rep_plugin, verb)(model, example_input=X.half(), inplace=inplace)
    assert type(model[0]) is nn.Conv2d and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
