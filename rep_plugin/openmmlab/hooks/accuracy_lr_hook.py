"""AccuracyLrHook: the learning rate falls whenever validation passes the next threshold."""

import math
from collections.abc import Sequence
from itertools import pairwise

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, final_model
from rep_plugin.registry import HOOKS

META = "rep_lr_steps"  # in a checkpoint's meta data: how many thresholds were passed


@HOOKS.register_module()
class AccuracyLrHook(Hook):
    """Multiply all learning rates by ``factor`` for each of the ``thresholds`` that ``monitor`` passes for the first time.

    As people step the rate by hand: fast while the network learns much, slow once it is good. Thresholds that are passed
    together count each; falling below one again changes nothing. Resuming goes on exactly: the validation that comes
    after a checkpoint, and which stock schedulers such as ReduceOnPlateauLR miss when they resume from it, is run again.

    Raises ValueError for bad arguments, and :class:`rep_plugin.errors.HookError` without validation, or where it does
    not give ``monitor``.
    """

    def __init__(self, thresholds: Sequence[float], factor: float = 0.1, monitor: str = "accuracy/top1"):
        values = [] if isinstance(thresholds, (str, int, float)) else list(thresholds)
        if not values or any(not math.isfinite(one) for one in values) or any(a >= b for a, b in pairwise(values)):
            raise ArgumentError(f"thresholds must be ascending numbers, at least one, got {thresholds!r}")
        if not 0 < factor < 1:
            raise ArgumentError(f"factor must lie in (0, 1), got {factor!r}")
        self.thresholds, self.factor, self.monitor = values, factor, monitor
        self.passed = 0

    def before_train(self, runner: Runner) -> None:
        if runner.val_loop is None:
            raise HookError(f"AccuracyLrHook follows {self.monitor!r} of validation, but the config has none")
        if runner.iter == 0:
            self.passed = 0
        elif _validated(runner):
            self._follow(runner, evaluate(runner, final_model(runner)))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if metrics is not None and runner.iter:  # not in a test of weights alone
            self._follow(runner, metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["meta"][META] = self.passed

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self.passed = int((checkpoint.get("meta") or {}).get(META, 0))

    def _follow(self, runner: Runner, metrics: dict[str, float]) -> None:
        if self.monitor not in metrics:
            raise HookError(f"AccuracyLrHook: validation gives {sorted(metrics)}, expected {self.monitor!r} among them")
        value = metrics[self.monitor]
        passed = sum(value > threshold for threshold in self.thresholds)
        if passed <= self.passed:
            return
        share = self.factor ** (passed - self.passed)
        for group in _groups(runner):
            group["lr"] *= share
        runner.logger.info(
            f"AccuracyLrHook: {self.monitor} {value:.4g} is above {self.thresholds[passed - 1]:g}, rates x {share:.3g}"
        )
        self.passed = passed


def _groups(runner: Runner) -> list[dict]:
    """All groups of parameters, and the settings which mmengine logs as the learning rate."""
    wrapper = runner.optim_wrapper
    wrappers = wrapper.optim_wrappers.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return [group for one in wrappers for group in one.param_groups]


def _validated(runner: Runner) -> bool:
    """Whether validation came right after the checkpoint that training goes on from."""
    loop = runner.train_loop
    done = runner.epoch if isinstance(loop, EpochBasedTrainLoop) else runner.iter
    return done >= loop.val_begin and done % loop.val_interval == 0
