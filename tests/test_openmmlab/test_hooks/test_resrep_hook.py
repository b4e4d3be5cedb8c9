"""ResRepHook in real runs: what it writes, what it does to the optimizer, killed and resumed, under EMA, AMP and DDP."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from rep_plugin.errors import HookError
from rep_plugin.openmmlab.hooks import ResRepHook
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, plain_model
from rep_plugin.openmmlab.load import load_model
from rep_plugin.pruning.methods.compactors import compactors_of
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.conftest import ROOT
from tests.test_openmmlab.test_hooks.tiny import STEPS, config, one_process, run

X = torch.randn(2, 3, 17, 16)
TYPE = "rep_plugin.ResRepHook"
# Momentum 0.9 and a strong pull: marked rows are zero after the last two of four epochs.
HOOK = dict(type=TYPE, macs=0.5, begin=0.5, end=2, interval=2, strength=0.1, marked_strength=8.0, momentum=0.9)
EMA = dict(type="EMAHook", momentum=0.3, update_buffers=True)
COSINE = dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)


def rounds_of(folder) -> list[dict]:
    return json.loads((folder / "pruned.rounds.json").read_text())


def artefact(folder) -> torch.nn.Module:
    return load_model(Config.fromfile(folder / "pruned.py"), folder / "pruned.pth")[0]


def hook_of(runner) -> ResRepHook:
    return next(hook for hook in runner.hooks if isinstance(hook, ResRepHook))


def log_of(folder) -> str:
    return "".join(path.read_text() for path in folder.glob("*/*.log"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four epochs with EMA; rows are marked before iterations 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("resrep")
    return folder, run(config(folder, EMA, HOOK, param_scheduler=COSINE))


def test_artefact_is_the_stock_network_narrower_and_as_good(tmp_path):
    runner = run(config(tmp_path, HOOK, param_scheduler=COSINE))
    pruned, (only,) = artefact(tmp_path), rounds_of(tmp_path)
    assert set(pruned.state_dict()) == {name for name in runner.model.state_dict() if "compactor" not in name}
    report = json.loads((tmp_path / "pruned.json").read_text())
    assert report["macs_after"] <= 0.5 * report["macs_before"] and report["max_rel_error"] < 1e-9
    assert only["macs_after"] == report["macs_after"] and only["before"] == evaluate(runner, runner.model)
    assert only["after"] == evaluate(runner, pruned) and only["largest_dropped_row"] == 0 < only["smallest_kept_row"]
    assert [choice["iter"] for choice in only["choices"]] == [2, 4, 6, 8]
    macs = [choice["macs"] for choice in only["choices"]]
    for share, value in zip((0.875, 0.75, 0.625, 0.5), macs):
        assert 0.3 * report["macs_before"] < value <= share * report["macs_before"]
    assert "ResRepHook" not in (tmp_path / "pruned.py").read_text()
    # What the rows have come to is all that is lost.
    hook = hook_of(runner)
    compactors = compactors_of(runner.model, hook.resrep.sites)
    for name, rows in hook.resrep.forgotten(hook.plan).items():
        compactors[name].weight.data[rows] = 0
    runner.model.eval()
    assert relative_error(runner.model(X), pruned(X)) < 1e-5


def test_compactors_are_a_group_of_their_own_in_optimizer_and_schedule(finished):
    _, runner = finished
    model, optimizer = runner.model, runner.optim_wrapper.optimizer
    first, second = optimizer.param_groups
    weights = [c.weight for c in compactors_of(model, hook_of(runner).resrep.sites).values()]
    assert len(weights) == 4 and [id(p) for p in second["params"]] == [id(p) for p in weights]
    assert (second["momentum"], second["weight_decay"], first["momentum"]) == (0.9, 0.0, 0.9)
    assert second["lr"] == first["lr"] < 1e-3 < second["initial_lr"] == first["initial_lr"] == 0.05
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in weights)
    (ema,) = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    assert set(ema.state_dict()) == set(model.state_dict())
    assert all(relative_error(torch.eye(len(w)).view_as(w), a) > 1e-3 for w, a in zip(weights, compactor_weights(ema)))
    assert not any(p.requires_grad for p in ema.parameters())


def compactor_weights(model) -> list[torch.Tensor]:
    return [value for name, value in model.state_dict().items() if name.endswith("compactor.weight")]


@pytest.mark.parametrize(
    ("schedule", "paramwise"),
    [
        (
            [dict(type="LinearLR", start_factor=0.1, end=3, by_epoch=False), dict(type="MultiStepLR", milestones=[2])],
            {},
        ),
        ([COSINE, dict(type="CosineAnnealingMomentum", eta_min=0.5, by_epoch=True)], dict(bias_decay_mult=0.0)),
        ([], dict(norm_decay_mult=0.0)),
    ],
)
def test_schedules_drive_the_new_group_as_the_others(schedule, paramwise, tmp_path):
    wrapper = dict(
        optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-4), paramwise_cfg=paramwise or None
    )
    changes = dict(
        optim_wrapper=wrapper, param_scheduler=schedule, val_cfg=None, val_dataloader=None, val_evaluator=None
    )
    runner = run(config(tmp_path, HOOK | dict(momentum=0.99), **changes))
    groups = runner.optim_wrapper.optimizer.param_groups
    assert len(groups) == (1 if not paramwise else len(list(runner.model.parameters())) - 4) + 1
    assert groups[-1]["lr"] == pytest.approx(groups[0]["lr"]) and groups[-1]["weight_decay"] == 0
    if "Momentum" in str(schedule):
        assert (groups[-1]["momentum"] - 0.5) / 0.49 == pytest.approx((groups[0]["momentum"] - 0.5) / 0.4)
    else:
        assert (groups[0]["momentum"], groups[-1]["momentum"]) == (0.9, 0.99)
    assert (groups[-1]["lr"] == 0.05) == (not schedule)
    for scheduler in runner.param_schedulers or []:
        begun = 0.99 if scheduler.param_name == "momentum" else 0.05
        assert len(scheduler.base_values) == len(runner.optim_wrapper.param_groups)
        assert scheduler.base_values[len(groups) - 1] == begun


WRAPPERS = {
    "plain": dict(),
    "bf16": dict(type="rep_plugin.CpuAmpOptimWrapper"),
    "accumulated": dict(accumulative_counts=STEPS),
    "clipped": dict(clip_grad=dict(max_norm=1e-3)),
}


@pytest.mark.parametrize("case", list(WRAPPERS))
def test_marked_rows_feel_the_lasso_alone_once_a_real_step(case, tmp_path):
    """One epoch of four batches, marked from the first: a row's own direction, by lr * strength each step."""
    lr, strength = 1e-3, 0.1
    wrapper = dict(optimizer=dict(type="SGD", lr=lr, momentum=0.0), **WRAPPERS[case])
    hook = HOOK | dict(begin=0, end=0, strength=0.0, marked_strength=strength, momentum=0.0)
    one = dict(train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg=None, val_dataloader=None, val_evaluator=None)
    runner = run(config(tmp_path, hook, optim_wrapper=wrapper, **one))
    found = hook_of(runner)
    steps = 1 if case == "accumulated" else STEPS
    compactors, seen = compactors_of(runner.model, found.resrep.sites), 0
    for name, rows in found.resrep.forgotten(found.plan).items():
        weight = compactors[name].weight.detach().flatten(1)
        expected = torch.eye(len(weight)) * (1 - steps * lr * strength)
        assert torch.allclose(weight[rows], expected[rows], atol=1e-7)
        others = [i for i in range(len(weight)) if i not in rows]
        assert case == "clipped" or not torch.allclose(weight[others], expected[others], atol=1e-7)
        seen += len(rows)
    assert seen > 4


