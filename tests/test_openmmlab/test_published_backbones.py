"""RepVGG, MobileOne and RepLKNet in stock OpenMMLab hands."""

import mmpretrain.models.backbones as stock
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.apis import init_model

from rep_plugin.backbones.mobileone import ARCHS as MOBILEONES
from rep_plugin.backbones.repvgg import ARCHS as REPVGGS
from rep_plugin.measure.costs import count_params
from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.backbones import MobileOne, RepLKNet, RepVGG
from rep_plugin.openmmlab.configs import deploy_config
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

SMALL = {
    "RepVGG": dict(arch=dict(depths=(1, 1, 2, 1), widths=(0.25, 0.25, 0.25, 0.25), groups=2, se=True)),
    "MobileOne": dict(arch=dict(widths=(0.25,) * 4, copies=2, depths=(1, 1, 2, 1), se_blocks=(0, 0, 1, 1))),
    "RepLKNet": dict(arch=dict(channels=(8, 8, 16, 16), kernels=(13, 9, 7, 7), depths=(1, 1, 1, 1))),
}
KINDS = {"RepVGG": RepVGG, "MobileOne": MobileOne, "RepLKNet": RepLKNet}


def classifier(name: str, **options) -> Config:
    width = KINDS[name](**SMALL[name]).out_channels[-1]
    return Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                backbone=dict(type=f"rep_plugin.{name}", **SMALL[name], **options),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=4, in_channels=width),
            ),
        )
    )


@pytest.mark.parametrize("deploy", [False, True])
def test_parameters_are_counted_as_mmpretrain_does(deploy):
    with torch.device("meta"):
        for arch in REPVGGS:
            ours, theirs = RepVGG(arch, deploy=deploy), stock.RepVGG(arch, deploy=deploy)
            assert count_params(ours) == count_params(theirs), arch
        for arch in MOBILEONES:
            ours, theirs = MobileOne(arch, deploy=deploy), stock.MobileOne(arch, deploy=deploy)
            assert count_params(ours) == count_params(theirs), arch
        ours = [RepLKNet("31B", deploy=deploy, keep_bn=deploy), RepLKNet("31B", (1, 3), deploy=deploy, keep_bn=deploy)]
    assert count_params(ours[0]) == count_params(stock.RepLKNet("31B", small_kernel_merged=deploy))
    assert count_params(ours[1]) - count_params(ours[0]) == 2 * 256


@pytest.mark.parametrize("name", KINDS)
def test_stock_classifier_deploys_and_init_model_loads_it(name, tmp_path):
    cfg = classifier(name, channels_last=True)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(cfg.model)
    model.init_weights()
    x = torch.randn(2, 3, 64, 64)
    calibrate_random_bn_(model, x)
    report = write_deployed(model, cfg, tmp_path)
    assert report.max_rel_error < 1e-10 and report.sensitivity > 1e-3 and report.params_after < report.params_before
    deployed = init_model(str(tmp_path / "deploy.py"), str(tmp_path / "deploy.pth"), device="cpu")
    assert relative_error(model(x), deployed(x)) < 1e-4
    assert not any("branches" in key for key in deployed.state_dict())
    assert deploy_config(cfg).model.backbone.deploy is True


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frozen", [-1, 0, 2])
def test_frozen_stages_and_norm_eval(name, frozen):
    model = KINDS[name](**SMALL[name], frozen_stages=frozen, norm_eval=True)
    assert model.train() is model
    for index, part in enumerate([model.stem, *model.stages]):
        assert all(p.requires_grad == (index > frozen) for p in part.parameters())
        assert all(m.training == (index > frozen) for m in part.modules() if isinstance(m, torch.nn.Conv2d))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))[0].mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"frozen_stages must lie in -1..4, got 5"):
        KINDS[name](**SMALL[name], frozen_stages=5)


@pytest.mark.parametrize("name", KINDS)
def test_init_cfg_loads_a_checkpoint_and_a_misfit_is_refused(name, tmp_path):
    source = KINDS[name](**SMALL[name])
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"), prefix="backbone.")
    model = KINDS[name](**SMALL[name], init_cfg=pretrained)
    model.init_weights()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match=f"does not fit {name}"):
        KINDS[name](**SMALL[name], deploy=True, init_cfg=pretrained).init_weights()


@pytest.mark.parametrize("name", ["rep_repvgg_a0_cub", "rep_mobileone_s0_fashion_mnist"])
def test_shipped_configs_build(name):
    cfg = Config.fromfile(f"configs/{name}.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})
    channels = cfg.model.backbone.get("in_channels", 3)
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, cfg.model.head.num_classes)
    assert cfg.missing_data_hint and {hook["type"] for hook in cfg.custom_hooks} == {"rep_plugin.ReparamHook"}
