"""What the log says, once and at the start, of a training that is dearer than it need be."""

import re
import types
from pathlib import Path

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from torch import nn

import rep_plugin
from rep_plugin.blocks.advice import online_advice
from rep_plugin.openmmlab.amp import slow_bfloat16
from rep_plugin.openmmlab.hooks.runner_utils import log_advice
from tests.test_openmmlab.test_hooks.tiny import config

REP = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(2,))


def lines_of(work_dir, word):
    (log,) = Path(work_dir).rglob("*.log")
    return [line for line in log.read_text().splitlines() if word in line]


@pytest.mark.parametrize("online", [False, True])
def test_a_training_names_the_online_form_once(online, tmp_path):
    cfg = config(tmp_path, dict(type="rep_plugin.ReparamHook"), train_cfg=dict(by_epoch=True, max_epochs=1))
    cfg.model.backbone = REP | {"online": online}
    cfg.model.head.in_channels = 8
    runner = Runner.from_cfg(cfg)
    log_advice(runner)  # as the command line's train does; then the hook asks for the same
    runner.train()
    found = lines_of(tmp_path, "online=True beside")
    assert len(found) == (0 if online else 1)
    assert online or "blocks (RepInvertedResidual) train every branch with a BN of its own" in found[0]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: timm.create_model("rep_repvgg_a0"), "22 blocks (RepVGGBlock)"),
        (lambda: timm.create_model("dbb_mobilenetv1_100"), "14 blocks (DBBConv2d)"),
        (lambda: timm.create_model("dbb_mobilenetv1_100", online=True), None),
        (lambda: timm.create_model("rep_repvgg_a0", deploy=True), None),
        (lambda: timm.create_model("rep_mobilenetv2_035", anneal=True), None),  # needs the BNs
        (lambda: timm.create_model("resnet18"), None),
        (lambda: rep_plugin.expand(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())[0], "1 blocks (DBB"),
    ],
)
def test_only_what_would_gain_is_named(build, named):
    advice = online_advice(build())
    assert advice is None if named is None else advice.startswith(named) and "\n" not in advice


CPUS = {
    "amx": ({"architecture": "x86_64", "amx_bf16": True, "cpu_name": "Xeon"}, None),
    "arm": ({"architecture": "arm64", "bf16": True}, None),
    "old": (
        {"architecture": "x86_64", "avx512_bf16": False, "cpu_name": "Intel Core i7"},
        r"Intel Core i7\), .*avx512_bf16",
    ),
    "old arm": ({"architecture": "arm64", "bf16": False}, r"no bfloat16 instructions \(bf16\): leave out --amp"),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpu_without_bfloat16_is_told_at_the_start(cpu, tmp_path, monkeypatch):
    found, told = CPUS[cpu]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: types.MappingProxyType(found))
    assert (slow_bfloat16() is None) == (told is None)
    runner = Runner.from_cfg(config(tmp_path))
    wrapper = dict(type="rep_plugin.CpuAmpOptimWrapper", optimizer=dict(type="SGD", lr=0.1))
    build_optim_wrapper(runner.model, wrapper)
    lines = lines_of(tmp_path, "SLOWER")
    assert len(lines) == (told is not None) and all("WARNING" in line for line in lines)
    assert told is None or re.search(told, lines[0])
