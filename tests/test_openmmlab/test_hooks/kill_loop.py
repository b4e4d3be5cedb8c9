"""Kill -9 at random moments of trainings that prune, resume each time, and compare with trainings that nobody killed.

    python -m tests.test_openmmlab.test_hooks.kill_loop --kills 20
    python -m tests.test_openmmlab.test_hooks.kill_loop --kills 3 --cases iterative
    python -m tests.test_openmmlab.test_hooks.kill_loop --cases --hooks my_config.py  # custom_hooks of a config, tiny data

Every start is `tools/train.py` in a process of its own (forked, so that imports are paid for once). It is killed at a
random time, between a removal and the checkpoint after it, or with a file half written. After at most five kills the
training goes on to its end. Its losses, from all its processes, its last checkpoint and its artefact must then be those
of the training that was not killed. Prints a table; exits with 1 where something differs.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mmengine.hooks.checkpoint_hook
from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import rep_plugin.checkpoints.files
from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from tests.test_openmmlab.test_hooks import tiny
from tests.test_openmmlab.test_hooks.forked import fork, load_tool, wait

EPOCHS, KILLS_A_RUN = 6, 5
TOLERANCE = 1e-6  # relative
SPARSITY = dict(type="rep_plugin.SparsityHook", strength=0.01, end=3)
EMA = dict(type="EMAHook", momentum=0.2, update_buffers=True)
CASES = {
    "one-shot": [SPARSITY, dict(type="rep_plugin.PruneHook", macs=0.5, begin=3)],
    "iterative": [EMA, dict(type="rep_plugin.PruneHook", prune_fraction=0.6, rounds=3, begin=1, interval=2)],
    "soft": [dict(type="rep_plugin.SoftPruneHook", prune_fraction=0.5, begin=2)],
    "ResRep": [dict(type="rep_plugin.ResRepHook", macs=0.5, begin=1, end=4, interval=2, marked_strength=0.1)],
    "C-SGD": [dict(type="rep_plugin.CentripetalHook", macs=0.5, strength=0.5, begin=1)],
}


@dataclass
class Outcome:
    """What became of the trainings of one case."""

    kills: Counter = field(default_factory=Counter)
    trainings: int = 0
    resumed: int = 0  # starts that went on from a checkpoint
    losses: int = 0  # compared
    loss_gap: float = 0.0
    weight_gap: float = 0.0
    wrong: list[str] = field(default_factory=list)


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file that ends its process when half of its first bytes are written."""

    def __init__(self, file):
        self.file = file

    def write(self, data: bytes | str) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        kill_self()

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def tear_file(number: int) -> None:
    """From now on, tear the file of this number (from 0) that is opened for a checkpoint, its record or an artefact."""
    opened = 0

    def opener(path, mode="r", *rest):
        nonlocal opened
        file = open(path, mode, *rest)  # noqa: SIM115
        opened += "w" in mode
        return Torn(file) if "w" in mode and opened == number + 1 else file

    rep_plugin.checkpoints.files.open = opener
    mmengine.hooks.checkpoint_hook.open = opener


def start(tool, folder: Path, resume: bool, prepare: Callable[[], None], kill_after: float | None) -> int:
    """Train in a new process; return its exit code, negative for a signal. Its output is appended to ``output.txt``."""
    arguments = [str(folder / "config.py"), *(["--resume"] if resume else [])]
    return wait(fork(tool, arguments, folder / "output.txt", prepare), kill_after)


def write_config(folder: Path, hooks: Sequence[dict]) -> None:
    folder.mkdir(parents=True)
    cfg = tiny.config(folder / "work", *hooks, dict(type="LossLog"), dict(type="KillAt"))
    cfg.train_cfg.update(max_epochs=EPOCHS, val_interval=3)
    cfg.dump(folder / "config.py")


def starts_of(folder: Path) -> list[dict[int, float]]:
    """Return {iteration: loss} of every process that trained, in turn."""
    found: dict[str, dict[int, float]] = {}
    path = folder / "work/losses.txt"
    for line in path.read_text().splitlines() if path.is_file() else ():
        process, iteration, loss = line.split()
        found.setdefault(process, {})[int(iteration)] = float.fromhex(loss)
    return list(found.values())


def rounds_of(folder: Path) -> list[dict]:
    """What was done, without the speed, which is of the moment."""
    rounds = json.loads((folder / "work/pruned.rounds.json").read_text())
    return [{key: value for key, value in entry.items() if key != "steps_per_second"} for entry in rounds]


