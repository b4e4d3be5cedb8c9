"""``rep_plugin.Pruned`` and ``rep_plugin.Merged`` in a config, as stock mmpretrain builds and loads them."""

import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from mmpretrain.apis import init_model
from torch import nn

from rep_plugin import apply_plan, plan_pruning, reparameterize
from rep_plugin.blocks.annealed import set_alpha_
from rep_plugin.errors import CheckpointMismatchError, EquivalenceError
from rep_plugin.history import history_of
from rep_plugin.openmmlab.artefacts import write_deployed, write_pruned
from rep_plugin.openmmlab.configs import pruned_config
from rep_plugin.openmmlab.load import build_model, load_model
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ARCH = dict(
    num_blocks=[1, 1, 2, 1], width_factor=[0.25, 0.25, 0.25, 0.25], group_layer_map=None, se_cfg=None, stem_channels=16
)


def config(backbone=None, channels=128):
    backbone = backbone or dict(type="RepVGG", arch=ARCH)
    return Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                backbone=backbone,
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=3, in_channels=channels),
            ),
            data_preprocessor=dict(mean=[1.0] * 3, std=[2.0] * 3, num_classes=3),
            custom_hooks=[dict(type="EMAHook"), dict(type="rep_plugin.LinearizeHook", end=1)],
            load_from="somewhere.pth",
        )
    )


def ours(**options):
    return config(dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, **options), 1280)


def trained(cfg):
    return calibrate_random_bn_(build_model(cfg), torch.randn(4, 3, 32, 32))


def prune(model, fraction=0.3):
    plan = plan_pruning(model, X, "random", fraction)
    apply_plan(model, plan, verify=False)
    return plan


def stock(cfg, model, folder):
    """Written, and loaded by mmpretrain's own function."""
    cfg.dump(folder / "model.py")
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / "model.pth")
    loaded = init_model(str(folder / "model.py"), str(folder / "model.pth"), device="cpu")
    loaded.eval()
    return loaded


@torch.no_grad()
def same(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    states = first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    return states and torch.equal(one(X), other(X))


FORMS = {
    "text": lambda plan, path: plan.to_json(),
    "data": lambda plan, path: json.loads(plan.to_json()),
    "path": lambda plan, path: (plan.to_json(path / "plan.json"), str(path / "plan.json"))[1],
    "list": lambda plan, path: [plan.to_json()],
}


@pytest.mark.parametrize("form", FORMS)
def test_stock_init_model_loads_plans_in_every_form(form, tmp_path):
    cfg = config()
    model = trained(cfg)
    keys = set(model.state_dict())
    plan = prune(model)
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=FORMS[form](plan, tmp_path))
    loaded = stock(cfg, model, tmp_path)
    assert same(model, loaded) and set(loaded.state_dict()) == keys
    assert type(loaded).__name__ == "ImageClassifier" and loaded.data_preprocessor.mean.flatten().tolist() == [1.0] * 3
    assert json.loads(json.dumps(history_of(loaded))) == [{"step": "prune", "plan": json.loads(plan.to_json())}]


@pytest.mark.parametrize("cfg", [config(), ours()], ids=["mmpretrain", "ours"])
def test_steps_nest_in_any_order(cfg, tmp_path):
    model = trained(cfg)
    for step in "ppmp":
        if step == "m":
            model, _ = reparameterize(model, X, fold_bn=False, verify=False)
            cfg.model = dict(type="rep_plugin.Merged", model=cfg.model)
        else:
            cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=prune(model, 0.2).to_json())
    loaded = stock(cfg, model, tmp_path)
    assert same(model, loaded)
    assert [step["step"] for step in history_of(loaded)] == ["prune", "prune", "reparameterize", "prune"]
    assert loaded.data_preprocessor.mean.flatten().tolist() == [1.0] * 3


def test_two_plans_in_a_list(tmp_path):
    cfg = config()
    model = trained(cfg)
    plans = [prune(model, 0.2).to_json(), prune(model, 0.2).to_json()]
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=plans)
    assert same(model, stock(cfg, model, tmp_path))


def pruned_cfg():
    cfg = config()
    model = trained(cfg)
    plan = prune(model)
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=plan.to_json())
    return cfg, model, plan


