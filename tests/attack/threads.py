"""Verbs in several threads, beside threads that only infer: nobody sees an error, and no output moves by a bit."""

import math
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import rep_plugin
from rep_plugin.blocks import RepVGGBlock
from rep_plugin.measure.copies import copy_model
from rep_plugin.testing import calibrate_random_bn_

SHORT, LONG, LIMIT_S = 1, 20, 600.0
THREADS = 8
X = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Blocks, Conv-BN pairs, a map that it keeps, a function of ``math`` on a size, noise that it draws itself."""

    def __init__(self, width: int, noisy: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(RepVGGBlock(width, width, 3), RepVGGBlock(width, 2 * width, 3, stride=2))
        self.neck = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head, self.noisy = nn.Linear(width, 5), noisy

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        self.kept = self.neck(x)
        y = self.head(self.kept.mean((2, 3))) * math.sqrt(x.shape[2])
        return y + 1e-3 * torch.randn_like(y) if self.noisy else y


def build(seed: int, noisy: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(8 + 4 * (seed % 3), noisy).eval()
        calibrate_random_bn_(net, X)
    return net


def merge(net: nn.Module, folder: Path) -> None:
    merged, report = rep_plugin.reparameterize(net, X)
    assert report.max_rel_error < 1e-9 and not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert type(merged.kept) is Tensor


def merge_in_place(net: nn.Module, folder: Path) -> None:
    _, report = rep_plugin.reparameterize(copy_model(net), X, inplace=True)
    assert report.max_rel_error < 1e-9


def expand(net: nn.Module, folder: Path) -> None:
    _, report = rep_plugin.expand(net, "acb", example_input=X)
    assert report.max_rel_error < 1e-9 and len(report.blocks) == 1


def prune(net: nn.Module, folder: Path) -> None:
    pruned = copy_model(net)
    report = rep_plugin.apply_plan(pruned, rep_plugin.plan_pruning(net, X, "l1", 0.3))
    assert report.max_rel_error < 1e-9 and report.params_after < report.params_before


def export(net: nn.Module, folder: Path) -> None:
    path = folder / f"{threading.get_ident()}.onnx"
    report = rep_plugin.export_onnx(net, path, X, rounds=0, runtimes=["onnxruntime"])
    assert path.stat().st_size == report.size_bytes


def save(net: nn.Module, folder: Path) -> None:
    merged, _ = rep_plugin.reparameterize(net, X)
    rep_plugin.save(merged, folder / str(threading.get_ident()))
    loaded = rep_plugin.load(folder / str(threading.get_ident()), model=copy_model(net))
    assert all(
        torch.equal(a, b) for a, b in zip(merged.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


VERBS: Mapping[str, Callable[[nn.Module, Path], None]] = {
    "reparameterize": merge,
    "inplace": merge_in_place,
    "expand": expand,
    "prune": prune,
    "export": export,
    "save": save,
}


def _say(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}: {place.line})"


def run_beside(
    jobs: Sequence[Callable[[], object]], models: Mapping[str, nn.Module], least: int = 1, repeat: int = 1
) -> Counter:
    """Run each job in a thread, and beside them one thread for each model that infers until they are done.

    Raises AssertionError for the first job that fails, model that fails, or output that differs by a bit.
    """
    expected = {name: model(X).detach() for name, model in models.items()}
    faults: list[str] = []
    counts: Counter = Counter()
    done, ready = threading.Event(), threading.Barrier(len(jobs) + len(models))

    def work(job: Callable[[], object]) -> None:
        ready.wait()
        for _ in range(repeat):
            try:
                job()
                counts["jobs"] += 1
            except BaseException as error:  # whatever it is, it is what we look for
                faults.append(f"a verb in a thread: {_say(error)}")

    def infer(name: str, model: nn.Module) -> None:
        ready.wait()
        number = 0
        while not done.is_set() or number < least:
            number += 1
            try:
                with torch.no_grad():
                    same = torch.equal(model(X), expected[name])
            except BaseException as error:  # as above
                faults.append(f"{name} model, call {number}: {_say(error)}")
                break
            if not same:
                faults.append(f"{name} model, call {number}: another output than before")
                break
        counts["inferences"] += number

    workers = [threading.Thread(target=work, args=(job,)) for job in jobs]
    readers = [threading.Thread(target=infer, args=item) for item in models.items()]
    for thread in (*workers, *readers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not faults, f"{len(faults)} faults, first: {faults[0]}"
    for name, model in models.items():
        assert torch.equal(model(X).detach(), expected[name]), f"{name} model: another output afterwards"
    return counts


def attack(seed: int, folder: Path) -> Counter:
    """Eight threads, each with a verb of its own turn, beside one that infers on the given model and one on another."""
    given, other = build(seed), build(seed + 1)
    verbs = [*VERBS.values()] * 3
    jobs = [partial(verb, given, folder) for verb in verbs[seed % len(VERBS) :][:THREADS]]
    own, state = torch.nn.Module.__call__, torch.get_rng_state()
    hooks = len(given._forward_hooks), [m.training for m in given.modules()]
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = run_beside(jobs, {"given": given, "other": other})
    assert torch.nn.Module.__call__ is own, "torch.nn.Module.__call__ was replaced"
    assert torch.equal(torch.get_rng_state(), state), "the random state moved"
    assert hooks == (len(given._forward_hooks), [m.training for m in given.modules()]), "hooks or modes changed"
    for name, value in given.state_dict().items():
        assert torch.equal(value, before[name]), f"{name!r} of the given model changed"
    return counts
