"""Forwards that decide by values, sizes or the number of images: compared on both sides, refused or named."""

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.errors import EquivalenceError, ExportError
from rep_plugin.measure import branches


class Decides(nn.Module):
    """Two convolutions, of which one runs; ``kind`` says what decides."""

    def __init__(self, kind, limit):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.kind, self.limit = kind, limit
        self.eval()

    def forward(self, x):
        if self.decision(x) > self.limit:
            return self.one(x)
        return self.other(x)

    def decision(self, x):
        if self.kind == "value":
            return x.abs().max()
        return x.shape[-1] if self.kind == "size" else x.shape[0]


def export(model, path, **options):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return rep_plugin.export_onnx(model, path, x, rounds=0, **options)


SIZES, NUMBERS = dict(dynamic_size=True), dict(dynamic_batch=True)
ONE_PATH = "the file holds one path of the forward.* in '(one|other)' .test_branches.py:2"


def test_decisions_by_values_are_named(tmp_path):
    notes = export(Decides("value", 10), tmp_path / "net.onnx").notes
    assert len(notes) == 1 and "test_branches.py:2" in notes[0]
    assert notes[0].startswith("the forward decides by a value in Decides (")
    assert notes[0].endswith("only the path of the given inputs is in the file")
    with pytest.raises(ExportError, match="cannot be written as ONNX"):
        export(Decides("value", 10), tmp_path / "new.onnx", dynamo=True)


@pytest.mark.parametrize(
    ("kind", "limit", "options"), [("size", 64, SIZES), ("size", 33, SIZES), ("batch", 4, NUMBERS)]
)
def test_decisions_by_sizes_are_refused(kind, limit, options, tmp_path):
    with pytest.raises(EquivalenceError, match=ONE_PATH) as caught:
        export(Decides(kind, limit), tmp_path / "net.onnx", **options)
    assert f"export with {next(iter(options))}=False" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises((EquivalenceError, ExportError)):
        export(Decides(kind, limit), tmp_path / "new.onnx", dynamo=True, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(("kind", "limit", "options"), [("size", 64, {}), ("batch", 4, dict(dynamic_batch=False))])
def test_what_is_fixed_decides_nothing(kind, limit, options, dynamo, tmp_path):
    report = export(Decides(kind, limit), tmp_path / "net.onnx", dynamo=dynamo, **options)
    assert not report.notes and report.max_rel_error < 1e-4


def test_both_sides_that_agree_are_compared(tmp_path):
    model = Decides("size", 64)
    model.other.load_state_dict(model.one.state_dict())
    report = export(model, tmp_path / "net.onnx", dynamic_size=True)
    assert max(shape[-1] for shape in report.compared) > 64


def test_a_size_that_is_too_large_to_run_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(branches, "LARGEST", 64)
    notes = export(Decides("size", 80), tmp_path / "net.onnx", dynamic_size=True).notes
    assert "the forward takes another path in 'one' (test_branches.py:2" in notes[0]
    assert notes[0].endswith("which is not in the file: they are too large to run")


class Scaled(nn.Conv2d):
    """The same operations on both sides: only the number differs."""

    def forward(self, x):
        return super().forward(x) * (2 if x.shape[-1] > 300 else 3)


def test_decisions_that_change_no_operation_are_named(tmp_path):
    notes = export(Scaled(3, 4, 1).eval(), tmp_path / "net.onnx", dynamic_size=True).notes
    assert len(notes) == 1 and notes[0].startswith("the forward decides by sizes in test_branches.py:")
