"""Costs and the report."""

import json

import timm
import torch
from torch import nn

from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.report import BlockReport, Report


def test_macs_count_convolutions_and_matrix_products():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 25, 7)
    )
    x = torch.zeros(2, 4, 5, 5)
    assert count_macs(model, x) == (25 * 6 * 2 * 9 + 6 * 25 * 7)
    assert count_params(model) == 6 * 2 * 9 + 6 + 12 + 6 * 25 * 7 + 7
    assert model.training, "the mode is kept"


def test_macs_of_mobilenet_v2_are_the_published_ones():
    assert round(count_macs(timm.create_model("mobilenetv2_100"), torch.zeros(1, 3, 224, 224)) / 1e6) == 301


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_params(nn.Sequential(layer, layer)) == 12


def test_json_round_trip_and_text(tmp_path):
    report = Report("reparameterize", 10, 4, 100, 50, (1, 3, 8, 8), 1e-9, 1e-10, blocks=[BlockReport("stem", "block")])
    report.notes.append("[brackets] stay")
    content = json.loads(report.to_json(tmp_path / "report.json"))
    assert content == json.loads((tmp_path / "report.json").read_text())
    assert content["params_before"] == 10 and content["blocks"][0]["name"] == "stem" and content["sensitivity"] is None
    assert "1.00e-10" in str(report) and "one image of 3x8x8" in str(report) and "[brackets] stay" in str(report)
