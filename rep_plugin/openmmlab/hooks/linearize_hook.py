"""LinearizeHook: lead activations from stock's form to the mergeable one while training."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from rep_plugin.arguments import In, NotNegative, OneOf, Positive, checked
from rep_plugin.backbones.warm_start import measure_identities_
from rep_plugin.blocks.activations import FUNCTIONS
from rep_plugin.blocks.annealed import annealed_modules, set_alpha_
from rep_plugin.blocks.annealed_layers import has_segments, in_segments
from rep_plugin.checkpoints.files import write_text
from rep_plugin.depth import DepthPlan, linearize, plan_depth
from rep_plugin.depth.plan import as_depth_plan
from rep_plugin.depth.planner import Share
from rep_plugin.depth.timing import EAGER, Runtime
from rep_plugin.errors import AnnealError, ArgumentError, HookError, RepPluginError, first_line
from rep_plugin.history import history_of, rebuild_
from rep_plugin.measure.copies import copy_model
from rep_plugin.openmmlab.accuracy import calibration_images, judge_of
from rep_plugin.openmmlab.hooks.base_pruning_hook import PruningHook, from_main_process
from rep_plugin.openmmlab.hooks.runner_utils import (
    ema_models,
    images_of,
    kept_random_state,
    plain_model,
)
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.openmmlab.hooks.stateful_hook import StatefulHook, parse_kept
from rep_plugin.openmmlab.load import KEPT, LINEARIZE
from rep_plugin.registry import HOOKS

SCHEDULES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}
PLAN = "depth_plan.json"


class _First(Hook):
    """What a LinearizeHook does before others: EMAHook loads its copy of a checkpoint, hooks that prune rehearse."""

    priority = "HIGH"

    def __init__(self, hook: "LinearizeHook"):
        self.hook = hook

    def before_train(self, runner: Runner) -> None:
        self.hook.refuse_rivals(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.hook.after_load_checkpoint(runner, checkpoint)


@checked
@HOOKS.register_module()
class LinearizeHook(StatefulHook):
    """Anneal every ``alpha`` of a model from 0 to exactly 1 between ``begin`` and ``end``.

    The model is one built with ``anneal=True``; or any stock model, in which ``plan`` or ``latency`` says which activations
    go: they are replaced once the weights are loaded, as :func:`rep_plugin.linearize` does, and ``ReparamHook`` merges what
    lay between them. With ``latency`` that is done when ``begin`` has come: the plan is made then, by validation, and written
    to ``depth_plan.json`` in the work directory. Neither goes with hooks that prune:
    linearize what they wrote.

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
        plan: What :func:`rep_plugin.plan_depth` returns, its data, its JSON text or the path of its file; or
        latency: Share of the network's own time that may remain, measured on the main process's machine.
        runtime: Where it is measured: ``eager``, ``onnxruntime`` or ``openvino``.
        judge_batches: Validation batches, spread over the set, that judge each segment; 0: the outputs alone judge.
        act_after: Activation that is annealed in behind each segment that is a block's output; default: the plan's.
        skip: With ``latency``: residual blocks may go whole, too.

    Raises:
        ArgumentError: An argument is out of its range, or the plan is of another model.
        AnnealError: ``end`` lies behind the training's, the model has nothing to anneal or is annealed already, or a hook
            prunes beside a plan.

    Example:
        >>> custom_hooks = [dict(type="rep_plugin.LinearizeHook", begin=2, end=20, plan="depth_plan.json")]
    """

    meta_key = LINEARIZE
    priority = "LOW"  # after EMAHook, which averages or copies buffers; before checkpoints are written

    def __init__(
        self,
        begin: NotNegative = 0,
        end: Positive | None = None,
        by_epoch: bool = True,
        schedule: Annotated[str, OneOf(SCHEDULES)] = "linear",
        measure_batches: Annotated[int, In("[0, inf)")] = 8,
        plan: DepthPlan | Mapping | str | Path | None = None,
        latency: Share | None = None,
        runtime: Runtime = EAGER,
        judge_batches: Annotated[int, In("[0, inf)")] = 4,
        act_after: Annotated[str, OneOf(FUNCTIONS)] | None = None,
        skip: bool = False,
    ):
        self.schedule = Schedule(begin, end, by_epoch=by_epoch)
        if end is None or begin == end:
            raise ArgumentError(f"LinearizeHook needs 0 <= begin < end, got begin={begin}, end={end}")
        if plan is not None and latency is not None:
            raise ArgumentError("give at most one of plan and latency")
        if skip and latency is None:
            raise ArgumentError("skip of LinearizeHook needs latency: a plan says itself what goes whole")
        self.measure_batches, self._curve = measure_batches, SCHEDULES[schedule]
        self.plan = None if plan is None else as_depth_plan(plan)
        self.latency, self.runtime, self.judge_batches, self.act_after = latency, runtime, judge_batches, act_after
        self.skip = skip
        self._done: dict | None = None  # the step, once it is made
        self._is_registered = False
        self._due = self.schedule  # in iterations, once there is a training

    def alpha_at(self, iteration: int) -> float:
        """The alpha which the iteration of this number (from 0) is trained with."""
        share = (iteration + 1 - self._due.begin) / (self._due.end - self._due.begin)
        return 1.0 if share >= 1 else self._curve(max(0.0, share))

    def before_run(self, runner: Runner) -> None:
        if not self._is_registered:  # with a hook put in before this one, mmengine's loop comes by once more
            self._is_registered = True
            runner.register_hook(_First(self))

    def refuse_rivals(self, runner: Runner) -> None:
        """Raise AnnealError where a hook prunes what a plan is of."""
        rival = next((type(hook).__name__ for hook in runner.hooks if isinstance(hook, PruningHook)), None)
        if rival and (self.plan is not None or self.latency is not None):
            raise AnnealError(
                f"LinearizeHook with {'latency' if self.plan is None else 'plan'} and {rival} do not go together in one "
                "training: prune first, then linearize what it wrote (pruned.py)"
            )

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
        if self.plan is not None and self._done is None:
            self._linearize(runner)
        if self.pending:
            if any(True for _ in annealed_modules(runner.model)):
                raise AnnealError("latency of LinearizeHook is for stock models: this one is annealed already")
            return
        alphas = {module.alpha for module in annealed_modules(runner.model)}
        if not alphas:
            raise AnnealError(
                "the model has no annealed block, expected a backbone with anneal=True, or plan=... or latency=... of "
                "LinearizeHook"
            )
        if runner.iter == 0 and alphas != {0.0}:
            raise AnnealError(
                f"the model starts at alpha {max(alphas):.4g}, expected 0: it is annealed already, drop LinearizeHook"
            )
        if runner.iter == 0 and self.measure_batches and not has_segments(runner.model):
            self._measure(runner)

    @property
    def pending(self) -> bool:
        """Whether the plan is still to be made."""
        return self.latency is not None and self._done is None

    def _linearize(self, runner: Runner) -> None:
        """Give the model annealed layers, and its averages the same."""
        model = plain_model(runner)
        with kept_random_state():
            plan = self.plan or self._plan(runner, model)
            try:
                _, report = linearize(
                    model, plan, inplace=True, act_after=self.act_after, example_input=images_of(runner, 2)
                )
            except ArgumentError as error:
                raise ArgumentError(f"LinearizeHook: {first_line(error)}") from None
        self._keep(runner, next(step for step in history_of(model) if step["step"] == "linearize"))
        runner.logger.info(f"LinearizeHook: {plan}\n{report}")

    def _keep(self, runner: Runner, step: Mapping[str, Any]) -> None:
        self._done = {key: step[key] for key in KEPT}
        for average in ema_models(runner):
            if not any(True for _ in in_segments(average.module)):
                rebuild_(average.module, [{"step": "linearize", **self._done}])

    def _plan(self, runner: Runner, model: nn.Module) -> DepthPlan:
        """The plan of the main process, by its own clock and validation."""
        copied, plan = copy_model(model), DepthPlan(type(model).__name__, (), ())
        failure = ""
        if is_main_process():
            loop, judge = runner.val_loop, None
            if self.judge_batches and loop is not None:
                judge = judge_of(loop.dataloader, loop.evaluator, self.judge_batches)
            images = calibration_images(copied, runner.train_loop.dataloader)
            try:
                plan = plan_depth(
                    copied.cpu(), images_of(runner, 1).cpu(), judge, latency=self.latency, runtime=self.runtime,
                    calibration=images.cpu(), act_after=self.act_after, skip=self.skip,
                )  # fmt: skip
            except RepPluginError as error:
                failure = first_line(error)
            else:
                write_text(Path(runner.work_dir) / PLAN, plan.to_json())
        plan = from_main_process(plan)
        if failure:
            raise AnnealError(f"LinearizeHook cannot plan: {failure}")
        return plan

    def state(self) -> str | None:
        return None if self._done is None else json.dumps(self._done)

    def load_structure(self, runner: Runner, state: object) -> None:
        step = parse_kept(state, LINEARIZE, KEPT)
        model = plain_model(runner)
        if not any(True for _ in in_segments(model)):
            rebuild_(model, [{"step": "linearize", **step}])
        self._keep(runner, step)

    def _measure(self, runner: Runner) -> None:
        model = plain_model(runner)
        loader = zip(range(self.measure_batches), runner.train_dataloader)
        count = measure_identities_(model, (model.data_preprocessor(batch, True)["inputs"] for _, batch in loader))
        runner.logger.info(
            f"LinearizeHook measured {count} identity branches on {self.measure_batches} batches at most"
        )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.pending and runner.iter >= self._due.begin:
            self._linearize(runner)
        alpha = self.alpha_at(runner.iter)
        set_alpha_(runner.model, alpha)
        runner.message_hub.update_scalar("train/linear_alpha", alpha)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        for average in ema_models(runner):
            set_alpha_(average.module, self.alpha_at(runner.iter))
