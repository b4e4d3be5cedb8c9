"""AccuracyLrHook in real runs, resumed and not."""

import json

import pytest

from rep_plugin.errors import HookError
from rep_plugin.openmmlab.hooks import AccuracyLrHook
from tests.test_openmmlab.test_hooks.tiny import STEPS, config, run

TYPE = "rep_plugin.AccuracyLrHook"
GROUPS = dict(
    optim_wrapper=dict(
        optimizer=dict(type="SGD", lr=0.05), paramwise_cfg=dict(custom_keys={"head.fc": dict(lr_mult=2.0)})
    )
)
EACH = dict(train_cfg=dict(by_epoch=True, max_epochs=4, val_interval=1))


@pytest.fixture
def accuracies(monkeypatch):
    """Validation gives these metrics, by epoch, whatever the model."""
    metrics = {0: 10.0, 1: 50.0, 2: 91.0, 3: 60.0, 4: 99.0}
    runners = []

    def compute(self, results):
        return {"top1": metrics[runners[-1].epoch]}

    monkeypatch.setattr("mmpretrain.evaluation.Accuracy.compute_metrics", compute)
    monkeypatch.setattr(AccuracyLrHook, "before_run", lambda self, runner: runners.append(runner), raising=False)
    return metrics


def rates(folder) -> list[float]:
    lines = next(folder.glob("*/vis_data/scalars.json")).read_text().splitlines()
    return [line["lr"] for line in map(json.loads, lines) if "loss" in line]


def test_rate_falls_as_thresholds_are_passed(accuracies, tmp_path):
    runner = run(config(tmp_path, dict(type=TYPE, thresholds=[40, 80, 90, 98], factor=0.5), **GROUPS, **EACH))
    expected = [0.05] * STEPS + [0.025] * STEPS + [0.00625] * 2 * STEPS
    assert rates(tmp_path) == pytest.approx(expected)
    groups = runner.optim_wrapper.optimizer.param_groups
    assert {round(group["lr"], 9) for group in groups} == {0.05 / 16, 0.1 / 16}


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resumed_run_has_the_same_rates(accuracies, epoch, tmp_path):
    """Checkpoints are written before the validation of their epoch, which may step the rate."""
    hook = dict(type=TYPE, thresholds=[40, 80, 90, 98], factor=0.5)
    run(config(tmp_path / "whole", hook, **GROUPS, **EACH))
    state = dict(load_from=str(tmp_path / f"whole/epoch_{epoch}.pth"), resume=True)
    run(config(tmp_path / "again", hook, **GROUPS, **EACH, **state))
    assert rates(tmp_path / "again") == pytest.approx(rates(tmp_path / "whole")[epoch * STEPS :])


def test_weights_alone_start_at_the_full_rate(accuracies, tmp_path):
    hook = dict(type=TYPE, thresholds=[40])
    run(config(tmp_path / "whole", hook, **EACH))
    run(config(tmp_path / "again", hook, **EACH, load_from=str(tmp_path / "whole/epoch_4.pth")))
    assert rates(tmp_path / "again")[0] == 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(thresholds=[]), r"ascending numbers, at least one, got \[\]"),
        (dict(thresholds=80), "thresholds must be a list of numbers, got 80"),
        (dict(thresholds=[87, 80]), r"ascending numbers, at least one, got \[87, 80\]"),
        (dict(thresholds=[80], factor=1), r"factor must be a number in \(0, 1\), got 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AccuracyLrHook(**arguments)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(HookError, match=r"validation gives \['accuracy/top1'\], expected 'accuracy/top5' among them"):
        run(config(tmp_path / "a", dict(type=TYPE, thresholds=[40], monitor="accuracy/top5")))
    with pytest.raises(HookError, match="follows 'accuracy/top1' of validation, but the config has none"):
        run(
            config(
                tmp_path / "b", dict(type=TYPE, thresholds=[40]), val_cfg=None, val_dataloader=None, val_evaluator=None
            )
        )
