"""Every config of the slimming studies runs, on tiny images that the stock loaders read, and removes what it declares."""

import hashlib
import importlib.util
import json
import pickle
import sys

import mmengine.config.config
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.datasets import CIFAR10
from mmpretrain.models.backbones import vgg

from rep_plugin.checkpoints import save_checkpoint_file
from rep_plugin.openmmlab.hooks import AccuracyLrHook, SparsityHook
from rep_plugin.openmmlab.load import build_model, load_model
from tests.test_openmmlab.test_hooks.conftest import ROOT
from tests.test_openmmlab.test_hooks.tiny import run

FOLDER = ROOT / "configs/pruning"
CONFIGS = sorted(path.stem for study in ("bcnn", "mobilenetv3") for path in FOLDER.glob(f"slim_{study}_*.py"))
assert CONFIGS
LAYOUTS = ("cub", "cars", "aircraft")
THIN = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rendered birds in three layouts, and noise in the layout of CIFAR-10, whose checksums the stock loader is given."""
    spec = importlib.util.spec_from_file_location("make_mini_fgvc", ROOT / "tools/dataset_converters/make_mini_fgvc.py")
    tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    root = tmp_path_factory.mktemp("data")
    for layout in tool.LAYOUTS:
        tool.make(root / layout, tool.Params(classes=5, train_per_class=3, test_per_class=2, size=48, layout=layout))
    folder = root / "cifar10/cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        sums = {}
        for name in [file for file, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]:
            batch = {"data": random.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
            (folder / name).write_bytes(pickle.dumps(batch))
        (folder / CIFAR10.meta["filename"]).write_bytes(
            pickle.dumps({"label_names": list(CIFAR10.METAINFO["classes"])})
        )
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for name in ("train_list", "test_list"):
            patch.setattr(CIFAR10, name, [[file, sums[file]] for file, _ in getattr(CIFAR10, name)])
        patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[CIFAR10.meta["filename"]]})
        yield root


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """An eighth of VGG's widths, which it does not take as an argument; configs are written as they come, without yapf."""
    monkeypatch.setattr(mmengine.config.config, "FormatCode", lambda text, **_: (text, True), raising=False)
    monkeypatch.setattr("rep_plugin.openmmlab.hooks.runner_utils.is_main_process", lambda: False)  # no plots
    make = vgg.make_vgg_layer

    def make_thin(in_channels, out_channels, *args, **kwargs):
        return make(in_channels if in_channels == 3 else in_channels // THIN, out_channels // THIN, *args, **kwargs)

    monkeypatch.setattr(vgg, "make_vgg_layer", make_thin)


def shortened(name: str, data, work_dir) -> Config:
    """A config with few and small images, without weights of other runs, and an epoch or two in each phase."""
    cfg = Config.fromfile(FOLDER / f"{name}.py")
    cfg.load_from, cfg.work_dir, cfg.experiment_name = None, str(work_dir), f"{name}_{id(work_dir)}"
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=2, num_workers=0, collate_fn=dict(type="default_collate"))
        loader.dataset.indices = 2
        for step in loader.dataset.pipeline:
            for key, size in (("scale", (16, 16)), ("crop_size", 48 if "mini_cub" in name else 28)):
                if key in step:
                    step[key] = size
    if "bcnn" in name:
        layout = next((one for one in LAYOUTS if f"_{one}" in name.replace("mini_cub", "")), "cub")
        cfg.train_dataloader.dataset.data_root = cfg.val_dataloader.dataset.data_root = str(data / layout)
        cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = 5
        cfg.model.backbone.init_cfg = None
        cfg.val_evaluator.topk = cfg.model.head.topk = (1,)
        if "vgg16" in name:
            cfg.model.head.in_channels //= THIN
    if "cifar10" in name:
        cfg.train_dataloader.dataset.data_root = cfg.val_dataloader.dataset.data_root = str(data / "cifar10")
    if "fashion" in name:
        cfg.train_dataloader.dataset.data_root = cfg.val_dataloader.dataset.data_root = str(ROOT / "data/fashion_mnist")
    cfg.train_cfg.max_epochs = 1
    for hook in cfg.custom_hooks:
        if "interval" in hook and "PruneHook" in hook.type:
            hook.interval = 1
            cfg.train_cfg.max_epochs = len(hook.get("fractions", ())) or hook.get("rounds", 1)
        if hook.get("end"):
            hook.end = 1
    schedulers = cfg.param_scheduler
    if isinstance(schedulers, list):  # of the ten epochs of the sparse birds
        cfg.param_scheduler = None
    return cfg


def trained_state(model) -> dict:
    """A state dict with the gammas of a trained network: those of a fresh one are all equal, and choose no channels."""
    return {
        key: torch.rand_like(value) if key.endswith("weight") and value.dim() == 1 else value
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_and_removes_what_it_declares(name, data, tmp_path):
    cfg = shortened(name, data, tmp_path)
    cfg.load_from = str(tmp_path / "sparse.pth")
    save_checkpoint_file(trained_state(build_model(cfg)), cfg.load_from)
    hooks = {hook.type.rpartition(".")[2]: hook for hook in cfg.custom_hooks}
    runner = run(cfg)
    assert runner.epoch == cfg.train_cfg.max_epochs
    pruning = hooks.get("PruneHook") or hooks.get("SoftPruneHook")
    if pruning is None:
        (hook,) = (hook for hook in runner.hooks if isinstance(hook, SparsityHook))
        strengths = {name: hook.sparsity.gammas.get(p) for name, p in runner.model.named_parameters()}
        assert {value for value in strengths.values() if value} == {
            hooks["SparsityHook"].strength,
            *hooks["SparsityHook"].get("overrides", {}).values(),
        }
        if "vgg16" in name:
            last = {"cub": 1e-3, "cars": 5e-4, "aircraft": 1e-3}[name.rpartition("_")[2]]
            assert strengths["backbone.features.16.bn.weight"] == last
            assert strengths["backbone.features.15.bn.weight"] == 1e-4
        if "mobilenetv3" in name:
            (steps,) = (hook for hook in runner.hooks if isinstance(hook, AccuracyLrHook))
            assert steps.thresholds == [80, 87, 90]
        return
    rounds = json.loads((tmp_path / "pruned.rounds.json").read_text())
    left = rounds[-1]["channels_after"] / rounds[0]["channels_before"]
    fractions = pruning.get("fractions") or [pruning["prune_fraction"]]
    assert left == pytest.approx(np.prod([1 - one for one in fractions]), abs=0.01)
    assert len(rounds) == pruning.get("rounds", len(fractions)) and rounds[-1]["max_rel_error"] < 1e-9
    pruned, _ = load_model(Config.fromfile(tmp_path / "pruned.py"), tmp_path / "pruned.pth")
    assert sum(p.numel() for p in pruned.parameters()) == rounds[-1]["params_after"]
    assert (tmp_path / "deploy.pth").is_file() == ("ReparamHook" in hooks)
    assert (tmp_path / "teacher.pth").is_file() == ("DistillHook" in hooks)


def test_stem_for_small_images_keeps_the_stock_keys():
    from mmpretrain.models.backbones import MobileNetV3

    from rep_plugin.openmmlab.mobilenet_v3 import MobileNetV3_CIFAR

    ours, stock = MobileNetV3_CIFAR("small"), MobileNetV3("small")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert ours(torch.zeros(1, 3, 32, 32))[0].shape == (1, 576, 2, 2)
    assert MobileNetV3_CIFAR("small_050", in_channels=1)(torch.zeros(1, 1, 28, 28))[0].shape == (1, 288, 2, 2)
