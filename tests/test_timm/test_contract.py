"""What timm's own tests ask of every model, for every name of ours: on the meta device, where size costs nothing.

Numbers are checked on networks that are cut short, one a family. `make test-timm` runs timm's own tests.
"""

import pytest
import timm
import torch
from timm.models import FeatureInfo, list_models
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import rep_plugin
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.models import WIDTHS
from tests.helpers import relative_error

NAMES = list_models(module=["models", "variants", "bilinear"])
PYRAMIDS = [
    "rep_mobilenetv2_075",
    "rep_repvgg_d2se",
    "rep_mobileone_s1",
    "rep_replknet_xl",
    "dbb_resnet18",
    "acb_mobilenetv2_100",
]
SMALL = {
    "rep_mobilenetv2_035": {},
    "rep_repvgg_a0": dict(arch=dict(depths=(1, 1, 2, 1), widths=(0.25,) * 4, se=True)),
    "rep_mobileone_s0": dict(arch=dict(widths=(0.25,) * 4, copies=2, depths=(1, 1, 2, 1))),
    "rep_replknet_31b": dict(arch=dict(channels=(8, 8, 16, 16), kernels=(13, 9, 7, 7), depths=(1, 1, 2, 1))),
    "acb_mobilenetv1_100": {},
}


def meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(2, 3, 64, 48)
    return calibrate_random_bn_(timm.create_model(name, num_classes=5, **SMALL[name]), x), x


def test_every_family_is_listed():
    families = {
        "rep_mobilenetv2": 5,
        "rep_repvgg": 14,
        "rep_mobileone": 5,
        "rep_replknet": 3,
        "dbb": 4,
        "acb": 4,
        "bcnn": 3,
    }
    counts = {family: sum(name.startswith(f"{family}_") for name in NAMES) for family in families}
    assert counts == families and sum(counts.values()) == len(NAMES) and len(WIDTHS) == 5
    assert not set(NAMES) & set(timm.list_pretrained())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_shapes_and_configs(name):
    """test_model_default_cfgs, and the shapes of test_model_forward."""
    model = meta(name, num_classes=42).eval()
    cfg = model.default_cfg
    features = model.forward_features(torch.empty(2, *cfg["input_size"], device="meta"))
    assert features.shape == (2, model.num_features, *cfg["pool_size"])
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) and model.forward_head(features).shape == (2, 42)

    first = cfg["first_conv"] if isinstance(cfg["first_conv"], tuple) else (cfg["first_conv"],)
    assert [model.get_submodule(conv).in_channels for conv in first] == [3] * len(first)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    data = timm.data.resolve_data_config(model=model)
    assert data["input_size"] == cfg["input_size"] and data["crop_pct"] == cfg["crop_pct"]
    timm.data.create_transform(**data, is_training=True)

    model.reset_classifier(0)
    assert model.num_classes == 0 and model.forward_head(features).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape

    deployed = meta(name, deploy=True, in_chans=2, num_classes=0, global_pool="")
    assert deployed.get_submodule(deployed.pretrained_cfg["first_conv"]).in_channels == 2
    assert deployed.forward_head(features).shape == features.shape


@pytest.mark.parametrize("name", ["rep_mobilenetv2_140", "rep_repvgg_b1g4", "rep_mobileone_s4", "acb_resnet50"])
def test_every_parameter_gets_a_gradient(name):
    """test_model_backward."""
    model = meta(name, num_classes=42).train()
    y = model(torch.empty(2, 3, 64, 64, device="meta"))
    y.mean().backward()
    assert y.shape == (2, 42) and all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", PYRAMIDS)
@torch.no_grad()
def test_maps_and_intermediates(name):
    """test_model_forward_features, test_model_forward_intermediates and its features_only form."""
    x = torch.empty(1, 3, 96, 96, device="meta")
    whole = meta(name).eval()
    final, maps = whole.forward_intermediates(x)
    info = FeatureInfo(whole.feature_info, len(whole.feature_info))
    assert final.shape == whole.forward_features(x).shape
    for features in (meta(name, features_only=True), meta(name, features_only=True, feature_cls="getter")):
        found = features.eval()(x)
        assert features.feature_info.channels() == info.channels() == [m.shape[1] for m in maps]
        assert features.feature_info.reduction() == info.reduction() == [96 // m.shape[2] for m in maps]
        assert [m.shape for m in found] == [m.shape for m in maps] and len(maps) >= 4


@pytest.mark.parametrize("name", SMALL)
def test_other_forms_compute_the_same(name, tmp_path):
    """test_model_forward_torchscript, test_model_forward_fx; also channels_last, export, feature extractors."""
    model, x = small(name)
    expected = model(x)
    assert relative_error(expected[:1], expected[1:]) > 1e-3
    deployed, _ = rep_plugin.reparameterize(model, x, verify=False)
    torch.jit.script(deployed).save(tmp_path / "model.pt")
    forms = {
        "script": torch.jit.load(tmp_path / "model.pt")(x),
        "export": torch.export.export(model, (x,)).module()(x),
        "channels_last": model(x.contiguous(memory_format=torch.channels_last)),
        "fx": torch.fx.symbolic_trace(model)(x) if name.startswith("rep") else expected,
    }
    for form, found in forms.items():
        assert relative_error(expected, found) < 1e-3, form
    layer = model.feature_info[-2]["module"]
    extractor = create_feature_extractor(model, {layer: "map"})
    assert extractor(x)["map"].shape[1] == model.feature_info[-2]["num_chs"]


@pytest.mark.parametrize(
    ("name", "kind"), [("rep_repvgg_a0", "fx"), ("rep_repvgg_a0", "dict"), ("rep_mobileone_s0", "hook")]
)
def test_other_extractors_deploy_as_well(name, kind):
    model = timm.create_model(name, features_only=True, feature_cls=kind, out_indices=(1, 2), **SMALL[name])
    x = torch.randn(2, 3, 64, 48)
    calibrate_random_bn_(model, x)
    merged, report = rep_plugin.reparameterize(model, x)
    ours, theirs = (list(m.values()) if isinstance(m, dict) else m for m in (model(x), merged(x)))
    assert all(relative_error(a, b) < 1e-3 for a, b in zip(ours, theirs, strict=True)) and len(ours) == 2
    assert report.max_rel_error < 1e-9 and not any("branches" in key for key in merged.state_dict())


@pytest.mark.parametrize("name", ["rep_mobilenetv2_035", "bcnn_rep_mobilenetv2_100"])
def test_a_classifier_needs_a_pooling(name):
    model = meta(name, num_classes=0, global_pool="")
    for build in (lambda: meta(name, num_classes=5, global_pool=""), lambda: model.reset_classifier(5)):
        with pytest.raises(ValueError, match="without pooling there is no classifier: num_classes must be 0, got 5"):
            build()
    assert model.num_classes == 0
    model.reset_classifier(5, "bilinear" if name.startswith("bcnn") else "avg")
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 5)
