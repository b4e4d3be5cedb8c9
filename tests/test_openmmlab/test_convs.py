"""``conv_cfg=dict(type='rep_plugin.DBBConv2d')`` in stock OpenMMLab networks."""

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.apis import init_model
from torch import nn

from rep_plugin.blocks.conv_like import ACBConv2d, ConvLike, DBBConv2d, MobileOneConv2d, RepConv2d
from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.configs import deploy_config
from rep_plugin.openmmlab.load import build_model
from rep_plugin.reparam import reparameterize
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(4, 3, 49, 40, generator=torch.Generator().manual_seed(1))
RESNET = dict(type="ResNet", depth=18, stem_channels=8, base_channels=8)
MOBILENET = dict(type="MobileNetV2", widen_factor=0.35)
VGG = dict(type="VGG", depth=11, norm_cfg=dict(type="BN"), num_classes=-1)


def config(backbone: dict, channels: int, **changes) -> Config:
    head = dict(type="LinearClsHead", num_classes=3, in_channels=channels)
    model = dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head)
    processor = dict(mean=[0.0] * 3, std=[1.0] * 3)
    return Config(dict(default_scope="mmpretrain", model=model, data_preprocessor=processor, **changes))


@pytest.mark.parametrize(
    "cls, options",
    [(DBBConv2d, {"mid_channels": 6}), (ACBConv2d, {}), (RepConv2d, {}), (MobileOneConv2d, {"copies": 2})],
)
def test_spatial_kernels_become_blocks_and_points_stay_plain(cls, options):
    cfg = dict(type=f"rep_plugin.{cls.__name__}", **options)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        assert type(build_conv_layer(cfg, 4, 8, 3, padding=1, groups=2, bias=False)) is cls
        assert type(build_conv_layer(cfg, 4, 8, kernel_size=(1, 5))) is cls
        assert type(build_conv_layer(cfg, 4, 8, 1, 2)) is nn.Conv2d
        for side in (1, 3):
            with pytest.raises(TypeError, match=f"conv_cfg of {cls.__name__} takes .* beside 'type', got 'mid'"):
                build_conv_layer(cfg | {"mid": 3}, 4, 8, side)
        with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'circular'"):
            build_conv_layer(cfg, 4, 8, 3, padding_mode="circular")


@pytest.mark.parametrize("order", [("conv", "norm", "act"), ("act", "conv", "norm"), ("norm", "conv", "act")])
@pytest.mark.parametrize("norm", [None, "BN", "GN"])
def test_conv_module(order, norm):
    norm_cfg = norm and (dict(type=norm) | (dict(num_groups=2) if norm == "GN" else {}))
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        module = ConvModule(4, 8, 3, 2, 1, conv_cfg=dict(type="rep_plugin.DBBConv2d"), norm_cfg=norm_cfg, order=order)
    assert module.conv.bias_free == (norm is not None)
    assert (module.kernel_size, module.stride, module.groups) == ((3, 3), (2, 2), 1)
    calibrate_random_bn_(module, torch.randn(8, 4, 9, 10))
    merged, report = reparameterize(module, torch.randn(2, 4, 9, 10), fold_bn=False)
    assert report.max_rel_error < 1e-9 and type(merged.conv) is nn.Conv2d
    absorbed = norm == "BN" and order.index("norm") > order.index("conv")
    assert (merged.conv.bias is None) == absorbed and bool(report.notes) == (norm is not None and not absorbed)


@pytest.mark.parametrize(
    "backbone, channels, cls", [(RESNET, 64, DBBConv2d), (MOBILENET, 1280, ACBConv2d), (VGG, 512, RepConv2d)]
)
def test_networks_train_deploy_and_become_the_stock_network(backbone, channels, cls, tmp_path):
    x = X if backbone is not VGG else X[:2]
    conv_cfg = dict(type=f"rep_plugin.{cls.__name__}")
    cfg = config(dict(backbone, conv_cfg=conv_cfg), channels)
    model = build_model(cfg)
    model.init_weights()
    blocks = [m for m in model.modules() if isinstance(m, ConvLike)]
    spatial = [m for m in build_model(config(backbone, channels)).modules() if isinstance(m, nn.Conv2d)]
    assert len(blocks) == sum(m.kernel_size != (1, 1) for m in spatial) > 7
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    calibrate_random_bn_(model, x)

    report = write_deployed(model, cfg, tmp_path, x)
    assert report.max_rel_error < 1e-9 and not report.notes
    assert Config.fromfile(tmp_path / "deploy.py").model.backbone == dict(backbone, conv_cfg=dict(type="Conv2d"))
    loaded = init_model(str(tmp_path / "deploy.py"), str(tmp_path / "deploy.pth"), device="cpu")
    assert relative_error(model(x), loaded(x)) < 1e-3  # float32
    stock = build_model(config(backbone, channels))
    stock.load_state_dict(loaded.state_dict())
    assert relative_error(loaded(x), stock(x)) < 1e-6


@pytest.mark.parametrize("backbone, channels, cls", [(RESNET, 64, DBBConv2d), (VGG, 512, ACBConv2d)])
def test_online_form(backbone, channels, cls):
    """VGG's convolutions have a bias and a BN behind: their blocks keep a BN, which becomes the bias."""
    model = build_model(config(backbone | {"conv_cfg": dict(type=f"rep_plugin.{cls.__name__}", online=True)}, channels))
    blocks = [m for m in model.modules() if isinstance(m, ConvLike)]
    assert blocks and all(block.online and hasattr(block, "post_bn") != block.bias_free for block in blocks)
    calibrate_random_bn_(model, X)
    merged, report = reparameterize(model, X, fold_bn=False)
    stock = build_model(config(backbone, channels))
    assert report.max_rel_error < 1e-9 and merged.state_dict().keys() == stock.state_dict().keys()


def test_deploy_config_says_plain_convolutions():
    cfg = config(dict(RESNET, conv_cfg=dict(type="rep_plugin.DBBConv2d", mid_channels=4)), 64, load_from="x.pth")
    deployed = deploy_config(cfg)
    assert deployed.model.backbone.conv_cfg == dict(type="Conv2d") and deployed.load_from is None
    assert cfg.model.backbone.conv_cfg.mid_channels == 4


def test_the_example_config_builds():
    from tests.test_openmmlab.test_hooks.conftest import ROOT

    cfg = Config.fromfile(ROOT / "configs/dbb_resnet18_cub.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg.model)
    assert sum(isinstance(m, DBBConv2d) for m in model.modules()) == 17
