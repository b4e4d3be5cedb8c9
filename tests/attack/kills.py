"""Kill -9 of a process that writes files, at any step or at any time: the old set stands there whole, or the new one."""

import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

from tests.attack.steps import count_steps, die_at
from tests.attack.writers import HEAVY, LIGHT, WRITERS, contents, in_child

SHORT, LONG, FEW, LIMIT_S = 12, 100, 3, 300
TRAINING = 25  # every so many-th kill is one of a training, which goes on


def attack(seed: int, folder: Path) -> Counter:
    """Write a set, kill the process that writes another one over it, look, and write a third."""
    if seed % TRAINING == TRAINING - 1:
        return _kill_training(seed, folder)
    rng = random.Random(seed)
    name = HEAVY[seed // 2 % len(HEAVY)] if seed % 2 else LIGHT[seed // 2 % len(LIGHT)]
    writer, place = WRITERS[name], folder / "set"
    place.mkdir()
    began, steps = time.perf_counter(), _steps_of(partial(writer.write, place, 0))
    seconds, old = time.perf_counter() - began, contents(place)
    writer.read(place)
    number = rng.randrange(steps + 10)
    while True:
        timed = rng.random() < 0.2
        how = f"{name} killed after {seconds:.3f} s" if timed else f"{name} killed at step {number}"
        signal, found = in_child(
            lambda number=number, timed=timed: (None if timed else die_at(number), writer.write(place, 1))[0],
            rng.uniform(0, seconds) if timed else None,
        )
        assert found is None, f"{how}: {found}"
        new = contents(place)
        changed = {file for file in {**old, **new} if old.get(file) != new.get(file)}
        wrong = sorted({*old, *new} - changed - {*writer.same}) if changed else []
        assert not wrong, f"{how}: {sorted(changed)} are new and {wrong} are old"
        try:
            writer.read(place)
        except Exception as error:
            raise AssertionError(f"{how}: the set is not read: {type(error).__name__}: {error}") from error
        if signal:
            break
        old, number = new, rng.randrange(max(1, number))  # not killed: it was over before
        writer.write(place, 0)
        old = contents(place)
    writer.write(place, 2)
    last = {path.name for path in place.iterdir()}
    assert last == {*old, *new}, f"{how}: the next write leaves {sorted(last)}"
    assert not [path for path in place.iterdir() if path.is_symlink()], f"{how}: the next write leaves links"
    writer.read(place)
    return Counter({"kills": 1, "new set" if changed else "old set": 1, f"kills of {name}": 1})


def _steps_of(write) -> int:
    """Write in a process of its own, and return its number of steps."""

    def counting() -> int:
        last = [0]
        count_steps(lambda step: last.__setitem__(0, step + 1))
        write()
        return last[0]

    _, found = in_child(counting)
    assert isinstance(found, int), found
    return found


def _kill_training(seed: int, folder: Path) -> Counter:
    """Kill trainings with pruning hooks until three kills struck; resumed, they equal one that nobody killed."""
    from tests.test_openmmlab.test_hooks.forked import load_tool
    from tests.test_openmmlab.test_hooks.kill_loop import CASES, run_case

    name = list(CASES)[seed // TRAINING % len(CASES)]
    outcome = run_case(load_tool(), CASES[name], folder, 3, seed, lambda: None)
    assert not outcome.wrong, f"training with {name}: {outcome.wrong[0]}"
    return Counter({"kills": outcome.kills.total(), "kills of trainings": outcome.kills.total()})
