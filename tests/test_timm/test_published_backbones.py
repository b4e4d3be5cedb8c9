"""RepVGG, MobileOne and RepLKNet under timm's own API."""

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.utils.model import reparameterize_model

import rep_plugin
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.models import MODELS
from tests.helpers import relative_error

SMALL = {
    "rep_repvgg_a0": dict(arch=dict(depths=(1, 1, 2, 1), widths=(0.25,) * 4, se=True)),
    "rep_mobileone_s0": dict(arch=dict(widths=(0.25,) * 4, copies=2, depths=(1, 1, 2, 1))),
    "rep_replknet_31b": dict(arch=dict(channels=(8, 8, 16, 16), kernels=(13, 9, 7, 7), depths=(1, 1, 2, 1))),
}


def small(name: str, **options):
    return timm.create_model(name, **SMALL[name], **options)


def test_names_are_listed():
    archs = {
        "repvgg": ("a0", "a1", "a2", "b0", "b1", "b1g2", "b1g4", "b2", "b2g2", "b2g4", "b3", "b3g2", "b3g4", "d2se"),
        "mobileone": ("s0", "s1", "s2", "s3", "s4"),
        "replknet": ("31b", "31l", "xl"),
    }
    archs["mobilenetv2"] = ("035", "050", "075", "100", "140")
    wanted = [f"rep_{family}_{arch}" for family, names in archs.items() for arch in names]
    assert sorted(wanted) == sorted(MODELS) and set(wanted) <= set(timm.list_models("rep_*"))


def test_every_name_builds_its_own_arch():
    with torch.device("meta"):
        for name, (kind, arguments) in MODELS.items():
            model = timm.create_model(name, num_classes=5)
            assert type(model) is kind and arguments.get("arch") == getattr(model, "arch", None)
            assert model.get_classifier().out_features == 5
            first = model.pretrained_cfg["first_conv"]
            for conv in [first] if isinstance(first, str) else first:
                assert model.get_submodule(conv).in_channels == 3


@pytest.mark.parametrize("name", SMALL)
def test_forward_features_head_and_backward(name):
    model = small(name, num_classes=7, drop_rate=0.1, in_chans=1)
    x = torch.randn(2, 1, 64, 64)
    y = model(x)
    assert y.shape == (2, 7)
    y.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(3, "avgmax")
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape


@pytest.mark.parametrize(("ours", "theirs"), [("rep_repvgg_a0", "repvgg_a0"), ("rep_mobileone_s0", "mobileone_s0")])
def test_features_only_is_described_as_timms_own(ours, theirs):
    with torch.device("meta"):
        mine, other = (timm.create_model(name, features_only=True).feature_info for name in (ours, theirs))
    assert mine.channels() == other.channels() and mine.reduction() == other.reduction()


@pytest.mark.parametrize("name", SMALL)
def test_features_only_network_deploys(name):
    model = small(name, features_only=True)
    x = torch.randn(2, 3, 64, 64)
    calibrate_random_bn_(model, x)
    maps = model(x)
    assert [y.shape[1] for y in maps] == model.feature_info.channels()
    assert [64 // y.shape[2] for y in maps] == model.feature_info.reduction()
    merged, report = rep_plugin.reparameterize(model, x)
    assert report.max_rel_error < 1e-9 and not any("branches" in key for key in merged.state_dict())
    assert len(small(name, features_only=True, out_indices=(1, 3))(x)) == 2


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_are_the_stage_maps(name):
    model = calibrate_random_bn_(small(name), torch.randn(2, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(maps) == len(model.feature_info)
    features = small(name, features_only=True)
    flat = {key.replace(".", "_", 1): tensor for key, tensor in model.state_dict().items()}
    given = {key: flat.get(key, model.state_dict().get(key)) for key in features.state_dict()}
    features.load_state_dict(given)
    features.eval()
    assert all(torch.equal(a, b) for a, b in zip(features(x), maps, strict=True))
    normed = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0]
    assert torch.equal(normed, final)
    early, _ = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(early, maps[1])
    model.prune_intermediate_layers([1], prune_norm=True)
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], maps[1])
    assert torch.equal(model.forward_features(x), maps[1]) and not any("norms" in key for key in model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = small(name, num_classes=2).eval()
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*grads) if a.abs().max() > 1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_parameter_groups_go_from_the_stem_to_the_classifier(name):
    model = small(name)
    groups = list(group_parameters(model, model.group_matcher(), reverse=False).items())
    assert all(key.startswith("stem") for key in groups[0][1])
    order = [key for _, keys in groups for key in keys]
    seen = [key for key in order if key.startswith(("stem", "stages"))]
    stage_of = [0 if key.startswith("stem") else int(key.split(".")[1]) + 1 for key in seen]
    assert stage_of == sorted(stage_of) and len(order) == len(list(model.named_parameters()))
    assert {key for key in order[len(seen) :]} == {k for k, _ in model.named_parameters()} - set(seen)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=False)
    assert len(coarse) == 6  # stem, four stages, what comes after


@pytest.mark.parametrize("name", SMALL)
def test_timms_own_reparameterize_gives_what_ours_gives_and_a_local_folder_loads_it(name, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    model = calibrate_random_bn_(small(name, num_classes=3), x)
    merged, report = rep_plugin.reparameterize(model, x)
    theirs = reparameterize_model(model)
    assert all(
        torch.equal(a, b) for a, b in zip(merged.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    save_for_hf(merged, tmp_path, model_args={"deploy": True, **SMALL[name]}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(merged(x), loaded(x))
