"""The registered parts in mmpretrain's classifiers, and the shipped configs with the stock loaders."""

import copy
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from mmpretrain.structures import DataSample
from torch import nn

from rep_plugin.bilinear.head import fold_bilinear_head
from rep_plugin.openmmlab.bilinear_head import BilinearClsHead, TwoStreamBackbone
from rep_plugin.openmmlab.bilinear_pooling import BilinearPooling
from rep_plugin.registry import MODELS
from tests.helpers import ROOT

PUBLISHED = {"cub": (200, 67_152_136), "cars": (196, 66_103_556), "aircraft": (100, 40_937_636)}
VGG = dict(type="VGG", depth=16, norm_cfg=dict(type="BN"), with_last_pool=False)
SMALL = dict(type="ResNet", depth=18, num_stages=2, out_indices=(0, 1), strides=(1, 2), dilations=(1, 1))


@pytest.fixture(autouse=True)
def mmpretrain_scope():
    init_default_scope("mmpretrain")


def classifier(backbone=SMALL, neck=None, head=None):
    cfg = dict(type="ImageClassifier", backbone=backbone, neck=neck, head=head)
    return MMPRETRAIN_MODELS.build(copy.deepcopy(cfg)).eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def samples(labels):
    return [DataSample().set_gt_label(label) for label in labels]


def spread_(model):
    """Weights of size 1 in the classifier: logits that a wrong fold would change."""
    nn.init.normal_(model.head.fc.weight)
    return model


def test_types_are_registered_under_their_names():
    for part in (BilinearPooling, BilinearClsHead, TwoStreamBackbone):
        assert MODELS.get(part.__name__) is part
        assert MMPRETRAIN_MODELS.get(f"rep_plugin.{part.__name__}") is part


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("step", ["", "_step1"])
def test_parameter_counts_of_the_configs_are_the_published_ones(name, step):
    cfg = Config.fromfile(ROOT / f"configs/bcnn/bcnn_vgg16bn_{name}{step}.py")
    classes, published = PUBLISHED[name]
    with torch.device("meta"):
        model = classifier(**{part: cfg.model[part] for part in ("backbone", "head")})
    assert count(model) == published
    assert cfg.data_preprocessor.num_classes == model.head.num_classes == classes


