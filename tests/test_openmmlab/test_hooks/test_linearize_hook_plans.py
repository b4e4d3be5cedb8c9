"""LinearizeHook puts annealed activations into a stock network while it is trained, by a plan or a measured budget."""

import copy
import json
import os
import signal

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.apis import init_model

import rep_plugin
from rep_plugin.blocks.annealed import annealed_modules
from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.depth import timing
from rep_plugin.errors import AnnealError, ArgumentError
from rep_plugin.openmmlab import write_deployed
from rep_plugin.openmmlab.checkpoint import enable_safe_loading
from rep_plugin.openmmlab.hooks import LinearizeHook
from rep_plugin.openmmlab.load import build_model, load_model
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks import test_linearize_hook as of_backbones
from tests.test_openmmlab.test_hooks import tiny
from tests.test_openmmlab.test_hooks.forked import load_tool
from tests.test_openmmlab.test_hooks.kill_loop import start, starts_of, tensors
from tests.test_openmmlab.test_hooks.test_linearize_hook import anneal, logged, run

EMA = dict(type="EMAHook", momentum=0.2, update_buffers=True)
REPARAM = dict(type="rep_plugin.ReparamHook")


def config(work_dir, *hooks, **changes) -> Config:
    """A stock MobileNetV2 of mmpretrain, as it is."""
    cfg = of_backbones.config(work_dir, *hooks, **changes)
    cfg.model.backbone = dict(type="MobileNetV2", widen_factor=0.1, out_indices=(4,))
    cfg.model.head.in_channels = 16
    return cfg


def stock(work_dir):
    cfg = config(work_dir)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model = stock(folder)
    model.eval()
    made = rep_plugin.plan_depth(model, torch.randn(1, 3, 32, 32), macs=0.55)
    assert len(made.chosen) > 1 and all(name.startswith("backbone.layer") for name in made.chosen)
    made.to_json(folder / "plan.json")
    return folder / "plan.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, plan):
    """Four epochs, annealed in the second and third, with EMA, deployed at the end."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("annealed")
    return folder, run(config(folder, EMA, anneal(begin=1, end=3, plan=str(plan)), REPARAM))


def test_alpha_is_led_in_model_and_average(finished):
    _, runner = finished
    assert logged(runner) == of_backbones.EXPECTED
    (ema,) = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    count = len(list(annealed_modules(runner.model)))
    assert count > 2 and len(list(annealed_modules(ema))) == count
    assert all(m.alpha == 1 and m.linear for model in (runner.model, ema) for m in annealed_modules(model))


def test_what_is_deployed_loads_in_stock_code(finished, plan):
    folder, runner = finished
    report = json.loads((folder / "deploy.json").read_text())
    chosen = rep_plugin.DepthPlan.from_json(plan).chosen
    assert report["max_rel_error"] < 1e-9 and report["sensitivity"] > 1e-3 and len(report["blocks"]) == len(chosen)
    cfg = Config.fromfile(folder / "deploy.py")
    assert cfg.model.type == "rep_plugin.Merged" and cfg.model.model.type == "rep_plugin.Linearized"
    assert cfg.custom_hooks == [EMA]
    model = init_model(cfg, str(folder / "deploy.pth"), device="cpu")
    assert not list(annealed_modules(model))
    (ema,) = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    x = torch.randn(2, 3, 33, 32)
    ema = copy.deepcopy(ema)
    ema.eval()
    # EMAHook puts the averages into the model's place at the end of a checkpoint alone.
    assert relative_error(ema(x), model(x)) < 1e-4


def test_resumed_run_goes_on_exactly(finished, tmp_path, plan):
    folder, whole = finished
    hooks = EMA, anneal(begin=1, end=3, plan=str(plan)), REPARAM
    again = run(config(tmp_path, *hooks, load_from=str(folder / "epoch_2.pth"), resume=True))
    assert logged(again)[-6:] == of_backbones.EXPECTED[6:]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    worst = max(relative_error(theirs[k], v) for k, v in ours.items() if v.is_floating_point() and theirs[k].any())
    assert worst < 1e-5


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A plan that merges two blocks."""
    folder = tmp_path_factory.mktemp("short")
    model = stock(folder)
    model.eval()
    plan = rep_plugin.plan_depth(model, torch.randn(1, 3, 32, 32), macs=0.9)
    plan.to_json(folder / "plan.json")
    return folder / "plan.json"


