"""Hooks, replaced methods, computed and shared weights, and reads from outside: what must stay is left, and named."""

import re
import types

import pytest
import torch
import torch.nn.functional as F
from timm.models.byobnet import RepVggBlock
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import rep_plugin
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(2, 3, 12, 13, generator=torch.Generator().manual_seed(0)).double()
SCALES = (1e-3, 1.0, 1e3)


def clamp(module, args, out):
    return out.clamp(-0.5, 0.5)


def observe(module, args, out):
    module.seen = out.shape


def halve(module, args):
    return (args[0] / 2,)


def pairs():
    """Three Conv-BN pairs, all of which can be folded."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    return calibrate_random_bn_(model, X.float()).double()


def own_forward(layer):
    layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x).clamp(-0.5, 0.5), layer)


def own_inner(layer):
    layer._conv_forward = types.MethodType(lambda self, x, w, b: nn.Conv2d._conv_forward(self, x, w, b).abs(), layer)


HOOKED = {
    "a hook on the BN": (lambda m: m[4].register_forward_hook(clamp), "'4' has a forward hook .clamp."),
    "a hook on the convolution": (lambda m: m[3].register_forward_hook(clamp), "'3' has a forward hook .clamp."),
    "always called": (lambda m: m[4].register_forward_hook(clamp, always_call=True), "'4' has a forward hook"),
    "an observer": (
        lambda m: m[4].register_forward_hook(observe),
        "hooks that only observe cannot be told from others",
    ),
    "a pre-hook": (lambda m: m[4].register_forward_pre_hook(halve), "'4' has a forward pre-hook .halve."),
    "a backward hook": (lambda m: m[4].register_full_backward_hook(lambda *a: None), "'4' has a backward hook"),
    "the BN's forward": (lambda m: own_forward(m[4]), "'4' has a forward of its own"),
    "the convolution's forward": (lambda m: own_forward(m[3]), "'3' has a forward of its own"),
    "an inner method": (lambda m: own_inner(m[3]), "'3' has a _conv_forward of its own"),
    "weight norm": (lambda m: weight_norm(m[3]), None),
    "spectral norm": (lambda m: spectral_norm(m[3]).eval(), None),
    "parametrized": (lambda m: parametrizations.weight_norm(m[3]), "'3' has weights that are computed in every call"),
    "masked": (lambda m: prune.l1_unstructured(m[3], "weight", 0.5), None),
    "shared": (
        lambda m: m.append(nn.Conv2d(8, 8, 3)) and setattr(m[8], "weight", m[3].weight),
        "'3' shares its weight",
    ),
    "shared memory": (
        lambda m: m.append(nn.Conv2d(8, 8, 3)) and setattr(m[8].weight, "data", m[3].weight.data),
        "'3' shares its weight with '8.weight'",
    ),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", HOOKED)
def test_a_pair_is_left_and_the_rest_is_folded(name, verify):
    model, (attach, why) = pairs(), HOOKED[name]
    attach(model)
    model = model.double().eval()
    merged, report = rep_plugin.reparameterize(model, X, verify=verify)
    assert isinstance(merged[4], nn.BatchNorm2d) and [type(merged[i]) for i in (1, 7)] == [nn.Identity] * 2
    assert [block.name for block in report.blocks] == ["0", "6"]
    notes = [note for note in report.notes if note.startswith("'3' and '4' are not folded: ")]
    assert len(notes) == (why is not None) and (why is None or re.search(why, notes[0]))
    for scale in SCALES:
        assert relative_error(model(X * scale), merged(X * scale)) < 1e-12


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("attach", [lambda m: m[2].register_forward_hook(clamp), lambda m: own_forward(m[1])])
def test_linear_sequences_end_at_what_is_attached(attach, verify):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 32, 1)]
    model = calibrate_random_bn_(nn.Sequential(*layers, nn.Conv2d(32, 2, 1)), X.float()).double()
    whole, _ = rep_plugin.reparameterize(model, X, fold_bn=False, merge_linear=True)
    assert sum(isinstance(layer, nn.Conv2d) for layer in whole) == 1
    attach(model)
    merged, report = rep_plugin.reparameterize(model, X, verify=verify, fold_bn=False, merge_linear=True)
    assert sum(isinstance(layer, nn.Conv2d) for layer in merged) > 1
    assert any(note.startswith("a linear sequence is not merged at ") for note in report.notes)
    for scale in SCALES:
        assert relative_error(model(X * scale), merged(X * scale)) < 1e-12


def block_of(kind):
    torch.manual_seed(0)
    blocks = [kind(8, 8, 3) if kind is RepVGGBlock else kind(8, 8) for _ in range(2)]
    return calibrate_random_bn_(nn.Sequential(nn.Conv2d(3, 8, 1), *blocks), X.float()).double()


def inner_bn(block):
    return next(module for module in block.modules() if isinstance(module, nn.BatchNorm2d))


def inner_conv(block):
    return next(module for module in block.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", [RepVGGBlock, RepVggBlock])
@pytest.mark.parametrize(
    ("attach", "why"),
    [
        (lambda b: inner_bn(b).register_forward_hook(clamp), "has a forward hook (clamp)"),
        (lambda b: inner_conv(b).register_forward_pre_hook(halve), "has a forward pre-hook (halve)"),
        (lambda b: own_forward(inner_bn(b)), "has a forward of its own"),
        (own_forward, "'1' has a forward of its own"),
    ],
)
def test_a_block_is_left_and_the_others_are_merged(kind, attach, why, verify):
    model = block_of(kind)
    attach(model[1])
    merged, report = rep_plugin.reparameterize(model, X, verify=verify, fold_bn=False)
    assert [block.name for block in report.blocks] == ["2"] and type(merged[1]) is kind
    assert any(note.startswith("block '1' is left as it is: ") and why in note for note in report.notes)
    for scale in SCALES:
        assert relative_error(model(X * scale), merged(X * scale)) < 1e-12


def test_hooks_on_what_stays_do_no_harm():
    """A block of ours stays in its place, and activations behind a sum stay: their hooks go on running."""
    model = block_of(RepVGGBlock)
    model[1].register_forward_hook(clamp)
    model[2].act.register_forward_hook(observe)
    merged, report = rep_plugin.reparameterize(model, X)
    assert [block.name for block in report.blocks] == ["1", "2"] and not report.notes
    assert (
        relative_error(model(X * 1e3), merged(X * 1e3)) < 1e-12
        and merged[1](X[:, :1].expand(2, 8, 12, 13)).max() <= 0.5
    )
    model = block_of(RepVggBlock)
    model[2].act.register_forward_hook(observe)
    merged, report = rep_plugin.reparameterize(model, X)
    assert [block.name for block in report.blocks][:2] == ["1", "2"] and not report.notes


def test_timm_cannot_merge_a_hooked_block_either():
    model = block_of(RepVGGBlock)
    inner_bn(model[1]).register_forward_hook(clamp)
    with pytest.raises(TypeError, match="has a forward hook .clamp., which a merge would lose"):
        model[1].switch_to_deploy()
    assert not model[1].deployed


class MonteCarlo(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, 0.5, True)


class Doubled(nn.Identity):
    def forward(self, x):
        return 2 * x


class DropPath(nn.ReLU):
    """A name that stands for something idle."""


@pytest.mark.parametrize("between", [MonteCarlo(), Doubled(), DropPath()])
def test_what_is_called_idle_must_be_idle(between):
    model = pairs()
    model.insert(4, between.eval())
    merged, report = rep_plugin.reparameterize(model, X, verify=False)
    assert [block.name for block in report.blocks] == ["0", "7"] and isinstance(merged[5], nn.BatchNorm2d)


class Reader(nn.Module):
    """Reads past a child on a path that only certain inputs take."""

    def __init__(self, read):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.tail, self.read = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), read

    def forward(self, x):
        if self.read == "size" and x.shape[-1] > 64:
            return self.tail(self.block[0](x))
        if self.read == "value" and x.abs().max() > 10:
            return self.tail(F.conv2d(x, self.block[0].weight, padding=1))
        if self.read == "alias" and len(x) > 5:
            return self.tail(self.of(self.block)(x))
        return self.tail(self.block(x))

    def of(self, block):
        return getattr(self.block, "0")


@pytest.mark.parametrize("read", ["size", "value"])
def test_what_is_read_on_another_path_is_not_folded(read):
    torch.manual_seed(0)
    model = calibrate_random_bn_(Reader(read), X.float()).double()
    for verify in (True, False):
        merged, report = rep_plugin.reparameterize(model, X, verify=verify)
        assert [block.name for block in report.blocks] == ["tail.0"]
        note = next(note for note in report.notes if "'block.0' and 'block.1' are not folded" in note)
        assert "is read by the forward of the model (test_fixed.py:" in note
        for x in (X, 1e3 * X, torch.randn(1, 3, 70, 70).double(), X[:1].expand(7, -1, -1, -1)):
            assert relative_error(model(x), merged(x)) < 1e-12


class ReadsABlock(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 1), kind(8, 8)

    def forward(self, x):
        x = self.stem(x)
        return self.block(x) if x.shape[-1] < 40 else self.block.conv_kxk(x)


def test_a_block_that_is_read_from_outside_is_left():
    torch.manual_seed(0)
    model = calibrate_random_bn_(nn.Sequential(ReadsABlock(RepVggBlock), RepVggBlock(8, 8)), X.float()).double()
    merged, report = rep_plugin.reparameterize(model, X)
    assert any("block '0.block' is left as it is: '0.block.conv_kxk' is read by" in note for note in report.notes)
    assert "1" in [block.name for block in report.blocks]
    for x in (X, torch.randn(1, 3, 50, 50).double()):
        assert relative_error(model(x), merged(x)) < 1e-12


def test_what_a_copy_would_share_is_refused():
    model = pairs()
    old = model[2].forward
    model[2].forward = lambda x: old(x).clamp(max=1)
    for verb in (rep_plugin.reparameterize, rep_plugin.expand):
        with pytest.raises(ValueError, match="'2' has a forward of its own that refers to '2' of the given model"):
            verb(model)


def test_expand_leaves_what_is_attached():
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(4)])
    model = calibrate_random_bn_(nn.Sequential(nn.Conv2d(3, 8, 1), model), X.float()).double()
    own_forward(model[1][0][0])
    own_inner(model[1][1][0])
    model[1][2][0].register_full_backward_hook(lambda *args: None)
    expanded, report = rep_plugin.expand(model, example_input=X)
    assert [block.name for block in report.blocks] == ["1.3.0"]
    assert {"it has a forward of its own", "it has a _conv_forward of its own"} <= {
        note.split("are, ")[1].split(":")[0] for note in report.notes
    }
    for scale in SCALES:
        assert relative_error(model(X * scale), expanded(X * scale)) < 1e-12
