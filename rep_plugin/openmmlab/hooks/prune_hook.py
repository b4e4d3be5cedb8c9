"""PruneHook: remove channels while training goes on, in rounds, or once at its end."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from mmengine.runner import Runner
from torch import nn

from rep_plugin.arguments import Count, Fraction, In, Name, NotNegative, Positive, Share, checked
from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks.base_pruning_hook import (
    HookScores,
    PruningHook,
    budget_of,
    from_main_process,
    prune_runner_,
)
from rep_plugin.openmmlab.hooks.runner_utils import (
    as_hook_error,
    ema_models,
    evaluate,
    final_model,
    forget_best,
    images_of,
    plain_model,
    renew_norms_of,
    shape_of_one,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.pruning import PrunePlan
from rep_plugin.pruning.planning import Budget, plan_to_budget
from rep_plugin.pruning.planning.options import Cost, Overrides, PruneOptions, Scope
from rep_plugin.pruning.planning.plan import compose_plans
from rep_plugin.registry import HOOKS


class _StepClock:
    """The median time of a training step since the last removal, loading of data not counted."""

    def __init__(self):
        self.times: list[float] = []
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.times.append(time.perf_counter() - self._started)
        self._started = None

    def lap(self) -> float | None:
        """Return the steps per second since the last lap (None: there were none), and begin a new one."""
        speed = 1 / statistics.median(self.times) if self.times else None
        self.times = []
        return speed


@checked
@HOOKS.register_module()
class PruneHook(PruningHook):
    """Plan and remove channels: after training, or after ``begin`` epochs and every ``interval`` epochs, going on between.

    Without ``begin`` a copy of the trained model (of the EMA weights, where there are) is pruned once, and written. With
    ``begin`` the model in training is pruned before the next epoch (iteration) starts: parameters, momentum and EMA copy
    stay and become narrower, DDP is wrapped anew, and every removal is first proven equal to masking. What follows is
    fine-tuning; ``pruned.pth pruned.py`` are written at its end. The same scheme as in Li et al., "Pruning Filters" (ICLR
    2017) and Molchanov et al. (ICLR 2017).

    Validation is run before and after each round (with new statistics of batch norms), and after the fine-tuning; metrics go
    to the log and to ``pruned.rounds.json``, with the steps per second before and after each removal (the median, since the
    last start of training); an accuracy that falls below half is a warning. ``save_best`` begins anew with each removal.
    Resuming, also after a kill between a removal and the next checkpoint, goes on exactly: see
    :class:`rep_plugin.openmmlab.hooks.base_pruning_hook.PruningHook`.

    Args:
        prune_fraction: Share of the prunable channels that is removed in all, in (0, 1).
        params: Parameters that may remain, a share as a float or a whole number; or
        macs: multiply-adds, likewise. These three are reached in ``rounds`` equal steps. Or
        fractions: for each round the share removed of what is left then.
        begin: Epochs that are over before the first round.
        interval: Epochs between two rounds.
        rounds: Their number.
        by_epoch: False: ``begin`` and ``interval`` count iterations.
        scores: As :func:`rep_plugin.plan_pruning` has it, by name. ``flow`` needs no sparse training; ``bn_gamma`` is that
            of Network Slimming, behind a SparsityHook.
        scope: As there.
        min_channels: As there.
        max_prune_fraction: As there, in each round.
        round_to: As there.
        overrides: As there; fractions are reached in rounds too.
        ignore: As there.
        bn_images: Right after each removal statistics of batch norms are measured anew on this many training images, spread
            over the data set, and the same ones each time; 0: they stay those of the wider network.
        out_dir: Folder of the files; default: the work directory.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: The rounds do not fit the training, or the model cannot be pruned so.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.PruneHook", macs=0.5, begin=10, rounds=3, interval=5)]
    """

    def __init__(
        self,
        prune_fraction: Share | None = None,
        *,
        params: Cost | None = None,
        macs: Cost | None = None,
        fractions: Sequence[Share] | None = None,
        begin: NotNegative | None = None,
        interval: Positive = 1,
        rounds: Count = 1,
        by_epoch: bool = True,
        scores: HookScores = "flow",
        scope: Scope = "global",
        min_channels: Count | None = None,
        max_prune_fraction: Fraction | None = None,
        round_to: Count | None = None,
        overrides: Overrides | None = None,
        ignore: Sequence[str] = (),
        bn_images: Annotated[int, In("[0, inf)")] = 512,
        out_dir: Name | None = None,
    ):
        super().__init__(out_dir)
        self.budget, self.fractions = budget_of(prune_fraction, params, macs, fractions=fractions), fractions
        if fractions is not None:
            if not fractions or rounds not in (1, len(fractions)):
                raise ArgumentError(
                    f"fractions must be a list with one number a round, got {fractions!r}, rounds={rounds}"
                )
            rounds = len(fractions)
        if begin is None and rounds > 1:
            raise ArgumentError(f"{rounds} rounds need begin: without it the model is pruned once, after training")
        self.begin, self.number, self.bn_images = begin, rounds, bn_images
        self.schedule = Schedule(begin or 0, interval=interval, by_epoch=by_epoch)
        self.options = PruneOptions(
            scores, scope, min_channels, round_to, overrides, ignore, max_prune_fraction=max_prune_fraction
        )
        self._clock = _StepClock()

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if self.begin is not None:
            limit, unit = self.schedule.length(runner, "PruneHook")
            last = self.begin + (self.number - 1) * self.schedule.interval
            if last >= limit:
                raise HookError(
                    f"PruneHook's last round comes after {last} {unit}, expected fewer than the training's {limit}"
                )
        self.rehearse(runner, self._plan, 0 if self.begin is None else self.number)

    def before_train_epoch(self, runner: Runner) -> None:
        if self.schedule.by_epoch:
            self._prune_if_due(runner, runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if not self.schedule.by_epoch:
            self._prune_if_due(runner, runner.iter)
        self._clock.start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self._clock.stop()

    def _prune_if_due(self, runner: Runner, progress: int) -> None:
        if self.begin is not None and len(self.rounds) < min(self.number, self.schedule.count(progress)):
            self._prune(runner)

    def after_train(self, runner: Runner) -> None:
        if self.begin is None:
            self.rounds = []
            self.prune_a_copy(runner, self._plan_together(runner, final_model(runner)), self.bn_images)
            return
        if not self.rounds:
            runner.logger.warning("PruneHook: training ended before the first round, nothing was pruned")
            return
        self._add_speed(runner)
        model = final_model(runner)
        self.complete_round(runner, evaluate(runner, model))
        plan = compose_plans(self.plans_of(runner))
        self.write_artefact(runner, plan, model, self.whole_report(plan, model))

    def _add_speed(self, runner: Runner) -> float | None:
        """Complete the last round with the speed after it, and return that."""
        speed = self._clock.lap()
        if self.rounds and speed is not None:
            pair = self.rounds[-1]["steps_per_second"]
            pair["after"] = speed
            before = "unknown" if pair["before"] is None else f"{pair['before']:.3g}"
            runner.logger.info(f"PruneHook, round {len(self.rounds)}: steps per second {before} -> {speed:.3g}")
        return speed

    def _prune(self, runner: Runner) -> None:
        speed = self._add_speed(runner)
        plan = self._plan_together(runner, plain_model(runner))
        before = evaluate(runner, final_model(runner))
        self.complete_round(runner, before)
        runner.call_hook("before_removal")  # DistillHook copies the model that teaches
        report = prune_runner_(runner, plan, example_input=images_of(runner))
        forget_best(runner)
        models = [plain_model(runner), *(average.module for average in ema_models(runner))]
        report.notes += renew_norms_of(runner, models, self.bn_images)
        self.add_round(runner, plan, report, before, evaluate(runner, final_model(runner)))
        self.rounds[-1]["steps_per_second"] = {"before": speed, "after": None}

    def _plan_together(self, runner: Runner, model: nn.Module) -> PrunePlan:
        with as_hook_error(f"PruneHook, round {len(self.rounds) + 1}"):
            return from_main_process(self._plan(model, shape_of_one(runner), self.rounds))

    def _plan(self, model: nn.Module, shape: tuple[int, ...], rounds: list[dict]) -> PrunePlan:
        """The plan of the round after these."""
        return plan_to_budget(model, shape, *self._request(model, shape, rounds))

    def _request(self, model: nn.Module, shape: tuple[int, ...], rounds: list[dict]) -> tuple[Budget, PruneOptions]:
        """What the round after these asks for: fractions of what is left, costs in whole numbers."""
        done = len(rounds)
        if self.fractions is not None:
            return Budget(self.fractions[done]), self.options
        overrides = {p: v if v == "frozen" else self._share(v, done) for p, v in self.options.overrides.items()}
        options = replace(self.options, overrides=overrides)
        assert self.budget is not None  # it is given where fractions are not
        name, amount = self.budget.item
        if name == "prune_fraction":
            return Budget(self._share(amount, done)), options
        if self.number == 1:
            return self.budget, options
        if rounds:
            first = rounds[0][f"plan_{name}"]
        else:
            first = getattr(plan_to_budget(model, shape, Budget(0.0), PruneOptions("l1")), f"{name}_before")
        step = (first - self.budget.limit(first)) / self.number
        return Budget(**{name: round(first - step * (done + 1))}), options

    def _share(self, whole: float, done: int) -> float:
        """The share of what is left which this round removes, so that ``whole`` of the beginning goes in equal steps."""
        step = whole / self.number
        return step / (1 - step * done)
