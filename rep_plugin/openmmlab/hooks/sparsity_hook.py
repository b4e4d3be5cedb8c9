"""SparsityHook: pull weak channels to zero while training, so that pruning finds something to remove."""

import math
from collections.abc import Mapping

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.measure.plots import gammas_figure
from rep_plugin.openmmlab.hooks.runner_utils import iterations_of, optimizers_of, pictures_of, plain_model, show
from rep_plugin.pruning import TraceError
from rep_plugin.pruning.methods.sparsity import MODES, Sparsity, all_parts, check_strength, prunable_parts, strengths_of
from rep_plugin.registry import HOOKS

SMALL = 1e-3  # gammas below it are counted in the log


@HOOKS.register_module()
class SparsityHook(Hook):
    """L1 on the gammas of batch norms (Liu et al., "Network Slimming", ICCV 2017), and group lasso on filters.

    ``strength`` of the L1; ``overrides``: name pattern of batch norms -> another one (0 leaves them alone), the first that
    fits counts. ``group_strength``: group lasso on the filters of convolutions (Wen et al., NeurIPS 2016); it says
    something where scores read kernels, a batch norm behind a filter undoes its scale. ``mode``: ``subgradient`` or
    ``proximal`` (exact zeros), see :class:`rep_plugin.pruning.methods.sparsity.Sparsity`, which acts once a real step, after
    unscaling, accumulation and clipping, so that it is right under any optimizer wrapper and DDP. ``warmup``: the strength
    rises linearly over so many epochs; from ``end`` on there is none, for fine-tuning (fractions too; iterations with
    ``by_epoch=False``). Both follow from the iteration's number alone, so that resuming goes on exactly.

    Only channels that could be pruned are pulled (the model is traced once, with the size of its pictures);
    ``only_prunable=False`` takes all batch norms, without tracing. Of a RepBlock only the output norms are taken. The log
    has ``sparsity_factor``, and after each epoch how many gammas are below 1e-3; a histogram of them goes to the
    visualizer as ``gammas`` after every ``histogram_interval`` epochs (0: never), when the pull ends, and at the end. EMA
    copies are averages: they come near zero, and are not exactly there.

    Raises ValueError for bad arguments, and :class:`rep_plugin.errors.HookError` at the start of training for patterns
    that match nothing, models that cannot be traced, and where there is nothing to pull.
    """

    def __init__(
        self,
        strength: float = 1e-4,
        overrides: Mapping[str, float] | None = None,
        mode: str = "subgradient",
        group_strength: float = 0.0,
        warmup: float = 0,
        end: float | None = None,
        by_epoch: bool = True,
        only_prunable: bool = True,
        histogram_interval: int = 10,
    ):
        self.strength = check_strength("strength", strength)
        self.overrides = {p: check_strength(f"overrides[{p!r}]", v) for p, v in (overrides or {}).items()}
        self.group_strength = check_strength("group_strength", group_strength)
        if mode not in MODES:
            raise ArgumentError(f"mode must be one of {MODES}, got {mode!r}")
        if not 0 <= warmup < (math.inf if end is None else end):
            raise ArgumentError(f"SparsityHook needs 0 <= warmup < end, got warmup={warmup}, end={end}")
        if isinstance(histogram_interval, bool) or not isinstance(histogram_interval, int) or histogram_interval < 0:
            raise ArgumentError(f"histogram_interval must be a whole number of epochs >= 0, got {histogram_interval!r}")
        self.mode, self.by_epoch, self.only_prunable = mode, by_epoch, only_prunable
        self.histogram_interval = histogram_interval
        self.warmup, self.end = warmup, math.inf if end is None else end
        self.sparsity: Sparsity | None = None
        self._iterations, self._pulls = 1.0, False

    def factor_at(self, iteration: int) -> float:
        """The share of the full strength which the iteration of this number (from 0) is trained with."""
        if iteration >= self.end * self._iterations - 0.5:
            return 0.0
        rise = round(self.warmup * self._iterations)
        return 1.0 if iteration >= rise else (iteration + 1) / (rise + 1)

    def before_train(self, runner: Runner) -> None:
        self._iterations = iterations_of(runner, self.by_epoch, "SparsityHook")
        model = plain_model(runner)
        norms, kernels = self._parts(runner)
        try:
            strengths = strengths_of(norms, self.strength, self.overrides)
            gammas = {model.get_submodule(name).weight: value for name, value in strengths.items() if value}
            filters = {model.get_submodule(name).weight: self.group_strength for name in kernels if self.group_strength}
            if not gammas and not filters:
                raise HookError(
                    f"SparsityHook has nothing to pull in {type(model).__name__}: no batch norm has a strength"
                )
            self.sparsity = Sparsity(gammas, filters, self.mode)
            self.sparsity.attach(optimizers_of(runner))
        except HookError:
            raise
        except ValueError as error:
            raise HookError(f"SparsityHook: {error}") from None
        runner.logger.info(f"SparsityHook pulls {len(gammas)} batch norms and {len(filters)} kernels, {self.mode}")

    def _parts(self, runner: Runner) -> tuple[list[str], list[str]]:
        model = plain_model(runner)
        if not self.only_prunable:
            return all_parts(model)
        try:
            return prunable_parts(model, (1, *pictures_of(runner, 1).shape[1:]))
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
            show(runner, "gammas", lambda: gammas_figure(gammas.cpu().numpy(), title))

    def _draws(self, runner: Runner) -> bool:
        """Whether the epoch that is over is one to draw."""
        if not self.histogram_interval:
            return False
        # A loop without epochs calls this once, at its end.
        over = runner.iter >= runner.max_iters or (self._pulls and self.factor_at(runner.iter) == 0)
        return over or (runner.epoch + 1) % self.histogram_interval == 0

    def after_train(self, runner: Runner) -> None:
        self.sparsity.detach()
