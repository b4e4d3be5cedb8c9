"""Defaults do not wreck a model: floors that give way last, bounds that do not, and scores that say nothing."""

import pytest
import torch
from torch import nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning
from rep_plugin.pruning.planning import PruneOptions
from rep_plugin.pruning.planning.plan import compose_plans
from rep_plugin.testing import calibrate_random_bn_
from tests.test_pruning.nets import ConvBN, Pooled, Residual, ready

X = (1, 3, 13, 13)


def lopsided():
    """Numbers by which one layer would be emptied first."""
    net = ready(ConvBN(3, 64), ConvBN(64, 40), ConvBN(40, 12), Pooled(12))
    return net, {"0.conv": [0.01 + i for i in range(64)], "1.conv": [1e3 + i for i in range(40)], "2.conv": [2e3] * 12}


def fresh():
    return nn.Sequential(ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32), Pooled(32)).eval()


@pytest.mark.parametrize(
    ("options", "floors"),
    [
        (dict(), {100: (1, 10), 64: (1, 8), 16: (1, 8), 12: (1, 6), 5: (1, 3), 1: (1, 1), 120: (1, 12), 700: (1, 70)}),
        (dict(min_channels=4), {100: (4, 10), 30: (4, 4), 3: (4, 4)}),
        (dict(min_channels=1), {100: (1, 10), 9: (1, 1)}),
        (dict(max_prune_fraction=0.25), {100: (75, 75), 10: (8, 8), 3: (3, 3)}),
        (dict(max_prune_fraction=0.99), {100: (1, 8), 2000: (20, 20)}),
        (dict(min_channels=20, max_prune_fraction=0.5), {100: (50, 50), 30: (20, 20)}),
    ],
)
def test_floors_of_widths(options, floors):
    assert {width: PruneOptions(**options).floors(width) for width in floors} == floors


def test_default_floors_hold_as_long_as_the_budget_can_be_met():
    net, scores = lopsided()
    plan = plan_pruning(net, X, scores, 0.6)
    assert plan.widths == {"0.conv": (64, 8), "1.conv": (40, 26), "2.conv": (12, 12), "3.fc": (5, 5)}
    assert plan.notes == ()
    bare = plan_pruning(net, X, scores, 0.6, min_channels=1, max_prune_fraction=0.99)
    assert (
        bare.widths["0.conv"] == (64, 1)
        and "layers lose more than 90 % of their channels: 0.conv (64 -> 1)" in bare.notes[0]
    )


@pytest.mark.parametrize("budget", [dict(prune_fraction=0.9), dict(macs=0.02), dict(params=0.03)])
def test_default_floors_give_way_alike_with_a_note(budget):
    net, scores = lopsided()
    plan = plan_pruning(net, X, scores, **budget)
    left = {name: after for name, (_, after) in plan.widths.items() if name != "3.fc"}
    assert all(1 <= left[name] < floor for name, floor in (("0.conv", 8), ("1.conv", 8))), left
    assert abs(left["0.conv"] - left["1.conv"]) <= 1  # not one emptied before the other
    (note,) = (note for note in plan.notes if "default floor" in note)
    assert f"0.conv keeps {left['0.conv']} of 64 (default floor 8)" in note and "\n" not in note
    assert apply_plan(net, plan).max_rel_error < 1e-9


def test_what_is_given_holds():
    net, scores = lopsided()
    with pytest.raises(
        ValueError, match=r"macs .* cannot be met with min_channels=6: the least that remains is [\d,]+$"
    ):
        plan_pruning(net, X, scores, macs=0.02, min_channels=6)
    with pytest.raises(ValueError, match="cannot be met with min_channels=2 and max_prune_fraction=0.5: "):
        plan_pruning(net, X, scores, macs=0.02, min_channels=2, max_prune_fraction=0.5)
    plan = plan_pruning(net, X, scores, 0.9, max_prune_fraction=0.5)
    assert {name: after for name, (_, after) in plan.widths.items()} == {
        "0.conv": 32,
        "1.conv": 20,
        "2.conv": 6,
        "3.fc": 5,
    }
    assert plan.notes[0] == "prune_fraction=0.9 asks for 104 channels, 58 can go with max_prune_fraction=0.5"
    for value in (1.0, -0.1, "0.5"):
        with pytest.raises(ValueError, match="max_prune_fraction must be a number in"):
            plan_pruning(net, X, scores, 0.5, max_prune_fraction=value)


