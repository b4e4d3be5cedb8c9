"""PruneHook: remove channels while training goes on, in rounds, or once at its end."""

from collections.abc import Mapping, Sequence

from mmengine.runner import Runner
from torch import nn

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.openmmlab.hooks.pruning_hook import (
    PruningHook,
    StepClock,
    check_scores,
    check_share,
    prune_runner_,
    shared_plan,
)
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, final_model, iterations_of, pictures_of, plain_model
from rep_plugin.pruning import PrunePlan, TraceError, plan_pruning
from rep_plugin.pruning.planning.plan import compose_plans
from rep_plugin.registry import HOOKS


@HOOKS.register_module()
class PruneHook(PruningHook):
    """Plan and remove channels: after training, or after ``begin`` epochs and every ``interval`` epochs, going on between.

    How much, one of: ``prune_fraction``, the share of the prunable channels removed in all; ``params`` or ``macs``, what may
    remain (a share as a float, or a whole number); each reached in ``rounds`` equal steps. Or ``fractions``: for each
    round the share removed of what is left then. ``scores``, ``scope``, ``min_channels``, ``round_to``, ``overrides`` and
    ``ignore`` as :func:`rep_plugin.plan_pruning` has them; fractions in ``overrides`` are reached in rounds too.

    Without ``begin`` a copy of the trained model (of the EMA weights, where there are) is pruned once, and written. With
    ``begin`` (epochs that are over then; iterations with ``by_epoch=False``) the model in training is pruned before the
    next one starts: parameters, momentum and EMA copy stay and become narrower, DDP is wrapped anew, and every removal is
    first proven equal to masking. What follows is fine-tuning; ``pruned.pth pruned.py`` are written at its end. The same
    scheme as in Li et al., "Pruning Filters" (ICLR 2017) and Molchanov et al. (ICLR 2017).

    Validation is run before and after each round, and after the fine-tuning; figures go to the log and to
    ``pruned.rounds.json``, with the steps per second before and after each removal (the median, since the last start of
    training); an accuracy that falls below half is a warning. Resuming, also after a kill between a removal
    and the next checkpoint, goes on exactly: see :class:`rep_plugin.openmmlab.hooks.pruning_hook.PruningHook`.

    Raises ValueError for bad arguments; :class:`rep_plugin.errors.HookError` where the rounds do not fit the training,
    or the model cannot be pruned so.
    """

    def __init__(
        self,
        prune_fraction: float | None = None,
        *,
        params: int | float | None = None,
        macs: int | float | None = None,
        fractions: Sequence[float] | None = None,
        begin: float | None = None,
        interval: float = 1,
        rounds: int = 1,
        by_epoch: bool = True,
        scores: str = "bn_gamma",
        scope: str = "global",
        min_channels: int = 1,
        round_to: int = 1,
        overrides: Mapping[str, float | str] | None = None,
        ignore: Sequence[str] = (),
        out_dir: str | None = None,
    ):
        super().__init__(out_dir)
        given = dict(prune_fraction=prune_fraction, params=params, macs=macs, fractions=fractions)
        self.amount = {name: value for name, value in given.items() if value is not None}
        if len(self.amount) != 1:
            raise ArgumentError(f"give exactly one of {', '.join(given)}, got {list(self.amount) or 'none'}")
        if fractions is not None:
            if isinstance(fractions, (str, float, int)) or not fractions or rounds not in (1, len(fractions)):
                raise ArgumentError(
                    f"fractions must be a list with one number a round, got {fractions!r}, rounds={rounds}"
                )
            rounds = len(fractions)
        if prune_fraction is not None:
            check_share("prune_fraction", prune_fraction)
        for index, fraction in enumerate(fractions or ()):
            check_share(f"fractions[{index}]", fraction)
        for name, value in (("params", params), ("macs", macs)):
            if value is not None and (
                isinstance(value, bool) or not value > 0 or (isinstance(value, float) and value > 1)
            ):
                raise ArgumentError(f"{name} must be a share (a float <= 1.0) or a whole number > 0, got {value!r}")
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            raise ArgumentError(f"rounds must be a whole number >= 1, got {rounds!r}")
        if begin is None and rounds > 1:
            raise ArgumentError(f"{rounds} rounds need begin: without it the model is pruned once, after training")
        if begin is not None and (begin < 0 or not interval > 0):
            raise ArgumentError(f"PruneHook needs begin >= 0 and interval > 0, got begin={begin}, interval={interval}")
        check_scores(scores)
        self.begin, self.interval, self.number, self.by_epoch = begin, interval, rounds, by_epoch
        self.overrides = dict(overrides or {})
        self.options = dict(
            scores=scores, scope=scope, min_channels=min_channels, round_to=round_to, ignore=tuple(ignore)
        )
        self._clock = StepClock()

    def before_train(self, runner: Runner) -> None:
        if self.begin is None:
            return
        iterations_of(runner, self.by_epoch, "PruneHook")
        unit, limit = ("epochs", runner.max_epochs) if self.by_epoch else ("iterations", runner.max_iters)
        last = self.begin + (self.number - 1) * self.interval
        if last >= limit:
            raise HookError(
                f"PruneHook's last round comes after {last} {unit}, expected fewer than the training's {limit}"
            )

    def before_train_epoch(self, runner: Runner) -> None:
        if self.begin is not None and self.by_epoch:
            self._prune_if_due(runner, runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.begin is not None and not self.by_epoch:
            self._prune_if_due(runner, runner.iter)
        self._clock.start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self._clock.stop()

    def _prune_if_due(self, runner: Runner, progress: int) -> None:
        done = len(self.rounds)
        if done < self.number and progress >= self.begin + done * self.interval:
            self._prune(runner)

    def after_train(self, runner: Runner) -> None:
        if self.begin is None:
            self.rounds = []
            self.prune_a_copy(runner, self._plan(runner, final_model(runner)))
            return
        if not self.rounds:
            runner.logger.warning("PruneHook: training ended before the first round, nothing was pruned")
            return
        self._note_speed(runner)
        model = final_model(runner)
        self.note_tuned(runner, evaluate(runner, model))
        plan = compose_plans(self.plans_of(runner))
        self.finish(runner, plan, model, self.whole_report(plan, model))

    def _note_speed(self, runner: Runner) -> float | None:
        """Complete the last round with the speed after it, and return that."""
        speed = self._clock.lap()
        if self.rounds and speed is not None:
            pair = self.rounds[-1]["steps_per_second"]
            pair["after"] = speed
            before = "unknown" if pair["before"] is None else f"{pair['before']:.3g}"
            runner.logger.info(f"PruneHook, round {len(self.rounds)}: steps per second {before} -> {speed:.3g}")
        return speed

    def _prune(self, runner: Runner) -> None:
        speed = self._note_speed(runner)
        plan = self._plan(runner, plain_model(runner))
        before = evaluate(runner, final_model(runner))
        self.note_tuned(runner, before)
        runner.call_hook("before_removal")  # DistillHook copies the model that teaches
        report = prune_runner_(runner, plan, example_input=pictures_of(runner))
        self.note(runner, plan, report, before, evaluate(runner, final_model(runner)))
        self.rounds[-1]["steps_per_second"] = {"before": speed, "after": None}

    def _plan(self, runner: Runner, model: nn.Module) -> PrunePlan:
        """The plan of the main process: all prune alike."""
        shape = (1, *pictures_of(runner, 1).shape[1:])  # costs are those of one picture
        try:
            plan = plan_pruning(model, shape, **self._amounts(model, shape), **self.options)
        except (ValueError, TraceError) as error:
            raise HookError(f"PruneHook, round {len(self.rounds) + 1}: {error}") from None
        return shared_plan(plan)

    def _amounts(self, model: nn.Module, shape: tuple[int, ...]) -> dict:
        """What this round removes, as arguments of plan_pruning: fractions of what is left, budgets in whole numbers."""
        round_, ((name, amount),) = len(self.rounds), self.amount.items()
        overrides = {p: v if v == "frozen" else self._share(v, round_) for p, v in self.overrides.items()}
        if name == "fractions":
            return dict(prune_fraction=amount[round_], overrides=self.overrides)
        if name == "prune_fraction":
            return dict(prune_fraction=self._share(amount, round_), overrides=overrides)
        if self.number == 1:
            return {name: amount, "overrides": overrides}
        whole = plan_pruning(model, shape, scores="l1", prune_fraction=0.0)
        now = {"params": whole.params_before, "macs": whole.macs_before}[name]
        first = self.rounds[0][f"plan_{name}"] if self.rounds else now
        target = amount * first if isinstance(amount, float) else amount
        return {name: round(first - (first - target) * (round_ + 1) / self.number), "overrides": overrides}

    def _share(self, whole: float, round_: int) -> float:
        """The share of what is left which this round removes, so that ``whole`` of the beginning goes in equal steps."""
        step = whole / self.number
        return step / (1 - step * round_)