def test_killed_in_the_anneal_and_resumed_it_ends_bit_by_bit_as_one_nobody_killed(tmp_path, short):
    tool = load_tool()
    for name in ("whole", "killed"):
        hooks = EMA, anneal(begin=1, end=3, plan=str(short)), dict(type="LossLog"), dict(type="KillAt")
        cfg = config(tmp_path / name / "work", *hooks)
        cfg.custom_imports.imports += [of_backbones.__name__]
        (tmp_path / name).mkdir()
        cfg.dump(tmp_path / name / "config.py")
    assert start(tool, tmp_path / "whole", False, lambda: None, None) == 0
    for place, at in enumerate([5, -1]):
        code = start(tool, tmp_path / "killed", place > 0, lambda at=at: os.environ.update(KILL_AT=str(at)), None)
        assert code == (0 if at < 0 else -signal.SIGKILL), (tmp_path / "killed/output.txt").read_text()[-2000:]
    (expected,), starts = starts_of(tmp_path / "whole"), starts_of(tmp_path / "killed")
    assert [list(losses) for losses in starts] == [[*range(5)], [*range(3, 12)]]
    assert all(loss == expected[at] for losses in starts for at, loss in losses.items())
    ours, theirs = (tensors(load_checkpoint_file(tmp_path / n / "work" / "epoch_4.pth")) for n in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and any("momentum" in key for key in ours) and any("ema" in key for key in ours)
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_checkpoints_are_tested_and_merged_with_the_config_they_were_trained_with(finished, plan, tmp_path):
    folder, _ = finished
    cfg = config(tmp_path, EMA, anneal(begin=1, end=3, plan=str(plan)), REPARAM, load_from=str(folder / "epoch_2.pth"))
    model, _ = load_model(cfg, folder / "epoch_2.pth")
    assert {m.alpha for m in annealed_modules(model)} == {float(torch.tensor(of_backbones.EXPECTED[5]))}
    cfg.test_dataloader, cfg.test_cfg, cfg.test_evaluator = cfg.val_dataloader, dict(), cfg.val_evaluator
    enable_safe_loading()
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert {m.alpha for m in annealed_modules(runner.model)} == {m.alpha for m in annealed_modules(model)}
    trained, _ = load_model(cfg, folder / "epoch_4.pth")
    report = write_deployed(trained, cfg, str(tmp_path / "out"))
    assert (
        report.max_rel_error < 1e-9
        and Config.fromfile(tmp_path / "out" / "deploy.py").model.type == "rep_plugin.Merged"
    )


def test_the_builder_takes_stock_weights(tmp_path, plan):
    cfg = config(tmp_path)
    state = stock(tmp_path).state_dict()
    cfg.model = dict(type="rep_plugin.Linearized", model=cfg.model, plan=str(plan))
    model = build_model(cfg)
    plain = build_model(config(tmp_path))
    model.load_state_dict(state), plain.load_state_dict(state)
    x = torch.randn(2, 3, 32, 33)
    assert relative_error(plain(x), model(x)) < 1e-6 and {m.alpha for m in annealed_modules(model)} == {0.0}
    for arguments in (dict(), dict(plan=str(plan), segments=[])):
        cfg.model = dict(type="rep_plugin.Linearized", model=config(tmp_path).model, **arguments)
        with pytest.raises(ArgumentError, match="give exactly one of plan and segments"):
            build_model(cfg)


def test_a_budget_is_planned_when_its_time_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.3)
    hooks = EMA, anneal(begin=1, end=2, latency=0.95, judge_batches=1), REPARAM
    runner = run(config(tmp_path, *hooks, train_cfg=dict(by_epoch=True, max_epochs=2)))
    made = rep_plugin.DepthPlan.from_json(tmp_path / "depth_plan.json")
    assert made.why == "latency=0.95" and made.importance == "evaluate"
    assert made.chosen and logged(runner)[-1] == 1
    first, second = (torch.load(tmp_path / f"epoch_{n}.pth", weights_only=False)["meta"] for n in (1, 2))
    kept = json.loads(second["rep_linearize"])
    assert "rep_linearize" not in first and logged(runner)[:4] == [0, 0, 0, pytest.approx(1 / 3)]
    assert json.loads((tmp_path / "deploy.json").read_text())["max_rel_error"] < 1e-9
    assert [segment["layers"][0] for segment in kept["segments"]] == [s.layers[0] for s in made.chosen_segments]


