"""Pruning of the model that a Runner is training, and of what a training ends with."""

import copy
import gc
import json
import statistics
import time
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rep_plugin.errors import ArgumentError, HookError
from rep_plugin.history import history_of
from rep_plugin.measure.costs import count_params
from rep_plugin.measure.plots import widths_figure
from rep_plugin.openmmlab.artefacts import write_pruned_model
from rep_plugin.openmmlab.configs import pruned_config
from rep_plugin.openmmlab.hooks.runner_utils import (
    collapsed,
    describe,
    ema_hooks,
    evaluate,
    final_model,
    modes_of,
    optimizers_of,
    pictures_of,
    plain_model,
    restore_modes_,
    show,
    show_rounds,
)
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan
from rep_plugin.pruning.planning.options import SCORES
from rep_plugin.pruning.planning.plan import as_plan, compose_plans

META = "rep_prune"  # in a checkpoint's meta data


# A hook has no loader to take first-order scores from.
HOOK_SCORES = [name for name in SCORES if name != "taylor"]


def check_scores(scores: object) -> None:
    """Raise ValueError for scores that a hook cannot take."""
    if scores not in HOOK_SCORES:
        raise ArgumentError(f"scores must be one of {HOOK_SCORES}, got {scores!r}")


def check_share(name: str, value: object) -> None:
    """Raise ValueError unless a share of channels is a number that removes some and leaves some."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ArgumentError(f"{name} must lie in (0, 1), got {value!r}")


def shared_plan(plan: PrunePlan) -> PrunePlan:
    """Return the plan of the main process, so that all prune alike."""
    shared = [plan.to_json()]
    broadcast_object_list(shared)
    return PrunePlan.from_json(shared[0])


def prune_runner_(
    runner: Runner, plan: PrunePlan, verify: bool = True, example_input: Tensor | None = None
) -> PruneReport:
    """Remove channels from the model in training, with the optimizers' state and the EMA copy; DDP is wrapped anew.

    Raises what :func:`rep_plugin.apply_plan` raises, and HookError for another wrapper than DDP; all is then as before.
    """
    model = plain_model(runner)
    averages = changeable(runner)
    modes = modes_of(model)
    model.eval()
    try:
        report = apply_plan(
            model,
            plan,
            optimizers_of(runner),
            ema=averages[0] if averages else None,
            verify=verify,
            example_input=example_input,
        )
    finally:
        restore_modes_(modes)
    for average in averages:
        if average.update_buffers:  # a state dict holds the tensors as they were
            average.avg_parameters = average.module.state_dict()
    wrap_anew(runner)
    return report


def changeable(runner: Runner) -> list[nn.Module]:
    """Return the EMA copies, one at most, that a change of the model in training must change along.

    Raises HookError for several, and for another wrapper than DDP.
    """
    if is_model_wrapper(runner.model) and not isinstance(runner.model, DistributedDataParallel):
        raise HookError(
            f"a model inside {type(runner.model).__name__} cannot be pruned in training, expected DDP or none"
        )
    averages = [hook.ema_model for hook in ema_hooks(runner)]
    if len(averages) > 1:
        raise HookError(f"{len(averages)} EMAHooks cannot be pruned along, expected at most 1")
    return averages


def wrap_anew(runner: Runner) -> None:
    """Wrap the model again where it is wrapped: DDP knows the parameters it was given."""
    if is_model_wrapper(runner.model):
        model, runner.model = plain_model(runner), None
        gc.collect()  # the old wrapper's hooks on the parameters go with it
        runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)


class StepClock:
    """The median time of a training step since the last removal, loading of data not counted."""

    def __init__(self):
        self.times: list[float] = []
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.times.append(time.perf_counter() - self._started)
        self._started = None

    def lap(self) -> float | None:
        """Return the steps per second since the last lap (None: there were none), and begin a new one."""
        speed = 1 / statistics.median(self.times) if self.times else None
        self.times = []
        return speed


class PruningHook(Hook):
    """What hooks that prune share: checkpoints know the structure, and training ends in files that stock code loads.

    A checkpoint of a pruned model carries the plans in its meta data; they are applied when it is loaded, before the
    weights are, to the model, to its EMA copy and to the wrapper. So any Runner resumes (and tests) it with the config
    it was trained with. Without plans a checkpoint is loaded as ever.
    """

    priority = "ABOVE_NORMAL"  # before EMAHook, which loads its copy from checkpoints

    def __init__(self, out_dir: str | None = None):
        self.out_dir = out_dir
        self.rounds: list[dict] = []  # what was done, plain data
        self._steps_before = 0  # steps of the config's own model, as of rep_plugin.Pruned

    def before_run(self, runner: Runner) -> None:
        self._steps_before = len(history_of(plain_model(runner)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        steps = history_of(plain_model(runner))
        if len(steps) > self._steps_before or self.rounds:
            checkpoint["meta"][META] = json.dumps({"history": steps, "rounds": self.rounds})

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        text = (checkpoint.get("meta") or {}).get(META)
        if text is None:
            return
        found, model = json.loads(text), plain_model(runner)
        own = json.loads(json.dumps(history_of(model)))
        if found["history"][: len(own)] != own:
            raise HookError(
                f"the checkpoint's model was pruned otherwise before: it begins with {len(found['history'])} steps, of "
                f"which the {len(own)} of {type(model).__name__} in the config are not the first"
            )
        for step in found["history"][len(own) :]:
            prune_runner_(runner, as_plan(step["plan"]), verify=False)
        if runner._resume:
            self.rounds = found["rounds"]

    def plans_of(self, runner: Runner) -> list[PrunePlan]:
        """Return the plans by which the model in training differs from the config's."""
        return [as_plan(step["plan"]) for step in history_of(plain_model(runner))[self._steps_before :]]

    def finish(self, runner: Runner, plan: PrunePlan, pruned: nn.Module, report: PruneReport) -> None:
        """Write what :func:`rep_plugin.openmmlab.artefacts.write_pruned` writes, and ``pruned.rounds.json``."""
        if not is_main_process():
            return
        loader = (runner.val_loop or runner.train_loop).dataloader
        out_dir = Path(self.out_dir or runner.work_dir)
        meta = getattr(loader.dataset, "metainfo", None)
        texts = {"pruned.rounds.json": json.dumps(self.rounds, indent=1) + "\n"}
        write_pruned_model(pruned, runner.cfg, plan, report, out_dir, pictures_of(runner).cpu(), meta, texts)
        runner.logger.info(f"pruned model written to {out_dir}/pruned.pth and pruned.py\n{report}")

    def prune_a_copy(self, runner: Runner, plan: PrunePlan) -> None:
        """Prune what training ended with by a plan, compare both in validation, and write it."""
        model = final_model(runner)
        pruned = copy.deepcopy(model)
        pruned.eval()
        report = apply_plan(pruned, plan, example_input=pictures_of(runner))
        before, after = evaluate(runner, model), evaluate(runner, pruned)
        self.note(runner, plan, report, before, after)
        show_rounds(runner, self.rounds)
        self.finish(runner, plan, pruned, report)

    def note(self, runner: Runner, plan: PrunePlan, report: PruneReport, before: dict, after: dict) -> None:
        """Keep the figures of a round, log them, and draw the widths against those of the beginning."""
        figures = {
            name: getattr(report, name) for name in ("params_before", "params_after", "macs_before", "macs_after")
        }
        entry = dict(round=len(self.rounds) + 1, epoch=runner.epoch, iter=runner.iter, why=plan.why, **figures)
        entry |= dict(plan_params=plan.params_before, plan_macs=plan.macs_before)
        entry |= dict(channels_before=plan.units[0], channels_after=plan.units[0] - plan.units[1])
        entry |= dict(max_rel_error=report.max_rel_error, before=before, after=after, tuned=None)
        self.rounds.append(entry)
        runner.logger.info(
            f"{type(self).__name__}, round {entry['round']}: parameters {report.params_before:,} -> "
            f"{report.params_after:,}, multiply-adds {report.macs_before:,} -> {report.macs_after:,}; before: "
            f"{describe(before)}; after: {describe(after)}"
        )
        if warning := collapsed(before, after):
            runner.logger.warning(f"{type(self).__name__}: {warning}")
        whole = compose_plans(self.plans_of(runner) or [plan])
        title = f"round {entry['round']}: {report.params_after:,} parameters, {report.macs_after:,} multiply-adds"
        show(runner, "widths", lambda: widths_figure(whole.widths, title, whole.frozen))

    def note_tuned(self, runner: Runner, metrics: dict) -> None:
        """Complete the last round with the figures after fine-tuning, and draw the rounds so far."""
        if self.rounds and self.rounds[-1]["tuned"] is None:
            self.rounds[-1]["tuned"] = metrics
            runner.logger.info(f"{type(self).__name__}, round {len(self.rounds)}, fine-tuned: {describe(metrics)}")
            show_rounds(runner, self.rounds)

    def whole_report(self, plan: PrunePlan, model: nn.Module) -> PruneReport:
        """Return the report of all rounds together: from before the first, with the largest error of all proofs."""
        first, last = self.rounds[0], self.rounds[-1]
        report = PruneReport("apply_plan", first["params_before"], count_params(model), input_shape=plan.input_shape)
        report.macs_before, report.macs_after = first["macs_before"], last["macs_after"]
        report.max_rel_error = max(entry["max_rel_error"] for entry in self.rounds)
        report.widths, report.frozen = dict(plan.widths), dict(plan.frozen)
        report.notes = [f"{len(self.rounds)} rounds, each proven; figures of validation are in pruned.rounds.json"]
        return report


def config_of(runner: Runner) -> Config:
    """Return the config that builds the model in training: the runner's own, or that of what was pruned meanwhile."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, PruningHook)), None)
    plans = hook.plans_of(runner) if hook is not None else []
    return pruned_config(runner.cfg, compose_plans(plans)) if plans else runner.cfg
