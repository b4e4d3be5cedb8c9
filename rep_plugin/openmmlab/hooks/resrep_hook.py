"""ResRepHook: let a network learn which channels it can forget while it trains, and remove them at its end."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from mmengine.dist import broadcast_object_list
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks.pruning_hook import PruningHook, changeable, wrap_anew
from rep_plugin.openmmlab.hooks.reparam_hook import ReparamHook
from rep_plugin.openmmlab.hooks.runner_utils import (
    add_param_group,
    evaluate,
    final_model,
    iterations_of,
    lost,
    optimizers_of,
    pictures_of,
    plain_model,
)
from rep_plugin.pruning import PrunePlan, TraceError
from rep_plugin.pruning.methods.compactors import compactors_of
from rep_plugin.pruning.methods.resrep import Forgetting, ResRep
from rep_plugin.pruning.methods.sparsity import check_strength
from rep_plugin.pruning.planning import Budget, PruneOptions
from rep_plugin.pruning.planning.plan import as_plan, compose_plans
from rep_plugin.registry import HOOKS

META_COMPACTORS = "rep_resrep"  # in a checkpoint's meta data
SMALL = 1e-2  # a share of the rows that stay: forgotten ones above it are a warning


@HOOKS.register_module()
class ResRepHook(PruningHook):
    """ResRep (Ding et al., ICCV 2021): compactors learn which channels to forget, the network's own weights remember.

    Before training 1x1 convolutions, identities, are put behind the Conv-BN pairs, coupled ones too (see
    :class:`rep_plugin.pruning.methods.resrep.ResRep`); they join the optimizer as a group of its own, with ``momentum`` and no
    weight decay. Group lasso of ``strength`` pulls their rows. From ``begin`` on (epochs, fractions too; iterations with
    ``by_epoch=False``) and every ``interval`` iterations, the rows of the lowest norms are marked to be forgotten: no
    gradient of the objective reaches them any more. Their number grows, so that what they leave falls in equal steps to
    ``macs`` (a share as a float, or a whole number) at the last choice before ``end`` (default: half of the way from
    ``begin`` to the end of training). The rest of the training is for forgetting: a marked row shrinks by about ``lr *
    marked_strength / (1 - momentum)`` an iteration, from 1, and stays at zero once it is there. The paper's is
    ``strength`` (the default), for hundreds of epochs; short schedules need more, on marked rows alone. ``min_channels``,
    ``round_to``, ``ignore`` as in :func:`rep_plugin.plan_pruning`.

    After training, compactors are merged into a copy of the model (of the EMA weights, where there are), forgotten rows
    dropped, the result proven and written as :func:`rep_plugin.openmmlab.artefacts.write_pruned` does. Validation is run
    before and after; figures, with the norms of dropped rows, go to the log and to ``pruned.rounds.json``. More than 0.1
    point lost is a warning with the numbers, as is a row above 1 % of those that stay beside it. The log has
    ``resrep_macs``, the share that would remain.

    Checkpoints hold compactors, their momentum and what is marked, so that resuming goes on exactly; other checkpoints
    are loaded before the compactors are put in. Raises ValueError for bad arguments, and
    :class:`rep_plugin.errors.HookError` at the start of training where the model, the optimizer (which needs
    momentum) or another hook that narrows the network does not fit.
    """

    def __init__(
        self,
        macs: int | float,
        *,
        begin: float = 1,
        end: float | None = None,
        by_epoch: bool = True,
        interval: int = 200,
        strength: float = 1e-4,
        marked_strength: float | None = None,
        momentum: float = 0.99,
        min_channels: int = 1,
        round_to: int = 1,
        ignore: Sequence[str] = (),
        out_dir: str | None = None,
    ):
        super().__init__(out_dir)
        self.budget = Budget(macs=macs)
        self.options = PruneOptions(min_channels=min_channels, round_to=round_to, ignore=ignore)
        if begin < 0 or (end is not None and end < begin):
            raise ArgumentError(f"ResRepHook needs 0 <= begin <= end, got begin={begin}, end={end}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ArgumentError(f"interval must be a whole number of iterations >= 1, got {interval!r}")
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ArgumentError(f"momentum must lie in [0, 1), got {momentum!r}")
        self.strength, self.momentum = check_strength("strength", strength), momentum
        self.marked_strength = self.strength if marked_strength is None else marked_strength
        check_strength("marked_strength", self.marked_strength)
        self.begin, self.end, self.by_epoch, self.interval = begin, end, by_epoch, interval
        self.resrep: ResRep | None = None
        self.plan: PrunePlan | None = None
        self.choices: list[dict] = []  # one for each time that rows were marked, plain data
        self._forgetting: Forgetting | None = None
        self._first = self._number = 0

    def before_run(self, runner: Runner) -> None:
        super().before_run(runner)
        others = [h for h in runner.hooks if isinstance(h, (PruningHook, ReparamHook)) and h is not self]
        if others:
            raise HookError(
                f"ResRepHook cannot run with {type(others[0]).__name__}: take what it writes, pruned.py, for the next step"
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().before_save_checkpoint(runner, checkpoint)
        if self.resrep is not None:
            plan = self.plan and asdict(replace(self.plan, scores={}))
            state = dict(shape=self.resrep.trace.shape, layers=self._layers(), plan=plan, choices=self.choices)
            checkpoint["meta"][META_COMPACTORS] = json.dumps(state)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().after_load_checkpoint(runner, checkpoint)
        text = (checkpoint.get("meta") or {}).get(META_COMPACTORS)
        if text is None:
            return
        state = json.loads(text)
        if self.resrep is None:
            self._insert(runner, tuple(state["shape"]))
        if (own := self._layers()) != state["layers"]:
            odd = sorted(set(own) ^ set(state["layers"]))
            raise HookError(f"the checkpoint's compactors are others than this config's: {odd[:3]} are behind one only")
        if runner._resume:
            self.choices = state["choices"]
            self.plan = state["plan"] and as_plan(state["plan"])

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
        model, averages = plain_model(runner), changeable(runner)
        try:
            self.resrep = ResRep(model, shape, self.budget, self.options)
            self.resrep.insert_(model)
        except (ValueError, TraceError) as error:
            raise HookError(f"ResRepHook: {error}") from None
        for average in averages:
            self.resrep.insert_(average.module)
            average.module.requires_grad_(False)
            held = average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters())
            average.avg_parameters = held
        wrap_anew(runner)
        if optimizers_of(runner):
            weights = self.resrep.parameters(model)
            add_param_group(runner, weights, momentum=self.momentum, weight_decay=0.0)

    def before_train(self, runner: Runner) -> None:
        per_unit = iterations_of(runner, self.by_epoch, "ResRepHook")
        unit, limit = ("epochs", runner.max_epochs) if self.by_epoch else ("iterations", runner.max_iters)
        end = (self.begin + limit) / 2 if self.end is None else self.end
        if not self.begin < limit or end > limit:
            raise HookError(
                f"ResRepHook marks rows from begin={self.begin} to end={end:g}, expected within the training's {limit} {unit}"
            )
        self._first = round(self.begin * per_unit)
        self._number = (round(end * per_unit) - self._first) // self.interval + 1
        if self.resrep is None:
            self._insert(runner, (1, *pictures_of(runner, 1).shape[1:]))  # costs are those of one picture
        model = plain_model(runner)
        weights = {name: c.weight for name, c in compactors_of(model, self.resrep.sites).items()}
        self._forgetting = Forgetting(weights, self.strength, self.marked_strength)
        if self.plan is not None:
            self._forgetting.mark(self.resrep.forgotten(self.plan))
        self._forgetting.attach(optimizers_of(runner))
        runner.logger.info(
            f"ResRepHook: {len(weights)} compactors, multiply-adds {self.resrep.macs_before:,} -> {self.resrep.target:,} "
            f"in {self._number} choices"
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        due = min(self._number, (runner.iter - self._first) // self.interval + 1)
        if due > (self.choices[-1]["number"] if self.choices else 0):
            self._choose(runner, due)
        remain = self.plan.macs_after if self.plan else self.resrep.macs_before
        runner.message_hub.update_scalar("train/resrep_macs", remain / self.resrep.macs_before)

    def _choose(self, runner: Runner, due: int) -> None:
        """Mark the rows of the choice with this number, from 1; all processes alike."""
        whole, target, model = self.resrep.macs_before, self.resrep.target, plain_model(runner)
        try:
            plan = self.resrep.choose(model, whole - (whole - target) * due // self._number)
        except ValueError as error:
            raise HookError(f"ResRepHook, choice {due}: {error}") from None
        shared = [plan.to_json()]
        broadcast_object_list(shared)
        self.plan = PrunePlan.from_json(shared[0])
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
                f"ResRepHook: training ended after choice {done} of {self._number}: {self.plan.macs_after:,} multiply-adds "
                f"remain, the target is {self.resrep.target:,}"
            )
        model = final_model(runner)
        left = self.resrep.rows_left(model, self.plan)
        if left["largest_dropped_share"] > SMALL:
            runner.logger.warning(
                f"ResRepHook: {self._describe(left)}; expected below {SMALL:.0%}: train longer after end, or raise "
                f"marked_strength (={self.marked_strength})"
            )
        pruned = copy.deepcopy(model)
        report = self.resrep.compact_(pruned, self.plan, pictures_of(runner))
        pruned.eval()
        self.rounds = []
        before, after = evaluate(runner, model), evaluate(runner, pruned)
        self.note(runner, self.plan, report, before, after)
        if warning := lost(before, after):
            runner.logger.warning(f"ResRepHook: {warning}; {self._describe(left)}")
        self.rounds[-1] |= left | dict(choices=self.choices)
        self.finish(runner, compose_plans([*self.plans_of(runner), self.plan]), pruned, report)
