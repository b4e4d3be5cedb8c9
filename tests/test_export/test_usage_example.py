"""The example of docs/export.md: onnxruntime alone predicts what the model does in its own framework."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image

import rep_plugin
from rep_plugin.openmmlab.export import read_images as read_mm_images
from rep_plugin.openmmlab.export import write_onnx
from rep_plugin.openmmlab.load import build_model
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.export import export_timm, load_timm, read_images
from tests.helpers import ROOT

CLASSES = ["a", "b", "c", "d", "e", "f", "g"]
BLOCKED = ["torch", "rep_plugin", "timm", "torchvision", "mmengine", "mmcv", "mmpretrain", "cv2", "onnx"]


def run_example(folder):
    """Run the page's second example in a process where only onnxruntime, numpy and Pillow are; return {class: share}."""
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/export.md").read_text(), re.S | re.M)
    (code,) = [one for one in examples if "import onnxruntime" in one]
    code = f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n{code}"
    code += "\nimport json\nprint(json.dumps([(name, float(share)) for name, share in predict('image.jpg')]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 5 and all(re.fullmatch(r" *\d+\.\d%  \w", line) for line in lines)
    return dict(json.loads(last))


def shares_of(model, x):
    with torch.no_grad():
        shares = model(x).softmax(1)[0].double()
    best = shares.argsort(descending=True)[:5]
    assert shares[best[0]] > 1.05 * shares[best[4]]  # else any order would do
    return {CLASSES[number]: shares[number].item() for number in best}


@pytest.fixture
def folder(tmp_path):
    """work_dirs/ for the file, and a smooth image of an odd size."""
    (tmp_path / "work_dirs").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    image = Image.fromarray(pixels).resize((131, 90), Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.jpg", quality=95)
    return tmp_path


@pytest.mark.parametrize(("crop_mode", "size"), [("center", (64, 64)), ("squash", (64, 64)), ("border", (64, 64))])
def test_timm_models(crop_mode, size, folder):
    overlay = {"label_names": CLASSES, "input_size": (3, *size), "crop_mode": crop_mode}
    model = timm.create_model("rep_mobilenetv2_035", num_classes=7, pretrained_cfg_overlay=overlay).eval()
    torch.nn.init.normal_(calibrate_random_bn_(model, torch.randn(8, 3, *size)).classifier.weight)
    rep_plugin.timm.save_timm(rep_plugin.reparameterize(model)[0], folder / "saved")
    name = f"local-dir:{folder / 'saved'}"
    export_timm(name, folder / "work_dirs/model.onnx", size=size, rounds=0, runtimes=["onnxruntime"])
    cfg = timm.data.resolve_data_config({}, model=load_timm(name))
    found, wanted = run_example(folder), shares_of(model, read_images(folder, cfg))
    assert list(found) == list(wanted) and found == pytest.approx(wanted, rel=1e-3)


def test_mmpretrain_models(folder):
    """Its own pipeline scales with OpenCV: here the image has the size already, so that only the steps are compared."""
    Image.open(folder / "image.jpg").resize((96, 96)).save(folder / "image.png")
    (folder / "image.jpg").unlink()
    Image.open(folder / "image.png").save(folder / "image.jpg", quality=95)
    (folder / "image.png").unlink()
    cfg = Config.fromfile(ROOT / "configs/rep_mbv2_mini_cub.py")
    cfg.model.head.num_classes = 7
    model = build_model(cfg)
    model.eval()
    x = read_mm_images(model, cfg, folder)
    calibrate_random_bn_(model, torch.cat((x, torch.randn(7, *x.shape[1:]))))
    torch.nn.init.normal_(model.head.fc.weight)
    path = folder / "work_dirs/model.onnx"
    write_onnx(model, cfg, path, x, {"classes": CLASSES}, rounds=0, runtimes=["onnxruntime"])
    steps = rep_plugin.export.read_metadata(path)["preprocessing"]
    assert steps["resize"] == {"edge": "both", "size": [96, 96]}  # nothing is scaled
    found, wanted = run_example(folder), shares_of(model, x)
    assert list(found) == list(wanted) and found == pytest.approx(wanted, rel=2e-2)
