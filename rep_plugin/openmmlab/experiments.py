"""Experiments: a set of ordinary configs, trained by the ordinary runner over several seeds, and a record of every run.

A set is a config file (``configs/experiments/``) that holds

* ``title``: one line;
* ``rows``: {name: dict(config=..., options={...}, start=..., widths_of=...)}: what is trained. ``config`` is a path or the
  name of a shipped config, ``options`` are changes to it as ``merge_from_dict`` takes them. ``start`` names the row whose
  last checkpoint of the same seed is loaded first, ``widths_of`` the row whose pruned network is trained from random
  weights, ``deployed_of`` the row whose merged or pruned network is trained on, ``hidden=True`` a row that only others
  start from;
* ``options``: changes to every config; ``seeds``: how many (3); ``baseline``: the row that others are compared with;
* ``claims``: what a source says, see :mod:`rep_plugin.openmmlab.results`.
"""

import copy
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from rep_plugin.checkpoints.files import check_writable, write_text
from rep_plugin.depth.timing import call_of, deployed, time_in_turns
from rep_plugin.errors import ArgumentError, TrainingError, did_you_mean
from rep_plugin.export.inputs import INPUT
from rep_plugin.export.int8 import export_int8
from rep_plugin.export.runtimes import open_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.openmmlab.accuracy import main_metric, validation_metrics
from rep_plugin.openmmlab.base_configs import read_config
from rep_plugin.openmmlab.checkpoint import find_latest_checkpoint
from rep_plugin.openmmlab.load import build_loader, build_model, labelled_batches, load_model
from rep_plugin.openmmlab.onnx_classifier import OnnxClassifier
from rep_plugin.shipped import CONFIGS

SETS = CONFIGS / "experiments"
PACKAGES = ("rep-plugin", "torch", "mmengine", "onedl-mmengine", "mmpretrain", "onedl-mmpretrain", "timm")
POLL = 0.5  # seconds
ARTEFACTS = {"pruned": "pruned", "deployed": "deploy"}  # name: stem of the files, the last one is what is used
INT8_IMAGES = 512  # of training, that calibrate


@dataclass(frozen=True)
class Row:
    """What is trained, under one name of the table."""

    name: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    widths_of: str | None = None
    deployed_of: str | None = None
    hidden: bool = False
    seeds: int | None = None

    @property
    def needs(self) -> str | None:
        """The row that has to be trained before."""
        return self.start or self.widths_of or self.deployed_of


@dataclass(frozen=True)
class ExperimentSet:
    """A set that was read, see :mod:`rep_plugin.openmmlab.experiments`."""

    name: str
    title: str
    rows: Mapping[str, Row]
    seeds: int = 3
    baseline: str | None = None
    claims: Sequence[Mapping[str, Any]] = ()
    path: Path | None = None

    @property
    def called(self) -> str:
        """What ``rep-plugin experiments`` calls it: the name of a shipped set, else the path in the checkout."""
        if self.path is None or self.path.parent == SETS:
            return self.name
        root = CONFIGS.resolve().parent
        return str(self.path.relative_to(root) if self.path.is_relative_to(root) else self.path)

    def seeds_of(self, name: str) -> int:
        """Return how many seeds a row needs: its own number or the set's, and as many as the rows that need it."""
        row = self.rows[name]
        own = 0 if row.hidden else row.seeds or self.seeds
        return max([own, *(self.seeds_of(other.name) for other in self.rows.values() if other.needs == name)])

    def in_order(self, names: Sequence[str] = ()) -> list[Row]:
        """Return rows, each after the one that it needs.

        Args:
            names: of the rows; none: all.

        Raises:
            ArgumentError: a name that is not in the set.
        """
        order: dict[str, Row] = {}

        def add(name: str) -> None:
            if name not in self.rows:
                raise ArgumentError(f"set {self.name!r} has no row {name!r}{did_you_mean(name, self.rows)}")
            if (needed := self.rows[name].needs) is not None:
                add(needed)
            order[name] = self.rows[name]

        for name in names or self.rows:
            add(name)
        return list(order.values())


def list_sets() -> list[str]:
    """Return the names of the shipped sets."""
    return sorted(path.stem for path in SETS.glob("[!_]*.py"))


