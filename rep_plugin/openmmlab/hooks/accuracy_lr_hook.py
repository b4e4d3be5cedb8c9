"""AccuracyLrHook: the learning rate falls whenever validation passes the next threshold."""

from collections.abc import Sequence
from itertools import pairwise

from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner

from rep_plugin.arguments import Name, Share, checked
from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, final_model, kept_random_state
from rep_plugin.openmmlab.hooks.stateful_hook import StatefulHook
from rep_plugin.registry import HOOKS


@checked
@HOOKS.register_module()
class AccuracyLrHook(StatefulHook):
    """Multiply all learning rates by ``factor`` for each threshold that validation passes for the first time.

    As people step the rate by hand: fast while the network learns much, slow once it is good. Thresholds that are passed
    together count each; falling below one again changes nothing. Resuming goes on exactly: the validation that comes
    after a checkpoint, and which stock schedulers such as ReduceOnPlateauLR miss when they resume from it, is run again.

    Args:
        thresholds: Ascending values of the metric.
        factor: In (0, 1).
        monitor: Name of the metric.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: There is no validation, or it does not give ``monitor``.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.AccuracyLrHook", thresholds=[60, 75], factor=0.1)]
    """

    meta_key = "rep_lr_steps"

    def __init__(self, thresholds: Sequence[float], factor: Share = 0.1, monitor: Name = "accuracy/top1"):
        values = list(thresholds)
        if not values or any(a >= b for a, b in pairwise(values)):
            raise ArgumentError(f"thresholds must be ascending numbers, at least one, got {thresholds!r}")
        self.thresholds, self.factor, self.monitor = values, factor, monitor
        self.passed = 0

    def state(self) -> int:
        return self.passed

    def load_state(self, state: int) -> None:
        self.passed = state

    def before_train(self, runner: Runner) -> None:
        if runner.val_loop is None:
            raise HookError(f"AccuracyLrHook follows {self.monitor!r} of validation, but the config has none")
        with kept_random_state():
            self._find(evaluate(runner, final_model(runner), batches=1))
        if runner.iter == 0:
            self.passed = 0
        elif _validated(runner):
            self._follow(runner, evaluate(runner, final_model(runner)))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if metrics is not None and runner.iter:  # not in a test of weights alone
            self._follow(runner, metrics)

    def _find(self, metrics: dict[str, float]) -> float:
        if self.monitor not in metrics:
            raise HookError(f"AccuracyLrHook: validation gives {sorted(metrics)}, expected {self.monitor!r} among them")
        return metrics[self.monitor]

    def _follow(self, runner: Runner, metrics: dict[str, float]) -> None:
        value = self._find(metrics)
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
