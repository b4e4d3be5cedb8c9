"""Drawn scenes, configs cut short, and the real tools: mmdet and mmseg with compiled operators (`make test-downstream`)."""

import subprocess
import sys
from pathlib import Path

import mmcv.ops  # an mmcv without compiled operators fails here, not in the middle
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm

from rep_plugin.openmmlab.load import build_model
from rep_plugin.testing import calibrate_random_bn_

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs/downstream").glob("*.py"))
SIDE = 64  # of the images

assert hasattr(mmcv.ops, "nms")


def run(tool: str, *words: object, cwd: Path) -> str:
    """Run one of our tools to its end; return what it printed."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / f"{tool}.py"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def tiny_fcos(folder: Path, hooks: str, epochs: int = 2) -> Path:
    """A config file: the shipped FCOS on few small images, every box kept whatever its score."""
    text = f"""
_base_ = ["{ROOT}/configs/downstream/fcos_rep_mbv2_mini_scenes.py"]
model = dict(test_cfg=dict(score_thr=0.0, max_per_img=20))
train_dataloader = dict(batch_size=4, dataset=dict(data_root="scenes/"))
val_dataloader = dict(dataset=dict(data_root="scenes/"))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="scenes/annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs}, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
custom_hooks = [{hooks}]
"""
    return _write(folder, f"fcos_{len(list(folder.glob('*.py')))}.py", text)


def tiny_deeplab(folder: Path, hooks: str) -> Path:
    """A config file: the shipped DeepLabV3+ on few small images."""
    text = f"""
_base_ = ["{ROOT}/configs/downstream/deeplabv3plus_rep_mbv2_mini_scenes.py"]
model = dict(data_preprocessor=dict(size=({SIDE}, {SIDE})))
train_dataloader = dict(batch_size=4, dataset=dict(data_root="scenes"))
val_dataloader = dict(dataset=dict(data_root="scenes"))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
custom_hooks = [{hooks}]
"""
    return _write(folder, f"deeplab_{len(list(folder.glob('*.py')))}.py", text)


def _write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def shipped(name: str, **changes: object) -> Config:
    """A shipped config, narrower, with a random start instead of downloaded weights."""
    cfg = Config.fromfile(ROOT / f"configs/downstream/{name}.py")
    cfg.merge_from_dict(changes)
    return cfg


def lively(cfg: Config) -> torch.nn.Module:
    """The model of a config with heads that say more than their bias, and random batch norms that fit its images.

    Weights are small enough that scores do not saturate: among equal ones the last digit would choose the boxes.
    """
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg))
    for name, layer in model.named_modules():
        if "head" in name and isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(layer.weight, std=0.5 / layer.weight[0].numel() ** 0.5)
    return calibrate_random_bn_(model, images())


def images(count: int = 2) -> torch.Tensor:
    """Random preprocessed images."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """In float32. Boxes in any order, as equal scores are sorted by the last digit; logits relative to the largest."""
    for one, other in zip(first, second, strict=True):
        assert one.shape == other.shape
        if one.dim() == 2:
            units = torch.tensor([0.05, 0.05, 0.05, 0.05, 1e-4, 1e-4])  # of a pixel; of a score; labels are equal
            apart = torch.cdist(one / units, other / units, p=float("inf"))
            assert apart.min(0).values.max() < 1 and apart.min(1).values.max() < 1
        else:
            assert (one - other).abs().max() <= 1e-3 * one.abs().max()


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A folder with drawn scenes, in which the tools run."""
    folder = tmp_path_factory.mktemp("downstream")
    run("dataset_converters/make_mini_scenes", "--out", "scenes", "--train", 8, "--val", 4, "--size", SIDE, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def detector(lab) -> Path:
    """FCOS, trained for two epochs with a ReparamHook by tools/train.py; its config is beside ``work``."""
    config = tiny_fcos(lab, 'dict(type="EMAHook", momentum=0.1), dict(type="rep_plugin.ReparamHook")')
    (lab / "train_fcos.log").write_text(run("train", config, "--work-dir", "fcos", cwd=lab))
    return config


@pytest.fixture(scope="session")
def segmentor(lab) -> Path:
    """DeepLabV3+, trained for four iterations with a ReparamHook by tools/train.py."""
    config = tiny_deeplab(lab, 'dict(type="rep_plugin.ReparamHook")')
    (lab / "train_deeplab.log").write_text(run("train", config, "--work-dir", "deeplab", cwd=lab))
    return config
