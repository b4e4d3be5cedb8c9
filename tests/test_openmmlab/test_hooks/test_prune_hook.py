"""PruneHook in real runs: once at the end, in rounds while training, killed and resumed, under EMA and DDP."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from rep_plugin.errors import HookError
from rep_plugin.history import history_of
from rep_plugin.openmmlab.accuracy import norm_batches, reestimate_norms_
from rep_plugin.openmmlab.hooks import PruneHook
from rep_plugin.openmmlab.hooks import prune_hook as hooks_base
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, plain_model
from rep_plugin.openmmlab.load import load_model
from rep_plugin.pruning import PrunePlan, apply_plan, plan_pruning
from rep_plugin.pruning.planning.plan import compose_plans
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.conftest import ROOT
from tests.test_openmmlab.test_hooks.tiny import STEPS, config, one_process, run

X = torch.randn(2, 3, 17, 16)
ROUNDS = dict(type="rep_plugin.PruneHook", prune_fraction=0.5, rounds=2, begin=1, interval=2)
EMA = dict(type="EMAHook", momentum=0.2, update_buffers=True)


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    ours, theirs = a.state_dict(), b.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    return max(relative_error(v, theirs[k]) for k, v in ours.items() if v.is_floating_point() and v.any())


def rounds_of(folder) -> list[dict]:
    """What was done, without the speed: that is of the moment."""
    rounds = json.loads((folder / "pruned.rounds.json").read_text())
    return [{key: value for key, value in entry.items() if key != "steps_per_second"} for entry in rounds]


def artefact(folder) -> torch.nn.Module:
    return load_model(Config.fromfile(folder / "pruned.py"), folder / "pruned.pth")[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four epochs, a quarter of the channels removed after the first and after the third, with EMA."""
    folder = tmp_path_factory.mktemp("rounds")
    return folder, run(config(folder, EMA, ROUNDS))


def test_once_after_training_writes_the_artefact_and_leaves_the_model(tmp_path):
    runner = run(config(tmp_path, dict(type="rep_plugin.PruneHook", macs=0.5, bn_images=0)))
    assert runner.model.backbone.conv1.out_channels == 8 and not history_of(runner.model)
    pruned = artefact(tmp_path)
    report, (only,) = json.loads((tmp_path / "pruned.json").read_text()), rounds_of(tmp_path)
    assert report["macs_after"] <= 0.5 * report["macs_before"] and report["max_rel_error"] < 1e-9
    plan = PrunePlan.from_json(tmp_path / "pruned.plan.json")
    copied = load_model(config(tmp_path), tmp_path / "epoch_4.pth")[0]
    apply_plan(copied, plan)
    assert relative_error(copied(X), pruned(X)) < 1e-6
    assert set(only["before"]) == {"accuracy/top1"} and only["after"] == evaluate(runner, pruned)
    assert only["before"] == evaluate(runner, runner.model) and only["tuned"] is None


def norms_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [b.clone() for name, b in model.named_buffers() if "running" in name]


def test_statistics_of_batch_norms_are_measured_anew_on_training_images(tmp_path):
    """After training, and before it goes on: with the same images each time, whatever was drawn before."""
    run(config(tmp_path / "once", dict(type="rep_plugin.PruneHook", macs=0.5, bn_images=10)))
    pruned, folder = artefact(tmp_path / "once"), tmp_path / "once"
    old = load_model(config(folder), folder / "epoch_4.pth")[0]
    apply_plan(old, PrunePlan.from_json(folder / "pruned.plan.json"))
    stale, loader = norms_of(old), Runner.build_dataloader(config(folder).train_dataloader)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert reestimate_norms_(old, norm_batches(loader, 10), 10) == 10
    assert torch.equal(state, torch.get_rng_state())
    for before, expected, found in zip(stale, norms_of(old), norms_of(pruned)):
        assert torch.allclose(expected, found, rtol=1e-6) and not torch.allclose(before, found, rtol=1e-3)
    assert "10 training images" in (folder / "pruned.json").read_text()


