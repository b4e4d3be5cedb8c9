import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin import PrunePlan, apply_plan, plan_pruning
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.costs import count_macs, count_params
from tests.test_pruning.nets import Concat, ConvBN, Flat, Gate, Pooled, Residual, ready

X = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(0))


def net_of():
    return ready(ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32), Gate(32, 8), Pooled(32))


def test_a_fraction_counts_tied_channels_once():
    plan = plan_pruning(net_of(), X, "random", 0.25)
    assert plan.units == (16 + 24 + 32 + 8, 20)
    gone = {name: before - after for name, (before, after) in plan.widths.items()}
    assert gone["0.conv"] == gone["1.second.conv"] and gone["2.conv"] == gone["3.up"]
    assert gone["0.conv"] + gone["1.first.conv"] + gone["2.conv"] + gone["3.down"] == 20
    assert plan.kept["0.conv"] == plan.kept["1.second.conv"] and plan.frozen == {
        "4.fc": "'4.fc' makes the model output, which keeps its width"
    }


def test_the_lowest_scores_go():
    net = net_of()
    plan = plan_pruning(net, X, "bn_gamma", 0.4)
    scored = {n: torch.tensor(s, dtype=torch.float64) for n, s in plan.scores.items() if None not in s}
    removed = torch.cat(
        [s[[i for i in range(len(s)) if i not in plan.kept.get(n, range(len(s)))]] for n, s in scored.items()]
    )
    kept = torch.cat([s[list(plan.kept.get(n, range(len(s))))] for n, s in scored.items()])
    assert removed.max() <= kept.min()
    assert plan.frozen["3.down"] == "'3.down' has no BN for bn_gamma: use scores='l1'"


def test_layer_scope_takes_an_equal_share_of_each():
    plan = plan_pruning(net_of(), X, "l1", 0.25, scope="layer")
    assert {n: w for n, w in plan.widths.items()} == {
        "0.conv": (16, 12), "1.first.conv": (24, 18), "1.second.conv": (16, 12), "2.conv": (32, 24), "3.down": (8, 6),
        "3.up": (32, 24), "4.fc": (5, 5),
    }  # fmt: skip


def test_costs_are_those_of_the_smaller_model():
    net = ready(ConvBN(3, 8), Concat(8, 6, 10), ConvBN(16, 12, groups=2), ConvBN(12, 12, groups=12), Flat(12))
    plan = plan_pruning(net, X, "random", 0.4)
    assert (plan.params_before, plan.macs_before) == (count_params(net), count_macs(net, X))
    rep_plugin.apply_plan(net, plan)
    assert (plan.params_after, plan.macs_after) == (count_params(net), count_macs(net, X))


def test_nothing_falls_below_the_minimum():
    plan = plan_pruning(net_of(), X, "l1", 0.95, min_channels=6)
    widths = {name: after for name, (before, after) in plan.widths.items() if name != "4.fc"}
    assert min(widths.values()) == 6
    plan = plan_pruning(net_of(), X, "l1", 0.999)
    assert min(after for _, after in plan.widths.values()) == 1


def test_rounding():
    plan = plan_pruning(net_of(), X, "l1", 0.4, round_to=8)
    narrower = [after for before, after in plan.widths.values() if before != after]
    assert narrower and all(after % 8 == 0 for after in narrower)


@pytest.mark.parametrize("what", ["params", "macs"])
def test_budgets_round_widths_by_themselves(what):
    net = ready(ConvBN(3, 64), Residual(64, 96), ConvBN(64, 128), ConvBN(128, 96), ConvBN(96, 12), Pooled(12))
    plan = plan_pruning(net, X, "l1", **{what: 0.5})
    before, after = (getattr(plan, f"{what}_{when}") for when in ("before", "after"))
    assert 0.95 * 0.5 * before <= after <= 0.5 * before and plan.notes == ()
    narrower = {old: new for old, new in plan.widths.values() if old != new}
    assert len(narrower) > 2 and all(new % (4 if old == 12 else 8) == 0 for old, new in narrower.items())
    for options in ({what: 0.5, "round_to": 1}, {"prune_fraction": 0.3}):
        assert any(new % 8 for old, new in plan_pruning(net, X, "l1", **options).widths.values() if old != new)


