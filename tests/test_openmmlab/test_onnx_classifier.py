"""Exported files in stock test loops: the metrics and predictions of PyTorch, or one line that says why not."""

import pickle
from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.visualization import Visualizer
from mmpretrain.structures import DataSample
from onnx import TensorProto, helper
from torch import nn

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.errors import ArgumentError
from rep_plugin.openmmlab import build_model
from rep_plugin.testing import calibrate_random_bn_
from tests.test_openmmlab.test_hooks import tiny

ONE = dict(rounds=0, runtimes=["onnxruntime"])
X = torch.stack([tiny.PlainImages()[index]["inputs"] for index in range(16)]).float().sub(127).div(64)


def write(path, shape=(None, 3, 16, 16), classes=2, kind=TensorProto.FLOAT, outputs=("logits",), channels=None):
    """A file that gives means of the channels: for what is refused before images come."""
    channels = channels or shape[1]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, (channels, classes), np.ones(channels * classes))
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
    ]
    nodes += [helper.make_node("MatMul", ["flat", "weight"], [name]) for name in outputs]
    inputs = [helper.make_tensor_value_info("image", kind, shape)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (shape[0], classes)) for name in outputs]
    graph = helper.make_graph(nodes, "graph", inputs, ends, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config, a checkpoint, and its files: float, of three images at a time, int8."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx")
    cfg = tiny.config(folder / "work")
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator, test_cfg=dict())
    cfg.dump(folder / "tiny.py")
    model = calibrate_random_bn_(build_model(cfg), X)
    with torch.no_grad():  # half of the images are of each class, and none lies on the line between them
        gaps = (model(X)[:, 0] - model(X)[:, 1]).sort().values
        model.head.fc.bias[0] -= gaps[len(X) // 2 - 1 : len(X) // 2 + 1].mean()
    save_checkpoint_file({"state_dict": model.state_dict(), "meta": {}}, folder / "tiny.pth")
    rep_plugin.export_onnx(model, folder / "float.onnx", X, **ONE)
    rep_plugin.export_onnx(model, folder / "three.onnx", X[:3], dynamic_batch=False, **ONE)
    rep_plugin.export_int8(
        model, folder / "int8.onnx", X, methods=["MinMax"], rounds=0, layers=False, min_agreement=0.0
    )
    return folder


@pytest.fixture
def tested(folder, monkeypatch):
    """Run ``rep-plugin test`` with words: its predictions."""
    monkeypatch.chdir(folder)

    def call(*words) -> list:
        main(["test", *map(str, words), "--work-dir", "work", "--out", "out.pkl"])
        return pickle.loads((folder / "out.pkl").read_bytes())

    return call


def test_files_are_tested_as_their_network(tested):
    expected = tested("tiny.py", "tiny.pth")
    scores = torch.stack([one["pred_score"] for one in expected])
    best, second = scores.topk(2).values.T
    clear = best - second > 1e-4  # rounding does not choose between the two
    cases = [
        ("float.onnx", "onnxruntime"),
        ("float.onnx", "openvino"),
        ("three.onnx", "onnxruntime"),
        ("int8.onnx", "openvino"),
    ]
    for name, runtime in cases:
        found = tested(name, "--config", "tiny.py", "--runtime", runtime)
        tolerance = 0.05 if name == "int8.onnx" else 1e-5
        got = torch.stack([one["pred_score"] for one in found])
        assert 0 <= (got - scores).abs().max() < tolerance
        assert [one["gt_label"] for one in found] == [one["gt_label"] for one in expected]
        if name == "int8.onnx":
            assert (got - scores).abs().max() > 1e-5
        else:
            labels, own = (torch.cat([one["pred_label"] for one in some]) for some in (found, expected))
            assert clear.sum() > 4 and torch.equal(labels[clear], own[clear])
    assert len({int(one["pred_label"]) for one in expected}) == 2


def test_metrics_are_the_stock_ones_and_the_log_names_file_and_kind(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(MMLogger, "_instance_dict", OrderedDict())  # they go by the second: another test's may be taken
    rows = []
    for words in (["tiny.py", "tiny.pth"], ["float.onnx", "--config", "tiny.py"], ["int8.onnx", "--config", "tiny.py"]):
        main(["test", *words, "--work-dir", "work", "--out", "out.json", "--out-item", "metrics"])
        rows.append((folder / "out.json").read_text())
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert rows[0] == rows[1] and "accuracy/top1" in rows[2]
    assert "float.onnx, float, in onnxruntime" in text and "int8.onnx, int8, in onnxruntime" in text
    assert "Epoch(test) [1/4]" in text  # progress


def build(path, model):
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(dict(type="rep_plugin.OnnxClassifier", path=str(path), model=model))


@pytest.mark.parametrize("kind", ["timm", "several labels"])
def test_predictions_are_made_as_the_network_makes_them(kind, tmp_path):
    cfg = tiny.config(tmp_path).model
    if kind == "timm":
        cfg = dict(type="TimmClassifier", model_name="test_byobnet", num_classes=3)
    else:
        cfg.head = dict(type="MultiLabelLinearClsHead", num_classes=3, in_channels=16, thr=0.4)
    cfg["data_preprocessor"] = dict(type="ClsDataPreprocessor", mean=[127.0] * 3, std=[64.0] * 3, num_classes=3)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg)
    calibrate_random_bn_(model, X)
    model.eval()
    network = model.model if kind == "timm" else model
    rep_plugin.export_onnx(network, tmp_path / "net.onnx", X, **ONE)
    exported = build(tmp_path / "net.onnx", cfg)
    exported.eval()
    batch = [dict(inputs=(image * 64 + 127), data_samples=DataSample()) for image in X[:4]]
    batch = dict(inputs=[one["inputs"] for one in batch], data_samples=[one["data_samples"] for one in batch])
    with torch.no_grad():
        wanted, found = model.test_step(batch), exported.test_step(batch)
        assert (model(X) - exported(X)).abs().max() < 1e-5
    for one, other in zip(wanted, found):
        assert torch.allclose(one.pred_score, other.pred_score, atol=1e-5) and one.pred_label.equal(other.pred_label)
    with pytest.raises(ArgumentError, match=r"mode must be 'tensor' or 'predict' for an ONNX file, .* got 'loss'"):
        exported(X, [], mode="loss")


WRONG = {
    "checkpoint none.onnx does not exist, expected a file": {},
    "text.onnx is no ONNX file, expected one that rep-plugin export wrote": {},
    "empty.onnx is no ONNX file, expected one": {},
    "folder.onnx is a folder, expected an ONNX file": {},
    "five.onnx gives 5 classes, expected the 2 of the config's head": dict(classes=5),
    "large.onnx takes images 3 x 32 x 32, but the config's are 3 x 16 x 16: export it": dict(shape=(None, 3, 32, 32)),
    "grey.onnx takes images 1 x any x any, but the config's are 3 x 16 x 16": dict(shape=(None, 1, None, None)),
    "odd.onnx: onnxruntime cannot open the graph: .*Incompatible dim": dict(shape=(None, 3, 16, 16), channels=4),
    r"bytes.onnx takes image uint8 \(\?, 3, 16, 16\), expected one batch of float32": dict(kind=TensorProto.UINT8),
    r"two.onnx gives a float \(\?, 2\) and b float \(\?, 2\), expected the logits": dict(outputs=("a", "b")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_one_line(message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    name = message.removeprefix("checkpoint ").split()[0].rstrip(":")
    if name == "folder.onnx":
        (folder / name).mkdir(exist_ok=True)
    elif name in ("text.onnx", "empty.onnx"):
        (folder / name).write_text("hello there" if name == "text.onnx" else "")
    elif name != "none.onnx":
        write(folder / name, **WRONG[message])
    for cls in (Visualizer, MessageHub, MMLogger):  # a command is a process of its own
        cls._instance_dict.clear()
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        main(["test", name, "--config", "tiny.py", "--work-dir", "new"])
    assert "\n" not in str(caught.value) and not (folder / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["float.onnx"], "expected float.onnx --config CONFIG, got no config"),
        (["float.onnx", "tiny.pth", "--config", "tiny.py"], "got the checkpoint tiny.pth"),
        (["tiny.py"], "expected CONFIG CHECKPOINT or MODEL.onnx --config CONFIG, got tiny.py"),
        (["tiny.py", "tiny.pth", "--runtime", "openvino"], "--runtime goes with MODEL.onnx, got tiny.py"),
        (["tiny.py", "tiny.pth", "--config", "tiny.py"], "--config goes with MODEL.onnx, got tiny.py"),
        (["float.onnx", "--config", "tiny.py", "--amp"], "--amp does not go with float.onnx"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        main(["test", *words])
    assert message in capsys.readouterr().err


def test_augmentation_needs_a_pipeline(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="^error: --tta needs a pipeline in test_dataloader.dataset, or tta_pipeline"):
        main(["test", "float.onnx", "--config", "tiny.py", "--tta"])


def test_networks_that_give_no_logits_are_refused(folder, tmp_path):
    cfg = tiny.config(tmp_path).model
    cfg.head = None
    with pytest.raises(ArgumentError, match="ImageClassifier is no classifier of mmpretrain"):
        build(folder / "float.onnx", cfg)
    assert isinstance(build(folder / "float.onnx", tiny.config(tmp_path).model).head, nn.Module)