@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_run_goes_on_exactly(epoch, finished, tmp_path):
    """From the middle of the choices, and after the last: weights, momentum, average, what is marked and the files."""
    folder, whole = finished
    state = dict(load_from=str(folder / f"epoch_{epoch}.pth"), resume=True)
    again = run(config(tmp_path, EMA, HOOK, param_scheduler=COSINE, **state))
    assert same(whole.model.state_dict(), again.model.state_dict())
    buffers = [
        {i: s["momentum_buffer"] for i, s in r.optim_wrapper.optimizer.state_dict()["state"].items()}
        for r in (whole, again)
    ]
    assert same(*buffers) and len(buffers[0]) == len(list(whole.model.parameters()))
    emas = [next(h.ema_model for h in r.hooks if isinstance(h, EMAHook)).state_dict() for r in (whole, again)]
    assert same(*emas) and rounds_of(folder) == rounds_of(tmp_path)
    assert same(artefact(folder).state_dict(), artefact(tmp_path).state_dict())


def test_killed_then_resumed_by_the_tool(finished, tmp_path):
    """In processes of their own; killed as by kill -9 between two choices."""
    folder, _ = finished
    config(tmp_path, EMA, HOOK, dict(type="KillAt"), param_scheduler=COSINE).dump(tmp_path / "config.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", ROOT / "tools/train.py", "config.py", "--work-dir", "work"]
    for kill_at, resume in ((STEPS + 3, []), (-1, ["--resume"])):
        done = subprocess.run(
            [*command, *resume],
            cwd=tmp_path,
            env=environment | {"KILL_AT": str(kill_at)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if kill_at < 0 else -signal.SIGKILL), done.stdout[-1500:] + done.stderr[-1500:]
    assert rounds_of(tmp_path / "work") == rounds_of(folder)
    assert same(artefact(folder).state_dict(), artefact(tmp_path / "work").state_dict())
    assert same(*(torch.load(f / "epoch_4.pth", weights_only=False)["state_dict"] for f in (folder, tmp_path / "work")))


def test_a_plain_checkpoint_begins_a_run_and_a_compacted_one_is_tested(finished, tmp_path):
    folder, whole = finished
    plain = run(config(tmp_path / "plain"))
    state = dict(load_from=str(tmp_path / "plain/epoch_4.pth"))
    hook = dict(type=TYPE, macs=0.5, begin=3, strength=0.0, momentum=0.0)
    frozen = dict(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0, momentum=0.9)))
    runner = run(config(tmp_path / "from", hook, **state, **frozen))
    ours, theirs = runner.model.state_dict(), plain.model.state_dict()
    assert (
        all(torch.equal(ours[name], p) for name, p in plain.model.named_parameters()) and len(ours) == len(theirs) + 4
    )

    cfg = config(tmp_path / "test", HOOK, load_from=str(folder / "epoch_4.pth"))
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator, test_cfg=dict())
    tester = Runner.from_cfg(cfg)
    assert tester.test()["accuracy/top1"] == rounds_of(folder)[0]["before"]["accuracy/top1"]
    average = next(h for h in whole.hooks if isinstance(h, EMAHook)).ema_model.module
    assert all(torch.equal(a, b) for a, b in zip(compactor_weights(tester.model), compactor_weights(average)))


