"""Progress is shown on a terminal, after a while, and leaves nothing; anywhere else nothing is written."""

import contextlib
import os
import pty
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.errors import ArgumentError
from rep_plugin.measure import progress
from rep_plugin.measure.progress import track, working
from rep_plugin.pruning import EagerTimer
from rep_plugin.testing import calibrate_random_bn_

# The file alone: the package around it takes seconds to import.
START = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("progress", {progress.__file__!r})
progress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(progress)
track, working = progress.track, progress.working
progress.DELAY = 0.3

def paint():
    until = time.monotonic() + 60
    while progress._DISPLAY.bars is None and time.monotonic() < until:
        time.sleep(0.01)
    progress._DISPLAY.bars.refresh()
"""
LOOP = """
for number in track(range(5), "counting sheep"):
    print("item", number, flush=True)
    time.sleep(0.2)
"""
PAINTED = LOOP + "    if number > 0: paint()\n"  # how soon a busy machine does it by itself is not the matter


def run(code, stdout=subprocess.PIPE, **env):
    """Run code in a process whose stderr is a terminal; return what it wrote there, its stdout and its exit status."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **env}
    stdout = theirs if stdout is None else stdout
    with subprocess.Popen(
        [sys.executable, "-c", START + code], stdout=stdout, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            seen += part
        out = process.stdout.read().decode() if process.stdout else ""
    os.close(ours)
    return seen.decode(), out, process.returncode


def test_a_terminal_sees_what_is_done_and_is_clean_afterwards():
    seen, out, code = run(PAINTED + "assert progress._DISPLAY.stages == [] and progress._DISPLAY.bars is None")
    assert code == 0 and "counting sheep" in seen and "3/5" in seen
    assert out == "".join(f"item {number}\n" for number in range(5))  # a piped stdout gets nothing of it
    assert seen.rstrip("\r").endswith("\r\x1b[2K\x1b[?25h"), seen[-40:]  # erased, and the cursor is back


def test_what_is_printed_meanwhile_stays_readable():
    seen, _, code = run(PAINTED, stdout=None)
    assert code == 0 and all(f"item {number}\r\n" in seen for number in range(5)) and "counting sheep" in seen


def test_nested_work_has_a_line_each():
    code = """
with working("whole", total=2) as step:
    for _ in range(2):
        for _ in track(range(4), "part"): paint()
        step()
        paint()
"""
    seen, _, status = run(code)
    assert status == 0 and "whole" in seen and "part" in seen and "1/2" in seen


@pytest.mark.parametrize(
    ("code", "env"),
    [
        (LOOP.replace("0.2", "0.001"), {}),  # over before anybody waits
        (LOOP, {"RANK": "1"}),
        (LOOP, {"TERM": "dumb"}),
        ("list(track(iter([]), 'nothing'))", {}),
    ],
)
def test_nothing_is_shown_of_short_work_or_in_another_process_of_ddp(code, env):
    seen, _, status = run(code, **env)
    assert (seen, status) == ("", 0)


def test_an_error_comes_after_the_line_is_erased():
    seen, _, status = run("with working('failing'):\n    paint()\n    raise KeyError('why')")
    assert status == 1 and "failing" in seen and seen.rstrip().endswith("KeyError: 'why'")
    assert "failing\x1b" not in seen.rpartition("Traceback")[2]


def test_a_loop_that_is_left_early_stops():
    seen, _, status = run(
        "for number in track(range(9), 'leaving'):\n    paint()\n    if number == 3: break\n"
        "del number\nimport gc; gc.collect()\nassert progress._DISPLAY.stages == []\n"
    )
    assert status == 0 and "leaving" in seen


@pytest.mark.parametrize("where", [subprocess.PIPE, subprocess.DEVNULL, None])
def test_without_a_terminal_nothing_is_written(where, tmp_path):
    if where is None:
        where = (tmp_path / "log").open("wb")
    done = subprocess.run([sys.executable, "-c", START + LOOP], stdout=subprocess.PIPE, stderr=where)
    assert done.returncode == 0 and not done.stderr and done.stdout.count(b"\n") == 5
    assert not (tmp_path / "log").exists() or not (tmp_path / "log").read_bytes()


def test_it_costs_nothing_where_nothing_is_shown():
    started = time.perf_counter()
    for _ in track(range(20_000), "nothing"):
        pass
    assert time.perf_counter() - started < 0.5


def test_it_decorates_and_gives_back_what_the_function_does():
    @working("doubling")
    def double(x):
        """Twice."""
        return 2 * x

    assert double(2) == 4 == double(2) and double.__doc__ == "Twice." and list(track([1, 2], "listing")) == [1, 2]


class Recorded:
    """Stands for the display, and keeps what it was told: name -> [total, steps]."""

    def __init__(self):
        self.seen, self.open = {}, []

    def enter(self, stage):
        self.seen.setdefault(stage.what, [stage.total, 0])
        self.open.append(stage)

    def advance(self, stage):
        self.seen[stage.what][1] += 1

    def leave(self, stage):
        self.open.remove(stage)


class Unsized:
    """A loader whose length is not known, as torch's of an iterable data set."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        raise TypeError("has no len()")


def test_every_verb_tells_what_it_does(monkeypatch, tmp_path):
    display = Recorded()
    monkeypatch.setattr(progress, "_DISPLAY", display)
    monkeypatch.setattr(progress, "_is_shown", lambda: True)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    calibrate_random_bn_(model, x)

    def told(call):
        display.seen = {}
        result = call()
        assert not display.open
        return result, display.seen

    (expanded, _), seen = told(lambda: rep_plugin.expand(model, "acb", example_input=x))
    assert {"expanding", "comparing whole models", "comparing blocks"} <= seen.keys()
    assert seen["comparing whole models"] == [2, 2] and seen["comparing blocks"] == [2, 4]  # two blocks on two inputs
    _, seen = told(lambda: rep_plugin.reparameterize(expanded, x))
    assert {"merging", "comparing blocks"} <= seen.keys()
    batches = Unsized([(x, torch.tensor([0, 1]))] * 3)
    loss = nn.functional.cross_entropy
    plan, seen = told(
        lambda: rep_plugin.plan_pruning(model, x, "taylor", 0.5, loader=batches, loss=loss, min_channels=1)
    )
    assert seen == {"planning": [None, 0], "scoring": [None, 3]}
    timer = EagerTimer(rounds=(1, 1))
    with contextlib.suppress(ArgumentError):  # of so few rounds the budget may not be met
        told(lambda: rep_plugin.plan_pruning(model, x, "l1", latency=0.7, timer=timer, min_channels=1))
    assert {"planning", "scoring", "timing", "timing pruned copies (often fewer)"} <= display.seen.keys()
    _, seen = told(lambda: rep_plugin.apply_plan(model, plan))
    assert "removing channels" in seen
    _, seen = told(lambda: rep_plugin.export_onnx(model, tmp_path / "net.onnx", x, rounds=1))
    assert {"exporting", "merging", "running PyTorch", "writing the graph", "timing"} <= seen.keys()
    assert seen["comparing runtimes"] == [2, 2]
