"""LinearizeHook: lead annealed blocks from stock MobileNetV2's form to the mergeable one while training."""

import math
from collections.abc import Iterator

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from rep_plugin.backbones.warm_start import measure_identities_
from rep_plugin.blocks.annealed import annealed_modules, set_alpha_
from rep_plugin.errors import AnnealError, ArgumentError
from rep_plugin.registry import HOOKS

SCHEDULES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}


@HOOKS.register_module()
class LinearizeHook(Hook):
    """Anneal every ``alpha`` of a model built with ``anneal=True`` from 0 to exactly 1 between ``begin`` and ``end``.

    ``begin`` and ``end`` count epochs (fractions too), or iterations with ``by_epoch=False``; the last iteration before
    ``end`` is trained at alpha 1, and all later ones. Leave some epochs after ``end``: statistics and weights then settle
    to the form that is deployed. ``schedule``: ``linear`` or ``cosine``. The alpha follows from the iteration's number
    alone, so that a resumed run goes on exactly; EMA copies get the same; the log has it as ``linear_alpha``. Before the
    first iteration ``measure_batches`` training batches tell the identity branches their statistics, so that in train
    mode too the network starts as stock, see :func:`rep_plugin.backbones.warm_start.measure_identities_`.

    Raises ValueError for a bad argument, and at the start of training :class:`rep_plugin.errors.AnnealError` where
    ``end`` lies behind the training's, or the model has nothing to anneal or is annealed already.
    """

    priority = "LOW"  # after EMAHook, which averages or copies buffers; before checkpoints are written

    def __init__(
        self,
        begin: float = 0,
        end: float | None = None,
        by_epoch: bool = True,
        schedule: str = "linear",
        measure_batches: int = 8,
    ):
        if end is None or not 0 <= begin < end:
            raise ArgumentError(f"LinearizeHook needs 0 <= begin < end, got begin={begin}, end={end}")
        if schedule not in SCHEDULES:
            raise ArgumentError(f"schedule must be one of {sorted(SCHEDULES)}, got {schedule!r}")
        if not isinstance(measure_batches, int) or measure_batches < 0:
            raise ArgumentError(f"measure_batches must be a whole number >= 0, got {measure_batches!r}")
        self.measure_batches = measure_batches
        self.begin, self.end, self.by_epoch, self.schedule = begin, end, by_epoch, schedule
        self._first, self._last = 0, 1

    def alpha_at(self, iteration: int) -> float:
        """The alpha which the iteration of this number (from 0) is trained with."""
        share = (iteration + 1 - self._first) / (self._last - self._first)
        return 1.0 if share >= 1 else SCHEDULES[self.schedule](max(0.0, share))

    def before_train(self, runner: Runner) -> None:
        unit, limit, per_unit = "iterations", runner.max_iters, 1.0
        if self.by_epoch:
            if not isinstance(runner.train_loop, EpochBasedTrainLoop):
                raise AnnealError(
                    f"by_epoch=True needs epochs, {type(runner.train_loop).__name__} has none: by_epoch=False"
                )
            unit, limit, per_unit = "epochs", runner.max_epochs, runner.max_iters / runner.max_epochs
        if self.end > limit:
            raise AnnealError(f"LinearizeHook.end (={self.end}) must be <= the training's {limit} {unit}")
        self._first, self._last = round(self.begin * per_unit), round(self.end * per_unit)
        if self._first >= self._last:
            raise AnnealError(
                f"between begin={self.begin} and end={self.end} {unit} lies no iteration, expected at least 1"
            )
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
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
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
        for model in self._ema_models(runner):
            set_alpha_(model, self.alpha_at(runner.iter))

    @staticmethod
    def _ema_models(runner: Runner) -> Iterator[nn.Module]:
        return (hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook))
