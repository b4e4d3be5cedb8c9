"""History is what was done, in order; repeated on a fresh model it gives the same structure."""

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from rep_plugin import apply_plan, plan_pruning, reparameterize
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.history import before_step, check_history, history_of, rebuild_, record_
from rep_plugin.pruning.planning.plan import as_plan
from rep_plugin.timm.artefacts import set_classes_
from tests.test_pruning.nets import ConvBN, Pooled, ready

X = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(0))


def net_of():
    return ready(ConvBN(3, 8), RepVGGBlock(8, 8, act=nn.ReLU()), RepVGGBlock(8, 12, act=nn.ReLU()), Pooled(12))


def test_a_model_starts_without_history_and_steps_are_added():
    net = net_of()
    assert history_of(net) == []
    record_(net, before_step(net), step="a", value=1)
    record_(net, before_step(net), step="b")
    assert history_of(net) == [{"step": "a", "value": 1}, {"step": "b"}]
    history_of(net).clear()
    assert len(history_of(net)) == 2 and history_of(copy.deepcopy(net)) == history_of(net)
    assert not any("history" in key for key in net.state_dict())


@pytest.mark.parametrize("fold_bn", [False, True])
def test_the_same_structure_from_scratch(fold_bn):
    net = net_of()
    apply_plan(net, plan_pruning(net, X, "random", 0.3))
    apply_plan(net, plan_pruning(net, X, "l1", 0.2))
    merged, _ = reparameterize(net, X, fold_bn=fold_bn)
    assert len(history_of(net)) == 2, "merging a copy is no step of the original"
    apply_plan(merged, plan_pruning(merged, X, "random", 0.2))
    history = history_of(merged)
    assert [step["step"] for step in history] == ["prune", "prune", "reparameterize", "prune"]
    assert history[2]["fold_bn"] is fold_bn and "scores" in history[0]["plan"] and not history[0]["plan"]["scores"]

    fresh = net_of().train()
    rebuilt = rebuild_(fresh, history)
    assert rebuilt.training and not torch.equal(rebuilt.eval()(X), merged(X))
    rebuilt.load_state_dict(merged.state_dict())
    assert torch.equal(rebuilt(X), merged(X))


def test_failed_steps_are_not_recorded():
    net = net_of()
    plan = plan_pruning(net, X, "random", 0.3)
    apply_plan(net, plan)
    with pytest.raises(ValueError, match="the plan says"):
        apply_plan(net, plan)
    with pytest.raises(RuntimeError, match="train mode"):
        reparameterize(net.train(), X, inplace=True)
    assert [step["step"] for step in history_of(net)] == ["prune"]


def test_plans_in_any_form(tmp_path):
    plan = plan_pruning(net_of(), X, "random", 0.3)
    plan.to_json(tmp_path / "plan.json")
    for form in (plan, asdict(plan), plan.to_json(), str(tmp_path / "plan.json")):
        assert as_plan(form) == plan
    with pytest.raises(ValueError, match="got int"):
        as_plan(3)
    for form, error in (
        ("{", ValueError),
        ({"kept": {}}, ValueError),
        (str(tmp_path / "none.json"), FileNotFoundError),
    ):
        with pytest.raises(error) as caught:
            as_plan(form)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("prune", "a history must be a list of steps, got str"),
        (
            ["prune"],
            "unknown step 'prune' in the history, expected one of classifier, expand, features, linearize, prune",
        ),
        ([{"step": "fuse"}], "unknown step 'fuse'"),
        ([{}], "unknown step None"),
        (
            [{"step": "reparameterize", "fold_bn": True}],
            r"step 0 of the history \(reparameterize\): .* \['merge_linear'\]",
        ),
        ([{"step": "prune", "plan": {}, "seed": 1}], r"missing or unknown \['seed'\]"),
    ],
)
def test_what_is_no_history_is_refused_before_anything_is_done(history, message):
    net = net_of()
    with pytest.raises(ValueError, match=message) as caught:
        rebuild_(net, history)
    assert "\n" not in str(caught.value) and net[0].conv.out_channels == 8
    with pytest.raises(ValueError, match=message):
        check_history(history)


def test_classes():
    net = net_of().double().train()
    set_classes_(net, "3.fc", 4)
    assert net[3].fc.weight.shape == (4, 12) and net[3].fc.weight.dtype == torch.float64 and net.num_classes == 4
    with pytest.raises(ValueError, match=r"num_classes \(=2\) needs a linear classifier, the model has Conv2d"):
        set_classes_(net, "0.conv", 2)
    set_classes_(net, "3.fc", 0)
    assert isinstance(net[3].fc, nn.Identity)


def test_paths_are_strings():
    with pytest.raises(ValueError, match="got PosixPath"):
        as_plan(Path("plan.json"))