def test_widths_stay_exact_where_rounding_misses_the_budget():
    net = net_of()
    plan, exact = (plan_pruning(net, X, "l1", macs=0.5, round_to=number) for number in (None, 1))
    assert plan.notes == ("widths are not rounded: macs=0.5 would be missed by more than 5 %",) and not exact.notes
    assert plan.kept == exact.kept
    narrow = ready(ConvBN(3, 7), ConvBN(7, 6), Pooled(6))  # nothing that could be rounded
    assert plan_pruning(narrow, X, "l1", macs=0.5).notes == ()


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("share", [True, False])
def test_budgets(what, share):
    net = net_of()
    before = {"params": count_params(net), "macs": count_macs(net, X)}[what]
    plan = plan_pruning(net, X, "l1", **{what: 0.5 if share else before // 2})
    after = getattr(plan, f"{what}_after")
    assert after <= before / 2
    removed = plan.units[1]
    one_less = plan_pruning(net, X, "l1", (removed - 1) / plan.units[0])
    assert one_less.units[1] == removed - 1 and getattr(one_less, f"{what}_after") > before // 2


def test_a_budget_out_of_reach_says_what_can_be_met():
    net = net_of()
    with pytest.raises(ValueError, match=r"params \(=10\) cannot be met: the least that remains is [\d,]+") as caught:
        plan_pruning(net, X, "l1", params=10)
    least = int(str(caught.value).rsplit(" ", 1)[1].replace(",", ""))
    assert plan_pruning(net, X, "l1", params=least).params_after == least


def test_overrides_and_ignore():
    plan = plan_pruning(
        net_of(), X, "l1", 0.5, overrides={"1.first*": 0.25, "3.down": "frozen"}, ignore=["2.conv"], scope="layer"
    )
    assert plan.widths["1.first.conv"] == (24, 18) and plan.widths["0.conv"] == (16, 8)
    assert plan.frozen["2.conv"] == plan.frozen["3.up"] == "'2.conv' is ignored by '2.conv'"
    assert plan.widths["3.down"] == (8, 8)


def test_grouped_convolutions_keep_equal_groups():
    net = ready(ConvBN(3, 12), ConvBN(12, 18, groups=3), Residual(18, 6), ConvBN(18, 8), Pooled(8))
    plan = plan_pruning(net, X, "random", 0.4)
    for name, width in (("0.conv", 4), ("1.conv", 6)):
        counts = [sum(i // width == group for i in plan.kept.get(name, range(3 * width))) for group in range(3)]
        assert len(set(counts)) == 1 and sum(counts) < 3 * width
    different = [[i % 4 for i in plan.kept["0.conv"] if i // 4 == group] for group in range(3)]
    assert different[0] != different[1] or different[1] != different[2]  # each group chooses for itself


def test_from_widths_takes_numbers_as_they_are():
    net = net_of()
    plan = PrunePlan.from_widths(net, X, {"0.conv": 7, "2.conv": 1, "1.second.conv": 7})
    assert {n: after for n, (before, after) in plan.widths.items() if before != after} == {
        "0.conv": 7, "1.second.conv": 7, "2.conv": 1, "3.up": 1,
    }  # fmt: skip
    kernel = (net[2].conv.weight.abs().sum((1, 2, 3)) / net[2].conv.weight.abs().sum((1, 2, 3)).mean()).detach()
    gate = net[3].up.weight.abs().sum((1, 2, 3)).detach()
    assert plan.kept["2.conv"] == ((kernel + gate / gate.mean()).argmax().item(),)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nowhere": 3}, "no layer 'nowhere'"),
        ({"0.conv": 0}, r"widths\['0.conv'\] must be a whole number >= 1, got 0"),
        ({"0.conv": 17}, "must lie in 1..16, got 17"),
        ({"0.conv": 2.0}, "must be a whole number >= 1, got 2.0"),
        ({"4.fc": 2}, "'4.fc' cannot go from 5 to 2 channels: '4.fc' makes the model output"),
        ({"0.conv": 7, "1.second.conv": 8}, "'1.second.conv' cannot keep 8 of 16 channels"),
        ({"0.conv": 8, "1.second.conv": 7}, "'0.conv' cannot keep 8 of 16 channels"),
    ],
)
def test_widths_that_cannot_be(widths, message):
    with pytest.raises(ValueError, match=message):
        PrunePlan.from_widths(net_of(), X, widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_fraction": 1.0}, r"prune_fraction must be a number in \[0, 1\) or None, got 1.0"),
        ({"prune_fraction": -0.1}, r"must be a number in \[0, 1\) or None, got -0.1"),
        ({"prune_fraction": float("nan")}, "got nan"),
        ({}, "exactly one of prune_fraction, params, macs, latency and latency_ms, got none"),
        ({"prune_fraction": 0.1, "macs": 0.5}, "exactly one of"),
        ({"macs": 1.5}, "must be a share"),
        ({"macs": 1}, r"macs must be a share .* got 1: 1.0 keeps all, 2 is a number of multiply-adds for one image"),
        ({"params": 1}, r"params must be a share .* got 1: 1.0 keeps all, 2 is a number of parameters"),
        ({"latency": 12.0}, r"latency must be a share in \(0, 1\] \(milliseconds are latency_ms\) or None, got 12.0"),
        ({"latency": 0.0}, "latency must be a share .* got 0.0"),
        ({"latency_ms": float("nan")}, "latency_ms must be a number > 0 or None, got nan"),
        ({"latency": 0.5, "latency_ms": 3}, r"exactly one of .*, got \['latency', 'latency_ms'\]"),
        ({"params": 0}, "params must be a share .*or a whole number > 1, got 0"),
        ({"prune_fraction": 0.1, "min_channels": 0}, "min_channels must be a whole number >= 1"),
        ({"prune_fraction": 0.1, "scope": "block"}, "scope must be one of global, layer, got 'block'"),
        ({"prune_fraction": 0.1, "ignore": ["nothing*"]}, "no layer is named like 'nothing\\*'"),
        ({"prune_fraction": 0.1, "overrides": {"nothing": 0.1}}, "no layer is named like 'nothing'"),
        (
            {"prune_fraction": 0.1, "overrides": {"*": 2}},
            r"overrides\['\*'\] must be a number in \[0, 1\) or 'frozen', got 2",
        ),
        ({"prune_fraction": 0.1, "ignore": ["*"]}, "nothing in Sequential can be pruned: '0.conv' is ignored by"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_pruning(net_of(), X, "l1", **options)
    assert "\n" not in str(caught.value)


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="nothing in Conv2d can be pruned: the model itself makes the model output"):
        plan_pruning(nn.Conv2d(3, 4, 1), X, "l1", 0.5)


def test_json_both_ways(tmp_path):
    plan = plan_pruning(net_of(), X, "bn_gamma", 0.3)
    assert PrunePlan.from_json(plan.to_json()) == plan
    plan.to_json(tmp_path / "plan.json")
    assert PrunePlan.from_json(tmp_path / "plan.json") == plan == PrunePlan.from_json(str(tmp_path / "plan.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plans_of_older_versions():
    """Version 1 had no latency; up to version 2 there were no notes, and costs were those of the whole example."""
    plan = plan_pruning(net_of(), X, "l1", 0.3)
    data = json.loads(plan.to_json())
    del data["notes"]
    whole = {name: 4 * data[name] for name in ("macs_before", "macs_after")} | {"input_shape": [4, 3, 13, 13]}
    of_four = PrunePlan.from_json(json.dumps({**data, **whole, "version": 2}))
    assert of_four == replace(plan, input_shape=(4, 3, 13, 13)) and of_four.notes == ()
    first = {key: value for key, value in data.items() if not key.startswith("latency")}
    assert PrunePlan.from_json(json.dumps({**first, "version": 1})) == plan
    with pytest.raises(ValueError, match=r"missing or unknown \['latency_after', 'latency_before'\]"):
        PrunePlan.from_json(json.dumps({**first, "version": 2}))


def test_json_that_is_no_plan(tmp_path):
    data = json.loads(plan_pruning(net_of(), X, "l1", 0.3).to_json())
    wrong = {
        "missing or unknown": {k: v for k, v in data.items() if k != "kept"},
        "plan of version 9": {**data, "version": 9},
        "must ascend": {**data, "kept": {**data["kept"], "0.conv": [3, 2, 1]}},
        "is not a pruning plan": {**data, "widths": [1, 2]},
    }
    for message, value in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            PrunePlan.from_json(json.dumps(value))
        assert "\n" not in str(caught.value)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not JSON"):
        PrunePlan.from_json(tmp_path / "broken.json")


def test_planning_touches_nothing():
    net = net_of().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    plan_pruning(net, X, "fpgm", 0.5)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net[0].conv.out_channels == 16 and all(m.training for m in net.modules())


MALFORMED = {
    "model": [None, 3, ["net"]],
    "input_shape": [[], [0, 3], [1.5, 3], "1, 3", None, [True, 3], {"1": 2}],
    "kept": [[1], {"0.conv": 3}, {"0.conv": ["1"]}, {"0.conv": [True]}, {"0.conv": [1.0]}, {"0.conv": [-1, 2]}],
    "widths": [[1], {"0.conv": [16]}, {"0.conv": [16, 0]}, {"0.conv": [8, 16]}, {"0.conv": ["16", 8]}, None],
    "groups": ["ab", [1], [["a", 1]], {"a": ["b"]}, None],
    "frozen": [[1], {"a": 1}, "abc", None],
    "scores": [[1], {"a": 1}, {"a": ["b"]}, {"a": [True]}, {"a": [float("nan")]}, None],
    "why": [1, None],
    "params_before": [-1, 1.5, "3", True, None],
    "params_after": [-1, 1.5, "3", True, None],
    "macs_before": [-1, 1.5, "3", True, None],
    "macs_after": [-1, 1.5, "3", True, None],
    "units": [[1], [1, 2, 3], [1, -1], "ab", None],
    "prune_outputs": [1, "yes", None],
    "latency_before": [-1.0, "3", float("nan"), 0, True],
    "latency_after": [-1.0, "3", float("nan"), 0, True, 3.0],
    "version": [99, "3", None, 3.5],
    "notes": ["text", [1], {"a": 1}, None],
}


@pytest.mark.parametrize("field", MALFORMED)
def test_each_field_is_checked_when_a_plan_is_read_and_built(field):
    plan = plan_pruning(net_of(), X, "l1", 0.3)
    data = json.loads(plan.to_json())
    assert data.keys() == MALFORMED.keys()
    for value in MALFORMED[field]:
        with pytest.raises(ArgumentError) as error:
            PrunePlan.from_json(json.dumps({**data, field: value}))
        assert "\n" not in str(error.value)
        given = tuple(value) if isinstance(value, list) else value
        with pytest.raises(ArgumentError, match=field.partition("_before")[0]):
            replace(plan, **{field: given})


def test_a_plan_that_was_broken_afterwards_is_refused_before_the_surgery():
    net = net_of()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for field, value in (("frozen", 1), ("scores", "abc"), ("widths", (16, 99)), ("kept", (1, 999)), ("kept", (2, 1))):
        plan = plan_pruning(net, X, "l1", 0.3)
        getattr(plan, field)["0.conv"] = value
        with pytest.raises(ArgumentError, match=field):
            apply_plan(net, plan)
        assert all(torch.equal(one, state[name]) for name, one in net.state_dict().items())


def test_widths_that_kept_channels_contradict_are_refused():
    net = net_of()
    plan = plan_pruning(net, X, "l1", 0.3)
    name = next(iter(plan.kept))
    before, after = plan.widths[name]
    with pytest.raises(ArgumentError, match=f"says that {after - 1} channels of '{name}' stay, but keeps {after}"):
        apply_plan(net, replace(plan, widths={**plan.widths, name: (before, after - 1)}))
