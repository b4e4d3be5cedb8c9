"""SoftPruneHook in real runs: zero, back by momentum, zero again, removed at the end."""

import copy
import json
import re

import pytest
import torch
from mmengine.config import Config

from rep_plugin.errors import HookError
from rep_plugin.openmmlab.hooks import SoftPruneHook
from rep_plugin.openmmlab.load import load_model
from rep_plugin.pruning import PrunePlan
from rep_plugin.pruning.methods.soft_pruning import count_returned, zero_channels_
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.tiny import config, run

X = torch.randn(2, 3, 17, 16)
SOFT = dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    return folder, run(config(folder, SOFT | dict(begin=2, interval=2))), (next(folder.glob("*/*.log"))).read_text()


def zeros(folder, epoch: int) -> int:
    """Channels of the second layer with kernel, gamma and beta all zero."""
    state = torch.load(folder / f"epoch_{epoch}.pth", weights_only=False)["state_dict"]
    parts = [state["backbone.conv2.weight"].flatten(1), state["backbone.bn2.weight"], state["backbone.bn2.bias"]]
    dead = [(part.reshape(16, -1) == 0).all(1) for part in parts]
    assert torch.equal(dead[1], dead[0] & dead[1] & dead[2])
    return int(dead[1].sum())


def test_zeroed_after_its_epochs_back_in_between(finished):
    folder, _, log = finished
    assert [zeros(folder, epoch) for epoch in (1, 2, 3, 4)] == [0, 8, 0, 8]
    found = re.search(
        r"20 of 40 channels set to zero; of the rows zeroed last time, (\d+) of (\d+) came back; before: accuracy", log
    )
    back, total = map(int, found.groups())
    assert back == total > 0


def test_what_is_zero_is_removed_and_computes_the_same(finished):
    folder, runner, _ = finished
    pruned, _ = load_model(Config.fromfile(folder / "pruned.py"), folder / "pruned.pth")
    assert pruned.backbone.conv2.out_channels == 8 and runner.model.backbone.conv2.out_channels == 16
    runner.model.eval()
    assert relative_error(runner.model(X), pruned(X)) < 1e-5
    (entry,) = json.loads((folder / "pruned.rounds.json").read_text())
    assert entry["before"] == entry["after"]
    first, second = entry["zeroings"]
    assert (first["epoch"], second["epoch"]) == (2, 4) and first["units"] == second["units"] == [40, 20]
    assert first["returned"] is None and second["returned"][0] == second["returned"][1] > 0
    assert second["after"] == entry["before"] and set(second["before"]) == {"accuracy/top1"}


def test_resumed_run_goes_on_exactly(finished, tmp_path):
    folder, whole, _ = finished
    hook = SOFT | dict(begin=2, interval=2)
    again = run(config(tmp_path, hook, load_from=str(folder / "epoch_2.pth"), resume=True))
    for name, value in whole.model.state_dict().items():
        if value.is_floating_point() and value.any():
            assert relative_error(value, again.model.state_dict()[name]) < 1e-5, name
    for name in ("pruned.plan.json", "pruned.rounds.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_zeroing_equals_removal_and_counts_what_returned(finished):
    folder, _, _ = finished
    plan = PrunePlan.from_json(folder / "pruned.plan.json")
    model, _ = load_model(config(folder), folder / "epoch_3.pth")
    before = copy.deepcopy(model)
    back, total = count_returned(model, plan)
    assert 0 < total == back
    zero_channels_(model, plan)
    assert count_returned(model, plan) == (0, total) and relative_error(before(X), model(X)) > 1e-3
    with torch.no_grad():
        model.backbone.bn2.bias += 1
    assert count_returned(model, plan) == (8, total)


def test_a_collapse_and_dead_filters_are_said_with_numbers(tmp_path, monkeypatch):
    metrics = iter([{"accuracy/top1": 90.0}, {"accuracy/top1": 12.5}])
    monkeypatch.setattr("rep_plugin.openmmlab.hooks.soft_prune_hook.evaluate", lambda *_: next(metrics))
    optimizer = dict(optimizer=dict(type="SGD", lr=0.01))
    run(config(tmp_path, SOFT, optim_wrapper=optimizer, train_cfg=dict(by_epoch=True, max_epochs=1)))
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "WARNING - SoftPruneHook: accuracy/top1 fell from 90 to 12.5" in log
    assert "WARNING - SoftPruneHook: the optimizer has no momentum" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prune_fraction=0), r"prune_fraction must be a number in \(0, 1\) or None, got 0"),
        (dict(prune_fraction=0.5, interval=0.5), "interval must be a whole number >= 1, got 0.5"),
        (dict(prune_fraction=0.5, begin=0), "begin must be a whole number >= 1, got 0"),
        (dict(prune_fraction=0.5, scores="l3"), "scores must be one of .*, got 'l3'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoftPruneHook(**arguments)


BAD_RUNS = {
    "late": (dict(begin=5), r"SoftPruneHook.begin \(=5\) must be <= the training's 4 epochs"),
    "pattern": (dict(ignore=["*.nothing"]), r"SoftPruneHook: no layer is named like '\*.nothing'"),
}


@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_what_does_not_fit_is_refused(case, tmp_path):
    arguments, message = BAD_RUNS[case]
    with pytest.raises(HookError, match=message) as caught:
        run(config(tmp_path, SOFT | arguments))
    assert "\n" not in str(caught.value)
