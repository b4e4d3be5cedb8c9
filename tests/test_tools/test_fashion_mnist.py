"""The Fashion-MNIST config on real images, in short: `rep-plugin experiments rep_mbv2` is the long form."""

import json

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from tests.test_openmmlab.test_hooks.conftest import ROOT, run


def test_config_trains_and_deploys_on_real_images(tmp_path):
    options = [
        "train_dataloader.dataset.indices=512",
        "val_dataloader.dataset.indices=200",
        "train_dataloader.num_workers=0",
        "val_dataloader.num_workers=0",
        "train_cfg.max_epochs=1",
        "default_hooks.logger.interval=1",
    ]
    config = ROOT / "configs/rep_mbv2_fashion_mnist.py"
    done = run(ROOT / "tools/train.py", config, "--work-dir", tmp_path, "--cfg-options", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "deploy.json").read_text())
    assert report["max_rel_error"] < 1e-10 and report["input_shape"] == [8, 1, 28, 28] and len(report["blocks"]) == 19
    lines = [json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)


def test_validation_is_on_the_test_images():
    cfg = Config.fromfile(ROOT / "configs/rep_mbv2_fashion_mnist.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        train, val = (DATASETS.build(cfg[f"{name}_dataloader"].dataset) for name in ("train", "val"))
    assert (len(train), len(val)) == (60000, 10000)
    assert not (train.get_data_info(0)["img"] == val.get_data_info(0)["img"]).all()
