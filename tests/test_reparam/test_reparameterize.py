"""reparameterize as users call it."""

import copy
import time

import pytest
import timm
import torch
from torch import nn

import rep_plugin
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.chain import Chain
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.errors import ArgumentError, EquivalenceError, TrainModeError
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.verify import verify_equivalence
from rep_plugin.reparam import adapters
from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), RepInvertedResidual(8, 8), nn.ReLU())
    return calibrate_random_bn_(model, torch.randn(4, 3, 16, 16))


def state_of(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, state: dict) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[key], state[key]) for key in state)


def test_a_copy_is_merged_by_default():
    model = net()
    state, x = state_of(model), torch.randn(2, 3, 17, 16)
    merged, report = rep_plugin.reparameterize(model, x)
    assert merged is not model and same_state(model, state)
    assert relative_error(model(x), merged(x)) < 1e-5
    assert [b.name for b in report.blocks] == ["2", "0"] and isinstance(merged[1], nn.Identity)
    assert report.max_rel_error < 1e-12 and report.border_rel_error < 1e-12 and report.blocks[0].max_rel_error < 1e-12
    assert report.params_after < report.params_before and report.macs_after < report.macs_before


def test_inplace_changes_the_given_model():
    model = net()
    merged, _ = rep_plugin.reparameterize(model, inplace=True)
    assert merged is model and model[2].deployed


def test_a_block_may_be_the_root():
    block = calibrate_random_bn_(RepInvertedResidual(8, 8), torch.randn(4, 8, 9, 9))
    x = torch.randn(1, 8, 9, 9)
    merged, report = rep_plugin.reparameterize(block, x)
    assert merged.deployed and relative_error(block(x), merged(x)) < 1e-5 and report.blocks[0].name == ""


def test_the_networks_own_bns_can_be_kept():
    merged, _ = rep_plugin.reparameterize(net(), fold_bn=False)
    assert isinstance(merged[1], nn.BatchNorm2d) and merged[2].deployed


def test_conv_bn_of_a_stock_network_is_folded():
    model = calibrate_random_bn_(timm.create_model("mobilenetv2_050"), torch.randn(4, 3, 64, 64))
    merged, report = rep_plugin.reparameterize(model, torch.randn(1, 3, 64, 64))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules()) and len(report.blocks) == 52
    assert report.max_rel_error < 1e-11  # of each logit


@pytest.mark.parametrize("name", ["mobilenetv2_050", "repvgg_a0", "rep_mobilenetv2_035", "dbb_mobilenetv2_100"])
def test_nothing_that_takes_the_place_of_something_is_in_train_mode(name):
    merged, _ = rep_plugin.reparameterize(timm.create_model(name, num_classes=2).eval(), verify=False)
    assert not [name for name, module in merged.named_modules() if module.training]


def test_a_convolution_with_a_second_reader_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), RepInvertedResidual(3, 3)

        def forward(self, x):
            y = self.conv(x)
            return self.block(self.bn(y)) + y

    model = calibrate_random_bn_(Shared(), torch.randn(4, 3, 8, 8))
    merged, report = rep_plugin.reparameterize(model)
    assert [b.name for b in report.blocks] == ["block"] and isinstance(merged.bn, nn.BatchNorm2d)


def test_an_untraceable_model_keeps_its_bns_and_says_so():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), RepInvertedResidual(3, 3)

        def forward(self, x):
            return self.block(self.bn(self.conv(x)) if x.sum() != 12.5 else x)

    model = calibrate_random_bn_(Branching(), torch.randn(4, 3, 8, 8))
    merged, report = rep_plugin.reparameterize(model)
    assert isinstance(merged.bn, nn.BatchNorm2d) and any("cannot trace Branching" in note for note in report.notes)
    assert any("decides by a value in Branching" in note for note in report.notes)


def test_train_mode_is_refused_by_name():
    model = net()
    model[2].branches["bottleneck"].expand_bn.train()
    with pytest.raises(RuntimeError, match=r"2\.branches\.bottleneck\.expand_bn.*train mode.*model\.eval\(\)"):
        rep_plugin.reparameterize(model)
    assert not model[2].deployed


