"""SoftPruneHook: set the weakest filters to zero again and again while training, and remove them at its end."""

import json
from collections.abc import Sequence

from mmengine.runner import Runner

from rep_plugin.arguments import Count, Fraction, Name, Share, checked
from rep_plugin.errors import HookError
from rep_plugin.openmmlab.hooks.base_pruning_hook import HookScores, PruningHook, budget_of, from_main_process
from rep_plugin.openmmlab.hooks.runner_utils import (
    as_hook_error,
    collapse_warning,
    evaluate,
    format_metrics,
    optimizers_of,
    plain_model,
    shape_of_one,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.openmmlab.hooks.stateful_hook import parse_kept
from rep_plugin.pruning import PrunePlan, PruneReport
from rep_plugin.pruning.methods.soft_pruning import count_returned, zero_channels_
from rep_plugin.pruning.planning import plan_to_budget
from rep_plugin.pruning.planning.options import Cost, Overrides, PruneOptions, Scope
from rep_plugin.registry import HOOKS


@checked
@HOOKS.register_module()
class SoftPruneHook(PruningHook):
    """Soft filter pruning (He et al., IJCAI 2018), for coupled layers as well.

    The weakest channels are set to zero: kernels, gammas and betas. They train on and may come back, by their momentum (see
    :func:`rep_plugin.pruning.methods.soft_pruning.zero_channels_`; an optimizer without any keeps them dead behind a ReLU,
    which is a warning). What is zero at the end is removed from a copy, and written as
    :func:`rep_plugin.openmmlab.artefacts.write_pruned` does.

    Validation is run before and after; an accuracy that falls below half is a warning with the numbers. The log also has
    how many of the channels zeroed last time came back; ``pruned.rounds.json`` has all this as ``zeroings``. With an
    EMAHook the last plan is applied to the average, whose channels are only near zero: the metrics of the last round
    contain what that costs. Resuming goes on exactly.

    Args:
        prune_fraction: Share of the prunable channels that is set to zero, in (0, 1); or
        params: parameters that may remain, a share as a float or a whole number; or
        macs: multiply-adds, likewise.
        begin: Epochs that are over the first time.
        interval: Epochs between two times; the last epoch counts too.
        scores: As :func:`rep_plugin.plan_pruning` has it, by name; ``l2`` is the paper's.
        scope: As there; ``layer`` is the paper's.
        min_channels: As there.
        max_prune_fraction: As there.
        round_to: As there.
        overrides: As there.
        ignore: As there.
        evaluate: False: validation is not run each time.
        out_dir: Folder of the files; default: the work directory.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: The training is too short, or the model cannot be pruned so.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.3, begin=5)]
    """

    meta_key = "soft_prune"

    def __init__(
        self,
        prune_fraction: Share | None = None,
        *,
        params: Cost | None = None,
        macs: Cost | None = None,
        begin: Count = 1,
        interval: Count = 1,
        scores: HookScores = "l2",
        scope: Scope = "layer",
        min_channels: Count | None = None,
        max_prune_fraction: Fraction | None = None,
        round_to: Count | None = None,
        overrides: Overrides | None = None,
        ignore: Sequence[str] = (),
        evaluate: bool = True,
        out_dir: Name | None = None,
    ):
        super().__init__(out_dir)
        self.budget = budget_of(prune_fraction, params, macs)
        self.schedule, self.evaluate = Schedule(begin, interval=interval), evaluate
        self.options = PruneOptions(
            scores, scope, min_channels, round_to, overrides, ignore, max_prune_fraction=max_prune_fraction
        )
        self.plan: PrunePlan | None = None
        self.zeroings: list[dict] = []  # what was done, plain data

    def state(self) -> str | None:
        return json.dumps({"zeroings": self.zeroings, "plan": self.plan.to_json()}) if self.plan else None

    def load_state(self, state: str) -> None:
        kept = parse_kept(state, self.meta_key, {"zeroings": list[dict], "plan": str})
        self.zeroings, self.plan = kept["zeroings"], PrunePlan.from_json(kept["plan"])

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        limit, unit = self.schedule.length(runner, "SoftPruneHook")
        if self.schedule.begin > limit:
            raise HookError(f"SoftPruneHook.begin (={self.schedule.begin}) must be <= the training's {limit} {unit}")
        groups = [g for one in optimizers_of(runner) for g in one.param_groups]
        if all(not group.get("momentum") and "betas" not in group for group in groups):
            runner.logger.warning("SoftPruneHook: the optimizer has no momentum, zeroed filters will hardly come back")
        self.rehearse(runner, lambda model, shape, _: plan_to_budget(model, shape, self.budget, self.options), 0)

    def after_train_epoch(self, runner: Runner) -> None:
        epoch = runner.epoch + 1
        times = self.schedule.count(epoch)
        if times > self.schedule.count(epoch - 1) or (times and epoch == runner.max_epochs):
            self._zero(runner)

    def _zero(self, runner: Runner) -> None:
        model = plain_model(runner)
        returned = None if self.plan is None else count_returned(model, self.plan)
        self.plan = self._plan(runner)
        before = evaluate(runner, model) if self.evaluate else {}
        zero_channels_(model, self.plan)
        after = evaluate(runner, model) if self.evaluate else {}
        entry = dict(epoch=runner.epoch + 1, units=list(self.plan.units), returned=returned, before=before, after=after)
        self.zeroings.append(entry)
        back = "" if returned is None else "; of the rows zeroed last time, {} of {} came back".format(*returned)
        runner.logger.info(
            f"SoftPruneHook: {self.plan.units[1]} of {self.plan.units[0]} channels set to zero{back}; before: "
            f"{format_metrics(before)}; after: {format_metrics(after)}"
        )
        if warning := collapse_warning(before, after):
            runner.logger.warning(f"SoftPruneHook: {warning}")

    def _plan(self, runner: Runner) -> PrunePlan:
        with as_hook_error("SoftPruneHook"):
            plan = plan_to_budget(plain_model(runner), shape_of_one(runner), self.budget, self.options)
            return from_main_process(plan)

    def after_train(self, runner: Runner) -> None:
        # Stopped before the first time, training has no plan.
        self.prune_a_copy(runner, self.plan or self._plan(runner))

    def add_round(self, runner: Runner, plan: PrunePlan, report: PruneReport, before: dict, after: dict) -> None:
        super().add_round(runner, plan, report, before, after)
        self.rounds[-1]["zeroings"] = self.zeroings