def test_in_training_the_model_and_its_average_get_new_statistics(tmp_path, monkeypatch):
    read, own = [], hooks_base.renew_norms_of
    monkeypatch.setattr(
        "rep_plugin.openmmlab.hooks.prune_hook.renew_norms_of",
        lambda runner, models, images: read.append((list(models), images)) or own(runner, models, images),
    )
    runner = run(config(tmp_path, EMA, dict(type="rep_plugin.PruneHook", prune_fraction=0.5, begin=1)))
    (models, images), *_ = read
    average = next(hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook))
    assert models == [runner.model, average] and images == 512 and len(read) == 1


def test_save_best_starts_anew_with_the_narrower_network(tmp_path):
    """A dense network that was better is not the best of the pruned one."""
    checkpoint = dict(type="CheckpointHook", interval=1, save_best="accuracy/top1")
    cfg = config(tmp_path, dict(type="rep_plugin.PruneHook", prune_fraction=0.5, begin=3))
    cfg.default_hooks.checkpoint, cfg.train_cfg.val_interval = checkpoint, 1
    runner = run(cfg)
    (best,) = tmp_path.glob("best_*.pth")
    kept = torch.load(best, weights_only=False)
    assert {name: v.shape for name, v in kept["state_dict"].items()} == {
        name: v.shape for name, v in runner.model.state_dict().items()
    }
    assert kept["meta"]["epoch"] == 4


def test_rounds_reach_the_whole_fraction_and_training_goes_on(finished):
    folder, runner = finished
    first, second = rounds_of(folder)
    assert (first["epoch"], second["epoch"]) == (1, 3) and first["tuned"] == second["before"] and second["tuned"]
    plans = [PrunePlan.from_json(json.dumps(s["plan"])) for s in history_of(runner.model)]
    total, removed = plans[0].units[0], sum(plan.units[1] for plan in plans)
    assert plans[1].units[0] == total - plans[0].units[1]
    assert abs(removed - total / 2) <= 1 and abs(plans[0].units[1] - total / 4) <= 1
    shapes = {p.shape for p in runner.model.parameters()}
    state = runner.optim_wrapper.optimizer.state
    assert all(state[p]["momentum_buffer"].shape == p.shape for p in runner.model.parameters())
    assert all(state[p]["momentum_buffer"].any() for p in runner.model.parameters() if p.dim() > 1)
    (ema,) = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    assert {p.shape for p in ema.parameters()} == shapes
    pruned = artefact(folder)
    ema.eval()
    assert relative_error(ema(X), pruned(X)) < 1e-6 and "PruneHook" not in (folder / "pruned.py").read_text()
    # Weights went on moving after the last removal, in the model and in its average.
    before, after = (torch.load(folder / f"epoch_{n}.pth", weights_only=False) for n in (3, 4))
    assert before["state_dict"]["backbone.conv2.weight"].shape != after["state_dict"]["backbone.conv2.weight"].shape


def test_steps_per_second_are_kept_and_logged(finished):
    folder, _ = finished
    first, second = (e["steps_per_second"] for e in json.loads((folder / "pruned.rounds.json").read_text()))
    assert first["before"] > 0 and first["after"] == second["before"] > 0 and second["after"] > 0
    log = next(folder.glob("*/*.log")).read_text()
    assert f"PruneHook, round 2: steps per second {second['before']:.3g} -> {second['after']:.3g}" in log


def test_composed_plan_removes_what_the_plans_remove_in_turn(finished):
    folder, runner = finished
    plans = [PrunePlan.from_json(json.dumps(s["plan"])) for s in history_of(runner.model)]
    whole = PrunePlan.from_json(folder / "pruned.plan.json")
    assert whole == compose_plans(plans)
    one, two = (load_model(config(folder), folder / "epoch_1.pth")[0] for _ in range(2))
    for plan in plans:
        apply_plan(one, plan)
    apply_plan(two, whole)
    assert distance(one, two) == 0 and torch.equal(one(X), two(X))
    with pytest.raises(ValueError, match=r"do not follow each other: .* ends with \d+ channels, the next plan begins"):
        compose_plans([plans[0], plans[0]])
    with pytest.raises(ValueError, match="got no plans"):
        compose_plans([])


