"""A few units of every part of `make attack`, and the command that runs them."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests.attack.__main__ import find_parts, main
from tests.helpers import ROOT

PART = """
import os, time
SHORT, LONG = 2, 4

def attack(seed, folder):
    if seed == 1:
        raise AssertionError("one is\\nwrong")
    if seed == 2:
        time.sleep(60)
    if seed == 3:
        os._exit(7)
    (folder / "file").write_text("in a folder of its own")
    return {"units": 1, "equal": seed}
"""


@pytest.mark.parametrize("part", find_parts())
def test_part(part, tmp_path):
    module = importlib.import_module(f"tests.attack.{part}")
    for seed in range(getattr(module, "FEW", 2)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert module.attack(seed, folder)


def test_command(tmp_path, monkeypatch, capsys):
    """Hangs and deaths are faults, the units after them run, and passed units are skipped the second time."""
    (tmp_path / "attack_package").mkdir()
    (tmp_path / "attack_package/part.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    record, summary = tmp_path / "record.jsonl", tmp_path / "summary.json"
    part = "attack_package.part"
    command = [sys.executable, "-m", "tests.attack", part, "--record", str(record), "--count", "1"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}, check=True)
    command = [part, "--record", str(record), "--summary", str(summary), "--limit", "3"]
    assert main([*command, "--count", "6", "--jobs", "2"]) == 1
    with record.open("a") as file:
        file.write('{"part": "attack_pack')  # killed while it wrote
    assert main([*command, "--long", "--shard", "1/2"]) == 1
    lines = [json.loads(line) for line in record.read_text().splitlines() if line.endswith("}")]
    assert sorted(line["seed"] for line in lines) == [0, 1, 1, 2, 3, 3, 4, 5]
    assert {line["seed"]: line.get("fault") for line in lines} == {
        0: None,
        1: "one is wrong",
        2: "still running after 3 s",
        3: "the process died with code 7",
        4: None,
        5: None,
    }
    assert set(json.loads(summary.read_text())["parts"][part]["commits"]) == {lines[0]["commit"]}
    out = capsys.readouterr().out
    assert "python -m tests.attack attack_package.part --first 3 --count 1: the process died" in out
