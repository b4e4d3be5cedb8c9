"""``type='rep_plugin.Expanded'``: a trained stock model, expanded, trained on and deployed, with no code."""

import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.model import initialize
from mmengine.registry import MODELS, DefaultScope

import rep_plugin
from rep_plugin.blocks.conv_like import ConvLike, SilentBatchNorm2d
from rep_plugin.errors import CheckpointMismatchError
from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.configs import deploy_config
from rep_plugin.openmmlab.load import build_model, load_model
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_openmmlab.test_convs import RESNET, X, config
from tests.test_openmmlab.test_hooks.conftest import ROOT, run

STOCK = config(dict(RESNET), 64)


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return calibrate_random_bn_(build_model(STOCK), X)


@pytest.fixture(scope="module")
def checkpoint(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("stock") / "stock.pth"
    torch.save({"state_dict": stock.state_dict(), "meta": {}}, path)
    return str(path)


def expanded(checkpoint: str | None, **args) -> Config:
    model = dict(type="rep_plugin.Expanded", model=copy.deepcopy(STOCK.model), checkpoint=checkpoint, **args)
    return Config(dict(default_scope="mmpretrain", model=model, data_preprocessor=STOCK.data_preprocessor))


def test_it_starts_as_the_trained_model_and_init_weights_keeps_it(stock, checkpoint):
    model = build_model(expanded(checkpoint, block="acb", where="backbone.layer*"))
    assert type(model).__name__ == "ImageClassifier" and model.data_preprocessor is not None
    assert sum(isinstance(m, ConvLike) for m in model.modules()) == 16
    assert relative_error(stock(X), model(X)) < 1e-5
    model.init_weights()  # what a Runner calls before training
    assert relative_error(stock(X), model(X)) < 1e-5


def test_silent_branches_survive_a_parent_that_initialises_anew(stock):
    """ResNet's own init_weights resets every gamma it finds to 1; so does an init_cfg that names BatchNorm2d."""
    for mark in (True, False):
        model, _ = rep_plugin.expand(stock, example_input=X[:2])
        for module in model.modules():
            if hasattr(module, "is_init") and not mark:
                module.is_init = False
        model.init_weights()
        if not mark:
            initialize(model, dict(type="Constant", layer=["_BatchNorm", "BatchNorm2d"], val=1))
        silent = [m for m in model.modules() if isinstance(m, SilentBatchNorm2d)]
        assert len(silent) == 3 * 17 and all((m.weight == 0).all() for m in silent)
        assert torch.equal(model.backbone.bn1.weight, torch.ones(8)) != mark


def test_what_does_not_fit_is_refused(stock, checkpoint, tmp_path):
    torch.save({"state_dict": {"head.fc.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointMismatchError, match=r"other.pth does not fit ImageClassifier: \d+ missing"):
        build_model(expanded(str(tmp_path / "other.pth")))
    with pytest.raises(FileNotFoundError, match="none.pth"):
        build_model(expanded("none.pth"))
    model = build_model(expanded(None))
    with pytest.raises(CheckpointMismatchError, match="does not fit ImageClassifier"):
        model.load_state_dict(stock.state_dict(), strict=False)


def test_deploy_config_is_the_stock_config():
    cfg = expanded("somewhere.pth")
    cfg.model.model.backbone.init_cfg = [dict(type="Pretrained", checkpoint="gone.pth")]
    deployed = deploy_config(cfg)
    assert deployed.model.backbone == dict(RESNET, init_cfg=None) and deployed.model.type == "ImageClassifier"
    assert deployed.data_preprocessor == STOCK.data_preprocessor and cfg.model.checkpoint == "somewhere.pth"


def test_train_tool_hook_and_stock_loader(stock, checkpoint, tmp_path):
    render = ["--classes", 3, "--train-per-class", 8, "--test-per-class", 4, "--size", 48]
    made = run(ROOT / "tools/dataset_converters/make_mini_fgvc.py", "--out", tmp_path / "birds", *render, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    loader = f'dict(batch_size=8, num_workers=0, dataset=dict(data_root="{tmp_path}/birds"))'
    (tmp_path / "config.py").write_text(
        f"""
_base_ = ["{ROOT}/configs/rep_mbv2_mini_cub.py"]
model = dict(_delete_=True, type="rep_plugin.Expanded", model={STOCK.model.to_dict()}, checkpoint="{checkpoint}")
train_dataloader = {loader}
val_dataloader = {loader}
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
custom_hooks = [dict(type="EMAHook", momentum=0.1), dict(type="rep_plugin.ReparamHook")]
"""
    )
    done = run(ROOT / "tools/train.py", "config.py", "--work-dir", "work", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "work/deploy.json").read_text())
    assert report["max_rel_error"] < 1e-9 and len(report["blocks"]) == 17
    state = torch.load(tmp_path / "work/deploy.pth", weights_only=True)["state_dict"]
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert "rep_plugin" not in (tmp_path / "work/deploy.py").read_text()
    # The stock loader, in a process that knows nothing of this package.
    code = """
import sys, torch
sys.modules["rep_plugin"] = None
from mmpretrain.apis import init_model
model = init_model("work/deploy.py", "work/deploy.pth", device="cpu")
model.eval()
torch.save(model(torch.load("x.pt")), "y.pt")
"""
    torch.save(X, tmp_path / "x.pt")
    loaded = run("-c", code, cwd=tmp_path)
    assert loaded.returncode == 0 and "do not match exactly" not in loaded.stdout + loaded.stderr, loaded.stderr
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        plain = MODELS.build(STOCK.model)
    plain.load_state_dict(state)
    plain.eval()
    assert relative_error(plain(X), torch.load(tmp_path / "y.pt")) < 1e-6
    # By hand, although the checkpoint it was expanded from is gone.
    cfg = Config.fromfile(tmp_path / "config.py")
    cfg.model.checkpoint = "gone.pth"
    model, meta = load_model(cfg, tmp_path / "work/epoch_1.pth")
    write_deployed(model, cfg, tmp_path / "hand", X)
    again = torch.load(tmp_path / "hand/deploy.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(again[key], state[key]) for key in state) and meta["dataset_meta"]
