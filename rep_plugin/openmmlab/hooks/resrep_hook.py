"""ResRepHook: let a network learn which channels it can forget while it trains, and remove them at its end."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from rep_plugin.arguments import Count, Fraction, Name, NotNegative, Share, Strength, checked
from rep_plugin.errors import HookError
from rep_plugin.measure.copies import copy_model
from rep_plugin.openmmlab.artefacts import check_pruned_form
from rep_plugin.openmmlab.hooks.base_pruning_hook import (
    PruningHook,
    averages_to_change,
    budget_of,
    from_main_process,
    wrap_anew,
)
from rep_plugin.openmmlab.hooks.reparam_hook import ReparamHook
from rep_plugin.openmmlab.hooks.runner_utils import (
    as_hook_error,
    evaluate,
    final_model,
    images_of,
    merge_loss_warning,
    optimizers_of,
    plain_model,
    rehearsal,
    shape_of_one,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.openmmlab.hooks.stateful_hook import parse_kept
from rep_plugin.pruning import PrunePlan
from rep_plugin.pruning.methods.compactors import compactors_of
from rep_plugin.pruning.methods.resrep import Forgetting, ResRep
from rep_plugin.pruning.planning.options import Cost, PruneOptions
from rep_plugin.pruning.planning.plan import as_plan, compose_plans
from rep_plugin.registry import HOOKS

KEPT = {"shape": tuple[int, ...], "layers": list[str], "plan": dict | None, "choices": list[dict]}

SMALL = 1e-2  # a share of the rows that stay: forgotten ones above it are a warning


@checked
@HOOKS.register_module()
class ResRepHook(PruningHook):
    """ResRep (Ding et al., ICCV 2021): compactors learn which channels to forget, the network's own weights remember.

    Before training 1x1 convolutions, identities, are put behind the Conv-BN pairs, coupled ones too (see
    :class:`rep_plugin.pruning.methods.resrep.ResRep`); they join the optimizer as a group of its own, without weight
    decay. Group lasso pulls their rows. From ``begin`` on the rows of the lowest norms are marked to be forgotten: no
    gradient of the objective reaches them any more. Their number grows, so that what they leave falls in equal steps to
    the budget at the last choice before ``end``. The rest of the training is for forgetting: a marked row shrinks by about
    ``lr * marked_strength / (1 - momentum)`` an iteration, from 1, and stays at zero once it is there.

    After training, compactors are merged into a copy of the model (of the EMA weights, where there are), forgotten rows
    dropped, the result proven and written as :func:`rep_plugin.openmmlab.artefacts.write_pruned` does. Validation is run
    before and after; metrics, with the norms of dropped rows, go to the log and to ``pruned.rounds.json``. More than 0.1
    point lost is a warning with the numbers, as is a row above 1 % of those that stay beside it. The log has
    ``resrep_macs``, the share that would remain.

    Checkpoints hold compactors, their momentum and what is marked, so that resuming goes on exactly; other checkpoints
    are loaded before the compactors are put in.

    Networks of multi-branch blocks (RepMobileNetV2, RepVGG ...) have no place for compactors, which is said before the first
    step. A first merge, on a copy, is proven then as well.

    Args:
        prune_fraction: Share of the channels that is removed, in (0, 1); or
        params: parameters that may remain, a share as a float or a whole number; or
        macs: multiply-adds, likewise.
        begin: Epochs that are over at the first choice, fractions too.
        end: Epochs that are over at the last choice at most; default: half of the way from ``begin`` to the end.
        by_epoch: False: ``begin`` and ``end`` count iterations.
        interval: Iterations between two choices.
        strength: Of the group lasso; the default is the paper's, for hundreds of epochs.
        marked_strength: On marked rows, default ``strength``; short schedules need more.
        momentum: Of the compactors.
        min_channels: As :func:`rep_plugin.plan_pruning` has it.
        max_prune_fraction: As there.
        round_to: As there.
        ignore: As there.
        out_dir: Folder of the files; default: the work directory.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: The model, the optimizer (which needs momentum) or another hook that narrows the network does not fit.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.ResRepHook", macs=0.5, begin=5, marked_strength=0.01)]
    """

    meta_key = "rep_resrep"

    def __init__(
        self,
        prune_fraction: Share | None = None,
        *,
        params: Cost | None = None,
        macs: Cost | None = None,
        begin: NotNegative = 1,
        end: NotNegative | None = None,
        by_epoch: bool = True,
        interval: Count = 200,
        strength: Strength = 1e-4,
        marked_strength: Strength | None = None,
        momentum: Fraction = 0.99,
        min_channels: Count | None = None,
        max_prune_fraction: Fraction | None = None,
        round_to: Count | None = None,
        ignore: Sequence[str] = (),
        out_dir: Name | None = None,
    ):
        super().__init__(out_dir)
        self.budget = budget_of(prune_fraction, params, macs)
        self.options = PruneOptions(
            min_channels=min_channels, max_prune_fraction=max_prune_fraction, round_to=round_to, ignore=ignore
        )
        self.schedule = Schedule(begin, end, by_epoch=by_epoch)
        self.strength, self.momentum = strength, momentum
        self.marked_strength = strength if marked_strength is None else marked_strength
        self.interval, self._due = interval, self.schedule
        self.resrep: ResRep | None = None
        self.plan: PrunePlan | None = None
        self.choices: list[dict] = []  # one for each time that rows were marked, plain data
        self._forgetting: Forgetting | None = None
        self._number = 0

    def before_run(self, runner: Runner) -> None:
        super().before_run(runner)
        others = [h for h in runner.hooks if isinstance(h, (PruningHook, ReparamHook)) and h is not self]
        if others:
            raise HookError(
                f"ResRepHook cannot run with {type(others[0]).__name__}: take what it writes, pruned.py, for the next step"
            )

    def state(self) -> str | None:
        if self.resrep is None:
            return None
        plan = self.plan and asdict(replace(self.plan, scores={}))
        return json.dumps(dict(shape=self.resrep.trace.shape, layers=self._layers(), plan=plan, choices=self.choices))

    def load_structure(self, runner: Runner, state: str) -> None:
        kept = parse_kept(state, self.meta_key, KEPT)
        if self.resrep is None:
            self._insert(runner, tuple(kept["shape"]))
        if (own := self._layers()) != kept["layers"]:
            odd = sorted(set(own) ^ set(kept["layers"]))
            raise HookError(f"the checkpoint's compactors are others than this config's: {odd[:3]} are behind one only")

    def load_state(self, state: str) -> None:
        kept = parse_kept(state, self.meta_key, KEPT)
        self.choices, self.plan = kept["choices"], kept["plan"] and as_plan(kept["plan"])

    def _layers(self) -> list[str]:
        return [site.conv for site in self.resrep.sites]

    def _insert(self, runner: Runner, shape: tuple[int, ...]) -> None:
        """Put compactors into the model, its EMA copy, the wrapper, and the optimizer."""
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise HookError("ResRepHook needs a single optimizer, got several")
        for optimizer in optimizers_of(runner):
            if "momentum" not in optimizer.defaults:
                raise HookError(
                    f"ResRepHook needs an optimizer with momentum, as SGD has, got {type(optimizer).__name__}"
                )
        model, averages = plain_model(runner), averages_to_change(runner)
        with as_hook_error("ResRepHook"):
            self.resrep = ResRep(model, shape, self.budget, self.options)
            self.resrep.insert_(model)
        for average in averages:
            self.resrep.insert_(average.module)
            average.module.requires_grad_(False)
            held = average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters())
            average.avg_parameters = held
        wrap_anew(runner)
        if optimizers_of(runner):
            weights = self.resrep.parameters(model)
            _add_param_group(runner, weights, momentum=self.momentum, weight_decay=0.0)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        limit, unit = self.schedule.length(runner, "ResRepHook")
        begin, end = self.schedule.begin, self.schedule.end
        end = (begin + limit) / 2 if end is None else end
        if not begin < limit or end > limit:
            raise HookError(
                f"ResRepHook marks rows from begin={begin} to end={end:g}, expected within the training's {limit} {unit}"
            )
        due = replace(self.schedule, end=end).in_iterations(runner, "ResRepHook")
        self._due = replace(due, interval=self.interval)
        self._number = self._due.count(self._due.end)
        if self.resrep is None:
            self._insert(runner, shape_of_one(runner))
        model = plain_model(runner)
        weights = {name: c.weight for name, c in compactors_of(model, self.resrep.sites).items()}
        self._forgetting = Forgetting(weights, self.strength, self.marked_strength)
        if self.plan is not None:
            self._forgetting.mark(self.resrep.forgotten(self.plan))
        self._forgetting.attach(optimizers_of(runner))
        self._rehearse(runner)
        runner.logger.info(
            f"ResRepHook: {len(weights)} compactors, {self._what} {self.resrep.before:,} -> {self.resrep.target:,} "
            f"in {self._number} choices"
        )

    @property
    def _what(self) -> str:
        """What the budget counts."""
        return {"macs": "multiply-adds", "params": "parameters"}.get(self.budget.item[0], "channels")

    def _remain(self) -> int:
        """How much of it the plan leaves."""
        if self._what == "channels":
            return self.plan.units[0] - self.plan.units[1]
        return getattr(self.plan, f"{self.budget.item[0]}_after")

    def _rehearse(self, runner: Runner) -> None:
        """A merge that cannot be proven shall be known before the training, not after it."""
        images, copied = images_of(runner, 2), copy_model(plain_model(runner))
        copied.eval()
        with rehearsal("ResRepHook"):
            plan = self.plan or self.resrep.choose(copied)
            self.resrep.compact_(copied, plan, images)
            check_pruned_form(copied, runner.cfg, compose_plans([*self.plans_of(runner), plan]), images)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        due = min(self._number, self._due.count(runner.iter))
        if due > (self.choices[-1]["number"] if self.choices else 0):
            self._choose(runner, due)
        remain = self.plan.macs_after if self.plan else self.resrep.macs_before
        runner.message_hub.update_scalar("train/resrep_macs", remain / self.resrep.macs_before)

    def _choose(self, runner: Runner, due: int) -> None:
        """Mark the rows of the choice with this number, from 1; all processes alike."""
        whole, target, model = self.resrep.before, self.resrep.target, plain_model(runner)
        with as_hook_error(f"ResRepHook, choice {due}"):
            plan = self.resrep.choose(model, whole - (whole - target) * due // self._number)
        self.plan = from_main_process(plan)
        self._forgetting.mark(self.resrep.forgotten(self.plan))
        self.choices.append(dict(number=due, iter=runner.iter, macs=self.plan.macs_after, units=self.plan.units[1]))

    def after_train_epoch(self, runner: Runner) -> None:
        if self.plan is not None:
            left = self.resrep.rows_left(plain_model(runner), self.plan)
            runner.logger.info(f"ResRepHook: {self._describe(left)}")

    def _describe(self, left: dict[str, float]) -> str:
        return (
            f"{self.plan.units[1]} of {self.plan.units[0]} channels are to be forgotten, the largest of their rows is "
            f"{left['largest_dropped_row']:.3g} ({left['largest_dropped_share']:.2%} of the mean of those beside it), the "
            f"smallest that stays {left['smallest_kept_row']:.3g}"
        )

    def after_train(self, runner: Runner) -> None:
        self._forgetting.detach()
        if self.plan is None:
            runner.logger.warning("ResRepHook: training ended before the first choice, nothing was pruned")
            return
        if (done := self.choices[-1]["number"]) < self._number:
            runner.logger.warning(
                f"ResRepHook: training ended after choice {done} of {self._number}: {self._remain():,} {self._what} remain, "
                f"the target is {self.resrep.target:,}"
            )
        model = final_model(runner)
        left = self.resrep.rows_left(model, self.plan)
        if left["largest_dropped_share"] > SMALL:
            runner.logger.warning(
                f"ResRepHook: {self._describe(left)}; expected below {SMALL:.0%}: train longer after end, or raise "
                f"marked_strength (={self.marked_strength})"
            )
        pruned = copy_model(model)
        report = self.resrep.compact_(pruned, self.plan, images_of(runner))
        pruned.eval()
        self.rounds = []
        before, after = evaluate(runner, model), evaluate(runner, pruned)
        self.add_round(runner, self.plan, report, before, after)
        if warning := merge_loss_warning(before, after):
            runner.logger.warning(f"ResRepHook: {warning}; {self._describe(left)}")
        self.rounds[-1] |= left | dict(choices=self.choices)
        self.write_artefact(runner, compose_plans([*self.plans_of(runner), self.plan]), pruned, report)


def _add_param_group(runner: Runner, parameters: Sequence[nn.Parameter], **changes: float) -> None:
    """Give the Runner's one optimizer a group more: like its largest, with ``changes``.

    Schedulers, which keep what they have begun with for every group, go on with the new group as with the one it is like.
    """
    wrapper = runner.optim_wrapper
    optimizer, place = wrapper.optimizer, len(wrapper.optimizer.param_groups)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    like = sizes.index(max(sizes))
    options = {k: v for k, v in optimizer.param_groups[like].items() if k not in ("params", "param_names")} | changes
    for name, value in changes.items():
        if f"initial_{name}" in options:
            options[f"initial_{name}"] = value
    optimizer.add_param_group({"params": list(parameters), **options})
    for scheduler in runner.param_schedulers or []:
        if hasattr(scheduler, "base_values"):
            scheduler.base_values.insert(place, options[f"initial_{scheduler.param_name}"])
        if hasattr(scheduler, "min_values"):
            scheduler.min_values.insert(place, scheduler.min_values[like])
        scheduler._last_value = [group[scheduler.param_name] for group in scheduler.optimizer.param_groups]