def test_neck_under_the_stock_linear_head():
    neck = dict(type="rep_plugin.BilinearPooling", in_channels=128)
    head = dict(type="LinearClsHead", num_classes=4, in_channels=128 * 128)
    model, x = spread_(classifier(neck=neck, head=head)).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    pooled = model.extract_feat(x, stage="neck")
    assert isinstance(pooled, tuple) and pooled[0].shape == (2, model.neck.out_channels)
    backbone_map = model.extract_feat(x, stage="backbone")[-1]
    reference = torch.einsum("nihw,njhw->nij", backbone_map, backbone_map).flatten(1) / backbone_map[0, 0].numel()
    reference = torch.sqrt(reference + 1e-5) - 1e-5**0.5  # the map is >= 0
    assert torch.allclose(pooled[0], reference / reference.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)
    assert set(model.loss(x, samples([1, 3]))) == {"loss"}
    assert model.predict(x)[0].pred_score.shape == (4,)

    expected = model(x)
    fold_bilinear_head(model)
    assert (model(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    folded = classifier(neck=dict(**neck, deploy=True), head=dict(head, in_channels=128 * 129 // 2)).double()
    folded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(folded(x), model(x))


def test_head_losses_predictions_and_fold():
    head = dict(
        type="rep_plugin.BilinearClsHead", in_channels=128, num_classes=4, topk=(1, 2), cal_acc=True,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=4),
    )  # fmt: skip
    model, x = spread_(classifier(head=head)).double(), torch.rand(3, 3, 32, 32, dtype=torch.float64)
    feats = model.extract_feat(x)
    assert torch.equal(model.extract_feat(x, stage="pre_logits"), model.head.pre_logits(feats))
    assert torch.equal(model.head.fc(model.head.pre_logits(feats)), model(x))
    losses = model.loss(x, samples([0, 1, 2]))
    assert set(losses) == {"loss", "accuracy_top-1", "accuracy_top-2"}
    stock = dict(head, type="LinearClsHead", in_channels=128 * 128)
    stock = MMPRETRAIN_MODELS.build(stock).double()
    stock.load_state_dict({k: v for k, v in model.head.state_dict().items() if k.startswith("fc.")})
    assert torch.equal(losses["loss"], stock.loss((model.head.pre_logits(feats),), samples([0, 1, 2]))["loss"])
    assert [s.pred_label.item() for s in model.predict(x)] == model(x).argmax(1).tolist()

    expected = model(x)
    model.head.switch_to_deploy()
    assert (model(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    deployed = classifier(head=dict(head, deploy=True)).double()
    deployed.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(deployed(x), model(x))


def test_head_on_a_pooling_neck():
    neck = dict(type="rep_plugin.BilinearPooling", in_channels=128, method="low_rank", rank=16)
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=16, num_classes=3, method=None)
    assert classifier(neck=neck, head=head)(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_init_weights_keeps_what_the_constructors_set():
    neck = dict(type="rep_plugin.BilinearPooling", in_channels=128, method="low_rank", projection=8)
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=8, num_classes=50, method=None)
    model = classifier(neck=neck, head=head)
    factor, weight = model.neck.pool.factor1.clone(), model.head.fc.weight.clone()
    model.init_weights()
    assert torch.equal(model.neck.pool.factor1, factor) and torch.equal(model.head.fc.weight, weight)
    assert weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_two_streams_of_different_backbones():
    mobile = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35, out_indices=(1,))
    backbone = dict(type="rep_plugin.TwoStreamBackbone", first=dict(SMALL, out_indices=(0,)), second=mobile)
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=(64, 8), num_classes=4)
    model = classifier(backbone=backbone, head=head)
    x = torch.rand(2, 3, 32, 32)
    assert [tuple(z.shape) for z in model.extract_feat(x)] == [(2, 64, 8, 8), (2, 8, 8, 8)]
    assert model.head.fc.in_features == 64 * 8
    model.loss(x, samples([0, 1]))["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("backbone.first.conv1", "backbone.second.stem")):
            assert parameter.grad.abs().max() > 0
    assert model.backbone.train() is model.backbone and model.backbone.second.training


def test_two_layers_of_one_backbone():
    """A fixed 2x2 mean brings the finer layer to the coarser one's size; without it the shapes are told."""
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=(64, 128), num_classes=4)
    with pytest.raises(ValueError, match=r"\(2, 64, 64\) and \(2, 128, 16\)"):
        classifier(head=head)(torch.rand(2, 3, 32, 32))
    same_size = dict(SMALL, strides=(1, 1))
    assert classifier(backbone=same_size, head=head)(torch.rand(2, 3, 32, 32)).shape == (2, 4)


def test_timm_backbones_and_other_layouts():
    timm_backbone = dict(type="TIMMBackbone", model_name="resnet18", features_only=True, out_indices=(2,))
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=128, num_classes=4, projection=16)
    assert classifier(backbone=timm_backbone, head=head)(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    vit = dict(
        type="VisionTransformer", img_size=32, patch_size=16, out_type="raw", with_cls_token=False,
        arch=dict(embed_dims=24, num_layers=1, num_heads=2, feedforward_channels=24),
    )  # fmt: skip
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=24, num_classes=4, layout="NLC")
    assert classifier(backbone=vit, head=head)(torch.rand(2, 3, 32, 32)).shape == (2, 4)


def test_vgg_keeps_the_map_before_the_fifth_pool():
    head = dict(type="rep_plugin.BilinearClsHead", in_channels=512, num_classes=2)
    model = classifier(backbone=VGG, head=head)
    feature_map = model.extract_feat(torch.rand(1, 3, 32, 32))[-1]
    assert feature_map.shape == (1, 512, 2, 2) and feature_map.min() >= 0


def test_head_refuses_no_classes():
    with pytest.raises(ValueError, match="num_classes must be a whole number in .*got 0"):
        BilinearClsHead(8, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", ["_step1", ""])
def test_two_step_recipe_trains_the_right_parts(step):
    """A real optimizer step: the head alone (not even a BN statistic moves), then everything."""
    cfg = Config.fromfile(ROOT / f"configs/bcnn/bcnn_vgg16bn_cub{step}.py")
    backbone, head = cfg.model.backbone, cfg.model.head
    backbone.init_cfg, head.projection = None, 16  # no download, and a small head
    model = classifier(backbone=backbone, head=dict(head, num_classes=2))
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)  # before train(), as the runner does
    model.train()
    before = copy.deepcopy(model.state_dict())
    optim_wrapper.update_params(model.loss(torch.rand(2, 3, 32, 32), samples([0, 1]))["loss"])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"head.fc.weight", "head.fc.bias"} <= moved
    in_backbone = {name for name in moved if name.startswith("backbone.")}
    convs = {n for n in before if n.startswith("backbone.") and n.endswith("conv.weight")}
    if step:
        assert not in_backbone
    else:
        # The optimizer holds every parameter, and every convolution moves.
        held = {id(p) for group in optim_wrapper.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        assert len(convs) == 13 and convs <= moved
        assert any(name.endswith("running_mean") for name in in_backbone)
    rates = {group["lr"] for group in optim_wrapper.optimizer.param_groups}
    assert rates == ({1e-2, 1.0} if step else {1e-2})


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_hand_over_their_checkpoint(name):
    first, second = (Config.fromfile(ROOT / f"configs/bcnn/bcnn_vgg16bn_{name}{step}.py") for step in ("_step1", ""))
    assert second.load_from == f"work_dirs/bcnn_vgg16bn_{name}_step1/epoch_{first.train_cfg.max_epochs}.pth"
    assert first.load_from is None
    assert second.optim_wrapper.optimizer.lr == (0.1 if name == "cars" else 0.01)
    assert second.train_dataloader.batch_size == 48 and second.optim_wrapper.optimizer.weight_decay == 1e-5
    head_rate = first.optim_wrapper.optimizer.lr * first.optim_wrapper.paramwise_cfg.custom_keys["head.fc"].lr_mult
    assert head_rate == pytest.approx(1.0)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two classes of small images in each layout."""
    folders = {}
    for layout in PUBLISHED:
        folders[layout] = tmp_path_factory.mktemp("birds") / layout
        tool = [
            sys.executable,
            ROOT / "tools/dataset_converters/make_mini_fgvc.py",
            "--layout",
            layout,
            "--out",
            folders[layout],
        ]
        size = ["--classes", "2", "--train-per-class", "3", "--test-per-class", "2", "--size", "40", "--workers", "1"]
        subprocess.run([str(part) for part in tool + size], check=True, capture_output=True)
    return folders


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_read_their_layout_with_the_stock_loaders(name, rendered):
    cfg = Config.fromfile(ROOT / f"configs/bcnn/bcnn_vgg16bn_{name}.py")
    for loader, length in ((cfg.train_dataloader, 6), (cfg.val_dataloader, 4), (cfg.test_dataloader, 4)):
        data = DATASETS.build(dict(loader.dataset, data_root=str(rendered[name])))
        assert len(data) == length
        assert data[0]["inputs"].shape == (3, 224, 224)
    assert cfg.val_dataloader.batch_size == cfg.test_dataloader.batch_size == 48


def test_mini_config_trains_on_rendered_birds(rendered):
    """The same images seen a few times: the loss falls, and testing gives a score for each."""
    cfg = Config.fromfile(ROOT / "configs/bcnn/bcnn_rep_mbv2_mini_cub.py")
    cfg.train_dataloader.dataset.pipeline[1] = dict(type="RandomCrop", crop_size=40, padding=2)
    preprocessor = dict(cfg.data_preprocessor, type="ClsDataPreprocessor")
    model = MMPRETRAIN_MODELS.build(dict(cfg.model, data_preprocessor=preprocessor))
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=str(rendered["cub"])))
    batch = pseudo_collate([data[i] for i in range(6)])
    losses = [model.train_step(batch, optim_wrapper)["loss"].item() for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    test = DATASETS.build(dict(cfg.val_dataloader.dataset, data_root=str(rendered["cub"])))
    model.eval()
    results = model.val_step(pseudo_collate([test[i] for i in range(4)]))
    assert len(results) == 4 and all(r.pred_score.shape == (20,) for r in results)