def test_a_wrapped_model_is_linearized(tmp_path, plan):
    with tiny.one_process(tmp_path, broadcast_buffers=True) as ddp:
        ddp["model_wrapper_cfg"]["find_unused_parameters"] = True  # the config reads no map of the last stages
        changes = dict(ddp, train_cfg=dict(by_epoch=True, max_epochs=1))
        runner = run(config(tmp_path, anneal(end=3, by_epoch=False, plan=str(plan)), **changes))
    assert type(runner.model).__name__ == "MMDistributedDataParallel"
    assert {m.alpha for m in annealed_modules(runner.model)} == {1.0} and logged(runner) == [1 / 3, 2 / 3, 1]


RIVALS = [
    dict(type="rep_plugin.PruneHook", prune_fraction=0.3, begin=2, scores="l1", min_channels=2),
    dict(type="rep_plugin.PruneHook", prune_fraction=0.3, scores="l1", min_channels=2),  # after training
    dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.3, begin=2),
]


@pytest.mark.parametrize("rival", RIVALS, ids=lambda hook: f"{hook['type'][11:]} {hook.get('begin')}")
def test_a_plan_beside_a_hook_that_prunes_is_refused_before_the_first_step(rival, tmp_path, short):
    for asked in (dict(plan=str(short)), dict(latency=0.9)):
        with pytest.raises(
            AnnealError, match=rf"with {next(iter(asked))} and \w+PruneHook|with .* and PruneHook"
        ) as caught:
            run(config(tmp_path / "work", rival, anneal(end=2, **asked)))
        assert "\n" not in str(caught.value) and not list((tmp_path / "work").glob("*.pth"))


def test_what_was_pruned_first_is_linearized_and_deployed(tmp_path):
    cfg = config(tmp_path / "work", REPARAM, train_cfg=dict(by_epoch=True, max_epochs=1))
    dense = build_model(cfg)
    pruned = rep_plugin.plan_pruning(dense, torch.randn(1, 3, 32, 32), "l1", 0.3, min_channels=2)
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=pruned.to_json())
    model = build_model(cfg)
    plan = rep_plugin.plan_depth(model, torch.randn(1, 3, 32, 32), macs=0.9)
    cfg.custom_hooks.insert(0, anneal(end=1, plan=plan.to_json()))
    run(cfg)
    report = json.loads((tmp_path / "work/deploy.json").read_text())
    assert report["max_rel_error"] < 1e-9 and len(report["blocks"]) == len(plan.chosen)
    deployed, _ = load_model(Config.fromfile(tmp_path / "work/deploy.py"), tmp_path / "work/deploy.pth")
    steps = [step["step"] for step in rep_plugin.history.history_of(deployed)]
    assert steps == ["prune", "linearize", "reparameterize"]


def test_refusals_are_one_line(tmp_path, monkeypatch, plan):
    with pytest.raises(ArgumentError, match="skip of LinearizeHook needs latency"):
        LinearizeHook(end=1, skip=True)
    with pytest.raises(ArgumentError, match="at most one of plan and latency"):
        LinearizeHook(end=2, plan=str(plan), latency=0.5)
    with pytest.raises(FileNotFoundError):
        LinearizeHook(end=2, plan=str(tmp_path / "none.json"))
    monkeypatch.setattr(timing, "SECONDS", 0.3)
    with pytest.raises(AnnealError, match="LinearizeHook cannot plan: latency=0.01 cannot be met") as caught:
        run(config(tmp_path, anneal(end=1, latency=0.01, judge_batches=0)))
    assert "\n" not in str(caught.value)
    cfg = config(tmp_path, anneal(end=1, plan=str(plan)))
    cfg.model.backbone.widen_factor = 0.35
    cfg.model.head.in_channels = 32
    with pytest.raises(ArgumentError, match="LinearizeHook: the plan is of another model"):
        run(cfg)
    annealed = of_backbones.config(tmp_path, anneal(end=1, latency=0.9))
    with pytest.raises(AnnealError, match="latency of LinearizeHook is for stock models"):
        run(annealed)
    with pytest.raises(AnnealError, match="no annealed block, expected .* or plan=... or latency=..."):
        run(config(tmp_path, anneal(end=1)))