def test_nothing_to_merge_and_merging_twice():
    with pytest.raises(ValueError, match="Sequential holds no block that can be merged"):
        rep_plugin.reparameterize(nn.Sequential(nn.Conv2d(3, 3, 1)).eval())
    with pytest.raises(ValueError, match=r"its batch norms can be folded: fold_bn=True \(--fold-bn\)$"):
        rep_plugin.reparameterize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), fold_bn=False)
    merged, _ = rep_plugin.reparameterize(net())
    state = state_of(merged)
    merged[2].switch_to_deploy()
    assert same_state(merged, state)


class WrongBlock(RepBlock):
    """Merges to something slightly else, as a faulty adapter would."""

    def _merge(self):
        merged = super()._merge()
        return merged._replace(bias=merged.bias + 1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_merge_is_refused_by_name_and_rolled_back(inplace):
    model = net()
    chain = Chain({"conv": nn.Conv2d(8, 8, 3), "bn": nn.BatchNorm2d(8)})
    model.insert(3, WrongBlock(8, 8, 3, {"conv": chain}))
    calibrate_random_bn_(model, torch.randn(4, 3, 16, 16))
    state = state_of(model)
    with pytest.raises(rep_plugin.EquivalenceError, match="block '3' differs"):
        rep_plugin.reparameterize(model, inplace=inplace)
    assert same_state(model, state) and not model[2].deployed


def test_an_activation_inside_a_chain_is_refused_and_nothing_is_lost():
    model = net()
    model.append(RepInvertedResidual(8, 8).eval())
    model[4].branches["bottleneck"].add_module("sneaked_in", nn.ReLU())
    state = state_of(model)
    with pytest.raises(TypeError, match="ReLU is not linear"):
        rep_plugin.reparameterize(model, inplace=True, verify=False)
    assert same_state(model, state)


def test_users_can_add_adapters(monkeypatch):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    def merge(module):
        conv = copy.deepcopy(module.a)
        with torch.no_grad():
            conv.weight.add_(module.b.weight)
            conv.bias.add_(module.b.bias)
        return conv

    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    register_adapter(Adapter("doubled 1x1", lambda m: isinstance(m, Doubled), merge))
    model = nn.Sequential(Doubled(), nn.ReLU()).eval()
    merged, report = rep_plugin.reparameterize(model)
    assert isinstance(merged[0], nn.Conv2d) and report.blocks[0].kind == "doubled 1x1" and report.max_rel_error < 1e-6


def test_bilinear_heads_fold_with_the_backbone():
    model = calibrate_random_bn_(
        timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3), torch.randn(4, 3, 64, 64)
    )
    torch.nn.init.normal_(model.head.fc.weight)
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 64, 64))
    assert merged.head.fc.in_features == 256 * 257 // 2 and model.head.fc.in_features == 256 * 256
    assert report.max_rel_error < 1e-10 and [b.name for b in report.blocks if b.kind == "bilinear head"] == ["head"]


def test_shared_blocks_stay_shared():
    block = RepInvertedResidual(4, 4)
    model = calibrate_random_bn_(nn.Sequential(block, nn.ReLU(), block), torch.randn(4, 4, 8, 8))
    merged, report = rep_plugin.reparameterize(model)
    assert merged[0] is merged[2] and len(report.blocks) == 1


def test_width_one_merges_in_seconds():
    """A loose bound that a return to group-by-group float64 convolutions (minutes) would break."""
    model = calibrate_random_bn_(timm.create_model("rep_mobilenetv2_100"), torch.randn(2, 3, 64, 64))
    started = time.perf_counter()
    _, report = rep_plugin.reparameterize(model, torch.randn(1, 3, 224, 224))
    assert time.perf_counter() - started < 40 and report.max_rel_error < 1e-10


def half_block(gamma: float, var: float) -> nn.Sequential:
    chain = Chain({"conv": nn.Conv2d(4, 4, 3), "bn": nn.BatchNorm2d(4)})
    with torch.no_grad():
        chain.bn.weight.fill_(gamma)
        chain.bn.running_var.fill_(var)
        chain.conv.weight.mul_(50 if gamma > 1 else 0.1)
    return nn.Sequential(RepBlock(4, 4, 3, {"conv": chain})).eval().half()