def read_set(name: str, options: Mapping[str, Any] | None = None) -> ExperimentSet:
    """Read a set.

    Args:
        name: of a shipped set, or the path of a file.
        options: changes to the config of every row, beside the set's own.

    Returns:
        The set.

    Raises:
        ArgumentError: there is no such set, or it is malformed.
    """
    path = Path(name) if name.endswith(".py") else SETS / f"{name}.py"
    if not path.is_file():
        known = list_sets()
        raise ArgumentError(
            f"no experiment {name!r}, expected one of {', '.join(known)}, or a .py file{did_you_mean(name, known)}"
        )
    cfg = Config.fromfile(str(path))
    if absent := [key for key in ("title", "rows") if not cfg.get(key)]:
        raise ArgumentError(f"{path} is no set of experiments: it has no {absent[0]!r}")
    common = {**cfg.get("options", {}), **(options or {})}
    rows = {}
    for row, given in cfg.rows.items():
        given = dict(given)
        own = {**common, **given.pop("options", {})}
        try:
            rows[row] = Row(row, given.pop("config", ""), own, **given)
        except TypeError as error:
            raise ArgumentError(f"row {row!r} of {path}: {error}") from None
        if sum(map(bool, (rows[row].config, rows[row].widths_of, rows[row].deployed_of))) != 1:
            raise ArgumentError(f"row {row!r} of {path} needs a config, or widths_of or deployed_of another row")
    found = ExperimentSet(
        path.stem, cfg.title, rows, cfg.get("seeds", 3), cfg.get("baseline"), [*cfg.get("claims", [])], path.absolute()
    )
    found.in_order()
    return found


@dataclass(frozen=True)
class Run:
    """One training: a row and a seed, in a folder of its own."""

    row: Row
    seed: int
    folder: Path
    before: Path | None  # folder of the run that it starts from

    @property
    def done(self) -> bool:
        return (self.folder / "done").is_file()

    @property
    def ready(self) -> bool:
        return self.before is None or (self.before / "done").is_file()

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


