"""SparsityHook in real runs of mmengine's Runner, against a run without it and against the gammas by hand."""

import copy

import pytest
import torch

from rep_plugin.errors import HookError
from rep_plugin.openmmlab.hooks import SparsityHook
from rep_plugin.openmmlab.hooks.runner_utils import plain_model
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.tiny import STEPS, config, one_process, run

TYPE = "rep_plugin.SparsityHook"
BACKBONE = "backbone.bn"


def gammas(runner) -> dict[str, torch.Tensor]:
    state = plain_model(runner).state_dict()
    return {name: value for name, value in state.items() if name.startswith(BACKBONE) and name.endswith("weight")}


def one_step(**changes) -> dict:
    """An epoch of four batches, of which the first ``accumulative_counts`` make the only step."""
    return (
        dict(train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg=None, val_dataloader=None, val_evaluator=None)
        | changes
    )


WRAPPERS = {
    "plain": dict(),
    "bf16": dict(type="rep_plugin.CpuAmpOptimWrapper"),
    "accumulated": dict(accumulative_counts=STEPS),
    "clipped": dict(clip_grad=dict(max_norm=1e-3)),
}


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
@pytest.mark.parametrize("case", list(WRAPPERS))
def test_difference_to_a_run_without_it_is_the_term(case, mode, tmp_path):
    """With a learning rate so small that nothing else differs, every real step moves gammas by lr * strength."""
    lr = 1e-3
    wrapper = dict(optimizer=dict(type="SGD", lr=lr), **WRAPPERS[case])
    hook = dict(type=TYPE, strength=0.01, overrides={"*.bn3": 0.1, "*.bn2": 0}, mode=mode)
    with_it = gammas(run(config(tmp_path / "with", hook, **one_step(optim_wrapper=wrapper))))
    without = gammas(run(config(tmp_path / "without", **one_step(optim_wrapper=copy.deepcopy(wrapper)))))
    steps = 1 if case == "accumulated" else STEPS
    for name, strength in (("bn1", 0.01), ("bn2", 0), ("bn3", 0.1), ("bn4", 0.01)):
        moved = (without[f"{BACKBONE}{name[-1]}.weight"] - with_it[f"{BACKBONE}{name[-1]}.weight"]) / lr / steps
        assert (moved - strength).abs().max() < (2e-3 if case == "bf16" else 5e-4), name


def test_only_what_can_be_pruned_is_pulled_unless_all_is_asked_for(tmp_path):
    """All four can: bn4 feeds the classifier through a pooling, bn1 and bn3 go together."""
    hook = SparsityHook(only_prunable=False)
    assert hook.factor_at(0) == 1.0
    runner = run(config(tmp_path, dict(type=TYPE, strength=10.0, mode="proximal"), **one_step()))
    assert all((value == 0).all() for value in gammas(runner).values())
    assert "exactly zero" in next(tmp_path.glob("*/*.log")).read_text()


def test_factor_rises_and_ends(tmp_path):
    hook = dict(type=TYPE, warmup=1, end=3)
    runner = run(config(tmp_path, hook))
    factors = list(runner.message_hub.get_scalar("train/sparsity_factor").data[0])
    assert factors == [0.2, 0.4, 0.6, 0.8, *[1] * 8, *[0] * 4]
    by_iteration = SparsityHook(warmup=3, end=10, by_epoch=False)
    assert [by_iteration.factor_at(i) for i in (0, 2, 3, 9, 10)] == [0.25, 0.75, 1, 1, 0]


def test_resumed_run_goes_on_exactly(tmp_path):
    hook = dict(type=TYPE, strength=0.01, mode="proximal", warmup=3)
    whole = run(config(tmp_path / "whole", hook))
    again = run(config(tmp_path / "again", hook, load_from=str(tmp_path / "whole/epoch_2.pth"), resume=True))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert (
        max(relative_error(theirs[k], v) for k, v in ours.items() if v.is_floating_point() and theirs[k].any()) < 1e-6
    )


def test_wrapped_model(tmp_path):
    hook = dict(type=TYPE, strength=0.01)
    plain = gammas(run(config(tmp_path / "plain", hook, **one_step())))
    with one_process(tmp_path, broadcast_buffers=True) as ddp:
        runner = run(config(tmp_path / "ddp", hook, **one_step(**ddp)))
    assert all(relative_error(plain[name], value) < 1e-6 for name, value in gammas(runner).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(strength=-1), r"strength must be a number in \[0, 1000\], got -1"),
        (dict(overrides={"*": "much"}), r"overrides\['\*'\] must be a number in \[0, 1000\], got 'much'"),
        (dict(group_strength=float("nan")), r"group_strength must be a number in \[0, 1000\], got nan"),
        (dict(mode="l0"), r"mode must be one of proximal, subgradient, got 'l0'"),
        (dict(histogram_interval=0.5), "histogram_interval must be a whole number >= 0, got 0.5"),
        (dict(warmup=3, end=3), "needs 0 <= warmup < end, got warmup=3, end=3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityHook(**arguments)


BAD_RUNS = {
    "unknown pattern": (dict(overrides={"*.norm": 1.0}), {}, r"no prunable batch norm is named like '\*.norm'"),
    "nothing": (dict(strength=0), {}, "nothing to pull in ImageClassifier"),
    "no epochs": (
        dict(),
        dict(train_cfg=dict(by_epoch=False, max_iters=4)),
        "IterBasedTrainLoop has none: by_epoch=False",
    ),
}


@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_what_does_not_fit_is_refused_before_the_first_step(case, tmp_path):
    arguments, changes, message = BAD_RUNS[case]
    with pytest.raises(HookError, match=message) as caught:
        run(config(tmp_path, dict(type=TYPE, **arguments), **one_step(**changes)))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.pth"))