def test_an_override_is_met_below_the_default_floors():
    net, scores = lopsided()
    plan = plan_pruning(net, X, scores, 0.0, overrides={"2.conv": 0.75})
    assert plan.widths["2.conv"] == (12, 3) and "2.conv keeps 3 of 12 (default floor 6)" in plan.notes[-1]


def test_default_floors_count_from_before_the_first_pruning():
    net, scores = lopsided()
    apply_plan(net, plan_pruning(net, X, scores, 0.6))
    scores["0.conv"], scores["1.conv"] = scores["0.conv"][-8:], scores["1.conv"][-26:]
    again = plan_pruning(net, X, scores, 0.2)
    assert again.widths["0.conv"] == (8, 8) and again.widths["1.conv"][1] < 26


@pytest.mark.parametrize("noise", [0.0, 1e-8])
@pytest.mark.parametrize("ask", [dict(macs=0.5), dict(prune_fraction=0.3), dict(params=0.5), dict(latency=0.5)])
def test_scores_that_are_equal_everywhere_are_refused(ask, noise):
    net = fresh()
    nn.init.zeros_(net[1].second.bn.weight)  # as timm starts: groups differ, their channels do not
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = module.weight.double() * (1 + noise * torch.rand(len(module.weight)))
    with pytest.raises(
        ValueError, match="scores='bn_gamma' say nothing about this Sequential: .* SparsityHook"
    ) as caught:
        plan_pruning(net.double(), X, **ask)
    assert "scores='flow' or 'l1'" in str(caught.value) and "\n" not in str(caught.value)


def test_equal_scores_of_some_layers_are_noted():
    net = fresh()
    with torch.no_grad():
        net[2].bn.weight.copy_(torch.linspace(0.5, 2, 32))
    plan = plan_pruning(net, X, prune_fraction=0.6)
    assert plan.notes[0].startswith("equal scores within 0.conv, 1.first.conv: which of its channels go is chance")
    plan = plan_pruning(net, X, prune_fraction=0.02)  # the lowest gammas: no layer whose scores are equal loses any
    assert plan.kept.keys() == {"2.conv"} and not plan.notes
    widths = PrunePlan.from_widths(fresh(), X, {"2.conv": 16}, scores="bn_gamma")
    assert widths.notes == ("equal scores within 2.conv: which of its channels go is chance",)


@pytest.mark.parametrize("scores", ["l1", "l2", "fpgm", "random"])
def test_other_scores_of_a_fresh_network_say_something(scores):
    assert not plan_pruning(fresh(), X, scores, 0.3).notes


def test_given_widths_may_be_small_and_are_noted():
    net, _ = lopsided()
    plan = PrunePlan.from_widths(net, X, {"0.conv": 2, "1.conv": 4})
    (note,) = plan.notes
    assert note.startswith("layers lose more than 90 % of their channels: 0.conv (64 -> 2);")  # 4 of 40 are 90 %


def test_plans_one_after_the_other_note_what_is_lost_in_all():
    net, _ = lopsided()
    first = PrunePlan.from_widths(net, X, {"0.conv": 16})
    apply_plan(net, first)
    second = PrunePlan.from_widths(net, X, {"0.conv": 5})
    assert not first.notes and not second.notes
    (note,) = compose_plans([first, second]).notes
    assert "0.conv (64 -> 5)" in note


def test_a_fresh_timm_network_keeps_its_layers():
    timm = pytest.importorskip("timm")
    net = timm.create_model("mobilenetv2_050", num_classes=10).eval()
    calibrate_random_bn_(net, torch.randn(2, 3, 32, 32), 0)
    for share in (0.5, 0.3):
        plan = plan_pruning(net, (1, 3, 32, 32), macs=share)
        narrowed = {name: pair for name, pair in plan.widths.items() if pair[0] > pair[1]}
        assert len(narrowed) > 20 and not plan.notes
        assert all(after >= max(min(8, before / 2), 0.1 * before) for before, after in narrowed.values())