def slug_of(name: str) -> str:
    """Return a name as it stands in names of files."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "_".join(words)


def runs_of(
    experiments: ExperimentSet, work_dir: Path, seeds: int | None = None, rows: Sequence[str] = ()
) -> list[Run]:
    """Return the runs of a set: all rows with the first seed, then with the next.

    Args:
        experiments: the set.
        work_dir: folder of all runs.
        seeds: how many; None: as many as the set says of each row.
        rows: names of the rows, and of those that they need; none: all.

    Returns:
        The runs.
    """

    def folder(row: str, seed: int) -> Path:
        return work_dir / f"{slug_of(row)}_seed{seed}"

    chosen = experiments.in_order(rows)
    counts = {row.name: experiments.seeds_of(row.name) if seeds is None else seeds for row in chosen}
    return [
        Run(row, seed, folder(row.name, seed), folder(row.needs, seed) if row.needs else None)
        for seed in range(max(counts.values()))
        for row in chosen
        if seed < counts[row.name]
    ]


def config_of(run: Run) -> Config:
    """Return the whole config of a run.

    Raises:
        ArgumentError: there is no such config.
    """
    if run.row.widths_of:
        cfg = Config.fromfile(str(run.before / "pruned.py"))
        cfg.load_from = None
    elif run.row.deployed_of:
        stem = next(stem for stem in reversed(ARTEFACTS.values()) if (run.before / f"{stem}.py").is_file())
        cfg = Config.fromfile(str(run.before / f"{stem}.py"))
        cfg.load_from = str(run.before / f"{stem}.pth")
    else:
        cfg = read_config(run.row.config)
    if run.row.start:
        cfg.load_from = find_latest_checkpoint(str(run.before))
    cfg.merge_from_dict(copy.deepcopy(dict(run.row.options)))
    # Killed, a run goes on from its last epoch.
    cfg.merge_from_dict({"randomness.seed": run.seed, "default_hooks.checkpoint.interval": 1})
    cfg.merge_from_dict({"default_hooks.checkpoint.max_keep_ckpts": 1})
    return cfg


@dataclass
class _Training:
    """A process that trains, and what it has to be told of."""

    run: Run
    process: subprocess.Popen
    log: TextIO
    lock: TextIO
    started: float = field(default_factory=time.monotonic)
    cpu_seconds: float = 0.0

    def is_over(self, wait: bool = False) -> bool:
        """Whether the process has ended, or does if it is waited for; then what it used is known."""
        pid, status, usage = os.wait4(self.process.pid, 0 if wait else os.WNOHANG)
        if pid:
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return bool(pid)


def train_all(
    runs: Sequence[Run],
    workers: int,
    deadline: float | None = None,
    log: Callable[[str], None] = print,
    finished: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train what is not yet trained, ``workers`` at a time, each with one thread.

    A run that was cut off goes on from its last checkpoint. One that another process trains at this moment is left to it.

    Args:
        runs: what to train; a run waits for the one that it starts from.
        workers: number of processes.
        deadline: on ``time.monotonic()``; then all are ended, and go on another time.
        log: is called with what is being done.
        finished: is called with each run that is trained now.

    Returns:
        The runs that are not done: out of time, or the one before failed.

    Raises:
        TrainingError: trainings failed; the message names their logs. The others are done.
    """
    waiting, active, failed = [run for run in runs if not run.done], [], []
    times: dict[str, list[float]] = {}
    try:
        while waiting or active:
            for one in [one for one in active if one.is_over()]:
                active.remove(one)
                with one.lock:  # until it is marked as done: another process would train it once more
                    seconds = _end(one)
                    if one.process.returncode:
                        failed.append(one.run)
                        log(f"failed: {one.run}, see {one.run.folder / 'log.txt'}")
                        continue
                    finished(one.run)
                    write_text(one.run.folder / "done", str(date.today()))
                times.setdefault(one.run.row.name, []).append(seconds)
                log(f"{one.run}: {_clock(seconds)}; {_remaining(waiting, active, times, workers)}")
            waiting = [run for run in waiting if not run.done and not _depends_on(run, failed)]
            if deadline is not None and time.monotonic() > deadline:
                log(f"out of time: {len(waiting) + len(active)} runs go on another time")
                return [*waiting, *(one.run for one in active)]
            for run in [run for run in waiting if run.ready][: max(0, workers - len(active))]:
                if (one := _begin(run)) is not None:
                    waiting.remove(run)
                    active.append(one)
                    log(f"training: {run}: {run.folder}")
            time.sleep(POLL)
    finally:
        for one in active:
            one.process.terminate()
            one.is_over(wait=True)
            with one.lock:
                _end(one)
    if failed:
        raise TrainingError(
            f"{len(failed)} trainings failed, see {', '.join(str(r.folder / 'log.txt') for r in failed)}"
        )
    return waiting


def _depends_on(run: Run, failed: Sequence[Run]) -> bool:
    return any(run.before == other.folder for other in failed)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _remaining(
    waiting: Sequence[Run], active: Sequence[_Training], times: Mapping[str, list[float]], workers: int
) -> str:
    """How many runs are left, and about how long they take: as long as those of their row, else as all do."""
    every = [seconds for row in times.values() for seconds in row]

    def expected(run: Run) -> float:
        known = times.get(run.row.name, every)
        return sum(known) / len(known)

    now = time.monotonic()
    left = sum(map(expected, waiting)) + sum(max(0, expected(one.run) - now + one.started) for one in active)
    return f"{len(waiting) + len(active)} left, about {_clock(left / workers)} minutes"


