"""What several hooks ask of a Runner: the plain model, its optimizers, images, metrics of validation, plots."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.advice import online_advice
from rep_plugin.checkpoints.files import check_writable
from rep_plugin.errors import HookError, InconclusiveWarning, RepPluginError, first_line
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.plots import accuracy_figure, to_array
from rep_plugin.measure.progress import track
from rep_plugin.openmmlab.accuracy import has_norms, kept_random_state, main_metric, measure, renew_norms_
from rep_plugin.openmmlab.load import REAL_IMAGES, real_inputs

ALLOWED_LOSS = 0.1  # points of accuracy, where a method promises that merging costs nothing


@contextmanager
def as_hook_error(who: str) -> Iterator[None]:
    """Raise errors of ours as HookErrors whose message begins with ``who``."""
    try:
        yield
    except HookError:
        raise
    except RepPluginError as error:
        raise HookError(f"{who}: {first_line(error)}") from None


def log_advice(runner: Runner) -> None:
    """Log once, where training starts, how its steps would be cheaper."""
    if not getattr(runner, "_rep_advised", False) and (advice := online_advice(runner.model)):
        runner.logger.info(advice)
    runner._rep_advised = True


def plain_model(runner: Runner) -> nn.Module:
    """Return the model that is trained, without a wrapper around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def ema_models(runner: Runner) -> list[ExponentialMovingAverage]:
    """Return the averages (ExponentialMovingAverage) that EMAHooks keep."""
    return [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]


def final_model(runner: Runner) -> nn.Module:
    """Return the model as validation sees it: the EMA weights where an EMAHook keeps some. Do not change it."""
    return next((average.module for average in ema_models(runner)), plain_model(runner))


def optimizers_of(runner: Runner) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the training; none where there is no training."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [one.optimizer for one in wrapper.optim_wrappers.values()]
    return [wrapper.optimizer] if isinstance(wrapper, OptimWrapper) else []


def images_of(runner: Runner, count: int = REAL_IMAGES) -> Tensor:
    """Return preprocessed images, of validation where there is one; random states stay.

    Args:
        runner: Of the training.
        count: How many at most.

    Returns:
        Images (N, C, H, W).
    """
    loader = (runner.val_loop or runner.train_loop).dataloader
    with kept_random_state():
        return real_inputs(plain_model(runner), loader, count)


def training_batch(runner: Runner, count: int = 2) -> dict:
    """Return a few training samples as the model is given them, ``inputs`` and ``data_samples``; random states stay.

    Args:
        runner: Of the training.
        count: How many at most.

    Returns:
        What the model's forward takes.
    """
    loader = runner.train_loop.dataloader
    with kept_random_state(), torch.no_grad():
        samples = [loader.dataset[index] for index in range(min(count, len(loader.dataset)))]
        return copy_model(plain_model(runner)).data_preprocessor(loader.collate_fn(samples), True)


def check_out_dir(runner: Runner, out_dir: str | None) -> None:
    """Raise OSError where what a training ends with could not be written.

    Args:
        runner: Of the training.
        out_dir: Folder of the files; None: the work directory.
    """
    if is_main_process():
        check_writable(Path(out_dir or runner.work_dir))


def was_over(runner: Runner, begun: int, file: Path) -> bool:
    """Whether a finished training was resumed whose last file was written after its last checkpoint.

    Args:
        runner: Of the training.
        begun: Its iteration before this training's first step.
        file: What a training ends with.

    Returns:
        True where nothing is to be written.
    """
    source = Path(str(runner._load_from))
    if not runner._resume or runner.iter != begun or not (file.is_file() and source.is_file()):
        return False
    return file.stat().st_mtime >= source.stat().st_mtime