def test_checkpoints_that_do_not_fit_are_refused_whole(tmp_path):
    cfg, model, _ = pruned_cfg()
    full = build_model(config())
    torch.save({"state_dict": full.state_dict()}, tmp_path / "full.pth")
    cfg.dump(tmp_path / "model.py")
    with pytest.raises(CheckpointMismatchError, match="does not fit ImageClassifier: .* of another shape") as caught:
        init_model(str(tmp_path / "model.py"), str(tmp_path / "full.pth"), device="cpu")
    assert "\n" not in str(caught.value)
    built = build_model(cfg)
    state = copy.deepcopy(built.state_dict())
    del (headless := model.state_dict())["head.fc.bias"]
    torch.save({"state_dict": headless}, tmp_path / "headless.pth")
    with pytest.raises(CheckpointMismatchError, match="1 missing .first: head.fc.bias."):
        load_checkpoint(built, str(tmp_path / "headless.pth"))
    assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())


def test_pretrained_weights_of_the_stock_model_are_not_looked_for(tmp_path):
    """Theirs are the shapes of before, and the file may be gone."""
    cfg, model, _ = pruned_cfg()
    cfg.model.model.init_cfg = dict(type="Pretrained", checkpoint="gone.pth")
    both = [dict(type="Kaiming", layer="Conv2d"), dict(type="Pretrained", checkpoint="gone.pth")]
    cfg.model.model.backbone.init_cfg = both
    cfg.model.model.pretrained = "gone.pth"
    before = copy.deepcopy(cfg.model)
    loaded = stock(cfg, model, tmp_path)
    loaded.init_weights()
    assert cfg.model == before and not torch.equal(
        loaded.state_dict()["head.fc.weight"], model.state_dict()["head.fc.weight"]
    )


def test_an_expanded_model_is_built_without_the_weights_it_was_expanded_from(tmp_path):
    cfg = config(dict(type="VGG", depth=11, norm_cfg=dict(type="BN"), num_classes=-1), 512)
    cfg.model = dict(type="rep_plugin.Expanded", model=cfg.model, block="acb", where="*.1?.conv")
    model = trained(cfg)
    cfg.model.checkpoint = "gone.pth"
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=prune(model).to_json())
    assert same(model, stock(cfg, model, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(plan="{"), "source, a plan as text, is not JSON"),
        (dict(plan=3), "plan must be a PrunePlan, its data, JSON text or a path, or a list of these, got 3"),
        (dict(plan=["{}", 3]), r"plan\[1\] must be a PrunePlan or a dict or a string, got 3"),
        (dict(plan="none.json"), "none.json"),
        (dict(plan={"kept": {}}), "is not a pruning plan"),
        (dict(model="resnet"), "model must be a config with a type, got 'resnet'"),
        (dict(model=dict(backbone={})), "model must be a config with a type, got .'backbone'"),
        (dict(pretrained="x.pth"), r"pretrained must be None .it belongs into the inner model's config., got 'x.pth'"),
        (dict(model=ours().model), "the plan is for another model"),
        (dict(plans=[]), "Pruned takes no 'plans', did you mean 'plan'"),
    ],
)
def test_bad_configs_are_refused_in_one_line(change, message):
    cfg, _, _ = pruned_cfg()
    cfg.model = dict(cfg.model) | change
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message) as caught:
        build_model(cfg)
    assert "\n" not in str(caught.value)


