"""The registered backbone in stock OpenMMLab hands."""

import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from rep_plugin.openmmlab.backbones import RepMobileNetV2, activation_name
from tests.helpers import relative_error


def test_config_type_resolves_in_a_fresh_process_without_custom_imports():
    code = """
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS, HOOKS
with DefaultScope.overwrite_default_scope("mmpretrain"):
    print(type(MODELS.build(dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35))).__module__)
    print(type(HOOKS.build(dict(type="rep_plugin.ReparamHook"))).__name__)
    print(type(MODELS.build(dict(type="rep_plugin.MobileOne"))).__module__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["rep_plugin.openmmlab.backbones", "ReparamHook", "rep_plugin.openmmlab.backbones"], (
        done.stderr
    )


def test_classifier_with_stock_neck_and_head():
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(
            dict(
                type="ImageClassifier",
                backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=4, in_channels=1280),
            )
        )
    model.init_weights()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    assert [tuple(x.shape) for x in model.extract_feat(torch.randn(2, 3, 64, 64), stage="backbone")] == [
        (2, 1280, 2, 2)
    ]


@pytest.mark.parametrize("frozen", [-1, 0, 3, 7])
def test_frozen_stages_stay_frozen_and_in_eval_mode(frozen):
    model = RepMobileNetV2(0.35, frozen_stages=frozen)
    assert model.train() is model and model.eval() is model
    model.train()
    parts = [model.stem, *model.stages]
    for index, part in enumerate(parts):
        is_frozen = index <= frozen
        assert all(p.requires_grad != is_frozen for p in part.parameters())
        assert all(m.training != is_frozen for m in part.modules())
    assert model.last_conv.training and all(p.requires_grad for p in model.last_conv.parameters())


def test_norm_eval_keeps_statistics():
    model = RepMobileNetV2(0.35, norm_eval=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 3, 64, 64))[0].mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.stem.branches["conv"].conv.weight.grad.abs().sum() > 0


def test_init_cfg_loads_a_checkpoint(tmp_path):
    source = RepMobileNetV2(0.35)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    model = RepMobileNetV2(
        0.35, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"), prefix="backbone.")
    )
    model.init_weights()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_lenient_loading_of_a_misfit_is_refused():
    from mmengine.runner import load_state_dict

    model, deployed = RepMobileNetV2(0.35), RepMobileNetV2(0.35, deploy=True)
    with pytest.raises(
        RuntimeError, match=r"does not fit RepMobileNetV2: 300 missing .*38 unexpected .*nothing was loaded"
    ):
        load_state_dict(
            nn.ModuleDict({"backbone": model}), {f"backbone.{k}": v for k, v in deployed.state_dict().items()}
        )


@pytest.mark.parametrize("in_channels", [1, 3])
def test_channels_last_gives_the_same_maps(in_channels):
    options = dict(widen_factor=0.35, in_channels=in_channels, out_indices=(1, 7))
    model, other = RepMobileNetV2(**options).eval(), RepMobileNetV2(**options, channels_last=True).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, in_channels, 64, 64)
    for a, b in zip(model(x), other(x)):
        assert relative_error(a, b) < 1e-4 and b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("cfg", "name"), [("ReLU", "relu"), (dict(type="HSwish"), "hardswish"), (dict(type="Swish", inplace=True), "silu")]
)
def test_activation_names_of_mmcv(cfg, name):
    assert activation_name(cfg) == name


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"frozen_stages must lie in -1..7, got 8"):
        RepMobileNetV2(0.35, frozen_stages=8)
    with pytest.raises(ValueError, match="act_cfg takes 'type' alone"):
        RepMobileNetV2(0.35, act_cfg=dict(type="ReLU", negative_slope=0.1))


@pytest.mark.parametrize("name", ["rep_mbv2_cub", "rep_mbv2_mini_cub", "rep_mbv2_fashion_mnist"])
def test_shipped_configs_build(name):
    cfg = Config.fromfile(f"configs/{name}.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})
    channels = cfg.model.backbone.get("in_channels", 3)
    assert model(torch.zeros(2, channels, 64, 64)).shape == (2, cfg.model.head.num_classes)
    assert cfg.missing_data_hint and cfg.custom_hooks[-1]["type"] == "rep_plugin.ReparamHook"
    if name == "rep_mbv2_cub":
        assert cfg.train_dataloader.dataset.data_root == "data/CUB_200_2011" and cfg.optim_wrapper.optimizer.lr == 0.01
