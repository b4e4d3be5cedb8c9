"""The closing table of a run: both forms agree, the stock network's top-1 is a stored one, and the next steps work."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from rep_plugin.commands.compare import called_as
from rep_plugin.errors import ArgumentError
from rep_plugin.openmmlab.compare import read_stock_record
from tests.helpers import ROOT
from tests.test_openmmlab.test_hooks.conftest import run

RECORD = {
    "row": "stock network",
    "config": "stock.py",
    "date": "2026-01-02",
    "versions": {"torch": "2.14"},
    "processor": "Some CPU",
    "main_metric": "accuracy/top1",
}


@pytest.fixture(scope="module")
def printed(trained) -> str:
    for seed, top1 in enumerate((80.0, 81.5)):
        record = RECORD | {"seed": seed, "metrics": {"accuracy/top1": top1}}
        (trained / f"record{seed}.json").write_text(json.dumps(record))
    records = "--stock-record", "record0.json", "record1.json"
    done = run("-m", "rep_plugin", "compare", "config.py", "work", "--rounds", 2, *records, cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_table_has_all_forms_and_names_the_record(printed):
    assert "predictions that differ: 0 of 24" in printed and "80.75 *" in printed
    source = printed[printed.index("* stored record record0.json") : printed.index("float64")]
    for words in ("stock.py, stock network, seed 0;", "record1.json", "seed 1; Some CPU, torch 2.14, 2026-01-02"):
        assert words in " ".join(source.split())


def test_printed_commands_work_as_they_stand(printed, trained):
    lines = printed.splitlines()
    (files,) = (line.removeprefix("files: ").split(", ") for line in lines if line.startswith("files: "))
    assert len(files) == 4 and all((trained / name).is_file() for name in files)
    steps = {line.split()[0]: line[14:] for line in lines[lines.index("next:") + 1 :]}
    assert lines[lines.index("next:") + 1 :] == lines[-4:] and len(steps) == 4
    for name in ("test", "prune"):
        done = subprocess.run(shlex.split(steps[name]), cwd=trained, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("pruned.pth", "pruned.py"):
        (trained / "work" / name).unlink()
    assert (ROOT / "docs/quickstart_mmpretrain.md").is_file() and "export work/deploy.py" in steps["export"]


@pytest.mark.parametrize("text", ["", "{}", '{"metrics": {"top1": "x"}, "main_metric": "top1"}', "[1]"])
def test_what_is_no_record_is_refused(text, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(
        ArgumentError, match=r"record.json is no record of a run, expected what rep-plugin experiments writes"
    ):
        read_stock_record(tmp_path / "record.json")


def test_the_program_is_named_as_it_was_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "rep-plugin"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert called_as() == "bin/rep-plugin"
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert called_as() == "rep-plugin"
    monkeypatch.setattr(sys, "argv", ["rep_plugin/__main__.py"])
    assert called_as() == f"{sys.executable} -m rep_plugin"
