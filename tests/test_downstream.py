"""Our timm names inside other people's networks: segmentation_models_pytorch and torchvision's detectors."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import rep_plugin
from rep_plugin.errors import InconclusiveWarning, TraceError
from tests.helpers import relative_error

SMALL_REPVGG = dict(arch=dict(depths=(1, 1, 2, 1), widths=(0.25,) * 4))
ENCODERS = {"tu-rep_mobilenetv2_100": {}, "tu-rep_repvgg_a0": SMALL_REPVGG}
IMAGES = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(i)) for i in range(2)]
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 30, 40], [20, 10, 60, 50]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.tensor([[8.0, 5, 30, 40]]), "labels": torch.tensor([3])},
]


def train(model: nn.Module, loss_of, steps: int = 4) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.02), []
    for _ in range(steps):
        losses.append(loss_of())
        losses[-1].backward()
        optimizer.step(), optimizer.zero_grad()
    model.eval()
    return [loss.item() for loss in losses]


def scene(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of three grey areas, and their masks."""
    masks = torch.zeros(2, height, width, dtype=torch.long)
    masks[:, height // 2 :] += 1
    masks[:, :, width // 2 :] += 1
    return masks[:, None] + 0.1 * torch.randn(2, 3, height, width), masks


@pytest.mark.parametrize("name", ENCODERS)
def test_unet_trains_deploys_and_is_pruned(name):
    x, masks = scene(64, 32)
    model = smp.Unet(name, encoder_weights=None, classes=3, decoder_channels=(32, 16, 16, 8, 8), **ENCODERS[name])
    losses = train(model, lambda: nn.functional.cross_entropy(model(x), masks), steps=6)
    assert losses[-1] < losses[0]
    merged, report = rep_plugin.reparameterize(model, x)
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    assert not any("branches" in key for key in merged.state_dict())
    assert relative_error(model(x), merged(x)) < 1e-4

    plan = rep_plugin.plan_pruning(model, x, scores="l1", prune_fraction=0.3)  # trained branches, decoder and all
    pruned = rep_plugin.apply_plan(model, plan)
    assert pruned.macs_after < 0.85 * pruned.macs_before and pruned.max_rel_error < 1e-9
    assert any(layer.startswith("encoder") for layer in plan.widths) and any(
        "decoder" in layer for layer in plan.widths
    )
    merged, report = rep_plugin.reparameterize(model, x)
    assert report.max_rel_error < 1e-9 and relative_error(model(x), merged(x)) < 1e-4


@pytest.mark.parametrize("name", ENCODERS)
def test_dilated_deeplab_trains_and_deploys(name):
    x, masks = scene(64, 96)
    options = dict(decoder_channels=16, decoder_atrous_rates=(1, 2, 3), encoder_output_stride=16)
    model = smp.DeepLabV3Plus(name, encoder_weights=None, classes=3, **options, **ENCODERS[name])
    assert model.encoder(x)[-1].shape[2:] == (4, 6)
    losses = train(model, lambda: nn.functional.cross_entropy(model(x), masks), steps=6)
    assert losses[-1] < losses[0]
    merged, report = rep_plugin.reparameterize(model, x)
    assert report.max_rel_error < 1e-9 and relative_error(model(x), merged(x)) < 1e-4


class Pyramid(nn.Module):
    """Backbone and torchvision's FPN, as torchvision's detectors take them."""

    def __init__(self):
        super().__init__()
        options = dict(features_only=True, out_indices=(-3, -2, -1))
        self.body = timm.create_model("rep_repvgg_a0", **SMALL_REPVGG, **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(level): m for level, m in enumerate(self.body(x))})


def detector(kind: str, threshold: float) -> nn.Module:
    options = dict(num_classes=4, min_size=64, max_size=96)
    sizes = ((16,), (32,), (64,))
    if kind == "fcos":
        anchors = AnchorGenerator(sizes, ((1.0,),) * 3)
        return FCOS(Pyramid(), anchor_generator=anchors, score_thresh=threshold, detections_per_img=5, **options)
    options |= dict(rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3), box_detections_per_img=5)
    pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    return FasterRCNN(Pyramid(), box_roi_pool=pool, box_score_thresh=threshold, **options)


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn"])
@torch.no_grad()
def test_detectors_train_deploy_and_are_pruned(kind):
    model = detector(kind, 0.0)
    with torch.enable_grad():
        losses = train(model, lambda: sum(model(IMAGES, TARGETS).values()))
    assert losses[-1] < losses[0]
    merged, report = rep_plugin.reparameterize(model, torch.stack(IMAGES))
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    assert not any("branches" in key for key in merged.state_dict())
    for ours, theirs in zip(model(IMAGES), merged(IMAGES), strict=True):
        assert len(ours["boxes"]) == 5 and torch.equal(ours["labels"], theirs["labels"])
        assert relative_error(ours["boxes"], theirs["boxes"]) < 1e-4

    with pytest.raises(
        TraceError, match=r"cannot trace .*: values decide which rows .* \(a detector's backbone, for example\)$"
    ):
        rep_plugin.plan_pruning(model, (2, 3, 64, 64), "l1", 0.3)
    plan = rep_plugin.plan_pruning(model.backbone, (2, 3, 64, 64), "l1", 0.3)
    rep_plugin.apply_plan(model.backbone, plan)
    assert [len(found["boxes"]) for found in model(IMAGES)] == [5, 5]


def test_a_detector_that_finds_nothing_is_inconclusive():
    """Its blocks are proven all the same."""
    with pytest.warns(InconclusiveWarning, match="another input changes the output by 0.0e"):
        _, report = rep_plugin.reparameterize(detector("fcos", 0.9).eval())
    assert report.max_rel_error == 0 and report.sensitivity == 0
    assert all(block.max_rel_error < 1e-9 for block in report.blocks if block.max_rel_error is not None)
