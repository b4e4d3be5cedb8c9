"""One short real training run with the real tools, shared by the tests of what it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command to its end; its output is kept."""
    words = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Folder with a small rendered data set, a config, and a finished run with EMA in ``work``."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "birds"
    render = ["--classes", 4, "--train-per-class", 12, "--test-per-class", 6, "--size", 64]
    made = run(ROOT / "tools/dataset_converters/make_mini_fgvc.py", "--out", data, *render, cwd=folder)
    assert made.returncode == 0, made.stderr
    (folder / "config.py").write_text(
        f"""
_base_ = ["{ROOT}/configs/rep_mbv2_mini_cub.py"]
model = dict(backbone=dict(widen_factor=0.35), head=dict(num_classes=4))
train_dataloader = dict(batch_size=8, num_workers=0, dataset=dict(data_root="{data}", classes=list("abcd")))
val_dataloader = dict(batch_size=8, num_workers=0, dataset=dict(data_root="{data}", classes=list("abcd")))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
custom_hooks = [dict(type="EMAHook", momentum=0.1), dict(type="rep_plugin.ReparamHook")]
"""
    )
    done = run(ROOT / "tools/train.py", "config.py", "--work-dir", "work", cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (folder / "train.log").write_text(done.stdout + done.stderr)
    return folder