def test_wrapped_model(tmp_path):
    plain = run(config(tmp_path / "plain", HOOK))
    with one_process(tmp_path) as ddp:
        first = run(config(tmp_path / "ddp", HOOK, **ddp))
        state = dict(load_from=str(tmp_path / "ddp/epoch_2.pth"), resume=True)
        again = run(config(tmp_path / "again", HOOK, **ddp, **state))
        for runner in (first, again):
            assert type(runner.model).__name__ == "MMDistributedDataParallel"
            known = runner.model._get_ddp_logging_data()["num_parameter_tensors"]
            assert known == len(list(runner.model.parameters()))
    for runner in (first, again):
        theirs = plain_model(runner).state_dict()
        for name, value in plain.model.state_dict().items():
            assert not value.is_floating_point() or relative_error(value + 1, theirs[name] + 1) < 1e-5, name


def test_a_network_that_was_narrowed_before_is_narrowed_on(tmp_path):
    run(config(tmp_path / "first", dict(type="rep_plugin.PruneHook", prune_fraction=0.3)))
    cfg = config(tmp_path / "second", HOOK, load_from=str(tmp_path / "first/pruned.pth"))
    cfg.model = Config.fromfile(tmp_path / "first/pruned.py").model
    run(cfg)
    first, second = artefact(tmp_path / "first"), artefact(tmp_path / "second")
    assert second.backbone.conv2.out_channels < first.backbone.conv2.out_channels < 16