def _begin(run: Run) -> _Training | None:
    """Start or continue a training; None where another process has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = (run.folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if run.done:  # since it was looked at
        lock.close()
        return None
    with _closed_on_error(lock):
        config, asked = run.folder / "config.py", run.folder / "asked.py"  # the runner writes over the first
        text = config_of(run).pretty_text
        if asked.is_file() and asked.read_text() != f"{text}\n":
            raise ArgumentError(f"{run.folder} holds a run of another config, expected a work folder of its own")
        write_text(asked, text)
        write_text(config, text)
        words = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "rep_plugin",
            "train",
            str(config),
            "--work-dir",
            str(run.folder),
        ]
        if (run.folder / "last_checkpoint").is_file() and find_latest_checkpoint(str(run.folder)):
            words.append("--resume")
        log = (run.folder / "log.txt").open("a")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return _Training(run, process, log, lock)


@contextmanager
def _closed_on_error(file: TextIO) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def _end(one: _Training) -> float:
    """Close what belongs to a process that ended, and return the seconds of this run in all its goes."""
    one.log.close()
    path = one.run.folder / "seconds.json"
    goes = json.loads(path.read_text()) if path.is_file() else []
    goes.append({"wall": round(time.monotonic() - one.started, 1), "cpu": round(one.cpu_seconds, 1)})
    write_text(path, json.dumps(goes))
    return sum(go["wall"] for go in goes)


def record_of(run: Run, experiments: str) -> dict[str, Any]:
    """Return what is known of a finished run: how it was trained, where, and what came out.

    Args:
        run: the run.
        experiments: name of its set.

    Returns:
        Plain data. ``metrics`` are of the last validation, ``history`` [epoch, main metric] of each; ``costs`` those of the
        trained network and of the merged or pruned one that it left; ``rounds`` the metrics round each removal;
        ``seconds`` one entry for each time it was started.
    """
    lines = [json.loads(line) for path in sorted(run.folder.glob("*/vis_data/scalars.json")) for line in path.open()]
    validations = {line["step"]: line for line in lines if any("/" in key and "lr" not in key for key in line)}
    validations = {step: line for step, line in validations.items() if "loss" not in line}
    if not validations:
        raise TrainingError(f"{run.folder} holds no validation, expected one at the end of the training")
    last = validations[max(validations)]
    metrics = {key: value for key, value in last.items() if "/" in key}
    main = main_metric(metrics)
    rounds = run.folder / "pruned.rounds.json"
    record = {
        "experiment": experiments,
        "row": run.row.name,
        "seed": run.seed,
        "config": run.row.config,
        "options": dict(run.row.options),
        **({key: value for key in ("start", "widths_of", "deployed_of") if (value := getattr(run.row, key))}),
        **environment(),
        "threads": 1,
        "seconds": json.loads((run.folder / "seconds.json").read_text()),
        "main_metric": main,
        "metrics": metrics,
        "history": [[step, round(line[main], 4)] for step, line in sorted(validations.items()) if main in line],
        "costs": costs_of(run.folder),
    }
    if rounds.is_file():
        keys = ("before", "after", "tuned")
        record["rounds"] = [
            {key: (one.get(key) or {}).get(main) for key in keys} for one in json.loads(rounds.read_text())
        ]
    return record


def score(record: Mapping[str, Any]) -> float:
    """Return the main metric of a run's last validation."""
    return float(record["metrics"][record["main_metric"]])


def costs_of(folder: Path) -> dict[str, Any]:
    """Return parameters and multiply-adds for one image of the networks that a run left.

    Args:
        folder: of the run.

    Returns:
        ``input_shape``, and (params, macs) of ``trained``, ``deployed`` and ``pruned``, as far as there are.
    """
    trained, image = _trained(folder)
    models = {"trained": trained, **_artefacts(folder)}
    costs: dict[str, Any] = {"input_shape": list(image.shape)}
    for name, model in models.items():
        costs[name] = {"params": count_params(model), "macs": count_macs(model, image)}
    return costs


def _trained(folder: Path) -> tuple[nn.Module, Tensor]:
    """Return the network that a run trains, with fresh weights, and an image (1, C, H, W) of its data."""
    cfg = Config.fromfile(str(folder / "config.py"))
    model = build_model(cfg)
    return model, _image(cfg, model)


def _image(cfg: Config, model: nn.Module) -> Tensor:
    """Return an image (1, C, H, W) of a config's data, as the model sees it."""
    (images, _), *_ = labelled_batches(model, cfg, 1)
    return images[:1]


def _artefacts(folder: Path) -> dict[str, nn.Module]:
    """Return the networks that a run left, as anyone loads them: ``pruned`` and ``deployed``, as far as there are."""
    return {
        name: load_model(Config.fromfile(str(folder / f"{stem}.py")), str(folder / f"{stem}.pth"))[0]
        for name, stem in ARTEFACTS.items()
        if (folder / f"{stem}.pth").is_file()
    }


