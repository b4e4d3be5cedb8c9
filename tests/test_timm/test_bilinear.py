"""The timm names: published parameter counts, timm's methods, artefact folder, deployed form."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import rep_plugin.timm.bilinear as entries

NAMES = ("bcnn_vgg16_bn", "bcnn_resnet50", "bcnn_rep_mobilenetv2_100")
CHANNELS = {"bcnn_vgg16_bn": 512, "bcnn_resnet50": 2048, "bcnn_rep_mobilenetv2_100": 1280}
WIDTHS = {"bcnn_vgg16_bn": 512, "bcnn_resnet50": 512, "bcnn_rep_mobilenetv2_100": 256}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def create_on_meta(name, **options):
    """Counts need no memory for 67 million weights."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize(("classes", "published"), [(100, 40_937_636), (196, 66_103_556), (200, 67_152_136)])
def test_parameter_counts_are_the_published_ones(classes, published):
    assert count(create_on_meta("bcnn_vgg16_bn", num_classes=classes)) == published


def test_parameter_counts_add_up_for_the_projected_ones():
    resnet = count(create_on_meta("resnet50", num_classes=0))
    head = 2048 * 512 + 2 * 512 + 512 * 512 * 7 + 7
    assert count(create_on_meta("bcnn_resnet50", num_classes=7)) == resnet + head


@pytest.mark.parametrize("name", NAMES)
def test_timm_interface(name):
    model = timm.create_model(name, num_classes=3, in_chans=2, method="triu").eval()
    x = torch.randn(2, 2, 64, 64)
    features = model.forward_features(x)
    width = WIDTHS[name]
    assert features.shape[:2] == (2, model.num_features) == (2, CHANNELS[name])
    assert features.min() >= 0  # the map after the last activation
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, width * (width + 1) // 2)
    logits = model(x)
    assert torch.equal(logits, model.forward_head(features)) and logits.shape == (2, 3)
    assert torch.equal(logits, model.get_classifier()(pooled))
    assert (model(torch.randn(2, 2, 64, 64)) - logits).abs().max() > 0

    model.reset_classifier(5)
    assert model.get_classifier().out_features == model.num_classes == 5 and model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)

    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 448, 448) and cfg["classifier"] == "head.fc"
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["first_conv"]).in_channels == 2
    assert timm.data.resolve_model_data_config(model)["mean"] == cfg["mean"]


def test_vgg_map_has_no_fifth_pool():
    backbone = timm.create_model("bcnn_vgg16_bn", num_classes=0).backbone
    assert sum(isinstance(module, nn.MaxPool2d) for module in backbone.modules()) == 4
    assert backbone(torch.randn(1, 3, 32, 32))[-1].shape == (1, 512, 2, 2)


def test_defaults_are_full_pooling_and_200_classes():
    model = create_on_meta("bcnn_vgg16_bn")
    assert model.get_classifier().weight.shape == (200, 512 * 512)
    assert create_on_meta("bcnn_resnet50").get_classifier().weight.shape == (200, 512 * 512)
    assert create_on_meta("bcnn_rep_mobilenetv2_100").get_classifier().weight.shape == (200, 256 * 256)


def test_drop_rate_reaches_the_head():
    model = timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3, drop_rate=0.25)
    assert model.drop_rate == model.head.drop.p == 0.25


def test_parameter_groups_cover_every_parameter():
    model = create_on_meta("bcnn_rep_mobilenetv2_100", num_classes=3)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())


def test_timm_folds_the_head_as_well():
    """timm's own function finds switch_to_deploy; the deployed network is built directly and loads strictly."""
    torch.manual_seed(0)
    model = timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3, projection=32).double().eval()
    nn.init.normal_(model.get_classifier().weight)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    deployed = timm.utils.reparameterize_model(model)
    assert deployed.get_classifier().in_features == deployed.head_hidden_size == 32 * 33 // 2
    assert expected.std() > 1e-3
    assert (deployed(x) - expected).abs().max() < 1e-9 * expected.abs().max()
    direct = timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3, projection=32, deploy=True).double().eval()
    direct.load_state_dict(deployed.state_dict(), strict=True)
    assert torch.equal(direct(x), deployed(x))


def test_a_local_folder_is_an_artefact(tmp_path):
    options = dict(method="tensor_sketch", dim=64, projection=16)
    model = timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3, deploy=True, **options).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = dict(
        architecture="bcnn_rep_mobilenetv2_100", num_classes=3, model_args=dict(deploy=True, **options),
        pretrained_cfg=dict(num_classes=3, classifier="head.fc", first_conv="backbone.stem.reparam_conv"),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(7)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(features_only=True), "features_only"),
        (dict(global_pool="avg"), "global_pool must be one of '', bilinear, got 'avg'"),
        (dict(pretrained_backbone=True), "no pretrained backbone"),
        (dict(method="low_rank", projection=8, rank=9), "got 9"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3, **options)


def test_pretrained_weights_that_do_not_exist_are_refused():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("bcnn_rep_mobilenetv2_100", num_classes=3, pretrained=True)


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match="backbone must be one of rep_mobilenetv2_100, resnet50, vgg16_bn, got 'vit'"):
        entries.BilinearCNN("vit")


def test_gradient_checkpointing_is_told_where_there_is_none():
    model = create_on_meta("bcnn_rep_mobilenetv2_100", num_classes=3)
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match="RepMobileNetV2"):
        model.set_grad_checkpointing()
    create_on_meta("bcnn_vgg16_bn", num_classes=3).set_grad_checkpointing()