def test_half_precision_merges_are_proven_in_half_precision():
    with pytest.raises(rep_plugin.EquivalenceError, match=r"out of the range of torch.float16"):
        rep_plugin.reparameterize(half_block(1000.0, 1e-3))
    with pytest.raises(rep_plugin.EquivalenceError, match="underflow"):
        rep_plugin.reparameterize(half_block(1e-4, 6e4))
    model = net().half()
    merged, report = rep_plugin.reparameterize(model)
    assert merged[2].reparam_conv.weight.dtype == torch.float16 and report.max_rel_error < 1e-10


class Large(nn.Module):
    """Its second block is for images 71 pixels wide alone: no proof runs these unasked."""

    def __init__(self, aux: nn.Module):
        super().__init__()
        self.block, self.aux = RepInvertedResidual(3, 3), aux

    def forward(self, x):
        return self.aux(self.block(x)) if x.shape[-1] == 71 else self.block(x)


def test_a_block_that_no_input_runs_is_proven_by_itself():
    model = calibrate_random_bn_(Large(RepInvertedResidual(3, 3)), torch.randn(4, 3, 64, 71))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 16, 16), fold_bn=False)
    assert report.blocks[1].max_rel_error < 1e-12 and report.notes == [
        "block 'aux' is not run by the model, and proven by itself"
    ]
    x = torch.randn(2, 3, 65, 71)
    assert relative_error(model(x), merged(x)) < 1e-5
    merged, _ = rep_plugin.reparameterize(model.double(), x[:, :, :16, :16], fold_bn=False)
    merged.aux.reparam_conv.weight.data[0, 0, 0, 0] += 1e-6
    with pytest.raises(rep_plugin.EquivalenceError, match="block 'aux' differs by"):
        verify_equivalence(model, merged, [torch.randn(2, 3, 16, 16)], ["block", "aux"])


def test_a_block_that_no_input_runs_and_no_map_either_is_not_called_proven():
    class Asked(RepInvertedResidual):
        def forward(self, x, how):
            return super().forward(x)

    model = calibrate_random_bn_(Large(RepInvertedResidual(3, 3)), torch.randn(4, 3, 64, 71))
    model.aux.__class__ = Asked
    with pytest.warns(rep_plugin.InconclusiveWarning, match="no input runs block 'aux'"):
        _, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 16, 16), fold_bn=False)
    assert report.blocks[1].max_rel_error is None and "'aux' was not run" in report.notes[0]


class Idle(nn.Module):
    """Has a part that it runs on seven images alone, and not to be traced."""

    def __init__(self, idle: nn.Module):
        super().__init__()
        self.live, self.idle = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), idle

    def forward(self, x):
        y = self.live(x)
        return self.idle(y) if x.shape[0] == 7 else y


def test_folds_in_parts_that_no_input_runs_are_not_called_proven():
    idle = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = calibrate_random_bn_(Idle(idle), torch.randn(7, 3, 16, 16))
    with pytest.warns(rep_plugin.InconclusiveWarning, match="no input runs block 'idle.0'"):
        _, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 16, 16))
    assert "block 'idle.0' was not run by any input and is not proven" in report.notes


@pytest.mark.parametrize("batch", [2, 7])
def test_blocks_whose_neighbours_are_folded_into_them_are_proven_as_they_were_before(batch):
    def block(**options):
        return timm.models.fastvit.MobileOneBlock(8, 8, use_act=False, **options)

    behind = nn.Sequential(block(kernel_size=3), nn.BatchNorm2d(8))
    ahead = nn.Sequential(nn.BatchNorm2d(8), block(kernel_size=1))
    for idle in (behind, ahead):
        model = calibrate_random_bn_(Idle(idle), torch.randn(7, 3, 16, 16))
        merged, report = rep_plugin.reparameterize(model, torch.randn(batch, 3, 16, 16))
        assert report.max_rel_error < 1e-9 and max(block.max_rel_error or 0 for block in report.blocks) < 1e-9
        x = torch.randn(7, 3, 16, 16)
        assert relative_error(model(x), merged(x)) < 1e-4


