"""Writing the artefact: all of it or nothing, and never what does not fit."""

import copy
import resource
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from rep_plugin.errors import EquivalenceError
from rep_plugin.openmmlab import artefacts
from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.configs import deploy_config
from rep_plugin.openmmlab.load import build_model, load_model, load_strictly
from rep_plugin.testing import calibrate_random_bn_

CONFIG = Config(
    dict(
        default_scope="mmpretrain",
        model=dict(
            type="ImageClassifier",
            backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35, init_cfg=dict(type="Constant", val=1)),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=3, in_channels=1280),
        ),
        data_preprocessor=dict(mean=[0.0] * 3, std=[1.0] * 3),
        custom_hooks=[dict(type="EMAHook"), dict(type="rep_plugin.ReparamHook")],
        load_from="somewhere.pth",
    )
)


@pytest.fixture(scope="module")
def model():
    return calibrate_random_bn_(build_model(CONFIG), torch.randn(4, 3, 64, 64))


def test_deploy_config_changes_only_what_it_must():
    cfg = deploy_config(CONFIG)
    assert cfg.model.backbone == dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35, deploy=True)
    assert cfg.load_from is None and cfg.custom_hooks == [dict(type="EMAHook")]
    assert "deploy" not in CONFIG.model.backbone and cfg.model.head == CONFIG.model.head
    stock = Config(dict(model=dict(type="ImageClassifier", backbone=dict(type="MobileNetV2"))))
    with pytest.raises(ValueError, match="'ImageClassifier' holds no rep_plugin part"):
        deploy_config(stock)


def test_files_load_and_the_model_is_left_alone(model, tmp_path):
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 65, 64)
    model.train()
    report = write_deployed(model, CONFIG, tmp_path / "other", x, {"classes": ("a", "b"), "palette": [1]})
    told = torch.load(tmp_path / "other/deploy.pth", weights_only=True)["meta"]["dataset_meta"]
    assert told == {"palette": [1]} and "class names left out: the data set has 2, the head 3" in report.notes[-1]
    report = write_deployed(model, CONFIG, tmp_path / "new", x, {"classes": ("a", "b", "c")})
    assert not any("class names" in note for note in report.notes)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    loaded, meta = load_model(Config.fromfile(tmp_path / "new/deploy.py"), tmp_path / "new/deploy.pth")
    assert torch.allclose(model(x), loaded(x), rtol=1e-4, atol=1e-4) and meta["dataset_meta"] == {
        "classes": ["a", "b", "c"]
    }
    assert report.max_rel_error < 1e-10
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        f"deploy.{kind}" for kind in ("html", "json", "pth", "py")
    ]


def test_a_full_disk_leaves_the_old_files(tmp_path):
    """A real limit on file size in a real process: the write fails half way."""
    for name in ("deploy.pth", "deploy.py", "deploy.json"):
        (tmp_path / name).write_text("old")
    code = f"""
import resource, signal, sys, torch
from tests.test_openmmlab.test_artefacts import CONFIG
from rep_plugin.openmmlab import build_model, write_deployed
model = build_model(CONFIG)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    write_deployed(model, CONFIG, {str(tmp_path)!r}, torch.randn(2, 3, 64, 64))
except OSError as error:
    print("OSError", error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("OSError") and str(tmp_path) in done.stdout, done.stderr
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("deploy.pth", "deploy.py", "deploy.json"), "old"
    )


def test_a_config_that_builds_another_network_is_refused(model, tmp_path, monkeypatch):
    def wrong(cfg, **options):
        cfg = deploy_config(cfg, **options)
        cfg.model.backbone.act_cfg = "relu"
        return cfg

    monkeypatch.setattr(artefacts, "deploy_config", wrong)
    with pytest.raises(EquivalenceError, match="built from the written config differs"):
        write_deployed(model, CONFIG, tmp_path, torch.randn(2, 3, 64, 64) * 10)
    assert not list(tmp_path.iterdir())


def test_misfits_are_listed_and_not_loaded(model):
    state = dict(model.state_dict())
    state["head.fc.weight"] = torch.zeros(5, 1280)
    state["extra"] = state.pop("head.fc.bias")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError,
        match=r"w.pth does not fit ImageClassifier: 1 missing \(first: head.fc.bias\); 1 unexpected \(first: extra\); "
        r"1 of another shape \(first: head.fc.weight\)",
    ):
        load_strictly(model, state, "w.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
