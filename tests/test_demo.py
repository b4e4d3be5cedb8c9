"""The demo's config, its stock counterpart and its pages fit together."""

import importlib
import json

from mmengine.config import Config

from rep_plugin.measure.costs import count_params
from rep_plugin.openmmlab.compare import read_stock_record
from rep_plugin.openmmlab.load import build_model
from tests.helpers import ROOT
from tests.test_tools.test_make_mini_fgvc import tool

DEMO = Config.fromfile(ROOT / "configs/rep_mbv2_mini_cub.py")
STOCK = Config.fromfile(ROOT / "benchmarks/configs/stock_mbv2_mini_cub.py")
RECORDS = sorted((ROOT / "docs/results/records").glob("demo*.json"))


def test_stock_network_has_the_same_budget():
    for key in ("train_dataloader", "val_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "randomness"):
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


def test_records_are_of_the_configs_as_they_are():
    for path in RECORDS:
        record = json.loads(path.read_text())
        assert (ROOT / record["config"]).is_file() and 5 < read_stock_record(path).top1 <= 100
        assert record["epochs"] == DEMO.train_cfg.max_epochs


def test_the_table_reads_what_the_benchmark_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    demo, runs = importlib.import_module("demo"), importlib.import_module("training_runs")
    jobs = [
        runs.Job("a", 0, demo.STOCK, [], "demo"),
        runs.Job("b", 3, demo.STOCK, [], "demo", {"OMP_NUM_THREADS": "2"}),
    ]
    results = [dict(top1=top1, seconds=9.7, cpu_seconds=8.2) for top1 in (90.0, 91.0)]
    demo.write_record(tmp_path / "records" / "stock.json", demo.STOCK, "rep-plugin train it", jobs, results)
    record = json.loads((tmp_path / "records" / "stock.json").read_text())
    assert record["epochs"] == DEMO.train_cfg.max_epochs and [run["threads"] for run in record["runs"]] == [1, 2]
    read = read_stock_record(tmp_path / "records" / "stock.json")
    assert read.top1 == 90.5 and "seeds 0, 3; threads: 1 and 2" in read.source