def tensors(node: object, name: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint: weights, averages, the optimizer's state."""
    if isinstance(node, Tensor):
        return {name: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    return {key: value for i, part in items for key, value in tensors(part, f"{name}.{i}").items()}


def larger(gap: float, other: float) -> float:
    """The larger of two differences; what is no number is infinite."""
    return math.inf if math.isnan(other) else max(gap, other)


def compare(folder: Path, whole: Path, outcome: Outcome) -> None:
    """Add to the outcome how a training that was killed differs from the one that was not."""
    (expected,) = starts_of(whole)
    seen = set()
    for index, losses in enumerate(starts_of(folder)):
        iterations = sorted(losses)
        outcome.resumed += index > 0 and iterations[0] > 0
        if iterations != list(range(iterations[0], iterations[-1] + 1)) or iterations[0] % tiny.STEPS:
            outcome.wrong.append(f"{folder.name}: start {index} trained iterations {iterations}")
        for iteration, loss in losses.items():
            outcome.loss_gap = larger(outcome.loss_gap, abs(loss - expected[iteration]) / abs(expected[iteration]))
            outcome.losses += 1
        seen |= set(losses)
    if seen != set(expected):
        outcome.wrong.append(f"{folder.name}: iterations {sorted(set(expected) - seen)} were never trained")
    for name in (f"epoch_{EPOCHS}.pth", "pruned.pth"):
        ours, theirs = (tensors(load_checkpoint_file(place / "work" / name)) for place in (folder, whole))
        shapes = [{key: value.shape for key, value in some.items()} for some in (ours, theirs)]
        if shapes[0] != shapes[1]:
            outcome.wrong.append(f"{folder.name}: {name} has other tensors")
            continue
        for key, value in theirs.items():
            gap = (ours[key].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-30)
            outcome.weight_gap = larger(outcome.weight_gap, float(gap))
    if rounds_of(folder) != rounds_of(whole):
        outcome.wrong.append(f"{folder.name}: pruned.rounds.json differs")
    models = [Config.fromfile(place / "work/pruned.py").model for place in (folder, whole)]
    if models[0] != models[1]:
        outcome.wrong.append(f"{folder.name}: pruned.py builds another model")
    if max(outcome.loss_gap, outcome.weight_gap) > TOLERANCE:
        outcome.wrong.append(f"{folder.name}: losses or weights differ by more than {TOLERANCE:g}")


def choose(rng: random.Random, turn: int, folder: Path, removals: Sequence[int], seconds: float):
    """Return the kind of kill whose turn it is, what the process does to prepare for it, and after how many seconds.

    Where there is no removal ahead, a file is torn instead.
    """
    trained = tiny.STEPS * len(list(folder.glob("work/epoch_*.pth")))
    between = [at for r in removals for at in range(r, r + tiny.STEPS) if r >= trained]
    kind = ("after removal", "torn file", "random")[turn % 3]
    if kind == "random":
        return kind, lambda: None, rng.uniform(0.05, 1.0) * seconds
    if kind == "torn file" or not between:
        number = rng.randrange(5)
        return "torn file", lambda: tear_file(number), None
    at = rng.choice(between)
    return kind, lambda: os.environ.update(KILL_AT=str(at)), None


def run_case(tool, hooks: Sequence[dict], folder: Path, kills: int, seed: int, advance: Callable[[], None]) -> Outcome:
    """Kill and resume trainings until there were so many kills; compare each with one that was not killed."""
    rng, outcome, whole = random.Random(seed), Outcome(), folder / "whole"
    write_config(whole, hooks)
    began = time.perf_counter()
    if start(tool, whole, False, lambda: None, None):
        raise RuntimeError(f"the training that nobody kills failed; see {whole / 'output.txt'}")
    seconds = time.perf_counter() - began
    removals = [entry["iter"] for entry in rounds_of(whole) if entry["iter"] < EPOCHS * tiny.STEPS]
    while outcome.kills.total() < kills:
        outcome.trainings += 1
        run = folder / f"run{outcome.trainings}"
        write_config(run, hooks)
        code, here = -signal.SIGKILL, 0
        resume = False
        while code:
            kind, prepare, after = "none", lambda: None, None
            if outcome.kills.total() < kills and here < KILLS_A_RUN:
                kind, prepare, after = choose(rng, outcome.kills.total(), run, removals, seconds)
            code = start(tool, run, resume, prepare, after)
            resume = True
            if code == -signal.SIGKILL and kind != "none":
                outcome.kills[kind] += 1
                here += 1
                advance()
            elif code:
                outcome.wrong.append(f"{run.name}: exit code {code} after {here} kills, see {run / 'output.txt'}")
                return outcome
        compare(run, whole, outcome)
    return outcome


def main() -> None:
    """Kill, print the table; exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of every case")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--hooks", nargs="*", default=[], help="configs whose custom_hooks are further cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where runs stay; default: a temporary folder")
    args = parser.parse_args()
    cases = {name: CASES[name] for name in args.cases}
    cases |= {Path(path).stem: Config.fromfile(path).custom_hooks for path in args.hooks}
    tool, began = load_tool(), time.perf_counter()
    table = Table(title=f"{args.kills} kills each; {EPOCHS} epochs of {tiny.STEPS} iterations")
    for column in ("hooks", "kills", "trainings", "resumed", "losses", "loss gap", "weight gap", "all equal"):
        table.add_column(column, justify="left" if column in ("hooks", "kills") else "right")
    wrong = []
    with tempfile.TemporaryDirectory() as temporary, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("kills", total=args.kills * len(cases))
        for name, hooks in cases.items():
            folder = Path(args.folder or temporary).resolve() / name
            found = run_case(tool, hooks, folder, args.kills, args.seed, lambda: progress.advance(task))
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.kills.items()))
            gaps = f"{found.loss_gap:.1e}", f"{found.weight_gap:.1e}"
            counts = str(found.trainings), str(found.resumed), str(found.losses)
            table.add_row(name, kinds, *counts, *gaps, "NO" if found.wrong else "yes")
            wrong += [f"{name}, {text}" for text in found.wrong]
    Console(width=130).print(table)
    print(f"{time.perf_counter() - began:.0f} s")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
