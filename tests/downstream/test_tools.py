"""Our tools and hooks on detectors and segmentors: train, resume, deploy, prune, test; stock code loads what they write."""

import json
import re

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmseg.apis import inference_model, init_model

from tests.downstream.conftest import assert_same, run, tiny_deeplab, tiny_fcos

PRUNE = 'dict(type="rep_plugin.PruneHook", {}, macs=0.8, scores="l1", round_to=4), dict(type="rep_plugin.ReparamHook")'


@pytest.fixture
def inside(lab, monkeypatch):
    """The configs name their images relative to the lab."""
    monkeypatch.chdir(lab)
    return lab


def boxes(lab, config: str, checkpoint: str):
    """A model and rows of (box, score, label) for each validation image, by stock mmdet."""
    model = init_detector(str(config), str(checkpoint), device="cpu")
    found = [inference_detector(model, str(path)).pred_instances for path in sorted((lab / "scenes/val2017").iterdir())]
    assert all(len(one) == 20 for one in found) and model.dataset_meta["classes"][0] == "disk"
    return model, [torch.column_stack([one.bboxes, one.scores, one.labels]) for one in found]


def maps(lab, config: str, checkpoint: str):
    """A model and its logits for the validation images, by stock mmseg."""
    model = init_model(str(config), str(checkpoint), device="cpu")
    paths = sorted((lab / "scenes/val2017").iterdir())
    return model, torch.stack([inference_model(model, str(path)).seg_logits.data for path in paths])


def test_a_trained_detector_and_its_deployed_form_find_the_same_boxes(inside, detector):
    _, expected = boxes(inside, detector, "fcos/epoch_2.pth")  # mmengine saves the EMA weights under the model's names
    deployed, found = boxes(inside, "fcos/deploy.py", "fcos/deploy.pth")
    assert_same(expected, found)
    assert "stages.1.0.branches.bottleneck.expand.weight" not in dict(deployed.backbone.named_parameters())
    report = json.loads((inside / "fcos/deploy.json").read_text())
    assert len(report["blocks"]) == 19 and report["max_rel_error"] < 1e-10 and report["input_shape"] == [4, 3, 128, 128]
    assert report["params_after"] < report["params_before"]


def test_resuming_a_detector(inside, detector):
    text = run(
        "train", detector, "--work-dir", "fcos", "--resume", "--cfg-options", "train_cfg.max_epochs=3", cwd=inside
    )
    assert "resumed epoch: 2, iter: 4" in text and (inside / "fcos/epoch_3.pth").is_file()


def test_a_detector_is_pruned_merged_and_tested_by_the_tools(inside, detector):
    flags = ("--macs", 0.7, "--scores", "l1", "--round-to", 4, "--out-dir", "pruned")
    assert "neck.lateral_convs.0.conv" in run("prune", detector, "fcos/epoch_2.pth", *flags, cwd=inside)
    pruned, expected = boxes(inside, "pruned/pruned.py", "pruned/pruned.pth")
    assert sum(p.numel() for p in pruned.parameters()) < 0.95 * 1_040_237
    run("reparameterize", "pruned/pruned.py", "pruned/pruned.pth", cwd=inside)
    _, found = boxes(inside, "pruned/deploy.py", "pruned/deploy.pth")
    assert_same(expected, found)
    tables = []
    for form in ("pruned", "deploy"):
        flags = ("--work-dir", "tested", "--out", "metrics.json", "--out-item", "metrics")
        run("test", f"pruned/{form}.py", f"pruned/{form}.pth", *flags, cwd=inside)
        tables.append(json.loads((inside / "metrics.json").read_text()))
    assert tables[0] == pytest.approx(tables[1], abs=1e-3) and "coco/bbox_mAP" in tables[0]


def test_a_detector_is_pruned_while_it_trains(inside, lab):
    config = tiny_fcos(lab, PRUNE.format("begin=1"))
    text = run("train", config, "--work-dir", "fcos_slim", cwd=inside)
    assert re.search(r"PruneHook, round 1: parameters 1,040,237 -> [\d,]+, multiply-adds", text)
    _, expected = boxes(inside, "fcos_slim/pruned.py", "fcos_slim/pruned.pth")
    _, found = boxes(inside, "fcos_slim/deploy.py", "fcos_slim/deploy.pth")
    assert_same(expected, found)
    text = run(
        "train", "fcos_slim/pruned.py", "--work-dir", "fcos_tuned", "--cfg-options", "load_from=fcos_slim/pruned.pth",
        "train_cfg.max_epochs=1", cwd=inside,
    )  # fmt: skip
    assert "loss_bbox" in text


def test_a_trained_segmentor_and_its_deployed_form_say_the_same(inside, segmentor):
    trained, expected = maps(inside, segmentor, "deeplab/iter_4.pth")
    deployed, found = maps(inside, "deeplab/deploy.py", "deeplab/deploy.pth")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(dim=0).max() > 1e-3  # images differ
    assert len(list(deployed.backbone.parameters())) < len(list(trained.backbone.parameters())) / 2


def test_a_segmentor_is_pruned_while_it_trains(inside, lab):
    config = tiny_deeplab(lab, PRUNE.format("begin=2, by_epoch=False"))
    text = run("train", config, "--work-dir", "deeplab_slim", cwd=inside)
    assert re.search(r"PruneHook, round 1: parameters 955,672 -> [\d,]+", text) and "aux.loss_ce" in text
    pruned, expected = maps(inside, "deeplab_slim/pruned.py", "deeplab_slim/pruned.pth")
    _, found = maps(inside, "deeplab_slim/deploy.py", "deeplab_slim/deploy.pth")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert pruned.auxiliary_head.conv_seg.weight.shape[0] == 4


def test_a_segmentor_is_pruned_and_merged_by_the_tools(inside, segmentor):
    flags = ("--fraction", 0.3, "--scores", "l1", "--out-dir", "deeplab_pruned")
    run("prune", segmentor, "deeplab/iter_4.pth", *flags, cwd=inside)
    _, expected = maps(inside, "deeplab_pruned/pruned.py", "deeplab_pruned/pruned.pth")
    run("reparameterize", "deeplab_pruned/pruned.py", "deeplab_pruned/pruned.pth", cwd=inside)
    _, found = maps(inside, "deeplab_pruned/deploy.py", "deeplab_pruned/deploy.pth")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    text = run("test", "deeplab_pruned/deploy.py", "deeplab_pruned/deploy.pth", "--work-dir", "tested", cwd=inside)
    assert "mIoU" in text
