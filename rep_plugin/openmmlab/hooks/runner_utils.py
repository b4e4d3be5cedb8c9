"""What the pruning hooks ask of a Runner: the plain model, its optimizers, pictures, figures of validation."""

from collections.abc import Callable, Sequence
from numbers import Number

import torch
from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.amp import autocast
from torch import Tensor, nn

from rep_plugin.errors import HookError
from rep_plugin.measure.plots import accuracy_figure, to_array
from rep_plugin.openmmlab.load import REAL_IMAGES, real_inputs

ALLOWED_LOSS = 0.1  # points of accuracy, where a method promises that merging costs nothing
HIGH_IS_GOOD = ("accuracy", "precision", "recall", "f1", "mAP", "mIoU")


def plain_model(runner: Runner) -> nn.Module:
    """Return the model that is trained, without a wrapper around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def ema_hooks(runner: Runner) -> list[EMAHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]


def final_model(runner: Runner) -> nn.Module:
    """Return the model as validation sees it: the EMA weights where an EMAHook keeps some. Do not change it."""
    return next((hook.ema_model.module for hook in ema_hooks(runner)), plain_model(runner))


def optimizers_of(runner: Runner) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the training; none where there is no training."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [one.optimizer for one in wrapper.optim_wrappers.values()]
    return [wrapper.optimizer] if isinstance(wrapper, OptimWrapper) else []


def pictures_of(runner: Runner, count: int = REAL_IMAGES) -> Tensor:
    """Return some preprocessed pictures (N, C, H, W), of validation where there is one; torch's random state stays."""
    loader = (runner.val_loop or runner.train_loop).dataloader
    with torch.random.fork_rng(devices=[]):
        return real_inputs(plain_model(runner), loader, count)


def iterations_of(runner: Runner, by_epoch: bool, who: str) -> float:
    """Return how many iterations one unit of a schedule has: those of an epoch, or 1.

    Raises HookError for epochs where the loop has none.
    """
    if not by_epoch:
        return 1.0
    if not isinstance(runner.train_loop, EpochBasedTrainLoop):
        raise HookError(
            f"{who}: by_epoch=True needs epochs, {type(runner.train_loop).__name__} has none: by_epoch=False"
        )
    return runner.max_iters / runner.max_epochs


def evaluate(runner: Runner, model: nn.Module) -> dict[str, float]:
    """Return the figures of validation for a model; {} without validation.

    The Runner's own loop would also step schedulers, save a best checkpoint and count for early stopping.
    """
    loop = runner.val_loop
    if loop is None:
        return {}
    modes = modes_of(model)
    model.eval()
    with torch.no_grad(), autocast(enabled=getattr(loop, "fp16", False)):
        for batch in loop.dataloader:
            outputs = model.val_step(batch)
            loop.evaluator.process(data_samples=outputs, data_batch=batch)
    metrics = loop.evaluator.evaluate(len(loop.dataloader.dataset))
    restore_modes_(modes)
    return {name: float(value) for name, value in metrics.items() if isinstance(value, Number)}


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def restore_modes_(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def describe(metrics: dict[str, float]) -> str:
    """Return figures in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "not measured: no validation"


def main_figure(metrics: dict[str, float]) -> str | None:
    """Return the name of the first figure that is high for good models; None where there is none."""
    return next((name for name in metrics if any(word in name for word in HIGH_IS_GOOD)), None)


def collapsed(before: dict[str, float], after: dict[str, float]) -> str:
    """Return a warning, with the numbers, where the first figure that is high for good models fell below half; else ''."""
    name = main_figure({name: value for name, value in before.items() if name in after})
    if name is None or after[name] >= before[name] / 2:
        return ""
    return f"{name} fell from {before[name]:.4g} to {after[name]:.4g}: remove less at a time, or train more before it"


def lost(before: dict[str, float], after: dict[str, float]) -> str:
    """Return what was lost, where the first figure that is high for good models fell by more than 0.1 point; else ''.

    Figures up to 1 are shares, others percent.
    """
    name = main_figure({name: value for name, value in before.items() if name in after})
    if name is None:
        return ""
    loss = (before[name] - after[name]) * (100 if 0 < before[name] <= 1 else 1)
    if loss <= ALLOWED_LOSS:
        return ""
    return f"merging lost {loss:.2f} points: {name} fell from {before[name]:.4g} to {after[name]:.4g}"


def show(runner: Runner, name: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure, in the main process alone, and hand it to the visualizer under the number of the iteration."""
    if is_main_process():
        runner.visualizer.add_image(name, to_array(draw()), runner.iter)


def show_rounds(runner: Runner, rounds: Sequence[dict]) -> None:
    """Draw validation over the share of channels removed, round by round; nothing where nothing was validated."""
    name = main_figure(rounds[0]["before"]) if rounds else None
    if name is None:
        return
    removed = [1 - entry["channels_after"] / rounds[0]["channels_before"] for entry in rounds]
    curves = {
        label: {share: entry[when][name] for share, entry in zip(removed, rounds) if entry[when]}
        for label, when in (("after removal", "after"), ("fine-tuned", "tuned"))
    }
    curves = {label: points for label, points in curves.items() if points}
    dense = rounds[0]["before"][name]
    show(runner, "accuracy_over_fraction", lambda: accuracy_figure(curves, name, "rounds of pruning", dense))


def add_param_group(runner: Runner, parameters: Sequence[nn.Parameter], **changes: float) -> None:
    """Give the Runner's one optimizer a group more: like its largest, with ``changes``.

    Schedulers, which keep what they have begun with for every group, go on with the new group as with the one it is like.
    """
    wrapper = runner.optim_wrapper
    optimizer, place = wrapper.optimizer, len(wrapper.optimizer.param_groups)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    like = sizes.index(max(sizes))
    options = {k: v for k, v in optimizer.param_groups[like].items() if k not in ("params", "param_names")} | changes
    for name, value in changes.items():
        if f"initial_{name}" in options:
            options[f"initial_{name}"] = value
    optimizer.add_param_group({"params": list(parameters), **options})
    for scheduler in runner.param_schedulers or []:
        if hasattr(scheduler, "base_values"):
            scheduler.base_values.insert(place, options[f"initial_{scheduler.param_name}"])
        if hasattr(scheduler, "min_values"):
            scheduler.min_values.insert(place, scheduler.min_values[like])
        scheduler._last_value = [group[scheduler.param_name] for group in scheduler.optimizer.param_groups]
