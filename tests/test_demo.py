"""The demo's config, its stock counterpart and its pages fit together."""

import json
from pathlib import Path

from mmengine.config import Config

from rep_plugin.measure.costs import count_params
from rep_plugin.openmmlab.compare import read_stock_record
from rep_plugin.openmmlab.experiments import config_of, read_set, runs_of
from rep_plugin.openmmlab.load import build_model
from tests.helpers import ROOT
from tests.test_tools.test_make_mini_fgvc import tool

DEMO = Config.fromfile(ROOT / "configs/rep_mbv2_mini_cub.py")
SET = read_set("demo")
(STOCK,) = (config_of(run) for run in runs_of(SET, Path("nowhere")) if run.row.name == "stock MobileNetV2")
RECORDS = sorted((ROOT / "docs/results/records/demo").glob("*.json"))


def test_stock_network_has_the_same_budget():
    for key in ("train_dataloader", "val_dataloader", "optim_wrapper", "param_scheduler", "train_cfg"):
        assert STOCK[key] == DEMO[key]
    assert STOCK.custom_hooks == DEMO.custom_hooks[:1] and DEMO.custom_hooks[0].type == "EMAHook"
    assert STOCK.model.backbone.type == "MobileNetV2" and STOCK.model.head == DEMO.model.head
    assert build_model(STOCK).backbone(next(build_model(DEMO).parameters()).new_zeros(1, 3, 96, 96))[0].shape[1] == 1280


def test_last_epoch_is_validated_and_kept():
    epochs = DEMO.train_cfg.max_epochs
    assert epochs % DEMO.train_cfg.val_interval == epochs % DEMO.default_hooks.checkpoint.interval == 0
    assert f"{epochs} epochs" in (page := (ROOT / "docs/quickstart_mmpretrain.md").read_text())
    assert f"work_dirs/mine/epoch_{epochs}.pth" in page


def test_pages_state_the_number_of_images_and_parameters():
    birds = tool.Params()
    images = f"{birds.classes * (birds.train_per_class + birds.test_per_class):,} images"
    demo = (ROOT / "docs/demo.md").read_text()
    assert images in demo and images in (ROOT / "README.md").read_text()
    assert f"| {count_params(build_model(DEMO)):,} |" in demo


def test_the_record_is_of_the_set_as_it_is():
    assert RECORDS
    for path in RECORDS:
        record = json.loads(path.read_text())
        row = SET.rows[record["row"]]
        assert record["config"] == row.config and record["options"] == dict(row.options)
        assert record["history"][-1][0] == DEMO.train_cfg.max_epochs and 5 < read_stock_record(path).top1 <= 100