def test_resume_before_a_later_round_goes_on_exactly(finished, tmp_path):
    """From the checkpoint of a pruned model, whose next removal comes at once; two more are in the test of killed runs."""
    folder, whole = finished
    again = run(config(tmp_path, EMA, ROUNDS, load_from=str(folder / "epoch_3.pth"), resume=True))
    assert distance(whole.model, again.model) < 1e-5
    assert rounds_of(tmp_path) == rounds_of(folder)
    assert Config.fromfile(tmp_path / "pruned.py").model == Config.fromfile(folder / "pruned.py").model
    assert relative_error(artefact(folder)(X), artefact(tmp_path)(X)) < 1e-5


def test_checkpoint_is_tested_by_a_runner_with_the_same_config(finished, tmp_path):
    folder, _ = finished
    cfg = config(tmp_path, ROUNDS, load_from=str(folder / "epoch_4.pth"))
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator, test_cfg=dict())
    runner = Runner.from_cfg(cfg)
    assert runner.test()["accuracy/top1"] == rounds_of(folder)[-1]["tuned"]["accuracy/top1"]
    runner.model.eval()
    assert relative_error(artefact(folder)(X), runner.model(X)) < 1e-6


def test_killed_between_removal_and_checkpoint_and_after_it_then_resumed(finished, tmp_path):
    """In processes of their own, with the command line tool; the first two are killed as by kill -9."""
    folder, whole = finished
    config(tmp_path, EMA, ROUNDS, dict(type="KillAt")).dump(tmp_path / "config.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", ROOT / "tools/train.py", "config.py", "--work-dir", "work"]
    # Rounds are before iterations 4 and 12; checkpoints after 4, 8, 12, 16.
    for kill_at, resume, last in ((STEPS + 2, [], 1), (3 * STEPS - 1, ["--resume"], 2), (-1, ["--resume"], 4)):
        done = subprocess.run(
            [*command, *resume],
            cwd=tmp_path,
            env={**environment, "KILL_AT": str(kill_at)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if kill_at < 0 else -signal.SIGKILL), done.stdout[-1500:] + done.stderr[-1500:]
        assert {path.name for path in (tmp_path / "work").glob("epoch_*")} == {
            f"epoch_{n + 1}.pth" for n in range(last)
        }
    model = whole.model.state_dict()
    found = torch.load(tmp_path / "work/epoch_4.pth", weights_only=False)["ema_state_dict"]
    assert max(relative_error(v, found[f"module.{k}"]) for k, v in model.items() if v.is_floating_point()) < 1e-5
    assert rounds_of(tmp_path / "work") == rounds_of(folder)
    assert relative_error(artefact(folder)(X), artefact(tmp_path / "work")(X)) < 1e-5


def test_wrapped_model_is_wrapped_anew_trains_and_resumes(tmp_path):
    plain = run(config(tmp_path / "plain", ROUNDS))
    with one_process(tmp_path) as ddp:
        first = run(config(tmp_path / "ddp", ROUNDS, **ddp))
        state = dict(load_from=str(tmp_path / "ddp/epoch_2.pth"), resume=True)
        again = run(config(tmp_path / "again", ROUNDS, **ddp, **state))
        assert type(first.model).__name__ == type(again.model).__name__ == "MMDistributedDataParallel"
    for runner in (first, again):
        assert distance(plain.model, plain_model(runner)) < 1e-5


@pytest.mark.parametrize("amount", [dict(params=0.4), dict(fractions=[0.2, 0.3]), dict(prune_fraction=0.5)])
def test_amounts_by_iteration(amount, tmp_path):
    hook = dict(type="rep_plugin.PruneHook", begin=3, interval=6, rounds=2, by_epoch=False, scores="l2", **amount)
    runner = run(config(tmp_path, hook))
    first, second = rounds_of(tmp_path)
    assert (first["iter"], second["iter"]) == (3, 9)
    plans = [PrunePlan.from_json(json.dumps(s["plan"])) for s in history_of(runner.model)]
    if "params" in amount:
        assert second["params_after"] <= 0.4 * first["params_before"] < first["params_after"]
        assert first["params_after"] <= 0.7 * first["params_before"]
    else:
        for plan, share in zip(plans, amount.get("fractions", (0.25, 1 / 3))):
            assert abs(plan.units[1] - share * plan.units[0]) <= 0.5 + 1e-9


def test_blocks_are_pruned_in_training_and_merged_at_the_end(tmp_path):
    prune = dict(type="rep_plugin.PruneHook", prune_fraction=0.3, begin=1)
    cfg = config(tmp_path, prune, dict(type="rep_plugin.SparsityHook", end=1), dict(type="rep_plugin.ReparamHook"))
    cfg.model.backbone = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35, out_indices=(2,))
    cfg.model.head.in_channels = 16
    cfg.train_cfg.max_epochs = 2
    runner = run(cfg)
    report = json.loads((tmp_path / "deploy.json").read_text())
    deployed = load_model(Config.fromfile(tmp_path / "deploy.py"), tmp_path / "deploy.pth")[0]
    pruned = artefact(tmp_path)
    assert relative_error(pruned(X), deployed(X)) < 1e-4 and report["max_rel_error"] < 1e-9
    assert not any(name in (tmp_path / "deploy.py").read_text() for name in ("PruneHook", "SparsityHook"))
    runner.model.eval()
    assert relative_error(pruned(X), runner.model(X)) < 1e-6