def _final(folder: Path) -> tuple[Config, nn.Module]:
    """Return what a run ends with, and its config: the deployed network, else the pruned one, else the trained one."""
    for stem in reversed(ARTEFACTS.values()):
        if (folder / f"{stem}.pth").is_file():
            cfg = Config.fromfile(str(folder / f"{stem}.py"))
            return cfg, load_model(cfg, str(folder / f"{stem}.pth"))[0]
    cfg = Config.fromfile(str(folder / "config.py"))
    return cfg, load_model(cfg, find_latest_checkpoint(str(folder)))[0]


def time_rows(
    experiments: ExperimentSet, work_dir: Path, records: Path, runtimes: Sequence[str] = ("onnxruntime", "openvino")
) -> Path:
    """Time what the rows of a set deploy, all in turns, on one thread, with one image, and write that beside the records.

    Args:
        experiments: the set.
        work_dir: folder of all runs; the network of each row is that of its first seed.
        records: folder of the records.
        runtimes: any of ``eager``, ``onnxruntime``, ``openvino``.

    Returns:
        The file: ``milliseconds`` {runtime: {row: number}}.

    Raises:
        ArgumentError: no row is trained.
        ExportError: a runtime cannot run a network.
    """
    models, image = {}, None
    for run in runs_of(experiments, work_dir, seeds=1):
        if run.done and not run.row.hidden:
            cfg, model = _final(run.folder)
            image = _image(cfg, model)
            models[run.row.name] = deployed(model, image)
    if image is None:
        raise ArgumentError(f"{work_dir} holds no finished run of {experiments.name}, expected one at least")
    found = {}
    for runtime in runtimes:
        calls = {name: call_of(runtime, model, image, 1) for name, model in models.items()}
        found[runtime] = {name: round(value, 4) for name, value in time_in_turns(calls, 1).items()}
    path = records / f"{experiments.name}_latency.json"
    write_text(path, json.dumps({**environment(), "threads": 1, "milliseconds": found}, indent=1))
    return path


def quantise_rows(
    experiments: ExperimentSet,
    work_dir: Path,
    records: Path,
    runtimes: Sequence[str] = ("onnxruntime", "openvino"),
    log: Callable[[str], None] = print,
) -> Path:
    """Write what the rows of a set deploy as int8, judge it on the whole validation set, and write that beside the records.

    There are two files of each run: one by ONNX Runtime's defaults (``MinMax``, a scale for a layer), one by
    :func:`rep_plugin.export_int8`, or by the run's own QATHook. Training images calibrate. What is in the records already is
    not done again.

    Args:
        experiments: the set.
        work_dir: folder of all runs.
        records: folder of the records.
        runtimes: where the files of the first seed are timed, all in turns, on one thread, with one image.
        log: is called with what is being done.

    Returns:
        The file: ``rows`` {row: {seed: numbers}}, ``milliseconds`` {runtime: {``float`` or ``int8``: {row: number}}}.

    Raises:
        ArgumentError: no row is trained.
        ExportError: a network cannot be exported.
    """
    path = records / f"{experiments.name}_int8.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    runs = [run for run in runs_of(experiments, work_dir) if run.done and not run.row.hidden]
    if not runs:
        raise ArgumentError(f"{work_dir} holds no finished run of {experiments.name}, expected one at least")
    for run in runs:
        if str(run.seed) not in rows.setdefault(run.row.name, {}):
            found = rows[run.row.name][str(run.seed)] = _quantised(run)
            log(f"{run}: float {found['float']:.2f}, naive int8 {found['naive']:.2f}, int8 {found['int8']:.2f}")
    calls: dict[str, dict] = {runtime: {} for runtime in runtimes}
    for run in (run for run in runs if run.seed == 0):
        cfg, model = _final(run.folder)
        image = _image(cfg, model)
        for runtime in runtimes:
            session = open_model(runtime, (run.folder / rows[run.row.name]["0"]["file"]).read_bytes(), 1)
            calls[runtime]["float", run.row.name] = call_of(runtime, deployed(model, image), image, 1)
            calls[runtime]["int8", run.row.name] = partial(session, {INPUT: image})
    times: dict[str, dict] = {runtime: {"float": {}, "int8": {}} for runtime in runtimes}
    for runtime in runtimes:
        for (kind, row), value in time_in_turns(calls[runtime], 1).items():
            times[runtime][kind][row] = round(value, 4)
    write_text(path, json.dumps({**environment(), "threads": 1, "rows": rows, "milliseconds": times}, indent=1))
    return path


