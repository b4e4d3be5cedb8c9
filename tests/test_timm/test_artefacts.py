"""Folders that ``timm.create_model('local-dir:FOLDER')`` loads: bit-exact, in any order of steps, or refused in a line."""

import copy
import json
import resource
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rep_plugin
from rep_plugin import apply_plan, plan_pruning, reparameterize
from rep_plugin.errors import ArgumentError, CheckpointMismatchError, EquivalenceError
from rep_plugin.history import history_of
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.artefacts import save_timm

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def made(name="test_resnet", **options):
    model = timm.create_model(name, num_classes=options.pop("num_classes", 5), **options).eval()
    return calibrate_random_bn_(model, torch.randn(4, 3, 32, 32))


def prune(model, fraction=0.3):
    apply_plan(model.eval(), plan_pruning(model, X, "random", fraction), verify=False)
    return model


def merge(model):
    return reparameterize(model.eval(), X, verify=False)[0]


def load(folder, **options):
    return timm.create_model(f"local-dir:{folder}", **options).eval()


def reload(model, folder, **options):
    save_timm(model, folder)
    return load(folder, **options)


@torch.no_grad()
def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    states = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    return states and torch.equal(one(X), other(X))


@pytest.mark.parametrize(
    ("name", "steps"), [("rep_mobilenetv2_035", "pmp"), ("repvgg_a0", "mpp"), ("repvgg_a0", "ppm")]
)
def test_any_order_comes_back_bit_exact(name, steps, tmp_path):
    model = made(name)
    for step in steps:
        model = merge(model) if step == "m" else prune(model, 0.2)
        loaded = reload(model, tmp_path)
        assert same(model, loaded) and json.dumps(history_of(loaded)) == json.dumps(history_of(model))
        model = loaded  # the next step is done to what was loaded
    assert [step["step"][0] for step in history_of(model)] == [{"p": "p", "m": "r"}[step] for step in steps]
    assert model.pretrained_cfg["architecture"] == name and not list(tmp_path.glob("*.new"))


