"""SoftPruneHook: set the weakest filters to zero again and again while training, and remove them at its end."""

import json
from collections.abc import Mapping, Sequence

from mmengine.runner import Runner

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks.pruning_hook import PruningHook, check_scores, check_share, shared_plan
from rep_plugin.openmmlab.hooks.runner_utils import (
    collapsed,
    describe,
    evaluate,
    iterations_of,
    optimizers_of,
    pictures_of,
    plain_model,
)
from rep_plugin.pruning import PrunePlan, PruneReport, TraceError, plan_pruning
from rep_plugin.pruning.methods.soft_pruning import count_returned, zero_channels_
from rep_plugin.registry import HOOKS

META = "soft_prune"  # in a checkpoint's meta data


@HOOKS.register_module()
class SoftPruneHook(PruningHook):
    """Soft filter pruning (He et al., IJCAI 2018), for coupled layers as well.

    After every ``interval`` epochs from ``begin`` on, and after the last, the weakest ``prune_fraction`` of the channels is
    set to zero: kernels, gammas and betas. They train on and may come back, by their momentum (see
    :func:`rep_plugin.pruning.methods.soft_pruning.zero_channels_`; an optimizer without any keeps them dead behind a ReLU, which is a
    warning). What is zero at the end is removed from a copy, and written as
    :func:`rep_plugin.openmmlab.artefacts.write_pruned` does. ``scores`` (the paper's: ``l2``), ``scope`` (the paper's:
    ``layer``), ``min_channels``, ``round_to``, ``overrides``, ``ignore`` as in :func:`rep_plugin.plan_pruning`.

    Each time validation is run before and after (``evaluate=False``: not); an accuracy that falls below half is a warning
    with the numbers. The log also has how many of the channels zeroed last time came back; ``pruned.rounds.json`` has all
    this as ``zeroings``. With an EMAHook the last plan is applied to the average, whose channels are only near zero: the
    figures of the last round tell what that costs. Resuming goes on exactly.

    Raises ValueError for bad arguments; :class:`rep_plugin.errors.HookError` where the model cannot be pruned so.
    """

    def __init__(
        self,
        prune_fraction: float,
        *,
        begin: int = 1,
        interval: int = 1,
        scores: str = "l2",
        scope: str = "layer",
        min_channels: int = 1,
        round_to: int = 1,
        overrides: Mapping[str, float | str] | None = None,
        ignore: Sequence[str] = (),
        evaluate: bool = True,
        out_dir: str | None = None,
    ):
        super().__init__(out_dir)
        check_share("prune_fraction", prune_fraction)
        for name, value in (("begin", begin), ("interval", interval)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} must be a whole number of epochs >= 1, got {value!r}")
        check_scores(scores)
        self.begin, self.interval, self.evaluate = begin, interval, evaluate
        self.options = dict(
            prune_fraction=prune_fraction, scores=scores, scope=scope, min_channels=min_channels, round_to=round_to
        )
        self.options |= dict(overrides=dict(overrides or {}), ignore=tuple(ignore))
        self.plan: PrunePlan | None = None
        self.zeroings: list[dict] = []  # what was done, plain data

    def before_train(self, runner: Runner) -> None:
        iterations_of(runner, True, "SoftPruneHook")
        if self.begin > runner.max_epochs:
            raise HookError(f"SoftPruneHook.begin (={self.begin}) must be <= the training's {runner.max_epochs} epochs")
        groups = [g for one in optimizers_of(runner) for g in one.param_groups]
        if all(not group.get("momentum") and "betas" not in group for group in groups):
            runner.logger.warning("SoftPruneHook: the optimizer has no momentum, zeroed filters will hardly come back")

    def after_train_epoch(self, runner: Runner) -> None:
        epoch = runner.epoch + 1
        last = epoch == runner.max_epochs
        if epoch >= self.begin and ((epoch - self.begin) % self.interval == 0 or last):
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
            f"{describe(before)}; after: {describe(after)}"
        )
        if warning := collapsed(before, after):
            runner.logger.warning(f"SoftPruneHook: {warning}")

    def _plan(self, runner: Runner) -> PrunePlan:
        try:
            plan = plan_pruning(plain_model(runner), (1, *pictures_of(runner, 1).shape[1:]), **self.options)
        except (ValueError, TraceError) as error:
            raise HookError(f"SoftPruneHook: {error}") from None
        return shared_plan(plan)

    def after_train(self, runner: Runner) -> None:
        # Stopped before the first time, training has no plan.
        self.rounds = []
        self.prune_a_copy(runner, self.plan or self._plan(runner))

    def note(self, runner: Runner, plan: PrunePlan, report: PruneReport, before: dict, after: dict) -> None:
        super().note(runner, plan, report, before, after)
        self.rounds[-1]["zeroings"] = self.zeroings

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().before_save_checkpoint(runner, checkpoint)
        if self.plan is not None:
            checkpoint["meta"][META] = json.dumps({"zeroings": self.zeroings, "plan": self.plan.to_json()})

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().after_load_checkpoint(runner, checkpoint)
        text = (checkpoint.get("meta") or {}).get(META)
        if text is not None and runner._resume:
            found = json.loads(text)
            self.zeroings, self.plan = found["zeroings"], PrunePlan.from_json(found["plan"])