def test_a_collapse_is_said_with_numbers(tmp_path, monkeypatch):
    metrics = iter([{"accuracy/top1": 90.0}, {"accuracy/top1": 12.5}])
    monkeypatch.setattr("rep_plugin.openmmlab.hooks.base_pruning_hook.evaluate", lambda *_: next(metrics))
    run(config(tmp_path, dict(type="rep_plugin.PruneHook", prune_fraction=0.5)))
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "WARNING - PruneHook: accuracy/top1 fell from 90 to 12.5: remove less at a time" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), r"exactly one of prune_fraction, params, macs, fractions, got none"),
        (dict(prune_fraction=0.5, macs=0.5), r"got \['prune_fraction', 'macs'\]"),
        (dict(prune_fraction=1.5), r"prune_fraction must be a number in \(0, 1\) or None, got 1.5"),
        (dict(fractions=[0.1, 0], begin=1), r"fractions\[1\] must be a number in \(0, 1\), got 0"),
        (dict(fractions=[0.1, 0.1], rounds=3, begin=1), r"one number a round, got \[0.1, 0.1\], rounds=3"),
        (dict(macs=1.5), "macs must be a share .* or a whole number > 1, got 1.5"),
        (dict(prune_fraction=0.5, rounds=2), "2 rounds need begin"),
        (dict(prune_fraction=0.5, begin=1, interval=0), "interval must be a number > 0, got 0"),
        (dict(prune_fraction=0.5, scores="taylor"), "scores must be one of .* got 'taylor'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PruneHook(**arguments)


BAD_RUNS = {
    "late": (ROUNDS | dict(begin=2), "last round comes after 4 epochs, expected fewer than the training's 4"),
    "pattern": (ROUNDS | dict(ignore=["*.nothing"]), r"PruneHook, round 1: no layer is named like '\*.nothing'"),
}


@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_what_does_not_fit_is_refused(case, tmp_path):
    hook, message = BAD_RUNS[case]
    with pytest.raises(HookError, match=message) as caught:
        run(config(tmp_path, hook))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_history_is_refused(finished, tmp_path):
    folder, _ = finished
    cfg = config(tmp_path, ROUNDS, load_from=str(folder / "epoch_2.pth"), resume=True)
    plan = plan_pruning(load_model(config(folder), folder / "epoch_1.pth")[0], (1, 3, 16, 16), prune_fraction=0.1)
    cfg.model = dict(type="rep_plugin.Pruned", model=cfg.model, plan=plan.to_json())
    with pytest.raises(HookError, match="the checkpoint's model was pruned otherwise before"):
        run(cfg)


def test_scores_that_say_nothing_are_refused_before_the_first_step(tmp_path):
    """Gammas of a network that was not trained: with begin=1 they are."""
    hook = dict(type="rep_plugin.PruneHook", scores="bn_gamma", macs=0.5, begin=0, max_prune_fraction=0.75)
    with pytest.raises(
        HookError, match="PruneHook, round 1: scores='bn_gamma' say nothing about this ImageClassifier"
    ) as caught:
        run(config(tmp_path, hook))
    assert "SparsityHook" in str(caught.value) and not list(tmp_path.glob("epoch_*.pth"))
