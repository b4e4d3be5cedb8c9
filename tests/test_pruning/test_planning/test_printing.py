"""What a plan and its report show: a few lines, a table, a plot."""

import io
import subprocess
import sys

import pytest
from rich.console import Console
from torch import nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning
from rep_plugin.blocks import RepVGGBlock
from rep_plugin.pruning.apply import PruneReport
from rep_plugin.pruning.planning.plan import MERGED
from tests.test_pruning.nets import ConvBN, Pooled, Residual, ready

X = (1, 3, 13, 13)


def net_of(tail=6):
    blocks = [layer for _ in range(tail) for layer in (ConvBN(32, 32, 1), nn.Softmax(1))]
    return ready(ConvBN(3, 64), Residual(64, 40), ConvBN(64, 32), *blocks, Pooled(32))


def printed(what, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    what.print(console)
    return console.file.getvalue()


def test_a_plan_is_a_line_and_its_notes():
    plan = PrunePlan.from_widths(net_of(), X, {"0.conv": 3})
    assert len(plan.to_json()) > 5000
    first, *notes = str(plan).splitlines()
    assert first == repr(plan) and len(first) < 300
    assert "Sequential, given widths of 1 layers, by l1: 2 of 11 layers narrower, 7 frozen, parameters " in first
    assert f"multiply-adds {plan.macs_before:,} -> {plan.macs_after:,}" in first
    assert notes == [f"note: {note}" for note in plan.notes] and "0.conv (64 -> 3), 1.second.conv (64 -> 3)" in notes[0]


def test_the_table_has_every_layer_that_can_lose_channels():
    plan = PrunePlan.from_widths(net_of(), X, {"0.conv": 3, "1.first.conv": 30})
    text = printed(plan)
    rows = {row.split("│")[1].strip(): row for row in text.splitlines() if row.startswith("│")}
    assert "95.3%" in rows["0.conv"] and "more than 90 % go" in rows["0.conv"] and "25.0%" in rows["1.first.conv"]
    assert "more than 90 % go" in rows["1.second.conv"] and "3.conv" not in rows and "15.fc" not in rows
    assert (
        f"{plan.params_before:,}" in rows["parameters"] and f"{plan.macs_after:,}" in rows["multiply-adds, one image"]
    )
    (several,) = (line for line in text.splitlines() if line.startswith("stay as they are: "))
    assert several.startswith("stay as they are: 3.conv, 5.conv, 7.conv and 3 more: '3.conv'")
    assert "stays as it is: '15.fc' makes the model output" in text and "note: layers lose more than 90 %" in text
    coupled = printed(plan_pruning(net_of(), X, "l1", 0.1))
    assert "goes with 0.conv" in coupled and "layers lose" not in coupled


def test_the_milliseconds_are_a_row():
    plan = plan_pruning(net_of(0), X, "l1", 0.1)
    timed = PrunePlan(**{**plan.__dict__, "latency_before": 4.0, "latency_after": 3.0})
    assert "milliseconds" not in printed(plan) and "│ milliseconds" in printed(timed) and "25.0%" in printed(timed)


def test_what_budgets_count_of_blocks_is_in_the_plan_and_in_every_report():
    net = ready(RepVGGBlock(3, 16), RepVGGBlock(16, 16), RepVGGBlock(16, 32), Pooled(32))
    plan = plan_pruning(net, X, "l1", macs=0.5, round_to=1)
    assert plan.notes == (MERGED,) and "each block as one convolution" in printed(plan)
    report = apply_plan(net, plan)
    assert plan.macs_after <= 0.5 * plan.macs_before < 0.5 * report.macs_before
    numbers = f"{plan.macs_before:,}", f"{plan.macs_after:,}"
    (row,) = (row for row in str(report).splitlines() if "once merged, as budgets count" in row)
    assert all(number in row for number in numbers)
    assert report.notes[0].startswith("merged, {} multiply-adds are {}: what budgets count (".format(*numbers))
    whole = PruneReport("apply_plan", 1, 1, report.macs_before, report.macs_after, input_shape=X)
    whole.add_plan(plan)  # as hooks report all of their rounds
    assert whole.notes == report.notes[-len(whole.notes) :] and "once merged" in str(whole)
    for module in net.modules():
        if isinstance(module, RepVGGBlock):
            module.switch_to_deploy()
    plan = plan_pruning(net, X, "l1", macs=0.5, round_to=1)
    assert MERGED not in plan.notes and "once merged" not in str(apply_plan(net, plan))


def test_notes_of_a_plan_are_in_its_report():
    net = net_of(0)
    report = apply_plan(net, PrunePlan.from_widths(net, X, {"0.conv": 3}))
    assert any("layers lose more than 90 %" in note for note in report.notes)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plan_pruning(net_of(), X, "l1", 0.3).plot(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


def test_a_plot_without_matplotlib_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None  # as if it were not installed
import importlib.util, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "matplotlib" else found(name, *args)
from rep_plugin.errors import MissingPackageError
from rep_plugin.pruning import plan_pruning
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
try:
    plan_pruning(net, (1, 3, 8, 8), "l1", 0.5).plot("widths.png")
except MissingPackageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs matplotlib, which is not installed: pip install 'rep-plugin[" in done.stdout, done.stderr
