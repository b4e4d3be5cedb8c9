"""Pruning at many rates: each is trained in a folder of its own, and one row describes it."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from mmengine.config import Config

from rep_plugin.checkpoints.files import write_atomic, write_contents, write_text
from rep_plugin.checkpoints.plain import read_json
from rep_plugin.errors import ArgumentError, TrainingError
from rep_plugin.measure.latency import eager_calls, interleaved_medians, torch_threads
from rep_plugin.measure.plots import accuracy_figure, save_figure
from rep_plugin.measure.progress import track, working
from rep_plugin.openmmlab.accuracy import main_metric
from rep_plugin.openmmlab.base_configs import read_config
from rep_plugin.openmmlab.checkpoint import find_latest_checkpoint
from rep_plugin.openmmlab.cli import parse_options
from rep_plugin.openmmlab.configs import type_name
from rep_plugin.openmmlab.load import load_model, read_state_dict

PRUNING = ("PruneHook", "SoftPruneHook")


def sweep(
    config: str,
    out: Path,
    rates: Sequence[float],
    *,
    checkpoint: str | None = None,
    sparse: str | None = None,
    strengths: Sequence[float] = (),
    cfg_options: Sequence[str] = (),
    sparse_options: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> list[dict]:
    """Prune one network at many rates, fine-tune each, time all, and write ``sweep.json`` and ``sweep.png``.

    Finished trainings are not repeated, and those that were cut off go on.

    Args:
        config: the config (a path or a shipped name) that prunes and fine-tunes: its PruneHook or SoftPruneHook has
            ``prune_fraction``.
        out: folder of all trainings.
        rates: shares of channels to remove.
        checkpoint: where all start; None for the config's ``load_from``.
        sparse: path of a config with a SparsityHook, to train that checkpoint with first.
        strengths: L1 strengths to train ``sparse`` with; none keeps its own.
        cfg_options: ``key=value`` for every pruning.
        sparse_options: ``key=value`` for every sparse training.
        log: is called with what is being done.

    Returns:
        The rows: rate, metrics before and after, costs, and milliseconds of one image on one thread.

    Raises:
        ArgumentError: a config or checkpoint does not fit, or a folder holds a training with other options.
        TrainingError: a training failed; the message names its log.
    """
    for options in (cfg_options, sparse_options):
        parse_options(options)
    if parse_options([f"load_from={out}"])["load_from"] != str(out):
        raise ArgumentError(
            f"work folder {str(out)!r} cannot be given to a training: no blanks, brackets, quotes or commas"
        )
    key = _hook_key(config, PRUNING, "prune_fraction")
    if sparse is not None:
        read_config(sparse)
    starts = {"": _start_of(config, checkpoint)} if sparse is None else {}
    for strength in track((strengths or [None]) if sparse is not None else [], "sparse trainings"):
        label = "" if strength is None else f"L1 {strength:g}"
        folder = out / ("sparse" if strength is None else f"sparse_{strength:g}")
        chosen = [] if strength is None else [f"{_hook_key(sparse, ('SparsityHook',), 'strength')}={strength}"]
        log(f"{' '.join(['sparse training', label]).strip()}: {folder}")
        _train(sparse, folder, [*sparse_options, *chosen])
        starts[label] = str(find_latest_checkpoint(str(folder)))
    rows = []
    with working("pruning and fine-tuning", total=len(starts) * len(rates)) as step:
        for label, rate in product(starts, rates):
            folder = out / "_".join(filter(None, [label.replace(" ", "_"), f"rate_{rate:g}"]))
            log(f"pruning and fine-tuning: {folder}")
            _train(config, folder, [*cfg_options, f"{key}={rate}"], starts[label])
            rows.append(_row_of(folder, label, rate))
            step()
    _add_latencies(rows, config, next(iter(starts.values())))
    contents = {"sweep.json": f"{json.dumps(rows, indent=1)}\n".encode()}
    if curves := curves_of(rows):
        dense = rows[0]["before"] if len(starts) == 1 else None
        figure = accuracy_figure(curves, rows[0]["metric"], Path(config).stem, dense)
        save_figure(figure, image := io.BytesIO())
        contents["sweep.png"] = image.getvalue()
    write_contents(out, contents)
    return rows


def _start_of(config: str, checkpoint: str | None) -> str:
    path = checkpoint or read_config(config).get("load_from")
    if not path or not Path(path).is_file():
        raise ArgumentError(f"checkpoint {path} does not exist: give --checkpoint, or --sparse to train it")
    read_state_dict(str(path))
    return str(path)


def _hook_key(path: str, names: tuple[str, ...], argument: str) -> str:
    """``custom_hooks.N.argument`` of the first hook of a config that is one of ``names``."""
    hooks = read_config(path).get("custom_hooks") or []
    for index, hook in enumerate(hooks):
        if type_name(hook) in names:
            if argument not in hook:
                raise ArgumentError(f"the {hook['type']} of {path} has no {argument!r}, got {sorted(hook)}")
            return f"custom_hooks.{index}.{argument}"
    raise ArgumentError(
        f"{path} has no {' or '.join(names)} in custom_hooks, got {[str(hook['type']) for hook in hooks]}"
    )


def _train(config: str, folder: Path, options: list[str], load_from: str | None = None) -> None:
    """Run ``rep-plugin train`` into a folder to its end, unless done before; go on where it was cut off."""
    asked = {"config": config, "options": options, "load_from": load_from}
    record, done = folder / "asked.json", folder / "done"
    if record.is_file() and read_json(record) != asked:
        raise ArgumentError(f"{folder} holds a run with other options ({record}), expected a work folder of its own")
    if done.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(asked, indent=1))
    words = [sys.executable, "-W", "ignore", "-m", "rep_plugin", "train", config, f"--work-dir={folder}"]
    if (folder / "last_checkpoint").is_file() and find_latest_checkpoint(str(folder)):
        words += ["--resume"]
    elif load_from:
        options = [*options, f"load_from={load_from}"]
    words += ["--cfg-options", *options] if options else []
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise TrainingError(f"the training in {folder} failed, see {folder / 'log.txt'}")
    write_atomic(done, lambda file: file.write(b""))


def _row_of(folder: Path, label: str, rate: float) -> dict:
    """The metrics and costs of a finished training."""
    rounds = read_json(folder / "pruned.rounds.json")
    first, last = rounds[0], rounds[-1]
    name = main_metric(first["before"])
    row = dict(start=label, rate=rate, folder=str(folder), metric=name)
    row |= {
        when: (entry[when] or {}).get(name) for entry, when in ((first, "before"), (last, "after"), (last, "tuned"))
    }
    row |= {key: first[key] for key in ("params_before", "macs_before")}
    return row | {key: last[key] for key in ("params_after", "macs_after")}


def _add_latencies(rows: list[dict], config: str, checkpoint: str) -> None:
    """Time all networks of the sweep interleaved: one image, one thread, milliseconds."""
    folders = [row["folder"] for row in rows]
    models = {one: load_model(Config.fromfile(f"{one}/pruned.py"), f"{one}/pruned.pth")[0] for one in folders}
    models["dense"] = load_model(read_config(config), checkpoint)[0]
    shape = read_json(Path(folders[0], "pruned.plan.json"))["input_shape"]
    with torch_threads(1):
        seconds = interleaved_medians(eager_calls(models, torch.rand(1, *shape[1:])))
    for row in rows:
        row |= dict(ms=1e3 * seconds[row["folder"]], ms_before=1e3 * seconds["dense"])


def curves_of(rows: list[dict]) -> dict[str, dict[float, float]]:
    """Return what is plotted: after removal and after fine-tuning, or of several starts the last metric alone."""
    labels = list(dict.fromkeys(row["start"] for row in rows))
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        best = row["after"] if row["tuned"] is None else row["tuned"]
        values = {row["start"]: best} if len(labels) > 1 else {"pruned": row["after"], "fine-tuned": row["tuned"]}
        for label, value in values.items():
            if value is not None:
                curves.setdefault(label, {})[row["rate"]] = value
    return curves
