"""QATHook in real runs: stock keys, ranges that stay, exact resumption, the file at the end, what is refused before."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmpretrain.registry import MODELS
from torch import nn

from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.errors import HookError, UnreadableCheckpointError
from rep_plugin.measure.copies import copy_model
from rep_plugin.openmmlab.hooks.runner_utils import plain_model
from rep_plugin.openmmlab.load import build_model, load_model
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.tiny import PlainImages, config, one_process, run

HOOK = dict(type="rep_plugin.QATHook", freeze=2, min_agreement=0.0, layers=False)
EMA = dict(type="EMAHook", momentum=0.2, update_buffers=True)
X = torch.stack([PlainImages()[index]["inputs"] for index in range(8)]).float().sub(127).div(64)


def ranges_of(path) -> dict:
    return json.loads(load_checkpoint_file(path)["meta"]["rep_qat"])["ranges"]


@HOOKS.register_module()
class LookAtValidation(Hook):
    """Measures in validation how far the model is from a copy, which is not rounded."""

    def __init__(self):
        self.differences = []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        plain = copy_model(runner.model)
        self.differences.append(relative_error(plain(X), runner.model(X)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(config(folder, HOOK, dict(type="LookAtValidation")))


def int8(path, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})[0])


def test_checkpoints_are_stock_and_the_file_is_of_the_trained_weights(whole, tmp_path):
    folder, runner = whole
    checkpoint = load_checkpoint_file(folder / "epoch_4.pth")
    plain = run(config(tmp_path))
    assert list(checkpoint["state_dict"]) == list(plain.model.state_dict())
    assert any(not torch.equal(value, plain.model.state_dict()[key]) for key, value in checkpoint["state_dict"].items())
    model, _ = load_model(config(tmp_path), folder / "epoch_4.pth")
    found, expected = int8(folder / "int8.onnx", X), model(X).detach()
    assert 0 < relative_error(expected, found) < 0.1
    report = json.loads((folder / "int8.onnx.json").read_text())
    assert report["images"] == 13 and report["held_out"] == 3 and report["top1"] is not None
    log = next(folder.glob("*/*.log")).read_text()
    assert "int8 file written to" in log and "int8 file in validation: accuracy/top1" in log
    assert not runner.model._forward_hooks and not runner.model._forward_pre_hooks


def test_validation_sees_what_is_rounded(whole):
    (look,) = (hook for hook in whole[1].hooks if isinstance(hook, LookAtValidation))
    assert len(look.differences) == 8 and min(look.differences) > 1e-4


def test_ranges_move_until_they_stay(whole):
    first, second, last = (ranges_of(whole[0] / f"epoch_{epoch}.pth") for epoch in (1, 2, 4))
    assert list(first) == ["backbone.conv1", "backbone.conv2", "backbone.conv3", "backbone.conv4", "head.fc"]
    assert second == last and all(first[name] != last[name] for name in list(first)[1:])


def test_resumed_training_is_the_same_bit_by_bit(whole, tmp_path):
    for epoch, name in ((1, "moving"), (3, "frozen")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(whole[0] / f"epoch_{epoch}.pth", folder)
        run(config(folder, HOOK, resume=True, load_from=str(folder / f"epoch_{epoch}.pth")))
        ours, theirs = (load_checkpoint_file(place / "epoch_4.pth") for place in (folder, whole[0]))
        assert all(torch.equal(value, theirs["state_dict"][key]) for key, value in ours["state_dict"].items())
        assert ours["meta"]["rep_qat"] == theirs["meta"]["rep_qat"]
        assert torch.equal(int8(folder / "int8.onnx", X), int8(whole[0] / "int8.onnx", X))
    before = (folder / "int8.onnx").stat().st_mtime_ns
    again = config(folder, HOOK, resume=True, load_from=str(folder / "epoch_4.pth"), experiment_name="again")
    run(again)
    assert (folder / "int8.onnx").stat().st_mtime_ns == before


def test_averaged_weights_are_what_is_written(tmp_path):
    runner = run(config(tmp_path, EMA, HOOK))
    average = next(hook.ema_model.module for hook in runner.hooks if hasattr(hook, "ema_model"))
    average.eval(), runner.model.eval()
    found = int8(tmp_path / "int8.onnx", X)
    errors = [np.square((model(X).detach() - found).numpy()).sum() for model in (average, runner.model)]
    assert errors[0] < errors[1] / 4


def test_several_processes_train_as_one(whole, tmp_path):
    with one_process(tmp_path) as wrapped:
        runner = run(config(tmp_path / "work", HOOK, **wrapped))
    expected = load_checkpoint_file(whole[0] / "epoch_4.pth")["state_dict"]
    state = plain_model(runner).state_dict()
    assert all(torch.allclose(value, expected[key], rtol=1e-5, atol=1e-7) for key, value in state.items())
    assert (tmp_path / "work/int8.onnx").is_file()


def test_deployed_blocks_are_trained_on(tmp_path):
    cfg = config(tmp_path, dict(HOOK, runtime="openvino", images=12), train_cfg=dict(by_epoch=True, max_epochs=2))
    cfg.model.backbone = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(0,), deploy=True)
    cfg.model.head.in_channels = 8
    before = build_model(cfg).state_dict()
    run(cfg)
    report = json.loads((tmp_path / "int8.onnx.json").read_text())
    assert report["runtime"] == "openvino" and report["images"] + report["held_out"] == 12
    after = load_checkpoint_file(tmp_path / "epoch_2.pth")["state_dict"]
    assert list(after) == list(before)
    assert any(name.startswith("backbone.stages") for name in ranges_of(tmp_path / "epoch_2.pth"))


@MODELS.register_module()
class Shuffle(nn.Module):
    """A network without convolutions."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16, 3))

    def forward(self, x):
        return (torch.einsum("oc,nchw->nohw", self.scale, x),)


