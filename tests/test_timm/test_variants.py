"""timm's networks with blocks plugged in, under timm's own API."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import rep_plugin
from rep_plugin.blocks.conv_like import ACBConv2d, ConvLike, DBBConv2d
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.variants import NAMES
from tests.helpers import relative_error

X = torch.randn(4, 3, 48, 40, generator=torch.Generator().manual_seed(1))
SMALL = "dbb_mobilenetv2_100"


def test_names_are_listed():
    assert set(NAMES) == set(timm.list_models(["dbb_*", "acb_*"])) and len(NAMES) == 8


@pytest.mark.parametrize("name", ["acb_resnet18", "acb_mobilenetv1_100", SMALL])
def test_merged_weights_load_into_deploy_and_into_timms_own_network(name):
    block, stock = name.split("_", 1)
    model = calibrate_random_bn_(timm.create_model(name, num_classes=7), X)
    blocks = [m for m in model.modules() if isinstance(m, ConvLike)]
    assert all(isinstance(b, {"dbb": DBBConv2d, "acb": ACBConv2d}[block]) and b.kernel_size == (3, 3) for b in blocks)
    assert all((chain.last_bn().weight != 0).all() for b in blocks for chain in b.branches.values())
    assert not any(
        type(m) is nn.Conv2d and m.kernel_size == (3, 3) for n, m in model.named_modules() if "branches" not in n
    )
    for fold_bn, target in (
        (True, timm.create_model(name, num_classes=7, deploy=True)),
        (False, timm.create_model(stock)),
    ):
        if not fold_bn:
            target.reset_classifier(7)
        merged, report = rep_plugin.reparameterize(model, X[:2], fold_bn=fold_bn)
        assert report.max_rel_error < 1e-9 and target.training
        target.load_state_dict(merged.state_dict(), strict=True)
        with torch.no_grad():
            assert relative_error(model(X), target.eval()(X)) < 5e-3  # float32, channels of variance 0
            assert relative_error(merged(X), target(X)) < 1e-6


@pytest.mark.parametrize("name", ["dbb_resnet18", "acb_mobilenetv1_100", SMALL])
def test_timms_contract(name):
    model, stock = timm.create_model(name, num_classes=5, in_chans=1), timm.create_model(name.split("_", 1)[1])
    x = X[:2, :1]
    model(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    assert model(x).shape == (2, 5) and model.num_features == stock.num_features
    final, maps = model.forward_intermediates(x)
    assert torch.equal(model.forward_head(final), model(x)) and len(maps) == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, stock.head_hidden_size)
    first = model.pretrained_cfg["first_conv"]
    for conv in [first] if isinstance(first, str) else first:
        assert f"{conv}.weight" in model.state_dict() and model.get_submodule(conv).in_channels == 1
    assert model.pretrained_cfg["classifier"] == stock.pretrained_cfg["classifier"]


@pytest.mark.parametrize("name, indices", [("acb_resnet18", (1, 3)), (SMALL, (0, 1, 2, 3, 4))])
def test_features_only_are_the_stock_networks(name, indices):
    build = {"features_only": True, "out_indices": indices}
    model, stock = timm.create_model(name, **build), timm.create_model(name.split("_", 1)[1], **build)
    assert model.feature_info.channels() == stock.feature_info.channels()
    assert model.feature_info.reduction() == stock.feature_info.reduction()
    calibrate_random_bn_(model, X)
    merged, report = rep_plugin.reparameterize(model, X[:2])
    deployed = timm.create_model(name, deploy=True, **build).eval()
    deployed.load_state_dict(merged.state_dict(), strict=True)
    assert [m.shape for m in deployed(X)] == [m.shape for m in stock(X)] and report.max_rel_error < 1e-9


def test_a_folder_holds_the_deployed_network(tmp_path):
    model = calibrate_random_bn_(timm.create_model(SMALL, num_classes=3), X)
    merged, _ = rep_plugin.reparameterize(model, X[:2], verify=False)
    data = {"input_size": [3, 48, 40], "first_conv": "conv_stem.branches.conv.conv", "classifier": "classifier"}
    cfg = {"architecture": SMALL, "num_classes": 3, "model_args": {"deploy": True}, "pretrained_cfg": data}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    torch.save(merged.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert relative_error(merged(X), loaded(X)) < 1e-6 and loaded.pretrained_cfg["first_conv"] == "conv_stem"


@pytest.mark.parametrize("name", ["dbb_resnet18", "acb_mobilenetv1_100"])
def test_online_form_trains_and_becomes_timms_own_network(name):
    stock = timm.create_model(name.split("_", 1)[1], num_classes=7)
    options = {"zero_init_last": False} if "resnet" in name else {}  # a gamma of 0 would keep gradients from branches
    model = timm.create_model(name, num_classes=7, online=True, **options)
    plain = timm.create_model(name, num_classes=7)
    blocks = [m for m in model.modules() if isinstance(m, ConvLike)]
    assert len(blocks) == sum(isinstance(m, ConvLike) for m in plain.modules()) > 0
    assert all(block.online and not hasattr(block, "post_bn") for block in blocks)  # the network's BN follows
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nn.functional.cross_entropy(model(X), torch.arange(4)).backward()
    optimizer.step()
    assert all((p != before[key]).any() for key, p in model.named_parameters() if "conv" in key and p.dim() == 4)
    calibrate_random_bn_(model, X)
    merged, report = rep_plugin.reparameterize(model, X, fold_bn=False)
    assert report.max_rel_error < 1e-9 and merged.state_dict().keys() == stock.state_dict().keys()
    deployed, report = rep_plugin.reparameterize(model, X)
    timm.create_model(name, num_classes=7, deploy=True).load_state_dict(deployed.state_dict())
    assert report.max_rel_error < 1e-9


def test_typos_are_refused():
    with pytest.raises(TypeError, match="nun_classes"):
        timm.create_model("dbb_resnet18", nun_classes=3)


def test_importing_draws_no_random_numbers():
    code = (
        "import torch, timm; torch.manual_seed(0); expected = torch.rand(3); torch.manual_seed(0); import rep_plugin; "
        "assert torch.equal(torch.rand(3), expected)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
