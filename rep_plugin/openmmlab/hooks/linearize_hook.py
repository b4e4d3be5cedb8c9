"""LinearizeHook: lead annealed blocks from stock MobileNetV2's form to the mergeable one while training."""

import math
from typing import Annotated

from mmengine.hooks import Hook
from mmengine.runner import Runner

from rep_plugin.arguments import In, NotNegative, OneOf, Positive, checked
from rep_plugin.backbones.warm_start import measure_identities_
from rep_plugin.blocks.annealed import annealed_modules, set_alpha_
from rep_plugin.errors import AnnealError, ArgumentError, HookError
from rep_plugin.openmmlab.hooks.runner_utils import ema_models, plain_model
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.registry import HOOKS

SCHEDULES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}


@checked
@HOOKS.register_module()
class LinearizeHook(Hook):
    """Anneal every ``alpha`` of a model built with ``anneal=True`` from 0 to exactly 1 between ``begin`` and ``end``.

    The last iteration before ``end`` is trained at alpha 1, and all later ones. Leave some epochs after ``end``: statistics
    and weights then settle to the form that is deployed. The alpha follows from the iteration's number alone, so that a
    resumed run goes on exactly; EMA copies get the same; the log has it as ``linear_alpha``.

    Args:
        begin: Epochs at alpha 0, fractions too.
        end: Epochs after which alpha is 1.
        by_epoch: False: ``begin`` and ``end`` count iterations.
        schedule: ``linear`` or ``cosine``.
        measure_batches: Training batches that measure the statistics of the identity branches before the first iteration,
            so that in train mode too the network starts as stock, see
            :func:`rep_plugin.backbones.warm_start.measure_identities_`.

    Raises:
        ArgumentError: An argument is out of its range.
        AnnealError: ``end`` lies behind the training's, or the model has nothing to anneal or is annealed already.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.LinearizeHook", begin=2, end=20)]
    """

    priority = "LOW"  # after EMAHook, which averages or copies buffers; before checkpoints are written

    def __init__(
        self,
        begin: NotNegative = 0,
        end: Positive | None = None,
        by_epoch: bool = True,
        schedule: Annotated[str, OneOf(SCHEDULES)] = "linear",
        measure_batches: Annotated[int, In("[0, inf)")] = 8,
    ):
        self.schedule = Schedule(begin, end, by_epoch=by_epoch)
        if end is None or begin == end:
            raise ArgumentError(f"LinearizeHook needs 0 <= begin < end, got begin={begin}, end={end}")
        self.measure_batches, self._curve = measure_batches, SCHEDULES[schedule]
        self._due = self.schedule  # in iterations, once there is a training

    def alpha_at(self, iteration: int) -> float:
        """The alpha which the iteration of this number (from 0) is trained with."""
        share = (iteration + 1 - self._due.begin) / (self._due.end - self._due.begin)
        return 1.0 if share >= 1 else self._curve(max(0.0, share))

    def before_train(self, runner: Runner) -> None:
        begin, end = self.schedule.begin, self.schedule.end
        try:
            limit, unit = self.schedule.length(runner, "LinearizeHook")
        except HookError as error:
            raise AnnealError(str(error)) from None
        if end > limit:
            raise AnnealError(f"LinearizeHook.end (={end}) must be <= the training's {limit} {unit}")
        self._due = self.schedule.in_iterations(runner, "LinearizeHook")
        if self._due.begin == self._due.end:
            raise AnnealError(f"between begin={begin} and end={end} {unit} lies no iteration, expected at least 1")
        alphas = {module.alpha for module in annealed_modules(runner.model)}
        if not alphas:
            raise AnnealError("the model has no annealed block, expected a backbone with anneal=True")
        if runner.iter == 0 and alphas != {0.0}:
            raise AnnealError(
                f"the model starts at alpha {max(alphas):.4g}, expected 0: it is annealed already, drop LinearizeHook"
            )
        if runner.iter == 0 and self.measure_batches:
            self._measure(runner)

    def _measure(self, runner: Runner) -> None:
        model = plain_model(runner)
        loader = zip(range(self.measure_batches), runner.train_dataloader)
        count = measure_identities_(model, (model.data_preprocessor(batch, True)["inputs"] for _, batch in loader))
        runner.logger.info(
            f"LinearizeHook measured {count} identity branches on {self.measure_batches} batches at most"
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        alpha = self.alpha_at(runner.iter)
        set_alpha_(runner.model, alpha)
        runner.message_hub.update_scalar("train/linear_alpha", alpha)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        for average in ema_models(runner):
            set_alpha_(average.module, self.alpha_at(runner.iter))
