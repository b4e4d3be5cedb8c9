"""Any model as a folder; what cannot be saved or loaded is refused in a line, and nothing is changed."""

import copy
import json

import pytest
import timm
import torch
import torchvision
from torch import nn

import rep_plugin
from rep_plugin.errors import ArgumentError, CheckpointMismatchError, UnreadableCheckpointError
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(width: int = 8, classes: int = 5) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return net.extend([nn.Flatten(), nn.Linear(width, classes)])


@pytest.fixture
def folder(tmp_path):
    model, _ = rep_plugin.expand(calibrate_random_bn_(build().eval(), X), "acb")
    rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, X, "random", 0.4))
    rep_plugin.save(model, tmp_path / "net")
    torch.save(model(X).detach(), tmp_path / "y.pt")
    return tmp_path / "net"


def test_a_model_of_the_users_own(folder):
    fresh = build()
    loaded = rep_plugin.load(folder, fresh)
    assert loaded is fresh and loaded.training
    assert torch.equal(loaded.eval()(X), torch.load(folder.parent / "y.pt"))
    loaded = rep_plugin.load(folder, build(classes=7))  # the classifier before the first step was another one
    assert torch.equal(loaded.eval()(X), torch.load(folder.parent / "y.pt"))


def test_what_does_not_fit(folder):
    for wrong in (build(width=12), torchvision.models.resnet18()):
        before = copy.deepcopy(wrong.state_dict())
        with pytest.raises(CheckpointMismatchError, match="does not fit this .* built as the saved one") as caught:
            rep_plugin.load(folder, wrong)
        assert "\n" not in str(caught.value) and before.keys() == wrong.state_dict().keys()
        assert all(torch.equal(value, before[key]) for key, value in wrong.state_dict().items())
    with pytest.raises(ArgumentError, match="Sequential, which is not built by name: rep_plugin.load"):
        rep_plugin.load(folder)
    with pytest.raises(ArgumentError, match="holds a model that timm does not build: rep_plugin.load"):
        timm.create_model(f"local-dir:{folder}")
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        rep_plugin.load(folder / "none")
    (folder / "config.json").write_text("{")
    with pytest.raises(UnreadableCheckpointError, match="config.json is not JSON"):
        rep_plugin.load(folder, build())


@pytest.mark.parametrize("entry", [{"architecture": 1.5}, {"architecture": "resnet18"}, {"pretrained_cfg": [1]}])
def test_a_config_with_other_entries_than_those_written(entry, folder):
    path, [(key, value)] = folder / "config.json", entry.items()
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    for model in (None, build()):
        with pytest.raises(UnreadableCheckpointError, match=f"config.json: {key} is ") as caught:
            rep_plugin.load(folder, model)
        assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_on_a_part_and_doubles(tmp_path):
    model = build().double().eval()
    model = nn.Sequential(model[:2], model[2:5], model[5])
    model[0], _ = rep_plugin.expand(model[0], "repvgg")
    rep_plugin.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["history"][0]["part"] == "0"
    fresh = build()
    loaded = rep_plugin.load(tmp_path, nn.Sequential(fresh[:2], fresh[2:5], fresh[5])).eval()
    assert torch.equal(loaded(X.double()), model(X.double()))


def test_an_ema_copy_is_saved_too(tmp_path):
    model = build().eval()
    ema = copy.deepcopy(model)
    rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, X, "random", 0.4), ema=ema)
    rep_plugin.save(ema, tmp_path)
    assert torch.equal(rep_plugin.load(tmp_path, build()).eval()(X), ema(X))


def test_timm_arguments_that_json_does_not_hold(tmp_path):
    def fresh():
        return timm.create_model("test_resnet", num_classes=3, act_layer=nn.SiLU)

    model, _ = rep_plugin.expand(fresh().eval(), "acb")
    rep_plugin.save(model, tmp_path)
    assert torch.equal(rep_plugin.load(tmp_path, fresh()).eval()(X), model(X))
    with pytest.raises(ArgumentError, match="not built by name .the argument act_layer=.* cannot be written as JSON"):
        rep_plugin.load(tmp_path)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_convnext"])
def test_features_of_a_pruned_timm_model(name, tmp_path):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1).eval()
    size = model.pretrained_cfg["input_size"] if "convnext" in name else (3, 64, 64)
    x = torch.randn(2, *size)
    rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, x, "l1", 0.3), verify=False)
    rep_plugin.save(model, tmp_path)
    features = timm.create_model(f"local-dir:{tmp_path}", features_only=True).eval()
    maps = features(x)
    assert features.feature_info.channels() == [y.shape[1] for y in maps]
    assert [entry["num_chs"] for entry in model.feature_info] == features.feature_info.channels()
    assert model.num_features == model.forward_features(x).shape[1]
    known = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(y, z) for y, z in zip(maps, known, strict=True))
    rep_plugin.save(features, tmp_path / "features")
    assert all(torch.equal(y, z) for y, z in zip(rep_plugin.load(tmp_path / "features").eval()(x), maps, strict=True))


