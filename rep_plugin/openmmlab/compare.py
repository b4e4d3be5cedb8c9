"""One table of a finished run: its trained form, its deployed form, and a stock network."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from rich.console import Console
from torch import Tensor, nn

from rep_plugin.checkpoints.plain import read_json
from rep_plugin.errors import ArgumentError, EquivalenceError
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.differences import compare_outputs
from rep_plugin.measure.latency import eager_calls, interleaved_medians, torch_threads
from rep_plugin.measure.progress import track
from rep_plugin.measure.tables import new_table
from rep_plugin.openmmlab.checkpoint import find_latest_checkpoint, latest_complete
from rep_plugin.openmmlab.cli import read_config
from rep_plugin.openmmlab.data import check_data
from rep_plugin.openmmlab.experiments import score
from rep_plugin.openmmlab.load import load_model, real_inputs
from rep_plugin.reparam import reparameterize


def _predict(models: dict[str, nn.Module], loader) -> tuple[dict[str, Tensor], Tensor]:
    """Return every model's predicted class (N,) on the whole data set, and the labels (N,)."""
    first = next(iter(models.values()))
    predictions, labels = {name: [] for name in models}, []
    for batch in track(loader, "validation set"):
        labels += [int(sample.gt_label) for sample in batch["data_samples"]]
        with torch.inference_mode():
            inputs = first.data_preprocessor(batch, False)["inputs"]
            for name, model in models.items():
                predictions[name].append(model(inputs).argmax(1))
    return {name: torch.cat(parts) for name, parts in predictions.items()}, torch.tensor(labels)


class StockRecord(NamedTuple):
    """What a stock network reached elsewhere: top-1 in percent, mean over seeds, and a line on how, where and when."""

    top1: float
    source: str


def read_stock_record(*paths: str | os.PathLike) -> StockRecord:
    """Read records that ``rep-plugin experiments`` wrote, of one network and several seeds.

    Args:
        paths: the JSON files.

    Raises:
        FileNotFoundError: there is none.
        ArgumentError: a file is no such record.
    """
    scores, sources = [], []
    for path in paths:
        try:
            record = read_json(path)
            scores.append(score(record))
            how = f"{record['config']}, {record['row']}, seed {record['seed']}"
            where = f"{record['processor']}, torch {record['versions']['torch']}, {record['date']}"
            sources.append(f"stored record {path}: {how}; {where}")
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f"{path} is no record of a run, expected what rep-plugin experiments writes") from None
    return StockRecord(sum(scores) / len(scores), "; ".join(sources))


def compare_deployed(
    config: str,
    work_dir: str | os.PathLike,
    stock: str,
    build_stock: Callable[[dict], nn.Module],
    rounds: int = 100,
    record: StockRecord | None = None,
) -> Path:
    """Compare the last checkpoint of a run with what was deployed of it, time both beside a stock network, and print it.

    Args:
        config: the run's config.
        work_dir: its folder, with checkpoints, deploy.py and deploy.pth.
        stock: what to call the stock network.
        build_stock: makes it, from the arguments ``num_classes`` and ``in_chans``.
        rounds: timed calls of each network.
        record: accuracy of the stock network, which is not trained here.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        EquivalenceError: a prediction differs.
    """
    checkpoint = find_latest_checkpoint(work_dir) or latest_complete(work_dir)
    if checkpoint is None:
        raise FileNotFoundError(f"{work_dir} holds no checkpoint, expected epoch_N.pth")
    cfg, work_dir = read_config(config), Path(work_dir)
    check_data(cfg, ("val_dataloader",))
    trained, _ = load_model(cfg, checkpoint)
    deployed, _ = load_model(Config.fromfile(work_dir / "deploy.py"), str(work_dir / "deploy.pth"))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
        loader = Runner.build_dataloader(cfg.val_dataloader)

    predictions, labels = _predict({"trained": trained, "deployed": deployed}, loader)
    differing = int((predictions["trained"] != predictions["deployed"]).sum())
    images = real_inputs(trained, loader)
    classes = trained.head.num_classes
    folded, _ = reparameterize(
        build_stock({"num_classes": classes, "in_chans": images.shape[1]}), images[:1], verify=False
    )
    models = {"trained form": trained, "deployed": deployed, f"stock {stock}": folded}
    with torch_threads(1):
        medians = interleaved_medians(eager_calls(models, images[:1]), rounds)

    console = Console(width=100)
    title = f"{Path(config).stem}, {len(labels)} validation images; one thread, batch 1, BN folded"
    table = new_table(title, ("network", "params", "MACs", "top-1 %", "ms", "times faster"))
    slowest = medians[list(models)[-1]]
    for name, model in models.items():
        key = name.split()[0]
        if key in predictions:
            top1 = f"{100 * (predictions[key] == labels).float().mean():.2f}"
        else:
            top1 = f"{record.top1:.2f} *" if record else "not trained"
        row = (f"{count_params(model):,}", f"{count_macs(model, images[:1]):,}", top1)
        table.add_row(name, *row, f"{medians[name] * 1e3:.2f}", f"{slowest / medians[name]:.2f}")
    console.print(table)
    if record:
        console.print(f"* {record.source}")
    columns = ("size", "float64", "at the border", "inside", "float32, last map", "at the border", "seconds")
    errors = new_table("deployed against trained form, real images, largest relative errors", columns)
    for size in (images.shape[-1], 224, 225):
        batch = nn.functional.interpolate(images, size=(size, size), mode="bilinear")
        _, report = reparameterize(trained, batch, fold_bn=False)
        with torch.no_grad():
            single = compare_outputs(trained.extract_feat(batch, "backbone"), deployed.extract_feat(batch, "backbone"))
        cells = (
            report.max_rel_error,
            report.border_rel_error,
            report.interior_rel_error,
            single.max_rel,
            single.border_rel,
        )
        errors.add_row(str(size), *(f"{value:.1e}" for value in cells), f"{report.seconds:.1f}")
    console.print(errors)
    console.print(f"predictions that differ: {differing} of {len(labels)}")
    if differing:
        raise EquivalenceError(f"{differing} predictions differ between trained and deployed form, expected 0")
    return Path(checkpoint)
