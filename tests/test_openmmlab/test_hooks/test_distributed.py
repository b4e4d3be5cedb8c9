"""The pruning hooks in two real processes, connected by gloo, under tools/train.py: one network at every moment."""

import json
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from rep_plugin.openmmlab.load import load_model
from tests.test_openmmlab.test_hooks.conftest import ROOT
from tests.test_openmmlab.test_hooks.tiny import config

HOOKS = {
    "rounds": [
        dict(type="rep_plugin.SparsityHook", strength=0.01, end=3),
        dict(type="EMAHook", momentum=0.2, update_buffers=True),
        dict(type="rep_plugin.PruneHook", prune_fraction=0.5, rounds=2, begin=1, interval=2),
    ],
    "soft": [dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.5, begin=2)],
}
CODE = """
import sys
from pathlib import Path
from tests.test_openmmlab.test_hooks.forked import load_tool, train_together
tool = load_tool()
for case in sys.argv[2:]:
    folder = Path(sys.argv[1], case)
    options = [str(folder / "config.py"), "--work-dir"]
    codes = train_together(tool, [*options, str(folder / "whole")], folder / "whole.txt")
    resume = ["--resume", str(folder / "whole/epoch_2.pth")]
    codes += train_together(tool, [*options, str(folder / "again"), *resume], folder / "again.txt")
    print(case, codes, flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both cases trained to the end, and resumed after the second of four epochs."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, hooks in HOOKS.items():
        cfg = config(folder / case, *hooks, dict(type="HashLog"))
        cfg.env_cfg = dict(dist_cfg=dict(backend="gloo"))
        cfg.train_dataloader.batch_size = 2  # so that each process has four batches an epoch, half of the images
        (folder / case).mkdir()
        cfg.dump(folder / case / "config.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(folder), *HOOKS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for case in HOOKS:
        logs = "".join(path.read_text()[-1500:] for path in sorted((folder / case).glob("*.txt")))
        assert f"{case} [0, 0, 0, 0]" in done.stdout, logs
    return folder


def hashes(folder) -> dict[tuple[int, int], str]:
    """Return {(rank, epoch): hash of plans, parameters and momentum}."""
    lines = [line.split() for line in (folder / "hashes.txt").read_text().splitlines()]
    return {(int(rank), int(epoch)): digest for rank, epoch, digest in lines}


@pytest.mark.parametrize("case", list(HOOKS))
def test_both_processes_hold_one_network_and_resume_it(case, folder):
    whole, again = hashes(folder / case / "whole"), hashes(folder / case / "again")
    assert set(whole) == {(rank, epoch) for rank in (0, 1) for epoch in (1, 2, 3, 4)}
    assert all(whole[0, epoch] == whole[1, epoch] for epoch in (1, 2, 3, 4))
    assert len(set(whole.values())) == 4, "weights move"
    assert again == {key: value for key, value in whole.items() if key[1] > 2}


@pytest.mark.parametrize("case", list(HOOKS))
def test_the_files_are_written_once_and_load(case, folder):
    whole, again = folder / case / "whole", folder / case / "again"
    assert (whole / "pruned.plan.json").read_text() == (again / "pruned.plan.json").read_text()
    models = [load_model(Config.fromfile(place / "pruned.py"), place / "pruned.pth")[0] for place in (whole, again)]
    assert models[0].backbone.conv2.out_channels < 16
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    epochs = [entry["epoch"] for entry in json.loads((whole / "pruned.rounds.json").read_text())]
    assert epochs == ([1, 3] if case == "rounds" else [4])
    assert not list(whole.glob("*.new")) and not list(whole.glob(".*.tmp"))