def test_arguments_by_name(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, X, "l1", 0.3), verify=False)
    rep_plugin.save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", drop_path_rate=0.2, drop_rate=0.1, global_pool="max")
    assert loaded.drop_rate == 0.1 and loaded.global_pool.pool_type == "max"
    assert any(getattr(module, "drop_prob", 0) for module in loaded.modules())
    assert torch.equal(loaded.fc.weight, model.fc.weight)


class Small(nn.Module):
    def __init__(self, inputs=3, classes=4, act=nn.ReLU, last=None):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(inputs, 16, 3), nn.BatchNorm2d(16), act()
        self.map, self.last, self.fc = nn.Conv2d(16, classes, 1), last or nn.Identity(), nn.Linear(classes, 5)

    def forward(self, x):
        return self.fc(self.last(self.map(self.act(self.bn(self.conv(x))))).mean((2, 3)))


@pytest.mark.parametrize("other", [dict(inputs=4), dict(classes=6), dict(act=nn.SiLU), dict(last=nn.Sigmoid())])
def test_a_fresh_model_that_computes_something_else_is_refused(tmp_path, other):
    model = Small().eval()
    rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, torch.randn(2, 3, 8, 8), "l1", 0.4))
    rep_plugin.save(model, tmp_path)
    fresh = Small(**other)
    with pytest.raises(CheckpointMismatchError, match="does not fit this Small"):
        rep_plugin.load(tmp_path, fresh)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in Small(**other).modules()]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(rep_plugin.load(tmp_path, Small()).eval()(x), model(x))


def test_a_model_that_takes_one_size_alone(tmp_path):
    """What was done is repeated without running the model: nothing says which inputs it takes."""

    def build():
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 5 * 7, 3)
        )

    x = torch.randn(2, 2, 7, 9)
    for step in ("merge", "expand"):
        model = calibrate_random_bn_(build().eval(), x)
        if step == "expand":
            model, _ = rep_plugin.expand(model, "acb", example_input=x)
        model, _ = rep_plugin.reparameterize(model, x, merge_linear=True)
        rep_plugin.save(model, tmp_path / step)
        assert torch.equal(rep_plugin.load(tmp_path / step, build()).eval()(x), model(x))


def changed_eps(net):
    net.bn.eps = 0.1
    return net


def clamped(net):
    net.map.register_forward_hook(lambda module, args, output: output.clamp(max=1))
    return net


def own_forward(net):
    net.bn.forward = lambda x: x
    return net


class Scaled(Small):
    """Another function, by what no layer and no weight tells."""

    def forward(self, x):
        return super().forward(x) * 1.01


@pytest.mark.parametrize(
    ("saved", "fresh", "message"),
    [
        (lambda: changed_eps(Small()), Small, "'bn' was BatchNorm2d.16, eps=1e-05. and is BatchNorm2d.16, eps=0.1."),
        (Small, lambda: changed_eps(Small()), "'bn' was BatchNorm2d.16, eps=0.1. and is BatchNorm2d.16, eps=1e-05."),
        (lambda: clamped(Small()), Small, "'map' .Conv2d.: in the saved one it has a forward hook"),
        (Small, lambda: clamped(Small()), "'map' .Conv2d. computes something else than the saved one did"),
        (lambda: own_forward(Small()), Small, "'bn' .BatchNorm2d.: in the saved one it has a forward of its own"),
        (Small, Scaled, "the model .Scaled. computes something else than the saved one did"),
    ],
)
def test_a_builder_that_gives_another_function_is_refused(saved, fresh, message, tmp_path):
    model = calibrate_random_bn_(saved(), X)
    rep_plugin.save(model, tmp_path)
    assert torch.equal(rep_plugin.load(tmp_path, saved()).eval()(X), model(X))
    given = fresh()
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(CheckpointMismatchError, match=message):
        rep_plugin.load(tmp_path, given)
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())


def test_a_folder_without_a_fingerprint_still_loads(folder):
    """As those written before there was one."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("fingerprint")["outputs"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = rep_plugin.load(folder, build())
    assert torch.equal(loaded.eval()(X), torch.load(folder.parent / "y.pt"))