def test_rows_that_are_not_small_are_said_with_numbers(tmp_path):
    run(config(tmp_path, HOOK | dict(strength=1e-4, marked_strength=1e-4)))
    (only,) = rounds_of(tmp_path)
    assert only["largest_dropped_row"] > 0.9
    words = f"the largest of their rows is {only['largest_dropped_row']:.3g} ({only['largest_dropped_share']:.2%} of the mean"
    assert "WARNING - ResRepHook" in log_of(tmp_path) and words in log_of(tmp_path)
    assert "raise marked_strength (=0.0001)" in log_of(tmp_path)


STOP = dict(type="EarlyStoppingHook", monitor="accuracy/top1", min_delta=200.0, patience=1)  # after two epochs


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (3.5, "ended before the first choice, nothing was pruned"),
        (0, r"training ended after choice 4 of 9: [\d,]+ multiply-adds remain, the target is 89,872"),
    ],
)
def test_a_training_that_ends_early_says_how_far_it_came(begin, message, tmp_path):
    cfg = config(tmp_path, HOOK | dict(begin=begin, end=4), STOP)
    cfg.train_cfg.val_interval = 1
    run(cfg)
    assert re.search(f"WARNING - ResRepHook: .*{message}", log_of(tmp_path))
    assert (tmp_path / "pruned.pth").exists() == (begin == 0)


def test_a_schedule_in_iterations(finished, tmp_path):
    folder, _ = finished
    run(config(tmp_path, EMA, HOOK | dict(begin=2, end=8, by_epoch=False), param_scheduler=COSINE))
    assert rounds_of(tmp_path) == rounds_of(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(macs=1.5), r"macs must be a share \(a float <= 1.0\) or a whole number > 1, got 1.5"),
        (dict(macs=0.5, begin=3, end=2), r"end must be >= begin \(=3\), got 2"),
        (dict(macs=0.5, interval=0), "interval must be a whole number >= 1, got 0"),
        (dict(macs=0.5, momentum=1.0), r"momentum must be a number in \[0, 1\), got 1.0"),
        (dict(macs=0.5, strength=-1), r"strength must be a number in \[0, 1000\], got -1"),
        (dict(macs=0.5, marked_strength="x"), r"marked_strength must be a number in \[0, 1000\] or None, got 'x'"),
        (dict(macs=0.5, round_to=0), "round_to must be a whole number >= 1 or None, got 0"),
        (dict(macs=0.5, ignore="*"), r"ignore must be a list of strings, got '\*'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResRepHook(**arguments)


BAD_RUNS = {
    "late": (HOOK | dict(begin=4, end=None), {}, "from begin=4 to end=4, expected within the training's 4 epochs"),
    "later": (HOOK | dict(end=5), {}, "from begin=0.5 to end=5, expected within the training's 4 epochs"),
    "pattern": (HOOK | dict(ignore=["*.nothing"]), {}, r"ResRepHook: no layer is named like '\*.nothing'"),
    "budget": (HOOK | dict(macs=10), {}, r"ResRepHook: macs \(=10\) cannot be met: the least that remains is"),
    "momentum": (
        HOOK,
        dict(optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3))),
        "needs an optimizer with momentum, as SGD has, got AdamW",
    ),
    "epochs": (HOOK, dict(train_cfg=dict(by_epoch=False, max_iters=4)), "IterBasedTrainLoop has none: by_epoch=False"),
}


@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_what_does_not_fit_is_refused(case, tmp_path):
    hook, changes, message = BAD_RUNS[case]
    with pytest.raises(HookError, match=message) as caught:
        run(config(tmp_path, hook, **changes))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("other", [dict(type="rep_plugin.PruneHook", macs=0.5), dict(type="rep_plugin.ReparamHook")])
def test_other_hooks_that_narrow_or_merge_are_refused(other, tmp_path):
    with pytest.raises(HookError, match="ResRepHook cannot run with .*Hook: take what it writes, pruned.py"):
        run(config(tmp_path, HOOK, other))


def test_a_checkpoint_of_other_compactors_is_refused(finished, tmp_path):
    folder, _ = finished
    cfg = config(
        tmp_path, HOOK | dict(ignore=["backbone.conv4"], macs=0.8), load_from=str(folder / "epoch_2.pth"), resume=True
    )
    with pytest.raises(HookError, match=r"others than this config's: \['backbone.conv4'\] are behind one only"):
        run(cfg)
