"""Whole detectors and segmentors: merged, pruned, written, and the same in the hands of stock mmdet and mmseg."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.apis import init_model
from mmseg.structures import SegDataSample

import rep_plugin
from rep_plugin.blocks.base import RepBlock
from rep_plugin.openmmlab.artefacts import write_deployed, write_pruned
from rep_plugin.openmmlab.load import build_model, load_model
from tests.downstream.conftest import CONFIGS, ROOT, SIDE, assert_same, images, lively, shipped

NARROW_HEADS = {
    "model.neck.out_channels": 32,
    "model.rpn_head.in_channels": 32,
    "model.rpn_head.feat_channels": 32,
    "model.roi_head.bbox_roi_extractor.out_channels": 32,
    "model.roi_head.bbox_head.in_channels": 32,
    "model.roi_head.bbox_head.fc_out_channels": 64,
    "model.roi_head.bbox_head.num_classes": 3,
    "model.test_cfg.rcnn.score_thr": 0.0,
    "model.test_cfg.rpn.max_per_img": 20,
}
SMALL = {
    "fcos_rep_mbv2_mini_scenes": {"model.test_cfg.score_thr": 0.0},
    "faster_rcnn_rep_mbv2_coco": {
        "model.backbone.widen_factor": 0.5,
        "model.neck.in_channels": [16, 16, 48, 160],
        **NARROW_HEADS,
    },
    "faster_rcnn_rep_repvgg_a0_coco": {
        "model.backbone.arch": dict(_delete_=True, depths=(1, 1, 2, 1), widths=(0.25,) * 4),
        "model.neck.in_channels": [16, 32, 64, 128],
        **NARROW_HEADS,
    },
    "deeplabv3plus_rep_mbv2_mini_scenes": {},
}
DETECTORS = [name for name in SMALL if not name.startswith("deeplab")]
X = images()
META = {"classes": ("a", "b", "c"), "palette": [(1, 2, 3)] * 3}


def samples(name: str, count: int = 2) -> list:
    """Annotations for ``count`` images: a box or two, or the class of every pixel."""
    generator, found = torch.Generator().manual_seed(0), []
    for index in range(count):
        meta = dict(
            img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), pad_shape=(SIDE, SIDE), batch_input_shape=(SIDE, SIDE)
        )
        meta |= dict(scale_factor=(1.0, 1.0), img_id=index)
        if name in DETECTORS:
            boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 20.0, 60.0, 58.0]])[: index + 1]
            one = DetDataSample(metainfo=meta, gt_instances=InstanceData(bboxes=boxes, labels=torch.arange(index + 1)))
            one.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        else:
            one = SegDataSample(metainfo=meta)
            one.gt_sem_seg = PixelData(data=torch.randint(0, 4, (1, SIDE, SIDE), generator=generator))
        found.append(one)
    return found


@torch.no_grad()
def predicted(model: torch.nn.Module, name: str) -> list[torch.Tensor]:
    """What a model says of each image: rows of (box, score, label), or logits."""
    model.eval()
    found = model(X, samples(name), mode="predict")
    if name not in DETECTORS:
        return [one.seg_logits.data for one in found]
    rows = [torch.column_stack([p.bboxes, p.scores, p.labels]) for p in (one.pred_instances for one in found)]
    assert min(map(len, rows)) > 10
    return rows


def stock(name: str, folder, form: str) -> torch.nn.Module:
    """What stock mmdet or mmseg build and load."""
    paths = str(folder / f"{form}.py"), str(folder / f"{form}.pth")
    if name not in DETECTORS:
        return init_model(*paths, device="cpu")
    return init_detector(*paths, palette="random", device="cpu")


def train_once(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Gradients of one training step."""
    model.train()
    model.zero_grad()
    losses, _ = model.parse_losses(model(X, samples(name), mode="loss"))
    losses.backward()
    assert torch.isfinite(losses)
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=SMALL)
def case(request):
    """Name, config and model."""
    cfg = shipped(request.param, **SMALL[request.param])
    return request.param, cfg, lively(cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_builds_as_listed(name):
    cfg = shipped(name)
    listed = {model["Name"]: model for model in yaml.safe_load((ROOT / "model-index.yml").read_text())["Models"]}
    model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == listed[name]["Metadata"]["Parameters"]
    assert type(model.backbone).__module__ == "rep_plugin.openmmlab.backbones" or "repvgg" in name
    assert [hook["type"] for hook in cfg.custom_hooks] == ["rep_plugin.ReparamHook"]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        maps = model.eval().backbone(torch.zeros(1, 3, 64, 64))
    if "coco" in name:
        assert [64 // m.shape[-1] for m in maps] == [4, 8, 16, 32]
        assert [m.shape[1] for m in maps] == list(cfg.model.neck.in_channels)


def test_every_parameter_that_wants_a_gradient_gets_one(case):
    """DDP waits for each: what of the backbone is not run must not ask."""
    name, cfg, _ = case
    gradients = train_once(revert_sync_batchnorm(build_model(cfg)), name)
    assert [key for key, gradient in gradients.items() if gradient is None] == []


def test_a_whole_model_is_merged(case):
    name, _, model = case
    merged, report = rep_plugin.reparameterize(model, X, fold_bn=False)
    assert report.max_rel_error < 1e-10 and report.sensitivity > 1e-2
    assert report.params_after < report.params_before and report.macs_after < report.macs_before
    blocks = [key for key, part in merged.named_modules() if isinstance(part, RepBlock)]
    assert len(blocks) == len(report.blocks) > 4 and all(merged.get_submodule(key).deployed for key in blocks)
    assert_same(predicted(model, name), predicted(merged, name))


def test_a_whole_model_is_merged_with_everything_folded(case):
    name, _, model = case
    merged, report = rep_plugin.reparameterize(model)  # random images
    assert report.max_rel_error < 1e-10 and len(report.blocks) >= 5
    assert_same(predicted(model, name), predicted(merged, name))


def test_deployed_files_load_in_stock_code(case, tmp_path):
    name, cfg, model = case
    write_deployed(model, cfg, tmp_path, X, META)
    loaded = stock(name, tmp_path, "deploy")
    assert_same(predicted(model, name), predicted(loaded, name))
    assert list(loaded.dataset_meta["classes"]) == ["a", "b", "c"]
    assert not any(".branches." in key for key in loaded.state_dict())


def test_pruned_files_load_in_stock_code_train_on_and_merge(case, tmp_path):
    name, cfg, model = case
    plan = rep_plugin.plan_pruning(model, X.shape, "l1", 0.3)
    report = write_pruned(model, cfg, plan, tmp_path, X, META)
    assert report.max_rel_error < 1e-10 and report.params_after < report.params_before
    narrow = [key for key, (before, after) in plan.widths.items() if after < before]
    assert any(key.startswith("backbone.stages") for key in narrow)
    assert any(key.startswith(("neck.lateral_convs", "decode_head")) for key in narrow)
    loaded = stock(name, tmp_path, "pruned")
    expected = predicted(loaded, name)
    pruned_cfg = Config.fromfile(tmp_path / "pruned.py")
    again, _ = load_model(pruned_cfg, str(tmp_path / "pruned.pth"))
    assert_same(expected, predicted(again, name))
    assert all(gradient is not None for gradient in train_once(revert_sync_batchnorm(again), name).values())
    again, _ = load_model(pruned_cfg, str(tmp_path / "pruned.pth"))
    write_deployed(again, pruned_cfg, tmp_path, X, META)
    assert_same(expected, predicted(stock(name, tmp_path, "deploy"), name))


def test_the_second_stage_keeps_what_it_reads(case):
    """No run reaches the regions' head, so the maps that it reads stay as they are, and the reason is told."""
    name, _, model = case
    plan = rep_plugin.plan_pruning(model, X.shape, "l1", 0.3)
    if name.startswith("faster_rcnn"):
        assert all("makes the model output" in plan.frozen[f"neck.fpn_convs.{i}.conv"] for i in range(4))
        assert not any(key.startswith("roi_head") for key in plan.widths)
    elif name.startswith("deeplab"):
        assert plan.widths["auxiliary_head.convs.0.conv"][0] == 32  # seen, so that it follows the backbone
    else:
        assert "bbox_head.conv_cls" in plan.frozen


def test_a_backbone_alone_is_pruned_and_merged_inside_its_detector():
    name = "fcos_rep_mbv2_mini_scenes"
    model = lively(shipped(name, **SMALL[name]))
    plan = rep_plugin.plan_pruning(model.backbone, X.shape, "l1", 0.3)
    report = rep_plugin.apply_plan(model.backbone, plan)
    assert report.max_rel_error < 1e-10 and plan.kept
    assert [m.shape[1] for m in model.backbone(X)] == [16, 16, 48, 160]  # the neck reads them
    expected = predicted(model, name)
    rep_plugin.reparameterize(model.backbone, X, inplace=True)
    assert_same(expected, predicted(model, name))


def test_conv_cfg_in_the_head_of_a_detector(tmp_path):
    """A group norm follows the convolutions: it cannot take up their biases, which stock FCOS has not."""
    name = "fcos_rep_mbv2_mini_scenes"
    cfg = shipped(name, **SMALL[name], **{"model.bbox_head.conv_cfg": dict(type="rep_plugin.DBBConv2d")})
    model = lively(cfg)
    report = write_deployed(model, cfg, tmp_path, X, META)
    assert {"bbox_head.cls_convs.0.conv", "bbox_head.reg_convs.1.conv"} <= {block.name for block in report.blocks}
    loaded = stock(name, tmp_path, "deploy")
    assert type(loaded.bbox_head.cls_convs[0].conv) is torch.nn.Conv2d
    assert_same(predicted(model, name), predicted(loaded, name))


def test_a_classifier_starts_a_detector(tmp_path):
    """``init_cfg`` with a prefix, as in the comments of the configs; a checkpoint that does not fit is refused."""
    backbone = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.5)
    head = dict(type="mmpretrain.LinearClsHead", num_classes=3, in_channels=1280)
    pool = dict(type="mmpretrain.GlobalAveragePooling")
    classifier = Config(dict(model=dict(type="mmpretrain.ImageClassifier", backbone=backbone, neck=pool, head=head)))
    trained = build_model(classifier)
    torch.save({"state_dict": trained.state_dict(), "meta": {}}, tmp_path / "cls.pth")
    start = dict(type="Pretrained", checkpoint=str(tmp_path / "cls.pth"), prefix="backbone.")
    name = "fcos_rep_mbv2_mini_scenes"
    model = build_model(shipped(name, **{"model.backbone.init_cfg": start}))
    model.init_weights()
    expected = trained.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())
    wide = build_model(shipped(name, **{"model.backbone.init_cfg": start, "model.backbone.widen_factor": 0.75}))
    with pytest.raises(RuntimeError, match="does not fit RepMobileNetV2"):
        wide.init_weights()


def test_detectors_need_no_mmpretrain(tmp_path):
    code = """
import json, sys
sys.modules["mmpretrain"] = None
import torch
from tests.downstream.test_models import SMALL, lively, predicted, shipped, write_deployed, X
name = "fcos_rep_mbv2_mini_scenes"
cfg = shipped(name, **SMALL[name])
print(json.dumps(write_deployed(lively(cfg), cfg, sys.argv[1], X).max_rel_error))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-10 and (tmp_path / "deploy.py").is_file()
