"""The config that narrows a stock network by ResRep on Fashion-MNIST, on real images, in short."""

import json

from tests.test_openmmlab.test_hooks.conftest import ROOT, run


def test_config_forgets_half_of_the_multiply_adds_and_merges(tmp_path):
    options = [
        "train_dataloader.dataset.indices=256",
        "val_dataloader.dataset.indices=100",
        "train_dataloader.num_workers=0",
        "val_dataloader.num_workers=0",
        "model.backbone.stem_channels=8",
        "model.backbone.base_channels=8",
        "model.head.in_channels=64",
        "train_cfg.max_epochs=2",
        "train_cfg.val_interval=2",
        "custom_hooks.0.begin=0",
        "custom_hooks.0.end=1",
        "custom_hooks.0.interval=1",
        "custom_hooks.0.min_channels=2",
        "custom_hooks.0.round_to=2",
    ]
    config = ROOT / "configs/pruning/resrep_resnet18_fashion_mnist.py"
    done = run(ROOT / "tools/train.py", config, "--work-dir", tmp_path, "--cfg-options", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "pruned.json").read_text())
    (only,) = json.loads((tmp_path / "pruned.rounds.json").read_text())
    assert report["max_rel_error"] < 1e-9 and report["macs_after"] <= 0.5 * report["macs_before"]
    assert [choice["number"] for choice in only["choices"]] == [1, 2, 3] and only["smallest_kept_row"] > 0
    assert all(set(only[when]) == {"accuracy/top1"} for when in ("before", "after"))
    assert (tmp_path / "pruned.py").is_file() and "compactors, multiply-adds" in done.stdout + done.stderr
