"""What hooks keep in checkpoints: the same keys and texts in every version, read where training is resumed."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from rep_plugin.openmmlab.hooks import AccuracyLrHook, CentripetalHook, DistillHook, QATHook, SoftPruneHook
from rep_plugin.pruning import plan_pruning
from rep_plugin.pruning.methods.clusters import plan_clusters
from rep_plugin.pruning.planning import Budget

NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
SHAPE = (1, 3, 9, 9)


def distill() -> DistillHook:
    hook = DistillHook()
    hook.teacher = NET
    return hook


CASES = {
    "rep_lr_steps": (lambda: AccuracyLrHook([40, 80]), lambda: 1),
    "rep_teacher": (distill, lambda: "0123abcd"),
    "rep_centripetal": (
        lambda: CentripetalHook(macs=0.5),
        lambda: plan_clusters(NET, SHAPE, Budget(prune_fraction=0.5)).to_json(),
    ),
    "rep_qat": (QATHook, lambda: json.dumps({"ranges": {"conv": [-0.10000000149011612, 6.0]}})),
    "soft_prune": (
        lambda: SoftPruneHook(0.5),
        lambda: json.dumps({"zeroings": [{"epoch": 1}], "plan": plan_pruning(NET, SHAPE, "l1", 0.5).to_json()}),
    ),
}


@pytest.mark.parametrize("key", list(CASES))
def test_state_is_loaded_where_training_is_resumed_and_kept_as_it_was(key):
    make, text = CASES[key]
    state, fresh = text(), make().state()
    for resume in (True, False):
        hook, runner = make(), SimpleNamespace(model=NET, _resume=resume)
        hook.after_load_checkpoint(runner, {"meta": {key: state}})
        assert hook.state() == (state if resume else fresh)
        saved = {"meta": {}}
        hook.before_save_checkpoint(runner, saved)
        assert saved["meta"] == {name: value for name, value in {key: hook.state()}.items() if value is not None}
        hook.after_load_checkpoint(runner, {"state_dict": {}})  # of others
        assert hook.state() == (state if resume else fresh)
