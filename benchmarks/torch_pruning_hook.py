"""Torch-Pruning inside the stock training loop, for comparison: sparse training, one removal, fine-tuning."""

from dataclasses import replace

import torch
import torch_pruning
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.openmmlab.hooks.base_pruning_hook import PruningHook
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, images_of, optimizers_of, plain_model, shape_of_one
from rep_plugin.openmmlab.load import build_model
from rep_plugin.pruning import PrunePlan, PruneReport

STEPS = 400  # in which its pruners go from nothing to everything; we stop where the budget is met
KINDS = {
    "bn_scale": (torch_pruning.pruner.BNScalePruner, lambda: torch_pruning.importance.BNScaleImportance()),
    "group_norm": (
        torch_pruning.pruner.GroupNormPruner,
        lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
    ),
}


@HOOKS.register_module()
class TorchPruningHook(PruningHook):
    """Torch-Pruning's own term in every gradient for ``begin`` epochs, then its removal to ``macs`` (a share), then on.

    Its pruners put new parameters into the model, so the optimizer is built anew, with the rate of the moment (its
    momentum, of some ten steps, is lost), and they work in eval mode, which is mended. The files at the end are those of
    PruneHook, with a plan made of the widths. An interrupted run must start again.
    """

    def __init__(
        self, kind: str, macs: float, begin: int, reg: float, round_to: int = 4, max_pruning_ratio: float = 0.9
    ):
        super().__init__()
        self.kind, self.macs, self.begin = kind, macs, begin
        self.options = dict(reg=reg, round_to=round_to, max_pruning_ratio=max_pruning_ratio)

    def before_train(self, runner: Runner) -> None:
        model, (cls, importance) = plain_model(runner), KINDS[self.kind]
        model.eval()
        self.pruner = cls(
            model,
            images_of(runner, 1),
            importance=importance(),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)],
            **self.options,
        )
        model.train()
        (optimizer,) = optimizers_of(runner)
        self.handle = optimizer.register_step_pre_hook(lambda *_: self.pruner.regularize(model))

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch != self.begin:
            return
        model, image = plain_model(runner), images_of(runner, 1)
        before = evaluate(runner, model)
        report = PruneReport("torch_pruning", count_params(model), 0, input_shape=tuple(image.shape))
        report.macs_before = report.macs_after = count_macs(model, image)
        self.handle.remove()
        model.eval()
        while report.macs_after > self.macs * report.macs_before:
            if self.pruner.current_step >= STEPS:
                raise RuntimeError(f"Torch-Pruning stopped at {report.macs_after:,} of {report.macs_before:,} macs")
            self.pruner.step()
            report.macs_after = count_macs(model, image)
        model.train()
        report.params_after = count_params(model)
        self._renew_optimizer(runner)
        self.add_round(runner, self._plan(runner), report, before, evaluate(runner, model))

    def after_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        self.complete_round(runner, evaluate(runner, model))
        runner.cfg.custom_hooks = []  # those of the pruned network's config
        plan = self._plan(runner)
        report = PruneReport("torch_pruning", plan.params_before, count_params(model), input_shape=plan.input_shape)
        report.macs_before, report.macs_after = (self.rounds[0][key] for key in ("macs_before", "macs_after"))
        self.write_artefact(runner, plan, model, report)

    @staticmethod
    def _renew_optimizer(runner: Runner) -> None:
        """The schedulers hold the wrapper, and go on with the optimizer inside it."""
        wrapper = runner.optim_wrapper
        fresh = runner.build_optim_wrapper(runner.cfg.optim_wrapper).optimizer
        for new, old in zip(fresh.param_groups, wrapper.param_groups, strict=True):
            new.update({key: value for key, value in old.items() if key != "params"})
        wrapper.optimizer = fresh

    def _plan(self, runner: Runner) -> PrunePlan:
        """Return a plan of the same widths for the config's own model; which channels stayed is in the weights."""
        widths = {n: m.out_channels for n, m in plain_model(runner).named_modules() if isinstance(m, nn.Conv2d)}
        with torch.random.fork_rng(devices=[]):  # building a model draws its weights
            dense = build_model(runner.cfg)
        plan = PrunePlan.from_widths(dense, shape_of_one(runner), widths)
        return replace(plan, why=f"macs={self.macs} by Torch-Pruning's {type(self.pruner).__name__}")