def _quantised(run: Run) -> dict[str, Any]:
    """Write the two int8 files of a run; return their main metrics on the validation set, and their sizes."""
    cfg, model = _final(run.folder)
    batches = labelled_batches(model, cfg, INT8_IMAGES, part="train_dataloader")
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    naive, ours = run.folder / "naive.onnx", run.folder / "int8.onnx"
    quick = dict(layers=False, rounds=0, min_agreement=0.0)
    export_int8(
        model, naive, images, labels, methods=["MinMax"], per_channel=False, equalise=False, with_report=True, **quick
    )
    trained = run.folder / "int8.onnx.json"  # of a QATHook
    if not trained.is_file():
        ours = run.folder / "calibrated.onnx"
        trained = run.folder / "calibrated.onnx.json"
        export_int8(model, ours, images, labels, with_report=True, **quick)
    report = json.loads(trained.read_text())
    loader = build_loader(cfg, "val_dataloader")

    def judged(network: nn.Module) -> float:
        metrics = validation_metrics(network, cfg, loader)
        return round(metrics[main_metric(metrics)], 4)

    def file(path: Path) -> nn.Module:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmpretrain")):
            return OnnxClassifier(path, cfg.model, data_preprocessor=cfg.get("data_preprocessor"))

    return {
        "float": judged(model), "naive": judged(file(naive)), "int8": judged(file(ours)), "file": ours.name,
        **{key: report[key] for key in ("size_float", "size_bytes", "method", "per_channel", "equalised")},
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Return where and when something is measured: ``commit``, ``date``, ``versions``, ``processor``."""
    versions = {name: found for name in PACKAGES if (found := _version(name))} | {"python": sys.version.split()[0]}
    return {"commit": commit(), "date": str(date.today()), "versions": versions, "processor": processor()}


def commit() -> str:
    """Return the commit of the checkout that this package is in, with ``+`` where files differ; else its version."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    return f"version {version('rep-plugin')}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name as Linux has it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def write_record(run: Run, experiments: str, folder: Path) -> Path:
    """Write the record of a finished run.

    Args:
        run: the run.
        experiments: name of its set.
        folder: of all records; the set has one of its own in it.

    Returns:
        The file.
    """
    path = folder / experiments / f"{slug_of(run.row.name)}_seed{run.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record_of(run, experiments), indent=1))
    return path


def run_experiments(
    name: str,
    work_dir: Path,
    records: Path,
    *,
    seeds: int | None = None,
    rows: Sequence[str] = (),
    workers: int | None = None,
    minutes: float | None = None,
    options: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> list[Run]:
    """Train what is missing of a set, and write a record of each run.

    Args:
        name: of a shipped set, or the path of a file.
        work_dir: folder of all runs.
        records: folder of the records.
        seeds: how many; None: as many as the set says.
        rows: names of the rows; none: all.
        workers: runs side by side, one thread each; None: one a core.
        minutes: time for all; what is not done then goes on another time.
        options: changes to the config of every row.
        log: is called with what is being done.

    Returns:
        The runs that are missing.

    Raises:
        ArgumentError: the set, a row or a work folder does not fit.
        TrainingError: trainings failed.
        OSError: records cannot be written.
    """
    experiments = read_set(name, options)
    runs = runs_of(experiments, work_dir, seeds, rows)
    check_writable(records)
    for run in runs:  # of goes that ended between the training and the record
        if run.done and not run.row.hidden and not (records / experiments.name / f"{run.folder.name}.json").is_file():
            write_record(run, experiments.name, records)
    left = sum(not run.done for run in runs)
    log(f"{experiments.title}: {len(runs)} runs, {len(runs) - left} done")

    def finished(run: Run) -> None:
        if not run.row.hidden:
            path = write_record(run, experiments.name, records)
            record = json.loads(path.read_text())
            log(f"{run}: {record['main_metric']} {score(record):.2f}")

    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    return train_all(runs, workers or os.cpu_count() or 1, deadline, log, finished)
