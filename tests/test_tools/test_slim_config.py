"""The configs that slim a stock network on Fashion-MNIST, on real pictures, in short."""

import json

import pytest

from tests.test_hooks.conftest import ROOT, run

SHORT = [
    "train_dataloader.dataset.indices=256",
    "val_dataloader.dataset.indices=100",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "train_cfg.max_epochs=3",
    "train_cfg.val_interval=3",
]
ONCE = ["custom_hooks.0.end=2", "custom_hooks.1.begin=2"]
ROUNDS = ["custom_hooks.0.end=2", "custom_hooks.1.begin=1", "custom_hooks.1.rounds=2"]


@pytest.mark.parametrize(
    ("name", "options", "epochs"), [("", ONCE, [2]), ("_iterative", ROUNDS, [1, 2]), ("_soft", [], [3])]
)
def test_config_slims_and_writes_what_it_says(name, options, epochs, tmp_path):
    config = ROOT / f"configs/slim_resnet18_fashion_mnist{name}.py"
    done = run(ROOT / "tools/train.py", config, "--work-dir", tmp_path, "--cfg-options", *SHORT, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "pruned.json").read_text())
    rounds = json.loads((tmp_path / "pruned.rounds.json").read_text())
    assert report["max_rel_error"] < 1e-9 and report["macs_after"] <= 0.5 * report["macs_before"]
    assert [entry["epoch"] for entry in rounds] == epochs
    measured = ("before", "after") if name == "_soft" else ("before", "after", "tuned")
    assert all(set(entry[when]) == {"accuracy/top1"} for entry in rounds for when in measured)
    assert (tmp_path / "pruned.py").is_file()
    assert ("SparsityHook pulls" in done.stdout + done.stderr) == (name != "_soft")