def copy_to_rehearse(runner: Runner) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Return copies of the model and its optimizers, to try on what will be done to them.

    Batch norms whose gammas are all equal, as those of a fresh network, get random ones: a plan needs an order.
    """
    own = plain_model(runner)
    model = copy_model(own)
    model.eval()  # not chained: mmpretrain's return None
    theirs = {id(p): other for p, other in zip(own.parameters(), model.parameters(), strict=True)}
    optimizers = copy.deepcopy(optimizers_of(runner), theirs)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        gamma = getattr(module, "weight", None)
        if isinstance(module, _BatchNorm) and gamma is not None and (gamma == gamma[0]).all():
            gamma.data = (gamma.data * (0.5 + torch.rand(len(gamma), generator=generator)).to(gamma)).detach()
    return model, optimizers


@contextmanager
def rehearsal(who: str) -> Iterator[None]:
    """Raise errors of ours as HookErrors whose message begins with ``who``; untrained networks prove little, without a word.

    Random states stay.
    """
    with kept_random_state(), as_hook_error(who), warnings.catch_warnings():
        warnings.simplefilter("ignore", InconclusiveWarning)
        yield


def shape_of_one(runner: Runner) -> tuple[int, ...]:
    """Return the shape (1, C, H, W) of one preprocessed image: costs are those of one."""
    return (1, *images_of(runner, 1).shape[1:])


def evaluate(runner: Runner, model: nn.Module, batches: int | None = None) -> dict[str, float]:
    """Measure a model in validation.

    The Runner's own loop would also step schedulers, save a best checkpoint and count for early stopping.

    Args:
        runner: Whose validation it is.
        model: To be measured; it stays as it is.
        batches: How many at most; None: all.

    Returns:
        The metrics by name; {} without validation.
    """
    loop = runner.val_loop
    if loop is None:
        return {}
    with torch.no_grad(), autocast(enabled=getattr(loop, "fp16", False)):
        images = len(loop.dataloader.dataset) if batches is None else None
        shown = track(islice(loop.dataloader, batches), "validating", batches or len(loop.dataloader))
        return measure(model, shown, loop.evaluator, images)


def renew_norms_of(runner: Runner, models: Iterable[nn.Module], images: int) -> list[str]:
    """Measure the statistics of batch norms anew, on training images; random states stay.

    Args:
        runner: Of the training.
        models: Changed in place.
        images: How many to read; 0: nothing is done.

    Returns:
        What the report says of it; nothing where nothing was done.
    """
    loader, notes = runner.train_loop.dataloader, []
    for model in models:
        if images and has_norms(model):
            notes.append(renew_norms_(model, loader, images))
    return notes[:1]


def forget_best(runner: Runner) -> None:
    """Let the next validation count as the best so far: ``save_best`` compares one network with itself.

    The file of the best one so far is replaced then.
    """
    for key in [key for key in runner.message_hub.runtime_info if key.split("_")[:2] == ["best", "score"]]:
        runner.message_hub.pop_info(key)


def format_metrics(metrics: dict[str, float]) -> str:
    """Return metrics in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "not measured: no validation"


def collapse_warning(before: dict[str, float], after: dict[str, float]) -> str | None:
    """Compare the main metric before and after a removal.

    Args:
        before: Metrics of validation.
        after: The same.

    Returns:
        A warning, with the numbers, where it fell below half; else None.
    """
    name = main_metric({name: value for name, value in before.items() if name in after})
    if name is None or after[name] >= before[name] / 2:
        return None
    return f"{name} fell from {before[name]:.4g} to {after[name]:.4g}: remove less at a time, or train more before it"


def merge_loss_warning(before: dict[str, float], after: dict[str, float]) -> str | None:
    """Compare the main metric before and after a merge that should cost nothing. Metrics up to 1 are shares, others percent.

    Args:
        before: Metrics of validation.
        after: The same.

    Returns:
        A warning, with the numbers, where it fell by more than 0.1 point; else None.
    """
    name = main_metric({name: value for name, value in before.items() if name in after})
    if name is None:
        return None
    loss = (before[name] - after[name]) * (100 if 0 < before[name] <= 1 else 1)
    if loss <= ALLOWED_LOSS:
        return None
    return f"merging lost {loss:.2f} points: {name} fell from {before[name]:.4g} to {after[name]:.4g}"


def add_plot(runner: Runner, name: str, draw: Callable[[], Figure]) -> None:
    """Draw a plot, in the main process alone, and hand it to the visualizer under the number of the iteration.

    Args:
        runner: Whose visualizer it is.
        name: Of the plot.
        draw: Makes it.
    """
    if is_main_process():
        runner.visualizer.add_image(name, to_array(draw()), runner.iter)


def plot_rounds(runner: Runner, rounds: Sequence[dict]) -> None:
    """Plot validation over the share of channels removed, round by round; nothing where nothing was validated.

    Args:
        runner: Whose visualizer it is.
        rounds: The entries that :class:`rep_plugin.openmmlab.hooks.base_pruning_hook.PruningHook` keeps.
    """
    name = main_metric(rounds[0]["before"]) if rounds else None
    if name is None:
        return
    removed = [1 - entry["channels_after"] / rounds[0]["channels_before"] for entry in rounds]
    curves = {
        label: {share: entry[when][name] for share, entry in zip(removed, rounds) if entry[when]}
        for label, when in (("after removal", "after"), ("fine-tuned", "tuned"))
    }
    curves = {label: points for label, points in curves.items() if points}
    dense = rounds[0]["before"][name]
    add_plot(runner, "accuracy_over_fraction", lambda: accuracy_figure(curves, name, "rounds of pruning", dense))
