"""``rep-plugin summary``: the layers add up, and every verb says what it takes and what not."""

import json

import pytest
import timm
import torch
from torch import nn

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.costs import count_macs
from rep_plugin.openmmlab.load import build_model
from rep_plugin.summary import summarize


class Net(nn.Module):
    """A grouped convolution, one that is called twice, a parameter outside of any layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc((self.scale * self.twice(self.twice(x))).mean((2, 3)))


def test_layers_add_up_to_the_model_in_the_order_of_the_forward_pass():
    net, x = Net().train(), torch.randn(4, 3, 10, 12)
    found = summarize(net, x)
    rows = {row.name: row for row in found.layers}
    assert list(rows)[:4] == ["stem", "bn", "twice", "fc"] and net.training
    assert rows["stem"].shape == (8, 10, 12) and rows["stem"].macs == 8 * 27 * 120
    assert rows["twice"].macs == 2 * 8 * 36 * 120 and rows["twice"].params == 8 * 36 + 8
    assert rows["unused"].macs == 0 and rows["unused"].shape is None and rows[""].params == 1
    assert sum(row.params for row in found.layers) == found.params == sum(p.numel() for p in net.parameters())
    assert rows["stem"].macs + rows["twice"].macs + rows["fc"].macs == found.macs == count_macs(net, x[:1])


@pytest.mark.parametrize("name", ["rep_mobilenetv2_035", "resnet18"])
def test_what_it_says_of_the_verbs_is_what_they_do(name):
    net, x = timm.create_model(name, num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    found = summarize(net, x)
    merged, report = rep_plugin.reparameterize(net, x[:1])
    assert found.merge.layers == [block.name for block in report.blocks]
    assert f"{report.params_after:,} parameters" in found.merge.result
    plan = rep_plugin.plan_pruning(net, x, "l1", 0.3)
    assert set(plan.kept) <= set(found.prune.layers) and not set(plan.frozen) & set(found.prune.layers)
    if name == "resnet18":
        _, report = rep_plugin.expand(net, "acb")
        assert found.expand.layers == [block.name for block in report.blocks]
        assert "3 left as they are" in found.expand.notes[0]
    else:
        assert found.expand.notes == ["no convolution stands outside of a block"]
    assert summarize(merged, x).merge.notes[0].endswith("holds no block that can be merged")


def test_the_command_takes_names_folders_and_configs(tmp_path, capsys):
    rep_plugin.timm.save_timm(
        rep_plugin.reparameterize(timm.create_model("rep_mobilenetv2_035", num_classes=2).eval())[0], tmp_path / "saved"
    )
    capsys.readouterr()
    main(["summary", f"local-dir:{tmp_path}/saved", "--size", "64", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["input_shape"] == [1, 3, 64, 64] and found["layers"][0]["name"] == "stem"
    assert sum(row["params"] for row in found["layers"]) == found["params"]
    main(["summary", "rep_mbv2_mini_cub"])
    text = capsys.readouterr().out
    _, report = rep_plugin.reparameterize(build_model(rep_plugin.get_config("rep_mbv2_mini_cub")), verify=False)
    assert "one image of 3x96x96" in text and "backbone.stages.1.0" in text and f"{report.params_before:,}" in text
    assert f"merge: {len(report.blocks)} layers; {report.params_after:,} parameters" in text
    for words, message in {
        "resnet18 --cfg-options a=1": "--cfg-options does not go with resnet18",
        "rep_mbv2_mini_cub --pretrained": "--pretrained does not go with the config",
        "resnet81": "timm has no model 'resnet81', expected one as resnet18",
        "nowhere.py": "config nowhere.py does not exist",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main(["summary", *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0", "--size: expected a whole number >= 1, got '0'"),
        ("99999", "--size: expected a whole number <= 8192, got '99999'"),
        ("8 8 8", "--size takes one or two numbers"),
    ],
)
def test_sizes_out_of_range_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["summary", "resnet18", "--size", *words.split()])
    assert message in capsys.readouterr().err


def test_an_image_that_is_too_small_is_named():
    with pytest.raises(ArgumentError, match=r"example_input, .*\(1, 3, 2, 2\).* does not go through Sequential"):
        summarize(nn.Sequential(nn.Conv2d(3, 4, 5)), torch.zeros(1, 3, 2, 2))
