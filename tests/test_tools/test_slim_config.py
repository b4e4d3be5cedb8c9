"""The configs that slim a stock network on Fashion-MNIST, on real images, in short."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_openmmlab.test_hooks.conftest import ROOT

SHORT = [
    "train_dataloader.dataset.indices=256",
    "val_dataloader.dataset.indices=100",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "train_cfg.max_epochs=3",
    "train_cfg.val_interval=3",
]
CASES = {
    "flow_resnet18_fashion_mnist": ["custom_hooks.0.begin=2"],
    "slim_resnet18_fashion_mnist": ["custom_hooks.0.end=2", "custom_hooks.1.begin=2"],
    "slim_resnet18_fashion_mnist_iterative": [
        "custom_hooks.0.end=2",
        "custom_hooks.1.begin=1",
        "custom_hooks.1.rounds=2",
    ],
    "slim_resnet18_fashion_mnist_soft": [],
}
EPOCHS = {name: epochs for name, epochs in zip(CASES, ([2], [2], [1, 2], [3]), strict=True)}
CODE = """
import json, sys
from pathlib import Path
from tests.test_openmmlab.test_hooks.forked import fork, load_tool, wait
tool, folder = load_tool(), Path(sys.argv[1])
for name, options in json.loads(sys.argv[2]).items():
    arguments = [f"configs/pruning/{name}.py", "--work-dir", str(folder / name), "--cfg-options", *options]
    print(name, wait(fork(tool, arguments, folder / f"{name}.txt")), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of them run, each in a process of its own."""
    folder = tmp_path_factory.mktemp("slim")
    cases = json.dumps({name: [*SHORT, *options] for name, options in CASES.items()})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(folder), cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    logs = "".join(path.read_text()[-1500:] for path in sorted(folder.glob("*.txt")))
    assert done.stdout == "".join(f"{name} 0\n" for name in CASES), done.stderr + logs
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_config_slims_and_writes_what_it_promises(name, folder):
    report = json.loads((folder / name / "pruned.json").read_text())
    rounds = json.loads((folder / name / "pruned.rounds.json").read_text())
    assert report["max_rel_error"] < 1e-9 and report["macs_after"] <= 0.5 * report["macs_before"]
    assert [entry["epoch"] for entry in rounds] == EPOCHS[name]
    soft = name.endswith("soft")
    measured = ("before", "after") if soft else ("before", "after", "tuned")
    assert all(set(entry[when]) == {"accuracy/top1"} for entry in rounds for when in measured)
    assert (folder / name / "pruned.py").is_file()
    sparse = name.startswith("slim") and not soft
    assert ("SparsityHook pulls" in (folder / f"{name}.txt").read_text()) == sparse
