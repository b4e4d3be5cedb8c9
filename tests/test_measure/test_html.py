"""Reports as one HTML file that needs nothing else."""

import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.export.report import ExportReport, Int8Layer, Int8Report, Int8Trial, RuntimeReport
from rep_plugin.measure.report import BlockReport, Report
from rep_plugin.pruning.apply import PruneReport


class Reader(HTMLParser):
    """Which elements are open, and the text of each cell."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.targets = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        self.targets += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open and all(target.startswith("data:image/png;base64,") for target in reader.targets)
    return reader


@pytest.mark.parametrize(
    ("report", "cells", "plots"),
    [
        (Report("merge", 10, 4, blocks=[BlockReport("a<b>&", "Conv-BN", 1e-12, 2e-12)], max_rel_error=2e-12),
         ["a<b>&", "2.00e-12", "10"], 0),
        (PruneReport("prune", 10, 4, widths={"conv": (16, 4)}, frozen={"fc": "an output"},
                     metrics={"before": {"top1": 90.0}, "after": {"top1": 80.0}}),
         ["25%", "an output", "90", "80"], 1),
        (ExportReport("export", 10, 4, path="a.onnx", seconds=1.0, runtimes=[RuntimeReport("ort", "1", 1e-6, 2e-6, 3.0)]),
         ["ort 1", "3.00"], 0),
        (Int8Report("int8", 10, 4, path="a.onnx", layers=[Int8Layer(f"conv{i}", 1.0, 2.0, i / 2) for i in range(12)],
                    trials=[Int8Trial("Entropy", True, 0.975, 31.0)]), ["conv11", "+5.50", "Entropy", "97.5%"], 0),
    ],
)  # fmt: skip
def test_page_has_tables_notes_and_plots(report, cells, plots, tmp_path):
    report.notes.append("1 < 2")
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == f"{text}\n" and "<li>1 &lt; 2</li>" in text
    reader = read(text)
    assert not [cell for cell in cells if cell not in reader.cells]
    assert len(reader.cells) - len(set(reader.cells)) < len(reader.cells) / 2  # no table stands there twice
    assert len(reader.targets) >= plots and not re.search(r"https?:", text)
    assert report.files("x").keys() == {"x.json", "x.html"}


def test_without_matplotlib_the_plots_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = PruneReport("prune", 10, 4, widths={"conv": (16, 4)})
    assert report.figures() == [] and "25%" in read(report.to_html()).cells


def test_report_of_a_real_removal():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    report = rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, (1, 3, 8, 8), "l1", 0.5))
    text = report.to_html()
    assert text.count("Sequential, prune_fraction=0.5 by l1") == 2  # the page's title and heading
    assert text.count("<table>") == 3  # costs, widths, frozen: no block has errors of its own
    reader = read(text)
    assert reader.cells[reader.cells.index("0") :][:4] == ["0", "16", "8", "50%"] and torch.is_tensor(model[0].weight)