def test_write_pruned(tmp_path):
    cfg = config()
    model = trained(cfg)
    model.train()
    state, plan = copy.deepcopy(model.state_dict()), plan_pruning(model, X, "l1", 0.4)
    report = write_pruned(model, cfg, plan, tmp_path, X, {"classes": ("a", "b", "c")})
    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    names = {"pruned.pth", "pruned.py", "pruned.plan.json", "pruned.json", "pruned.html", "pruned.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    written = Config.fromfile(tmp_path / "pruned.py")
    assert written.load_from == str(tmp_path / "pruned.pth") and written.custom_hooks == [dict(type="EMAHook")]
    assert cfg.model.type == "ImageClassifier" and cfg.load_from == "somewhere.pth"
    loaded, meta = load_model(written, tmp_path / "pruned.pth")
    again = init_model(str(tmp_path / "pruned.py"), str(tmp_path / "pruned.pth"), device="cpu")
    again.eval()
    model.eval()
    apply_plan(model, plan, verify=False)
    assert same(model, loaded) and same(model, again) and meta["dataset_meta"] == {"classes": ["a", "b", "c"]}
    assert json.loads((tmp_path / "pruned.json").read_text())["params_after"] == report.params_after

    deployed = write_deployed(loaded, written, tmp_path / "deployed", X)
    assert deployed.max_rel_error < 1e-9
    final = init_model(str(tmp_path / "deployed/deploy.py"), str(tmp_path / "deployed/deploy.pth"), device="cpu")
    final.eval()
    assert (final(X) - loaded(X)).abs().max() < 1e-4 * loaded(X).abs().max()


def test_a_plan_for_another_model_leaves_old_files(tmp_path):
    (tmp_path / "pruned.pth").write_text("old")
    model = trained(config())
    plan = plan_pruning(build_model(ours()), X, "l1", 0.4)
    with pytest.raises(ValueError, match="the plan is for another model"):
        write_pruned(model, config(), plan, tmp_path, X)
    plan = plan_pruning(model, X, "l1", 0.4)
    with pytest.raises((EquivalenceError, CheckpointMismatchError, ValueError)):
        write_pruned(model, ours(), plan, tmp_path, X)  # the config builds another network
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("pruned.pth", "old")]


@pytest.mark.parametrize("alpha", [0, 1])
def test_an_anneal_that_is_not_over_goes_on(alpha, tmp_path):
    """LinearizeHook leaves the config where its work is done, and stays where the blocks could not be merged without."""
    cfg = ours(anneal=True)
    model = trained(cfg)
    set_alpha_(model, alpha)
    write_pruned(model, cfg, plan_pruning(model, X, "bn_gamma", 0.3), tmp_path, X)
    hooks = [hook.type for hook in Config.fromfile(tmp_path / "pruned.py").custom_hooks]
    assert hooks == ["EMAHook"] + ["rep_plugin.LinearizeHook"] * (1 - alpha)


def test_pruned_config_is_a_file_that_stock_mmengine_reads(tmp_path):
    cfg, model, plan = config(), None, None
    model = trained(cfg)
    plan = plan_pruning(model, X, "l1", 0.4)
    (tmp_path / "a.py").write_text(pruned_config(cfg, plan).pretty_text)
    read = Config.fromfile(tmp_path / "a.py")
    assert json.loads(read.model.plan)["scores"] == {} and len((tmp_path / "a.py").read_text()) < 20_000


def clamp(module, args, output):
    return output.clamp(max=1)


CHANGES = {
    r"'backbone.stage_1.0.branch_3x3.norm' .*: eps is 0.1, in its place 1e-05": lambda net: setattr(
        net.backbone.stage_1[0].branch_3x3.norm, "eps", 0.1
    ),
    r"'backbone.stage_2.0.act' .SiLU.*: it is a SiLU, in its place a ReLU": lambda net: setattr(
        net.backbone.stage_2[0], "act", nn.SiLU()
    ),
    r"'head.fc' .*: it has a forward hook .clamp.": lambda net: net.head.fc.register_forward_hook(clamp),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_the_config_does_not_build_is_refused(message, tmp_path):
    cfg = config()
    model = trained(cfg)
    CHANGES[message](model)
    with pytest.raises(EquivalenceError, match=f"the model built from the written config differs: {message}"):
        write_pruned(model, cfg, plan_pruning(model, X, "l1", 0.3), tmp_path, X)
    assert not list(tmp_path.iterdir())


def test_what_deploy_does_not_hold_is_refused(tmp_path):
    cfg = ours()
    model = trained(cfg)
    model.head.fc.register_forward_hook(clamp)
    with pytest.raises(EquivalenceError, match="'head.fc' .*: it has a forward hook .clamp."):
        write_deployed(model, cfg, tmp_path, X)
    assert not list(tmp_path.iterdir())