BRANCHES = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(0,))
FEW = dict(type="PlainImages")
JOBS = {
    "QATHook: 19 modules still have the branches of training, first 'backbone.stem': merge first": dict(
        backbone=BRANCHES
    ),
    "QATHook cannot run with PruneHook: train what that hook writes": dict(
        hook=dict(type="rep_plugin.PruneHook", macs=0.5, begin=1)
    ),
    "QATHook cannot run with ReparamHook": dict(hook=dict(type="rep_plugin.ReparamHook")),
    r"QATHook.freeze \(=5\) must be <= the training's 4 epochs": dict(options=dict(freeze=5)),
    "QATHook: ImageClassifier calls no convolution or linear layer": dict(
        backbone=dict(type="Shuffle"), head=dict(type="ClsHead")
    ),
    "set with_cp=False of 'backbone'": dict(
        backbone=dict(type="ResNet", depth=18, base_channels=4, stem_channels=4, with_cp=True), in_channels=32
    ),
    "QATHook rounds in the forward as it is written: set compile=False": dict(compile=True),
}


@pytest.mark.parametrize("message", JOBS)
def test_what_cannot_be_done_is_said_before_the_first_step(message, tmp_path):
    job = dict(JOBS[message])
    cfg = config(tmp_path, dict(HOOK, **job.get("options", {})), *([job["hook"]] if "hook" in job else []))
    cfg.model.backbone = job.get("backbone", cfg.model.backbone)
    cfg.model.head.in_channels = job.get("in_channels", 8 if "backbone" in job else 16)
    cfg.model.head = job.get("head", cfg.model.head)
    if job.get("compile"):
        cfg.compile = dict(backend="eager")
    with pytest.raises(HookError, match=message) as caught:
        run(cfg)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.pth"))


def test_a_checkpoint_that_keeps_something_else_is_refused(whole, tmp_path):
    content = load_checkpoint_file(whole[0] / "epoch_1.pth")
    content["meta"]["rep_qat"] = json.dumps(dict(ranges={"backbone.conv1": ["low", 1]}))
    torch.save(content, tmp_path / "epoch_1.pth")
    with pytest.raises(UnreadableCheckpointError, match="meta.rep_qat of the checkpoint is not what its hook keeps"):
        run(config(tmp_path, HOOK, resume=True, load_from=str(tmp_path / "epoch_1.pth")))
