"""mmpretrain's own multi-branch blocks: merged by their attributes, and proven against mmpretrain's forward."""

import mmpretrain.models  # noqa: F401  (registers)
import pytest
import torch
from mmcv.cnn import ConvModule
from mmpretrain.models.backbones.levit import LeViT
from mmpretrain.models.backbones.mobileone import MobileOneBlock
from mmpretrain.models.backbones.replknet import RepLKBlock
from mmpretrain.models.backbones.repmlp import RepMLPBlock
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from mmpretrain.models.backbones.riformer import RIFormerBlock
from mmpretrain.registry import MODELS
from torch import nn

import rep_plugin
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

SE = {"ratio": 4}
BLOCKS = {
    "repvgg": (lambda: RepVGGBlock(8, 8), "mmpretrain RepVGG block"),
    "repvgg_stride_groups": (lambda: RepVGGBlock(8, 16, stride=2, groups=4), "mmpretrain RepVGG block"),
    "repvgg_dilated": (lambda: RepVGGBlock(8, 8, padding=2, dilation=2), "mmpretrain RepVGG block"),
    "repvgg_se": (lambda: RepVGGBlock(8, 8, se_cfg=SE), "mmpretrain RepVGG block"),
    "repvgg_sync_bn": (lambda: RepVGGBlock(8, 8, norm_cfg={"type": "SyncBN"}), "mmpretrain RepVGG block"),
    "mobileone": (lambda: MobileOneBlock(8, 8, 3, 4, groups=8), "mmpretrain MobileOne block"),
    "mobileone_se": (lambda: MobileOneBlock(8, 12, 3, 2, stride=2, se_cfg=SE), "mmpretrain MobileOne block"),
    "replk": (lambda: RepLKBlock(8, 8, 13, 5, 0.1), "large-kernel convolution"),
    "repmlp": (lambda: RepMLPBlock(8, 8, 8, reparam_conv_kernels=(1, 3), num_sharesets=2), "RepMLP block"),
    "repmlp_without_convolutions": (lambda: RepMLPBlock(8, 8, 8, num_sharesets=4), "RepMLP block"),
    "riformer": (lambda: RIFormerBlock(8, drop_path=0.1, layer_scale_init_value=0.7), "RIFormer block"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    build, kind = BLOCKS[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), build())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):  # it cannot take batch statistics on the CPU
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    if name != "repvgg_sync_bn":
        calibrate_random_bn_(model, torch.randn(4, 3, 16, 16))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 16, 16))
    assert kind in {block.kind for block in report.blocks} and not report.notes
    assert report.max_rel_error < 1e-11 and report.sensitivity > 0.05
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in merged[1].modules())
    assert all(p.requires_grad for p in merged.parameters())


def test_d2se_keeps_its_squeeze_and_excite():
    """Stock's own deployed block passes over it."""
    arch = {
        "num_blocks": [1, 1, 1, 1],
        "width_factor": [0.25, 0.25, 0.25, 0.125],
        "group_layer_map": None,
        "se_cfg": SE,
        "stem_channels": 16,
    }
    model = MODELS.build({"type": "mmpretrain.RepVGG", "arch": arch, "out_indices": (3,)})
    calibrate_random_bn_(model, torch.randn(4, 3, 64, 64))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 64, 64))
    assert report.max_rel_error < 1e-10 and report.sensitivity > 0.05 and len(report.blocks) == 5
    assert merged.stage_1[0].se_layer is not None
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)[0]
    model.switch_to_deploy()
    assert relative_error(expected, merged(x)[0]) < 1e-4 and relative_error(expected, model(x)[0]) > 0.1


def test_levit_with_its_head(monkeypatch):
    arch = {"embed_dims": [32, 48, 64], "num_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dims": [16, 16, 16]}
    monkeypatch.setitem(LeViT.arch_zoo, "tiny", arch)
    model = MODELS.build(
        {
            "type": "ImageClassifier",
            "backbone": {"type": "LeViT", "arch": "tiny", "img_size": 64},
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LeViTClsHead", "num_classes": 5, "in_channels": 64, "distillation": False},
        }
    )
    calibrate_random_bn_(model, torch.randn(8, 3, 64, 64))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 64, 64))
    assert isinstance(merged.backbone, LeViT) and isinstance(merged.head.head, nn.Linear)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in merged.modules())
    assert report.max_rel_error < 1e-10 and report.sensitivity > 0.05


class Detector(nn.Module):
    """As detectors are: what joins backbone, neck and head cannot be traced."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(RepVGGBlock(3, 8, stride=2), RepVGGBlock(8, 8))
        self.neck = ConvModule(8, 8, 3, padding=1, norm_cfg={"type": "BN"})
        self.heads = nn.ModuleList([ConvModule(8, 4, 1, norm_cfg={"type": "BN"}, act_cfg=None) for _ in range(2)])

    def forward(self, x):
        x = self.neck(self.backbone(x))
        return [head(x) for head in self.heads if len(torch.nonzero(x > 0)) > 0]


def test_backbone_neck_and_heads_of_an_untraceable_detector():
    model = calibrate_random_bn_(Detector(), torch.randn(4, 3, 32, 32))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 32, 32))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    folded = {block.name for block in report.blocks if block.kind.startswith("Conv-BN")}
    assert folded == {"neck.conv", "heads.0.conv", "heads.1.conv"} and len(report.blocks) == 5
    assert report.max_rel_error < 1e-12 and report.sensitivity > 0.05
    assert len(report.notes) == 1 and "'the model': torch.fx cannot trace Detector" in report.notes[0]