def test_models_that_work_in_place_are_not_blamed_and_the_example_stays():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = RepInvertedResidual(3, 4)

        def forward(self, x):
            return self.block(x.sub_(1).mul_(2))

    model = calibrate_random_bn_(InPlace(), torch.randn(2, 3, 16, 16))
    for dtype in (torch.float32, torch.float64):
        model, example = model.to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
        before = example.clone()
        _, report = rep_plugin.reparameterize(model, example)
        assert report.max_rel_error < 1e-9 and torch.equal(example, before)


def test_a_model_that_is_not_finite_itself_is_told_apart_from_a_wrong_merge():
    model = net()
    model[0].weight.data[0] = float("nan")
    with pytest.raises(rep_plugin.EquivalenceError, match="given model's own output is not finite"):
        rep_plugin.reparameterize(model)


def test_an_active_dropout_is_refused():
    """Monte Carlo dropout between a convolution and its BN: folding would pass over it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.5), nn.BatchNorm2d(8)).eval()
    model[1].train()
    with pytest.raises(TrainModeError, match=r"'1' \(Dropout2d\) is in train mode"):
        rep_plugin.reparameterize(model, torch.randn(2, 3, 8, 8))
    model[1].p = 0.0
    assert len(rep_plugin.reparameterize(model, torch.randn(2, 3, 8, 8))[1].blocks) == 1


class Reads(nn.Module):
    """A forward that reads the layers of its parts, which a merge takes away or changes."""

    def __init__(self, read):
        super().__init__()
        self.block, self.conv, self.bn = RepVGGBlock(3, 4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.read = read

    def forward(self, x):
        return self.bn(self.conv(self.block(x))) * self.read(self).mean()


@pytest.mark.parametrize(
    "read", [lambda m: m.block.branches["conv"].conv.weight, lambda m: m.bn.weight, lambda m: m.conv.weight]
)
def test_a_forward_that_reads_what_a_merge_takes_away(read):
    model, x = Reads(read).eval(), torch.randn(2, 3, 9, 9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EquivalenceError) as caught:
        rep_plugin.reparameterize(model, x)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_attention_merges_in_a_verb_inside_a_verb():
    """torch's attention counts as drawing: the random state is put aside twice."""

    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x):
            tokens = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    with private_random():
        assert rep_plugin.reparameterize(Attended().eval(), torch.randn(2, 3, 6, 6))[1].max_rel_error < 1e-9


def _three_blocks() -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(RepVGGBlock(4, 4, 3), RepVGGBlock(4, 4, 3)), *blocks)
    return calibrate_random_bn_(net, torch.randn(4, 3, 9, 9))


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (dict(where="1"), {"1.0", "1.1"}),
        (dict(where=["1.0", "3*"]), {"1.0", "3.0"}),
        (dict(skip="1.1"), {"1.0", "2.0", "3.0"}),
        (dict(where="1*", skip=lambda name, module: name.endswith(".0")), {"1.1"}),
        (dict(skip=["1", "2"]), {"3.0"}),
    ],
)
def test_users_say_what_is_merged(chosen, names, tmp_path):
    net, x = _three_blocks(), torch.randn(2, 3, 9, 9)
    merged, report = rep_plugin.reparameterize(net, x, **chosen)
    assert {block.name for block in report.blocks} == names and not report.notes
    rep_plugin.save(merged, tmp_path / "model")
    assert torch.equal(rep_plugin.load(tmp_path / "model", _three_blocks())(x), merged(x))


def test_patterns_that_fit_nothing_are_refused():
    with pytest.raises(ArgumentError, match="where must name something, got an empty list"):
        rep_plugin.reparameterize(_three_blocks(), where=[])
    with pytest.raises(ArgumentError, match="skip='stage' fits none of .* modules"):
        rep_plugin.reparameterize(_three_blocks(), skip="stage")
