"""SparsityHook: pull weak channels to zero while training, so that pruning finds something to remove."""

from collections.abc import Mapping
from typing import Annotated

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rep_plugin.arguments import In, NotNegative, OneOf, Positive, Strength, checked
from rep_plugin.errors import ArgumentError, HookError, TraceError
from rep_plugin.measure.plots import gammas_figure
from rep_plugin.openmmlab.hooks.runner_utils import (
    add_plot,
    as_hook_error,
    optimizers_of,
    plain_model,
    shape_of_one,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.pruning.methods.sparsity import MODES, Sparsity, all_parts, prunable_parts, strengths_of
from rep_plugin.registry import HOOKS

SMALL = 1e-3  # gammas below it are counted in the log


@checked
@HOOKS.register_module()
class SparsityHook(Hook):
    """L1 on the gammas of batch norms (Liu et al., "Network Slimming", ICCV 2017), and group lasso on filters.

    It acts once a real step, after unscaling, accumulation and clipping, so that it is right under any optimizer wrapper
    and DDP, see :class:`rep_plugin.pruning.methods.sparsity.Sparsity`. The factor of the strength follows from the
    iteration's number alone, so that resuming goes on exactly. Of a RepBlock only the output norms are taken. The log has
    ``sparsity_factor``, and after each epoch how many gammas are below 1e-3; a histogram of them goes to the visualizer as
    ``gammas``. EMA copies are averages: they come near zero, and are not exactly there.

    Args:
        strength: Of the L1.
        overrides: {name pattern of batch norms: another strength}, 0 leaves them alone; the first that fits counts.
        mode: ``subgradient``, or ``proximal`` (exact zeros).
        group_strength: Of a group lasso on the filters of convolutions (Wen et al., NeurIPS 2016). It matters where scores
            read kernels; a batch norm behind a filter undoes its scale.
        warmup: Epochs over which the strength rises linearly, fractions too.
        end: Epochs after which there is none, for fine-tuning.
        by_epoch: False: ``warmup`` and ``end`` count iterations.
        only_prunable: Pull only channels that could be pruned (the model is traced once, with the size of its images);
            False: all batch norms, without tracing.
        histogram_interval: Epochs between two histograms, 0: none; one more when the pull ends, and one at the end.

    Raises:
        ArgumentError: An argument is out of its range.
        HookError: At the start of training, where a pattern matches nothing, the model cannot be traced, or there is
            nothing to pull.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.SparsityHook", strength=1e-4, warmup=2, end=30)]
    """

    def __init__(
        self,
        strength: Strength = 1e-4,
        overrides: Mapping[str, Strength] | None = None,
        mode: Annotated[str, OneOf(MODES)] = "subgradient",
        group_strength: Strength = 0.0,
        warmup: NotNegative = 0,
        end: Positive | None = None,
        by_epoch: bool = True,
        only_prunable: bool = True,
        histogram_interval: Annotated[int, In("[0, inf)")] = 10,
    ):
        self.strength, self.overrides, self.group_strength = strength, dict(overrides or {}), group_strength
        if end is not None and warmup >= end:
            raise ArgumentError(f"SparsityHook needs 0 <= warmup < end, got warmup={warmup}, end={end}")
        self.schedule = Schedule(warmup, end, by_epoch=by_epoch)
        self.mode, self.only_prunable, self.histogram_interval = mode, only_prunable, histogram_interval
        self.sparsity: Sparsity | None = None
        self._due, self._pulls = self.schedule, False

    def factor_at(self, iteration: int) -> float:
        """The share of the full strength which the iteration of this number (from 0) is trained with."""
        if self._due.end is not None and iteration >= self._due.end:
            return 0.0
        return 1.0 if iteration >= self._due.begin else (iteration + 1) / (self._due.begin + 1)

    def before_train(self, runner: Runner) -> None:
        self._due = self.schedule.in_iterations(runner, "SparsityHook")
        limit, unit = self.schedule.length(runner, "SparsityHook")
        if self.schedule.begin >= limit:
            raise HookError(
                f"SparsityHook.warmup (={self.schedule.begin}) must be < the training's {limit} {unit}: the full strength "
                "would never be reached"
            )
        model = plain_model(runner)
        norms, kernels = self._parts(runner)
        with as_hook_error("SparsityHook"):
            strengths = strengths_of(norms, self.strength, self.overrides)
            gammas = {model.get_submodule(name).weight: value for name, value in strengths.items() if value}
            filters = {model.get_submodule(name).weight: self.group_strength for name in kernels if self.group_strength}
            if not gammas and not filters:
                raise HookError(
                    f"SparsityHook has nothing to pull in {type(model).__name__}: no batch norm has a strength"
                )
            self.sparsity = Sparsity(gammas, filters, self.mode)
            self.sparsity.attach(optimizers_of(runner))
        runner.logger.info(f"SparsityHook pulls {len(gammas)} batch norms and {len(filters)} kernels, {self.mode}")

    def _parts(self, runner: Runner) -> tuple[list[str], list[str]]:
        model = plain_model(runner)
        if not self.only_prunable:
            return all_parts(model)
        try:
            return prunable_parts(model, shape_of_one(runner))
        except TraceError as error:
            raise HookError(f"SparsityHook: {error}; only_prunable=False takes all batch norms") from None

    def before_train_epoch(self, runner: Runner) -> None:
        self._pulls = self.factor_at(runner.iter) > 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self.sparsity.factor = self.factor_at(runner.iter)
        runner.message_hub.update_scalar("train/sparsity_factor", self.sparsity.factor)

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.sparsity.gammas:
            return
        gammas = torch.cat([gamma.detach().abs().flatten() for gamma in self.sparsity.gammas])
        small, zero = (gammas < SMALL).float().mean().item(), (gammas == 0).float().mean().item()
        runner.logger.info(
            f"SparsityHook: {small:.1%} of {len(gammas):,} gammas below {SMALL}, {zero:.1%} exactly zero, "
            f"mean {gammas.mean():.3g}"
        )
        if self._draws(runner):
            title = f"after {runner.iter:,} iterations, L1 {self.strength:g}: {small:.1%} of the gammas below {SMALL}"
            add_plot(runner, "gammas", lambda: gammas_figure(gammas.cpu().numpy(), title))

    def _draws(self, runner: Runner) -> bool:
        """Whether the epoch that is over is one to draw."""
        if not self.histogram_interval:
            return False
        # A loop without epochs calls this once, at its end.
        over = runner.iter >= runner.max_iters or (self._pulls and self.factor_at(runner.iter) == 0)
        return over or (runner.epoch + 1) % self.histogram_interval == 0

    def after_train(self, runner: Runner) -> None:
        self.sparsity.detach()
