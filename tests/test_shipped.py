"""Configs and scripts of the package are found by name, from a checkout as from a wheel."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config

import rep_plugin
from rep_plugin.commands.models import is_config
from rep_plugin.depth import plan_depth
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.costs import count_params
from rep_plugin.openmmlab.cli import resolve_config
from rep_plugin.openmmlab.configs import drop_pretrained_, typed_dicts
from rep_plugin.openmmlab.load import build_model
from rep_plugin.shipped import CONFIGS, SCRIPTS, find_config, find_script, list_configs
from tests.helpers import ROOT

NAMES = list_configs()
ON_MMPRETRAIN = [name for name in NAMES if not name.startswith("downstream/")]


def test_the_package_ships_every_config_tool_and_the_model_index():
    for shipped, folder, endings in ((CONFIGS, "configs", (".py", ".md")), (SCRIPTS, "tools", (".py", ".sh"))):
        files = [path for path in (ROOT / folder).rglob("*.*") if path.suffix in endings]
        assert len(files) > 10 and all((shipped / path.relative_to(ROOT / folder)).is_file() for path in files)
    index = yaml.safe_load((CONFIGS.parent / "model-index.yml").read_text())
    for path in [*(c["README"] for c in index["Collections"]), *(m["Config"] for m in index["Models"])]:
        assert (CONFIGS.parent / path).is_file(), path


def test_list_configs_filters_as_timm_does():
    assert "rep_mbv2_cub" in NAMES and "bcnn/bcnn_vgg16bn_cub" in NAMES and sorted(NAMES) == NAMES
    assert not [name for name in NAMES if "_base_" in name]
    assert list_configs("rep_mbv2_cub*") == ["rep_mbv2_cub", "rep_mbv2_cub_warm_start"]
    assert list_configs("csgd*") == ["pruning/csgd_resnet18_fashion_mnist"]
    assert set(list_configs(["csgd*", "downstream/*"])) == {*list_configs("csgd*"), *list_configs("downstream/*")}
    assert list_configs("nothing*") == []
    bare = [name.rpartition("/")[2] for name in NAMES]
    assert len(set(bare)) == len(bare), "a name without its folder would have two meanings"


@pytest.mark.parametrize("name", ["bcnn_vgg16bn_cub", "bcnn_vgg16bn_cub.py", "bcnn/bcnn_vgg16bn_cub"])
def test_get_config_takes_every_spelling(name):
    cfg = rep_plugin.get_config(name, train_cfg=dict(max_epochs=3), work_dir="here")
    assert cfg.model.head.type == "rep_plugin.BilinearClsHead" and cfg.data_root == "data/CUB_200_2011"
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.by_epoch, cfg.work_dir) == (3, True, "here")
    assert Path(cfg.filename) == find_config(name) and find_config(name).parts[-3:-1] == ("configs", "bcnn")


@pytest.mark.parametrize("name", ON_MMPRETRAIN)
def test_every_config_is_read_by_its_name(name):
    """What it says where the data is missing is a command that needs no checkout, and writes where the config reads."""
    cfg = rep_plugin.get_config(name)
    assert cfg.model.type
    for root, hint in cfg.get("missing_data_hint", {}).items():
        for script, out in re.findall(r"rep-plugin script (\S+) .*--out (\S+)", hint):
            assert find_script(script).is_file() and root == out
        assert "tools/" not in hint
    if cfg.get("missing_data_hint"):
        assert cfg.train_dataloader.dataset.data_root.rstrip("/") in cfg.missing_data_hint


@pytest.mark.parametrize("name", list_configs("depth/*"))
def test_networks_of_depth_configs_are_built_and_have_layers_to_spare(name):
    cfg = rep_plugin.get_config(name)
    for part in typed_dicts(cfg.model):
        drop_pretrained_(part)  # from the network
    model, index = build_model(cfg), yaml.safe_load((CONFIGS.parent / "model-index.yml").read_text())
    (listed,) = (one for one in index["Models"] if one["Config"] == f"configs/{name}.py")
    assert count_params(model) == listed["Metadata"]["Parameters"]
    hook = next(hook for hook in cfg.custom_hooks if hook.type == "rep_plugin.LinearizeHook")
    assert 0 < hook.begin < hook.end < cfg.train_cfg.max_epochs and hook.act_after and hook.runtime == "onnxruntime"
    channels = 1 if "fashion" in name else 3
    assert len(plan_depth(model, torch.randn(1, channels, 64, 64), macs=0.97).chosen) >= 1


def test_an_unknown_name_ends_in_the_nearest_names():
    for ask, name in ((rep_plugin.get_config, "rep_mbv2_cup"), (resolve_config, "configs/rep_mbv2_cup.py")):
        with pytest.raises(
            ArgumentError, match=f"config {name} does not exist, .*; the nearest: rep_mbv2_cub, "
        ) as caught:
            ask(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match=r"script make_fgvc.py does not exist, .*; the nearest: make_mini_fgvc"):
        find_script("make_fgvc.py")


def test_a_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_config("rep_mbv2_cub.py") == str(CONFIGS / "rep_mbv2_cub.py")
    (tmp_path / "rep_mbv2_cub.py").write_text("mine = 1")
    assert resolve_config("rep_mbv2_cub.py") == "rep_mbv2_cub.py"


def test_commands_tell_shipped_configs_from_timm_names():
    models = (
        "rep_mbv2_mini_cub",
        "bcnn/bcnn_vgg16bn_cub",
        "mine.py",
        "rep_mobilenetv2_050",
        "local-dir:folder",
        "resnet18",
    )
    assert [is_config(model) for model in models] == [True, True, True, False, False, False]


def test_scripts_are_found_without_their_folder():
    assert find_script("make_mini_fgvc.py") == SCRIPTS / "dataset_converters/make_mini_fgvc.py"
    assert find_script("dataset_converters/make_mini_scenes.py").is_file() and find_script("dist_train.sh").is_file()
    with pytest.raises(ArgumentError):
        find_script("_birds.py")


@pytest.mark.parametrize("base", ["rep_plugin::rep_mbv2_cub.py", "rep_plugin::bcnn/bcnn_vgg16bn_cub.py"])
def test_a_config_inherits_a_shipped_one(base, tmp_path):
    (tmp_path / "mine.py").write_text(f'_base_ = "{base}"\nmodel = dict(head=dict(num_classes=3))\n')
    expected = rep_plugin.get_config(base.partition("::")[2], model=dict(head=dict(num_classes=3)))
    mine = Config.fromfile(tmp_path / "mine.py")
    assert mine.to_dict() == expected.to_dict()
    assert Config._get_cfg_path("mmpretrain::_base_/default_runtime.py", "")[1] == "mmpretrain"


STOCK = """
import sys
from mmengine.config import Config
cfg = Config.fromfile("mine.py")
print(cfg.model.head.num_classes, cfg.before, cfg.model.backbone.type)
"""


def test_stock_code_inherits_a_shipped_config_by_its_path(tmp_path):
    """Before rep_plugin is imported mmengine knows no such prefix; the way that configs/README.md names works."""
    (tmp_path / "mine.py").write_text(
        '_base_ = __import__("rep_plugin").get_config("rep_mbv2_cub").filename\n'
        "model = dict(head=dict(num_classes=3))\nbefore = {{_base_.model.head.num_classes}}\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", STOCK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "200", "rep_plugin.RepMobileNetV2"], done.stderr
    assert (tmp_path / "mine.py").read_text().splitlines()[0] in (ROOT / "configs/README.md").read_text()
