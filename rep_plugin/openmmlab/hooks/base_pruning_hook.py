"""Pruning of the model that a Runner is training, and of what a training ends with."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rep_plugin.arguments import OneOf
from rep_plugin.depth import DepthPlan
from rep_plugin.errors import ArgumentError, HookError, UnreadableCheckpointError, first_line
from rep_plugin.history import check_history, history_of
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_params
from rep_plugin.measure.forward import eval_mode
from rep_plugin.measure.plots import widths_figure
from rep_plugin.openmmlab.artefacts import check_pruned_form, write_pruned_model
from rep_plugin.openmmlab.hooks.runner_utils import (
    add_plot,
    check_out_dir,
    collapse_warning,
    copy_to_rehearse,
    ema_models,
    evaluate,
    final_model,
    format_metrics,
    images_of,
    optimizers_of,
    plain_model,
    plot_rounds,
    rehearsal,
    renew_norms_of,
    shape_of_one,
)
from rep_plugin.openmmlab.hooks.stateful_hook import StatefulHook, parse_kept
from rep_plugin.pruning import PrunePlan, PruneReport, apply_plan
from rep_plugin.pruning.methods.clusters import Clusters
from rep_plugin.pruning.planning import Budget
from rep_plugin.pruning.planning.options import SCORES
from rep_plugin.pruning.planning.plan import as_plan, compose_plans

META = "rep_prune"  # in a checkpoint's meta data
# A hook has no loader to take first-order scores from.
HookScores = Annotated[str, OneOf([name for name in SCORES if name != "taylor"])]
Planner = Callable[[nn.Module, tuple[int, ...], list[dict]], PrunePlan]
Planned = TypeVar("Planned", PrunePlan, Clusters, DepthPlan)


def budget_of(
    prune_fraction: float | None, params: int | float | None = None, macs: int | float | None = None, **others: object
) -> Budget | None:
    """Check that one of the arguments that say how much goes is given, and make a budget of it.

    Args:
        prune_fraction: As in :class:`rep_plugin.pruning.planning.Budget`, but not 0.
        params: As there.
        macs: As there.
        **others: What else says how much goes.

    Returns:
        The budget; None where one of ``others`` is given.

    Raises:
        ArgumentError: None or several are given, or the number is out of its range.
    """
    given = dict(prune_fraction=prune_fraction, params=params, macs=macs, **others)
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ArgumentError(f"give exactly one of {', '.join(given)}, got {names or 'none'}")
    return None if names[0] in others else Budget(prune_fraction, params, macs)


def from_main_process(planned: Planned) -> Planned:
    """Return what the main process has planned, so that all prune alike."""
    texts = [planned.to_json()]
    broadcast_object_list(texts)
    return type(planned).from_json(texts[0])


def prune_runner_(
    runner: Runner, plan: PrunePlan, verify: bool = True, example_input: Tensor | None = None
) -> PruneReport:
    """Remove channels from the model in training, with the optimizers' state and the EMA copy; DDP is wrapped anew.

    Args:
        runner: Whose model it is.
        plan: What goes.
        verify: Prove the removal first.
        example_input: Images (N, C, H, W) for the proof, beside random ones.

    Returns:
        The report.

    Raises:
        HookError: The model is inside another wrapper than DDP, or has several EMA copies. All is then as before, as it is
            after what :func:`rep_plugin.apply_plan` raises.
    """
    model, averages = plain_model(runner), averages_to_change(runner)
    ema = averages[0] if averages else None
    with eval_mode(model):
        report = apply_plan(model, plan, optimizers_of(runner), ema=ema, verify=verify, example_input=example_input)
    for average in averages:
        if average.update_buffers:  # a state dict holds the tensors as they were
            average.avg_parameters = average.module.state_dict()
    wrap_anew(runner)
    return report


def _check_optimizers(model: nn.Module, optimizers: list[Optimizer], remove: Callable[[], object]) -> None:
    """Step, remove, step: a state that is not sliced along shows here. All of this on copies."""

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()

    step()
    remove()
    try:
        step()
    except (RuntimeError, IndexError, ValueError) as error:  # torch's, of shapes
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ArgumentError(
            f"the state of {names} does not fit a network that becomes narrower ({first_line(error)}): take SGD or AdamW, "
            "or prune after training"
        ) from error


def averages_to_change(runner: Runner) -> list[nn.Module]:
    """Return the EMA copies, one at most, that a change of the model in training must change along.

    Raises:
        HookError: There are several, or the model is inside another wrapper than DDP.
    """
    if is_model_wrapper(runner.model) and not isinstance(runner.model, DistributedDataParallel):
        raise HookError(
            f"a model inside {type(runner.model).__name__} cannot be pruned in training, expected DDP or none"
        )
    averages = ema_models(runner)
    if len(averages) > 1:
        raise HookError(f"{len(averages)} EMAHooks cannot be pruned along, expected at most 1")
    return averages


def wrap_anew(runner: Runner) -> None:
    """Wrap the model again where it is wrapped: DDP keeps the parameters that it was given."""
    if is_model_wrapper(runner.model):
        model, runner.model = plain_model(runner), None
        gc.collect()  # the old wrapper's hooks on the parameters go with it
        runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)


class PruningHook(StatefulHook):
    """What hooks that prune share: checkpoints contain the structure, and training ends in files that stock code loads.

    A checkpoint of a pruned model carries the plans in its meta data; they are applied when it is loaded, before the
    weights are, to the model, to its EMA copy and to the wrapper. So any Runner resumes (and tests) it with the config
    it was trained with. Without plans a checkpoint is loaded as ever.

    Args:
        out_dir: Folder of the files; default: the work directory.
    """

    priority = "ABOVE_NORMAL"  # before EMAHook, which loads its copy from checkpoints

    def __init__(self, out_dir: str | None = None):
        self.out_dir = out_dir
        self.rounds: list[dict] = []  # what was done, plain data
        self._steps_before = 0  # steps of the config's own model, as of rep_plugin.Pruned

    def before_run(self, runner: Runner) -> None:
        self._steps_before = len(history_of(plain_model(runner)))

    def before_train(self, runner: Runner) -> None:
        check_out_dir(runner, self.out_dir)

    def rehearse(
        self, runner: Runner, plan: Callable[[nn.Module, tuple[int, ...], list[dict]], PrunePlan], last: int
    ) -> None:
        """Plan and remove on copies, once for each round that is left, and build what will be written.

        Args:
            runner: Of the training.
            plan: Of a model, the shape of an input and the rounds before, makes the plan of the next.
            last: The number of rounds; 0: one, after training, without the optimizers.

        Raises:
            HookError: It cannot be done.
        """
        model, optimizers = copy_to_rehearse(runner)
        if last:
            averages_to_change(runner)
        shape, images = shape_of_one(runner), images_of(runner, 2)
        rounds, plans = list(self.rounds) if last else [], self.plans_of(runner)
        while len(rounds) < max(1, last):
            with rehearsal(type(self).__name__ + (f", round {len(rounds) + 1}" if last > 1 else "")):
                now = plan(model, shape, rounds)

                def remove(now: PrunePlan = now, first: bool = not rounds) -> None:
                    apply_plan(model, now, optimizers if last else None, verify=first, example_input=images)

                if last and not rounds:
                    _check_optimizers(model, optimizers, remove)
                else:
                    remove()
            rounds.append(dict(plan_params=now.params_before, plan_macs=now.macs_before))
            plans.append(now)
        with rehearsal(type(self).__name__):
            check_pruned_form(model, runner.cfg, compose_plans(plans), images)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().before_save_checkpoint(runner, checkpoint)
        steps = history_of(plain_model(runner))
        if len(steps) > self._steps_before or self.rounds:
            checkpoint["meta"][META] = json.dumps({"history": steps, "rounds": self.rounds})

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        text = (checkpoint.get("meta") or {}).get(META)
        if text is not None:
            kept = parse_kept(text, META, {"history": list[dict], "rounds": list[dict]})
            try:
                check_history(kept["history"])
            except ArgumentError as error:
                raise UnreadableCheckpointError(f"meta.{META} of the checkpoint: {error}") from None
            self._load_history(runner, kept["history"])
            if runner._resume:
                self.rounds = kept["rounds"]
        super().after_load_checkpoint(runner, checkpoint)

    def _load_history(self, runner: Runner, history: list[dict]) -> None:
        """Prune the config's model as the checkpoint's was."""
        model = plain_model(runner)
        own = json.loads(json.dumps(history_of(model)))
        if history[: len(own)] != own:
            raise HookError(
                f"the checkpoint's model was pruned otherwise before: it begins with {len(history)} steps, of which the "
                f"{len(own)} of {type(model).__name__} in the config are not the first"
            )
        for step in (step for step in history[len(own) :] if step["step"] == "prune"):
            prune_runner_(runner, as_plan(step["plan"]), verify=False)

    def plans_of(self, runner: Runner) -> list[PrunePlan]:
        """Return the plans by which the model in training differs from the config's."""
        steps = history_of(plain_model(runner))[self._steps_before :]
        return [as_plan(step["plan"]) for step in steps if step["step"] == "prune"]

    def write_artefact(self, runner: Runner, plan: PrunePlan, pruned: nn.Module, report: PruneReport) -> None:
        """Write what :func:`rep_plugin.openmmlab.artefacts.write_pruned` writes, and ``pruned.rounds.json``.

        Args:
            runner: Of the training.
            plan: What is gone from the config's model.
            pruned: The model without it.
            report: Of the removal.
        """
        if not is_main_process():
            return
        loader = (runner.val_loop or runner.train_loop).dataloader
        out_dir = Path(self.out_dir or runner.work_dir)
        meta = getattr(loader.dataset, "metainfo", None)
        texts = {"pruned.rounds.json": json.dumps(self.rounds, indent=1) + "\n"}
        write_pruned_model(pruned, runner.cfg, plan, report, out_dir, images_of(runner).cpu(), meta, texts)
        runner.logger.info(f"pruned model written to {out_dir}/pruned.pth and pruned.py\n{report}")

    def prune_a_copy(self, runner: Runner, plan: PrunePlan, bn_images: int = 0) -> None:
        """Prune a copy of what training ended with, compare both in validation, and write it.

        Args:
            runner: Of the training.
            plan: What goes.
            bn_images: Training images on which statistics of batch norms are measured anew.
        """
        model = final_model(runner)
        pruned = copy_model(model)
        pruned.eval()
        report = apply_plan(pruned, plan, example_input=images_of(runner))
        report.notes += renew_norms_of(runner, [pruned], bn_images)
        self.rounds = []
        self.add_round(runner, plan, report, evaluate(runner, model), evaluate(runner, pruned))
        plot_rounds(runner, self.rounds)
        self.write_artefact(runner, plan, pruned, report)

    def add_round(self, runner: Runner, plan: PrunePlan, report: PruneReport, before: dict, after: dict) -> None:
        """Keep the numbers of a round, log them, and plot the widths against those of the beginning.

        Args:
            runner: Of the training.
            plan: What went in this round.
            report: Of its removal.
            before: Metrics of validation before it.
            after: And after it.
        """
        costs = {name: getattr(report, name) for name in ("params_before", "params_after", "macs_before", "macs_after")}
        entry = dict(round=len(self.rounds) + 1, epoch=runner.epoch, iter=runner.iter, why=plan.why, **costs)
        entry |= dict(plan_params=plan.params_before, plan_macs=plan.macs_before)
        entry |= dict(channels_before=plan.units[0], channels_after=plan.units[0] - plan.units[1])
        entry |= dict(max_rel_error=report.max_rel_error, before=before, after=after, tuned=None)
        self.rounds.append(entry)
        runner.logger.info(
            f"{type(self).__name__}, round {entry['round']}: parameters {report.params_before:,} -> "
            f"{report.params_after:,}, multiply-adds {report.macs_before:,} -> {report.macs_after:,}; before: "
            f"{format_metrics(before)}; after: {format_metrics(after)}"
        )
        if warning := collapse_warning(before, after):
            runner.logger.warning(f"{type(self).__name__}: {warning}")
        whole = compose_plans(self.plans_of(runner) or [plan])
        title = f"round {entry['round']}: {report.params_after:,} parameters, {report.macs_after:,} multiply-adds"
        add_plot(runner, "widths", lambda: widths_figure(whole.widths, title, whole.frozen))

    def complete_round(self, runner: Runner, metrics: dict) -> None:
        """Add the metrics after fine-tuning to the last round, and plot the rounds so far.

        Args:
            runner: Of the training.
            metrics: Of validation.
        """
        if self.rounds and self.rounds[-1]["tuned"] is None:
            self.rounds[-1]["tuned"] = metrics
            runner.logger.info(
                f"{type(self).__name__}, round {len(self.rounds)}, fine-tuned: {format_metrics(metrics)}"
            )
            plot_rounds(runner, self.rounds)

    def whole_report(self, plan: PrunePlan, model: nn.Module) -> PruneReport:
        """Return the report of all rounds together: from before the first, with the largest error of all proofs.

        Args:
            plan: Of all rounds.
            model: What is left.
        """
        first, last = self.rounds[0], self.rounds[-1]
        report = PruneReport("apply_plan", first["params_before"], count_params(model), input_shape=plan.input_shape)
        report.macs_before, report.macs_after = first["macs_before"], last["macs_after"]
        report.max_rel_error = max(entry["max_rel_error"] for entry in self.rounds)
        report.notes = [f"{len(self.rounds)} rounds, each proven; metrics of validation are in pruned.rounds.json"]
        report.add_plan(plan)
        return report
