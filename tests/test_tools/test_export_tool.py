"""tools/export.py on configs, artefacts and timm models, and what the files say."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.export.graph import read_metadata
from rep_plugin.openmmlab.artefacts import write_deployed, write_pruned
from rep_plugin.openmmlab.export import pipeline_of, preprocessing_of, read_images, write_onnx
from rep_plugin.openmmlab.load import build_model, load_model
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.artefacts import save_timm
from tests.test_openmmlab.test_hooks.conftest import ROOT

CONFIG = """
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, channels_last=True),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=1280),
)
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[60.0, 50.0, 40.0], to_rgb=True)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type="CustomDataset",
        data_root="images",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="ResizeEdge", scale=40, backend="pillow", interpolation="bicubic"),
            dict(type="CenterCrop", crop_size=(36, 32)),
            dict(type="PackInputs"),
        ],
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
"""


@pytest.fixture
def tried(folder, monkeypatch):
    """Call the tool in ``folder`` with a list of words: None, or what it ended with."""
    monkeypatch.chdir(folder)

    def call(*words):
        try:
            main(["export", *map(str, words), "--rounds", "1"])
        except SystemExit as error:
            return error.code
        return None

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes, a config, a checkpoint, its deployed and pruned forms, a timm checkpoint and folder."""
    folder, generator = tmp_path_factory.mktemp("export"), np.random.default_rng(0)
    for kind in ("crow", "owl"):
        (folder / "images" / kind).mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / kind / f"{index}.png")
    (folder / "config.py").write_text(CONFIG)
    cfg = Config.fromfile(folder / "config.py")
    model, x = build_model(cfg), torch.randn(8, 3, 64, 64)
    calibrate_random_bn_(model, x)
    torch.nn.init.normal_(model.head.fc.weight)
    save_checkpoint_file({"state_dict": model.state_dict(), "meta": {}}, folder / "epoch_1.pth")
    write_deployed(model, cfg, folder, x[:2], {"classes": ["crow", "owl"]})
    plan = rep_plugin.plan_pruning(model, x[:1], scores="l1", prune_fraction=0.2)
    write_pruned(model, cfg, plan, folder, x[:2])

    named = calibrate_random_bn_(timm.create_model("test_byobnet", num_classes=4), torch.randn(8, 3, 64, 64))
    torch.save({"state_dict": named.state_dict(), "epoch": 1}, folder / "last.pth.tar")
    rep_plugin.apply_plan(named, rep_plugin.plan_pruning(named, x[:1], scores="l1", prune_fraction=0.2), verify=False)
    save_timm(named, folder / "saved")
    return folder


