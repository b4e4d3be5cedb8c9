"""Models that are not run by ``model(x)`` alone, in the shape of mmseg's and mmdet's, without either."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from rep_plugin import apply_plan, plan_pruning, reparameterize
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.measure.costs import count_macs
from rep_plugin.measure.forward import forward_of, run_model
from rep_plugin.openmmlab.detectors import is_two_stage
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Two maps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = RepVGGBlock(3, 8, 3, 2), RepVGGBlock(8, 16, 3, 2)

    def forward(self, x):
        x = self.first(x)
        return x, self.second(x)


class Head(nn.Module):
    """A convolution, a dropout of whole channels, and a classifier of positions, on one map."""

    def __init__(self, index, channels):
        super().__init__()
        self.index, self.drop = index, nn.Dropout2d(0.5)
        self.conv, self.bn = nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv_seg = nn.Conv2d(12, 4, 1)

    def forward(self, maps):
        return self.conv_seg(self.drop(self.bn(self.conv(maps[self.index])).relu()))


class Segmentor(nn.Module):
    """The auxiliary heads read a map in training only."""

    def __init__(self, several=False):
        super().__init__()
        self.backbone, self.decode_head = Body(), Head(1, 16)
        self.auxiliary_head = nn.ModuleList([Head(0, 8), Head(1, 16)]) if several else Head(0, 8)

    def extract_feat(self, x):
        return self.backbone(x)

    def forward(self, x):
        return self.decode_head(self.extract_feat(x))


class TwoStage(nn.Module):
    """``forward`` needs annotations; the regions' head is out of reach."""

    def __init__(self):
        super().__init__()
        self.backbone, self.rpn_head, self.roi_head = Body(), Head(1, 16), nn.Linear(16, 3)

    def extract_feat(self, x):
        return self.backbone(x)

    def forward(self, x, samples):
        raise AssertionError("regions are chosen by their scores")


def prepared(model):
    return calibrate_random_bn_(model, X)


@pytest.mark.parametrize("several", [False, True])
def test_auxiliary_heads_follow_what_they_read(several):
    model = prepared(Segmentor(several))
    plan = plan_pruning(model, X.shape, "l1", 0.4)
    apply_plan(model, plan)
    heads = list(model.auxiliary_head) if several else [model.auxiliary_head]
    channels = [m.shape[1] for m in model.extract_feat(X)]
    assert channels[0] < 8 and [head.conv.weight.shape[1] for head in heads] == channels[: len(heads)]
    model.train()
    assert [tuple(out.shape[:2]) for out in forward_of(model).run_auxiliary(model, X)] == [(2, 4)] * len(heads)


def test_a_two_stage_detector_is_run_up_to_its_regions():
    model = prepared(TwoStage())
    assert is_two_stage(model) and not is_two_stage(Segmentor()) and not is_two_stage(nn.Linear(2, 2))
    maps, scores = run_model(model, X)
    assert [m.shape[1] for m in maps] == [8, 16] and scores.shape == (2, 4, 4, 4)
    assert count_macs(model, X) == count_macs(model.backbone, X) + 16 * (16 * 12 * 9 + 12 * 4)
    merged, report = reparameterize(model, X, fold_bn=False)
    assert report.max_rel_error < 1e-12 and report.sensitivity > 0.1 and len(report.blocks) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, run_model(merged, X)[0]))


def test_what_unreached_heads_read_stays():
    plan = plan_pruning(prepared(TwoStage()), X.shape, "l1", 0.4)
    assert {name: reason for name, reason in plan.frozen.items() if "backbone" in name} == {
        f"backbone.{name}": f"'backbone.{name}' makes the model output, which keeps its width; prune_outputs=True lets "
        "maps lose channels"
        for name in ("first", "second")
    }
    assert list(plan.kept) == ["rpn_head.conv"]

    model = prepared(Segmentor())
    model.extra_head = nn.Linear(16, 2)  # reads a map in a way that no run shows
    plan = plan_pruning(model, X.shape, "l1", 0.4)
    assert {"backbone.first", "backbone.second"} <= set(plan.frozen)
    assert {name.split(".")[0] for name in plan.kept} == {"decode_head", "auxiliary_head"}


def test_import_of_the_package_registers_them_and_loads_no_framework():
    code = """
import sys, rep_plugin
from rep_plugin.measure.forward import forward_of
model = type("Model", (), {"extract_feat": print})()
print(type(forward_of(model)).__name__, {"mmengine", "mmcv", "mmdet", "mmseg"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "OpenMMLabForward set()\n", done.stderr
