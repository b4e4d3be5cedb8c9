"""The config that slims a stock network on Fashion-MNIST, on real pictures, in short."""

import json

from tests.test_hooks.conftest import ROOT, run


def test_config_slims_and_writes_what_it_says(tmp_path):
    options = [
        "train_dataloader.dataset.indices=256",
        "val_dataloader.dataset.indices=100",
        "train_dataloader.num_workers=0",
        "val_dataloader.num_workers=0",
        "model.backbone.stem_channels=8",
        "model.backbone.base_channels=8",
        "model.head.in_channels=64",
        "train_cfg.max_epochs=3",
        "custom_hooks.0.end=2",
        "custom_hooks.1.begin=2",
        "custom_hooks.1.min_channels=2",
        "custom_hooks.1.round_to=2",
    ]
    config = ROOT / "configs/slim_resnet18_fashion_mnist.py"
    done = run(ROOT / "tools/train.py", config, "--work-dir", tmp_path, "--cfg-options", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "pruned.json").read_text())
    (only,) = json.loads((tmp_path / "pruned.rounds.json").read_text())
    assert report["max_rel_error"] < 1e-9 and report["macs_after"] <= 0.5 * report["macs_before"]
    assert only["epoch"] == 2 and all(set(only[when]) == {"accuracy/top1"} for when in ("before", "after", "tuned"))
    assert (tmp_path / "pruned.py").is_file() and "SparsityHook pulls" in done.stdout + done.stderr