def differs(path, model, x):
    """Largest relative difference of the file in ONNX Runtime from the model."""
    with torch.no_grad():
        wanted = model(x).numpy()
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(["logits"], {"input": x.numpy()})
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_it_writes_configs_artefacts_and_timm_models(folder, tried, capsys):
    cases = [
        ["config.py", "epoch_1.pth", "a.onnx", "--cfg-options", "val_dataloader.dataset.data_root=images"],
        ["deploy.py", "deploy.pth", "b.onnx", "--images", "images", "--batch", 2],
        ["pruned.py", "pruned.pth", "c.onnx", "--no-real-data", "--size", 32, 48, "--dynamic-size"],
        ["test_byobnet", "d.onnx", "--checkpoint", "last.pth.tar", "--model-args", "num_classes=4", "--size", 64,
         "--images", "images", "--class-names", "names.txt"],
    ]  # fmt: skip
    (folder / "names.txt").write_text("a\nb\nc\nd\n")
    assert [tried(*words) for words in cases] == [None] * len(cases)
    printed = capsys.readouterr().out
    assert "written: a.onnx, a.onnx.json, a.onnx.html" in printed and "openvino" in printed
    words = ["local-dir:saved", "e.onnx", "--size", "64", "--dynamic-batch"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/export.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "written: e.onnx, e.onnx.json, e.onnx.html" in done.stdout, done.stderr
    reports = {name: json.loads((folder / f"{name}.onnx.json").read_text()) for name in "abcde"}
    assert all(report["max_rel_error"] < 1e-4 and len(report["runtimes"]) == 2 for report in reports.values())

    cfg = Config.fromfile(folder / "config.py")
    model, _ = load_model(cfg, folder / "epoch_1.pth")
    images = read_images(model, cfg, folder / "images")
    assert images.shape == (6, 3, 32, 36)
    assert differs(folder / "a.onnx", model, images) < 1e-4
    assert reports["a"]["compared"][0] == [6, 3, 32, 36] and reports["a"]["merge_rel_error"] < 1e-9
    assert len(reports["a"]["blocks"]) == 19 and not reports["a"]["notes"]
    assert differs(folder / "b.onnx", model, images[:2]) < 1e-4 and reports["b"]["inputs"]["input"] == [2, 3, 32, 36]
    pruned, _ = load_model(Config.fromfile(folder / "pruned.py"), folder / "pruned.pth")
    assert differs(folder / "c.onnx", pruned, torch.randn(3, 3, 50, 33)) < 1e-4
    assert reports["c"]["params_before"] < reports["a"]["params_before"] and "random" in reports["c"]["notes"][-1]
    saved = timm.create_model(f"local-dir:{folder / 'saved'}").eval()
    assert differs(folder / "e.onnx", saved, torch.randn(5, 3, 64, 64)) < 1e-4
    named = timm.create_model("test_byobnet", num_classes=4).eval()
    named.load_state_dict(torch.load(folder / "last.pth.tar")["state_dict"])
    assert differs(folder / "d.onnx", named, torch.randn(3, 3, 64, 64)) < 1e-4
    assert read_metadata(folder / "d.onnx")["class_names"] == ["a", "b", "c", "d"]
    for name in "ab":
        assert read_metadata(folder / f"{name}.onnx")["class_names"] == ["crow", "owl"]


def test_metadata_tell_how_the_config_feeds_images(folder):
    cfg = Config.fromfile(folder / "config.py")
    model = build_model(cfg)
    told = preprocessing_of(model, cfg, (3, 32, 36))
    assert told["resize"] == {"edge": "short", "size": [40, 40]} and told["interpolation"] == "bicubic"
    assert told["crop"] == [32, 36] and told["channel_order"] == "RGB" and told["white"] == 255
    assert told["mean"] == [123.675, 116.28, 103.53]
    assert told["pipeline"] == json.loads(json.dumps(cfg.val_dataloader.dataset.pipeline))
    # The images are 40 pixels high already.
    values = np.asarray(Image.open(folder / "images/crow/0.png"), np.float32)[4:36, 6:42]
    by_hand = ((values - np.float32(told["mean"])) / np.float32(told["std"])).transpose(2, 0, 1)
    assert np.abs(read_images(model, cfg, folder / "images")[0].numpy() - by_hand).max() < 1e-5

    cfg.test_dataloader = dict(dataset=dict(type="RepeatDataset", dataset=dict(pipeline=[
        dict(type="mmcv.Resize", scale=(20, 10), keep_ratio=True), dict(type="PackInputs"),
    ])))  # fmt: skip
    model.data_preprocessor.to_rgb, model.data_preprocessor._enable_normalize = False, False
    told = preprocessing_of(model, cfg, (3, 10, 20))
    assert told["resize"] == {"edge": "fit", "size": [10, 20]} and told["channel_order"] == "BGR" and "mean" not in told
    assert len(pipeline_of(cfg)) == 2
    assert read_images(model, cfg, folder / "images").shape[0] == 6  # a loader is put in front


def test_another_size_than_the_pipelines_is_told(folder, tmp_path):
    cfg = Config.fromfile(folder / "config.py")
    model, _ = load_model(cfg, folder / "epoch_1.pth")
    x = read_images(model, cfg, folder / "images", 2)
    report = write_onnx(model, cfg, tmp_path / "net.onnx", x, {"classes": ("one",)}, size=(24, 40), rounds=0)
    told = read_metadata(tmp_path / "net.onnx")
    assert told["preprocessing"]["then_resize"] == {"size": [24, 40], "interpolation": "bilinear"}
    assert report.inputs == {"input": ["batch", 3, 24, 40]} and "class_names" not in told
    assert "class names left out: the data set has 1, the head 2" in report.notes[-1]
    with pytest.raises(ValueError, match="the input size is needed"):
        write_onnx(model, cfg, tmp_path / "net.onnx")


def test_errors_are_one_line_and_write_nothing(folder, tried):
    (folder / "empty").mkdir()
    (folder / "short.txt").write_text("a\n")
    (folder / "text.pth").write_text("no weights")
    mm, named = ["config.py", "epoch_1.pth", "f.onnx"], ["test_byobnet", "f.onnx", "--size", 64]
    cases = {
        "none.py does not exist": ["none.py", "epoch_1.pth", "f.onnx"],
        "none.pth does not exist": ["config.py", "none.pth", "f.onnx"],
        "does not fit ImageClassifier": ["config.py", "deploy.pth", "f.onnx"],
        "the input size is needed": [*mm, "--no-real-data"],
        "'nowhere' of CustomDataset does not exist": [*mm, "--cfg-options", "val_dataloader.dataset.data_root=nowhere"],
        "empty holds 0 images": [*mm, "--images", "empty"],
        "nowhere does not exist, expected a folder of images": [*mm, "--images", "nowhere"],
        "class_names holds 1 names, expected one for each of the 2 logits": [*mm, "--class-names", "short.txt"],
        "none.txt does not exist": [*named, "--class-names", "none.txt"],
        "f.pt": ["config.py", "epoch_1.pth", "f.pt"],
        "tolerance 1e-14": [*mm, "--tolerance", 1e-14],
        "timm has no model 'rep_repvgg_a9', expected one as rep_repvgg_a": ["rep_repvgg_a9", "f.onnx"],
        "cannot write into short.txt: Not a directory": [*named[:1], "short.txt/f.onnx", *named[2:]],
        "text.pth is not readable": [*named, "--checkpoint", "text.pth"],
        "last.pth.tar does not fit": [*named, "--checkpoint", "last.pth.tar"],
        "none does not exist, expected a folder with config.json": ["local-dir:none", "f.onnx"],
        "unexpected keyword argument 'nonsense'": [*named, "--model-args", "nonsense=1"],
        "test_byobnet takes 1 channels": [*named, "--model-args", "in_chans=1", "--images", "images"],
    }
    before = sorted(path.name for path in folder.iterdir())
    for message, words in cases.items():
        end = tried(*words)
        assert message in end and end.startswith("error: ") and "\n" not in end, (message, end)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_wrong_words_are_refused_by_name(tried, capsys):
    cases = {
        "expected NAME OUT.onnx, got 2 files": ["test_byobnet", "a", "f.onnx"],
        "expected CONFIG CHECKPOINT OUT.onnx, got 1 files": ["config.py", "f.onnx"],
        "--cfg-options does not go with test_byobnet": ["test_byobnet", "f.onnx", "--cfg-options", "a=1"],
        "--checkpoint does not go with config.py": ["config.py", "epoch_1.pth", "f.onnx", "--checkpoint", "x"],
        "expected KEY=VALUE, got 'nonsense'": ["test_byobnet", "f.onnx", "--model-args", "nonsense"],
        "--batch: expected a whole number >= 1, got '0'": ["test_byobnet", "f.onnx", "--batch", 0],
        "--size takes one or two numbers": ["test_byobnet", "f.onnx", "--size", 1, 2, 3],
        "not allowed with argument": ["test_byobnet", "f.onnx", "--batch", 1, "--dynamic-batch"],
    }
    for message, words in cases.items():
        assert tried(*words) == 2 and message in capsys.readouterr().err


@pytest.fixture
def many(folder):
    """Twelve images."""
    place, generator = folder / "many", np.random.default_rng(1)
    place.mkdir(exist_ok=True)
    for index in range(12):
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(place / f"{index}.png")
    return "many"


def test_int8_of_a_config_and_of_a_timm_model(tried, folder, many, capsys):
    kept = "--keep-float", 1, "--min-agreement", 0
    assert tried("config.py", "epoch_1.pth", "bird8.onnx", "--int8", "--images", many, *kept) is None
    out = capsys.readouterr().out
    assert "bird8.onnx.json" in out and "held-out images" in out
    report = json.loads((folder / "bird8.onnx.json").read_text())
    assert (report["images"], report["held_out"], len(report["kept_float"])) == (10, 2, 1)
    assert read_metadata(folder / "bird8.onnx")["preprocessing"]["crop"] == [32, 36]
    words = ("test_byobnet", "timm8.onnx", "--checkpoint", "last.pth.tar", "--model-args", "num_classes=4", "--int8")
    assert tried(*words, "--images", many, "--size", 64, "--int8-images", 11) is None
    assert json.loads((folder / "timm8.onnx.json").read_text())["images"] == 9
    session = onnxruntime.InferenceSession(str(folder / "timm8.onnx"))
    assert session.run(None, {"input": np.zeros((3, 3, 64, 64), np.float32)})[0].shape == (3, 4)


INT8_REFUSED = {
    "calibration must be 10 images or more, best some hundred, got 6": (
        "config.py",
        "epoch_1.pth",
        "no.onnx",
        "--int8",
    ),
    "--int8 needs --images FOLDER": ("test_byobnet", "no.onnx", "--int8"),
    "--min-agreement goes with --int8": ("config.py", "epoch_1.pth", "no.onnx", "--min-agreement", 0.5),
    "--keep-float goes with --int8": ("config.py", "epoch_1.pth", "no.onnx", "--keep-float", 2),
    "--dynamic-size does not go with --int8": ("config.py", "epoch_1.pth", "no.onnx", "--int8", "--dynamic-size"),
    "--batch does not go with --int8": ("config.py", "epoch_1.pth", "no.onnx", "--int8", "--batch", 2),
}


@pytest.mark.parametrize("message", INT8_REFUSED)
def test_int8_is_refused_in_one_line(message, tried, folder, capsys):
    code = tried(*INT8_REFUSED[message])
    said = f"{code} {capsys.readouterr().err}"
    assert message in said and "Traceback" not in said and not (folder / "no.onnx").exists()
