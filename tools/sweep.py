#!/usr/bin/env python
"""Prune one sparse-trained network at many rates (and L1 strengths), fine-tune each, and print one table.

python tools/sweep.py CONFIG                                            # starts from the config's load_from
python tools/sweep.py CONFIG --checkpoint work_dirs/sparse/epoch_30.pth --rates 0.2 0.4 0.6
python tools/sweep.py CONFIG --sparse SPARSE_CONFIG --strengths 1e-5 1e-4 1e-3

CONFIG has a PruneHook or a SoftPruneHook with ``prune_fraction``, which is set to each rate; SPARSE_CONFIG has the
SparsityHook. Every run is tools/train.py in a folder of its own; finished ones are not repeated, cut off ones go on. Into
the work folder: sweep.json, and sweep.png with the accuracy over the rate.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rep_plugin.optional import require_or_exit

require_or_exit("mmengine", "mmcv", "mmpretrain", extra="openmmlab")

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from rep_plugin.checkpoints.files import write_atomic
from rep_plugin.errors import ArgumentError, TrainingError
from rep_plugin.measure.latency import eager_calls, interleaved_medians, torch_threads
from rep_plugin.measure.plots import accuracy_figure, save_figure
from rep_plugin.openmmlab.checkpoint import find_latest_checkpoint
from rep_plugin.openmmlab.cli import run
from rep_plugin.openmmlab.hooks.runner_utils import main_figure
from rep_plugin.openmmlab.load import load_model

TOOL = Path(__file__).with_name("train.py")
RATES = [round(0.1 * n, 1) for n in range(1, 10)]
PRUNING = ("PruneHook", "SoftPruneHook")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config that prunes and fine-tunes")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="shares of channels to remove; 0.1 .. 0.9"
    )
    parser.add_argument("--checkpoint", help="where all start; default: the config's load_from")
    parser.add_argument("--sparse", help="config to train that checkpoint with first, in the work folder")
    parser.add_argument("--strengths", type=float, nargs="+", help="L1 strengths to train --sparse with")
    parser.add_argument("--work-dir", help="folder of all runs; default: work_dirs/sweep_<name of the config>")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="for every pruning run")
    parser.add_argument(
        "--sparse-options", nargs="+", default=[], metavar="KEY=VALUE", help="for every sparse training"
    )
    args = parser.parse_args(argv)
    if args.strengths and not args.sparse:
        parser.error("--strengths needs --sparse, the config to train with each")
    if args.sparse and args.checkpoint:
        parser.error("give --checkpoint or --sparse, not both")
    for rate in args.rates:
        if not 0 < rate < 1:
            parser.error(f"--rates must lie in (0, 1), got {rate}")
    args.rates = sorted(set(args.rates))
    return args


def hook_key(path: str, names: tuple[str, ...], argument: str) -> str:
    """Return ``custom_hooks.N.argument`` of the first hook that is one of ``names``. Raises ArgumentError for none."""
    hooks = Config.fromfile(path).get("custom_hooks") or []
    for index, hook in enumerate(hooks):
        if str(hook["type"]).rpartition(".")[2] in names:
            if argument not in hook:
                raise ArgumentError(f"the {hook['type']} of {path} has no {argument!r}, got {sorted(hook)}")
            return f"custom_hooks.{index}.{argument}"
    raise ArgumentError(
        f"{path} has no {' or '.join(names)} in custom_hooks, got {[str(hook['type']) for hook in hooks]}"
    )


def train(config: str, folder: Path, options: list[str], load_from: str | None = None) -> None:
    """Run tools/train.py into a folder to its end, unless done before; go on where it was cut off.

    Raises ArgumentError where the folder holds a run with other options, and TrainingError, with the log's path, where the
    training fails.
    """
    asked = {"config": config, "options": options, "load_from": load_from}
    record, done = folder / "asked.json", folder / "done"
    if record.is_file() and json.loads(record.read_text()) != asked:
        raise ArgumentError(f"{folder} holds a run with other options ({record}), expected a work folder of its own")
    if done.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(record, lambda file: file.write(json.dumps(asked, indent=1).encode()))
    words = [sys.executable, "-W", "ignore", str(TOOL), config, "--work-dir", str(folder)]
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


def starts(args: argparse.Namespace, out: Path, console: Console) -> dict[str, str]:
    """Return what to start from: label -> checkpoint; sparse trainings are run here."""
    if not args.sparse:
        path = args.checkpoint or Config.fromfile(args.config).get("load_from")
        if not path or not Path(path).is_file():
            raise ArgumentError(f"checkpoint {path} does not exist: give --checkpoint, or --sparse to train it")
        return {"": str(path)}
    checkpoints = {}
    for strength in args.strengths or [None]:
        label = "" if strength is None else f"L1 {strength:g}"
        folder = out / ("sparse" if strength is None else f"sparse_{strength:g}")
        chosen = [] if strength is None else [f"{hook_key(args.sparse, ('SparsityHook',), 'strength')}={strength}"]
        console.print(f"{' '.join(['sparse training', label]).strip()}: {folder}", markup=False)
        train(args.sparse, folder, [*args.sparse_options, *chosen])
        checkpoints[label] = str(find_latest_checkpoint(str(folder)))
    return checkpoints


def row_of(folder: Path, label: str, rate: float) -> dict:
    """Return the metrics of a finished run."""
    rounds = json.loads((folder / "pruned.rounds.json").read_text())
    first, last = rounds[0], rounds[-1]
    name = main_figure(first["before"])
    row = dict(start=label, rate=rate, folder=str(folder), figure=name)
    row |= {
        when: (entry[when] or {}).get(name) for entry, when in ((first, "before"), (last, "after"), (last, "tuned"))
    }
    row |= {key: first[key] for key in ("params_before", "macs_before")}
    return row | {key: last[key] for key in ("params_after", "macs_after")}


def add_latencies(rows: list[dict], args: argparse.Namespace, starting: dict[str, str]) -> None:
    """Time all networks of the sweep in one interleaved run: one image, one thread, milliseconds."""
    models = {row["folder"]: load_model(Config.fromfile(f"{row['folder']}/pruned.py"), f"{row['folder']}/pruned.pth")[0]
              for row in rows}  # fmt: skip
    models["dense"] = load_model(Config.fromfile(args.config), next(iter(starting.values())))[0]
    shape = json.loads(Path(rows[0]["folder"], "pruned.plan.json").read_text())["input_shape"]
    with torch_threads(1):
        seconds = interleaved_medians(eager_calls(models, torch.rand(1, *shape[1:])))
    for row in rows:
        row |= dict(ms=1e3 * seconds[row["folder"]], ms_before=1e3 * seconds["dense"])


def table_of(rows: list[dict], title: str) -> Table:
    """All rows, and of each start the network before."""
    table = Table(title=title)
    several = any(row["start"] for row in rows)
    for column in (["start"] if several else []) + ["rate", "before", "pruned", "fine-tuned", "params", "MACs", "ms"]:
        table.add_column(column, justify="left" if column == "start" else "right")
    seen = set()
    for row in rows:
        lead = [row["start"]] if several else []
        if row["start"] not in seen:
            seen.add(row["start"])
            costs = f"{row['params_before']:,}", f"{row['macs_before']:,}", f"{row['ms_before']:.2f}"
            table.add_row(*lead, "0", _number(row["before"]), "", "", *costs)
        figures = (_number(row[when]) for when in ("before", "after", "tuned"))
        costs = f"{row['params_after']:,}", f"{row['macs_after']:,}", f"{row['ms']:.2f}"
        table.add_row(*lead, f"{row['rate']:g}", *figures, *costs)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def curves_of(rows: list[dict]) -> dict[str, dict[float, float]]:
    """Return what is plotted: after removal and after fine-tuning, or of several starts the last figure alone."""
    labels = list(dict.fromkeys(row["start"] for row in rows))
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        best = row["after"] if row["tuned"] is None else row["tuned"]
        values = {row["start"]: best} if len(labels) > 1 else {"pruned": row["after"], "fine-tuned": row["tuned"]}
        for label, value in values.items():
            if value is not None:
                curves.setdefault(label, {})[row["rate"]] = value
    return curves


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, then one table, one file, one plot."""
    args = parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file has room for the table
    key = hook_key(args.config, PRUNING, "prune_fraction")
    out = Path(args.work_dir or f"work_dirs/sweep_{Path(args.config).stem}")
    starting, rows = starts(args, out, console), []
    for label, checkpoint in starting.items():
        for rate in args.rates:
            folder = out / "_".join(filter(None, [label.replace(" ", "_"), f"rate_{rate:g}"]))
            console.print(f"pruning and fine-tuning: {folder}", markup=False)
            train(args.config, folder, [*args.cfg_options, f"{key}={rate}"], checkpoint)
            rows.append(row_of(folder, label, rate))
    add_latencies(rows, args, starting)
    title = f"{Path(args.config).stem}: {rows[0]['figure']}, costs of one image, one thread"
    console.print(table_of(rows, title))
    write_atomic(out / "sweep.json", lambda file: file.write((json.dumps(rows, indent=1) + "\n").encode()))
    if curves := curves_of(rows):
        dense = rows[0]["before"] if len(starting) == 1 else None
        figure = accuracy_figure(curves, rows[0]["figure"], Path(args.config).stem, dense)
        write_atomic(out / "sweep.png", lambda file: save_figure(figure, file))
    console.print(f"written: {out / 'sweep.json'} and sweep.png", markup=False)


if __name__ == "__main__":
    run(main)