def test_the_folder_loads_in_a_process_of_its_own(tmp_path):
    model = prune(made(pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), crop_pct=0.9)))
    save_timm(model, tmp_path)
    torch.save((X, model(X).detach()), tmp_path / "x.pt")
    code = f"""
import timm, torch, rep_plugin
model = timm.create_model("local-dir:{tmp_path}").eval()
x, y = torch.load("{tmp_path}/x.pt")
data = timm.data.resolve_model_data_config(model)
print(torch.equal(model(x), y), data["mean"], data["crop_pct"])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True (0.1, 0.2, 0.3) 0.9", done.stderr


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = prune(made()).train()
    state, history = copy.deepcopy(model.state_dict()), history_of(model)
    save_timm(model, tmp_path)
    assert model.training and history_of(model) == history
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_other_classes(name, tmp_path):
    """A fresh classifier, which may be saved, pruned and replaced again."""
    model = prune(made(name))
    other = reload(model, tmp_path, num_classes=9)
    assert other(X).shape == (2, 9) and other.num_classes == other.get_classifier().out_features == 9
    assert same(other, reload(other, tmp_path))
    prune(other)
    again = reload(other, tmp_path, num_classes=4)
    assert again(X).shape == (2, 4) and same(again, reload(again, tmp_path))
    features = load(tmp_path, num_classes=0)
    assert isinstance(features.get_classifier(), nn.Identity) and same(features, reload(features, tmp_path))
    with pytest.raises(ValueError, match=r"num_classes \(=3\) needs a linear classifier, the model has Identity"):
        load(tmp_path, num_classes=3)


def test_classifiers_that_timm_replaced(tmp_path):
    model = made(num_classes=7)
    model.reset_classifier(6)  # before the first step
    prune(model)
    assert same(model, reload(model, tmp_path))
    model.reset_classifier(3)  # behind it
    assert same(model, reload(model, tmp_path))


def test_arguments_that_timms_scripts_give(tmp_path):
    model = prune(made("test_efficientnet"))
    loaded = reload(model, tmp_path, in_chans=3, drop_rate=0.25)
    assert loaded.drop_rate == 0.25 and same(model, loaded)
    assert not torch.equal(load(tmp_path, weights=False).state_dict()["conv_stem.weight"], model.conv_stem.weight)
    with pytest.raises(ValueError, match="in_chans must be what the model in .* has, 3, got 1"):
        load(tmp_path, in_chans=1)


def changed_depth(model):
    model.layer1 = model.layer1[:0]


CHANGED = "the model was changed by hand after 'prune', which cannot be repeated: "


def changed_activation(model):
    model.act1 = nn.SiLU()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_depth, CHANGED + "'layer1.0.conv1' was Conv2d.* and is not there; make the change when"),
        (changed_activation, CHANGED + r"'act1' was ReLU\(\) and is SiLU\(\); make the change when"),
        (
            lambda model: setattr(model, "rep_history", []),
            "ResNet is not what its history makes of 'test_resnet': .* of another shape .first: conv1.0.weight",
        ),
    ],
)
def test_changes_that_the_history_does_not_tell_are_refused(change, message, tmp_path):
    model = prune(made())
    save_timm(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises((ArgumentError, CheckpointMismatchError), match=message):
        save_timm(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_models_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="Sequential was not made by timm.create_model.*use rep_plugin.save"):
        save_timm(nn.Sequential(nn.Linear(2, 2)), tmp_path / "none")
    with pytest.raises(ValueError, match="the argument act_layer=.* cannot be written as JSON"):
        save_timm(prune(made(act_layer=nn.SiLU)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_full_disk_leaves_both_old_files(tmp_path):
    """The weights fit, the config does not: neither is replaced."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("old")
    code = f"""
import json, resource, signal, timm, rep_plugin
from rep_plugin.timm import artefacts
model = timm.create_model("test_resnet", num_classes=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
artefacts.write_folder.__globals__["safetensors"].save = lambda state: b"weights"
try:
    artefacts.save_timm(model, {str(tmp_path)!r})
except OSError as error:
    print("OSError", error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("OSError") and "config.json" in done.stdout, done.stderr
    names = ("config.json", "model.safetensors")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "old")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet")
    save_timm(prune(made()), path)
    return path


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        config["model_args"][name] = value
    (path / "config.json").write_text(json.dumps(config))


def other_weights(path):
    state = load_file(path / "model.safetensors")
    del state["fc.bias"]
    save_file(state, path / "model.safetensors")


BROKEN = {
    "no such file or dir|does not exist|not found": lambda path: (path / "config.json").unlink(),
    "model.safetensors does not exist": lambda path: (path / "model.safetensors").unlink(),
    "model.safetensors is not readable": lambda path: (path / "model.safetensors").write_bytes(b"junk"),
    "does not fit ResNet: 1 missing .first: fc.bias.": other_weights,
    "timm does not build: rep_plugin.load": lambda path: edit_config(path, base=""),
    "must be the name of a network of timm, got .nonsense.": lambda path: edit_config(path, base="nonsense"),
    "of another shape": lambda path: edit_config(path, history=[]),
    "has no layer": lambda path: edit_config(path, base="vgg11_bn"),
    "unknown step 'fold'": lambda path: edit_config(path, history=[{"step": "fold"}]),
    "missing or unknown .'plan'.": lambda path: edit_config(path, history=[{"step": "prune"}]),
    "a history must be a list of steps, got dict": lambda path: edit_config(path, history={"step": "prune"}),
    "unexpected keyword argument 'depth'": lambda path: edit_config(path, depth=3),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folders_are_refused_in_one_line(message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    BROKEN[message](tmp_path / "broken")
    with pytest.raises((ValueError, RuntimeError, OSError, TypeError), match=f"(?i){message}") as caught:
        load(tmp_path / "broken")
    assert "\n" not in str(caught.value)


def test_without_a_folder():
    for name in ("rep_plugin_rebuilt", "rep_rebuilt"):
        for pretrained in (False, True):
            with pytest.raises(ValueError, match="'rep_plugin_rebuilt' is loaded from a folder"):
                timm.create_model(name, pretrained=pretrained)


def clamp(module, args, output):
    return output.clamp(max=50)


def other_blocks(model):
    model.blocks[0][0].bn1.eps = 0.1  # a BN with its activation, whose parts are layers


HIDDEN = {
    r"'blocks.0.0.bn1' \(BatchNormAct2d\).*: eps is 0.1, in its place 1e-05": other_blocks,
    "'conv_stem' .*: it has a forward hook .clamp.": lambda model: model.conv_stem.register_forward_hook(clamp),
    "'bn1' .*: it has a forward of its own": lambda model: setattr(model.bn1, "forward", lambda x: x.clamp(-9, 9)),
}


@pytest.mark.parametrize("message", HIDDEN)
@pytest.mark.parametrize("step", [lambda model: model, lambda model: prune(model, 0.2)])
def test_what_a_reload_would_lose_is_refused(message, step, tmp_path):
    model = step(made("test_efficientnet"))
    HIDDEN[message](model)
    with pytest.raises(EquivalenceError, match=message):
        save_timm(model, tmp_path)
    with pytest.raises(EquivalenceError, match=message):
        rep_plugin.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
