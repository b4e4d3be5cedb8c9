"""The table "Which hook fits which network" of docs/pruning.md is true."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import rep_plugin  # registers the names
from rep_plugin.errors import ArgumentError
from rep_plugin.pruning.methods import ResRep
from rep_plugin.pruning.methods.clusters import plan_clusters
from rep_plugin.pruning.planning import Budget, PruneOptions, plan_to_budget

TEXT = (Path(__file__).parents[2] / "docs/pruning.md").read_text().partition("### Which hook fits which network")[2]
ROWS = dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", TEXT.partition("\nA compactor")[0], re.MULTILINE))
SHAPE, BUDGET = (1, 3, 64, 64), Budget(macs=0.7)
HOOKS = (
    lambda model, scores="flow": plan_to_budget(model, SHAPE, BUDGET, PruneOptions(scores)),
    lambda model, scores="l2": plan_to_budget(model, SHAPE, BUDGET, PruneOptions(scores, scope="layer")),
    lambda model: ResRep(model, SHAPE, BUDGET),
    lambda model: plan_clusters(model, SHAPE, BUDGET, PruneOptions(), "even"),
)


def test_the_table_is_there():
    assert len(ROWS) == 10 and rep_plugin.__name__


@pytest.mark.parametrize("name", ROWS)
def test_each_hook_plans_or_refuses_as_the_page_says(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    for module in model.modules():  # as trained ones: equal gammas say nothing
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for plan, cell in zip(HOOKS, ROWS[name].split("|"), strict=True):
        if cell.strip() == "yes":
            plan(model)
            continue
        with pytest.raises(ArgumentError) as caught:
            plan(model)
        assert "\n" not in str(caught.value)
        if other := re.search('scores="(\\w+)"', cell):
            plan(model, other[1])
        else:
            assert cell.strip() == "no"
