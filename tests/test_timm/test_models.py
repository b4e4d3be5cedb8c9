"""Our names under timm's own API."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

import rep_plugin
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

NAMES = [f"rep_mobilenetv2_{width}" for width in ("035", "050", "075", "100", "140")]


def test_names_are_listed():
    assert set(NAMES) <= set(timm.list_models("rep_mobilenetv2*"))


@pytest.mark.parametrize("name", NAMES)
def test_forward_features_head_and_backward(name):
    model = timm.create_model(name, num_classes=7, drop_rate=0.1)
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    assert y.shape == (2, 7)
    y.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", NAMES)
def test_timms_own_reparameterize_deploys_every_block(name):
    model = calibrate_random_bn_(timm.create_model(name), torch.randn(2, 3, 64, 64))
    merged = reparameterize_model(model)
    x = torch.randn(2, 3, 65, 65)
    assert not any("branches" in key for key in merged.state_dict())
    assert relative_error(model(x), merged(x)) < 1e-4
    ours, report = rep_plugin.reparameterize(model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), merged.state_dict().values()))
    assert report.max_rel_error < 1e-10


def test_classifier_can_be_read_and_replaced():
    model = timm.create_model("rep_mobilenetv2_035", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.num_classes == 3
    model.reset_classifier(4, "avgmax")
    assert model(x).shape == (1, 4)
    model.reset_classifier(0)
    assert model(x).shape == (1, 1280)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 1280, 2, 2)


def test_input_channels_and_pretrained_cfg():
    model = timm.create_model("rep_mobilenetv2_035", in_chans=1, num_classes=2).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and model.pretrained_cfg["classifier"] == "classifier"
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1


@pytest.mark.parametrize("indices", [None, (1, 3), (4,)])
def test_features_only(indices):
    extra = {} if indices is None else {"out_indices": indices}
    model = timm.create_model("rep_mobilenetv2_100", features_only=True, **extra).eval()
    maps = model(torch.randn(1, 3, 64, 64))
    chosen = indices or range(5)
    assert [y.shape[1] for y in maps] == [[16, 24, 32, 96, 320][i] for i in chosen] == model.feature_info.channels()
    assert [64 // y.shape[2] for y in maps] == [[2, 4, 8, 16, 32][i] for i in chosen] == model.feature_info.reduction()


def test_features_only_network_deploys():
    model = timm.create_model("rep_mobilenetv2_050", features_only=True)
    calibrate_random_bn_(model, torch.randn(2, 3, 64, 64))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 64, 64))
    assert report.max_rel_error < 1e-10 and not any("branches" in key for key in merged.state_dict())


def test_intermediates_are_the_stage_maps():
    model = timm.create_model("rep_mobilenetv2_035").eval()
    x = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(maps) == len(model.feature_info)
    assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], maps[1])
    with pytest.raises(ValueError, match="'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    model.prune_intermediate_layers([1])
    assert len(model.stages) == 2 and torch.equal(
        model.forward_intermediates(x, [1], intermediates_only=True)[0], maps[1]
    )


def test_gradient_checkpointing_gives_the_same_gradients():
    model = timm.create_model("rep_mobilenetv2_035", num_classes=2).eval()
    x, grads = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append(model.stem.branches["conv"].conv.weight.grad.clone())
    assert relative_error(*grads) < 1e-5


def test_channels_last_gives_the_same_output():
    model = calibrate_random_bn_(timm.create_model("rep_mobilenetv2_035"), torch.randn(2, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    assert relative_error(expected, model(x.contiguous(memory_format=torch.channels_last))) < 1e-4


def test_local_folder_holds_a_deployed_model(tmp_path):
    from timm.models import save_for_hf

    model = calibrate_random_bn_(timm.create_model("rep_mobilenetv2_035", num_classes=3), torch.randn(2, 3, 64, 64))
    merged, _ = rep_plugin.reparameterize(model)
    save_for_hf(merged, tmp_path, model_args={"deploy": True}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(merged(x), loaded(x))
