#!/usr/bin/env python
"""Times pruning itself: ResNet-50 by us and by Torch-Pruning in turns, and the classifier of a bilinear network.

    python benchmarks/prune_speed.py                    # about half a minute

Above: 30 % of ResNet-50's channels by the L1 norm of their kernels, from the dense model to the narrow one (224 x 224
input): ours (trace, plan, apply), ours with the proof that removed equals masked, which Torch-Pruning has not, and
Torch-Pruning's MagnitudePruner. Below: a quarter of the 512 channels before bilinear pooling and its classifier (512 * 512
columns, 200 classes), planned and removed without the proof: 23 million of the 52 million weights go. One thread, medians
of interleaved rounds.
Exits with 1 where ours takes over 3 s or longer than Torch-Pruning, or the bilinear classifier over 0.5 s.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch_pruning as tp
from common import make_table, print_failures, times_in_turns
from rich.console import Console
from torch import Tensor, nn

import rep_plugin
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.measure.costs import count_params

SECONDS, SECONDS_HEAD, FRACTION = 3.0, 0.5, 0.3
CHANNELS, CLASSES = 512, 200


def ours(model: nn.Module, verify: bool) -> None:
    """Plan and apply."""
    plan = rep_plugin.plan_pruning(model, (1, 3, 224, 224), "l1", FRACTION)
    rep_plugin.apply_plan(model, plan, verify=verify)


def theirs(model: nn.Module) -> None:
    """Torch-Pruning's way."""
    importance = tp.importance.MagnitudeImportance(p=1)
    x = torch.randn(1, 3, 224, 224)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance, pruning_ratio=FRACTION, global_pruning=True, ignored_layers=[model.fc]
    )
    pruner.step()


def timed(work: Callable[[nn.Module], None], model: nn.Module) -> float:
    model.eval()
    started = time.perf_counter()
    work(model)
    return time.perf_counter() - started


class BilinearHead(nn.Module):
    """512 channels into their products and 200 classes: little but the classifier can take time."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.pool = BilinearPooling(CHANNELS)
        self.fc = nn.Linear(CHANNELS * CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool((self.convs(x),))[0])


def prune_bilinear(model: nn.Module) -> None:
    plan = rep_plugin.plan_pruning(model, (1, 3, 16, 16), "l1", 0.25)
    rep_plugin.apply_plan(model, plan, verify=False)
    if model.fc.in_features != (CHANNELS * 3 // 4) ** 2:
        raise RuntimeError(f"the classifier has {model.fc.in_features} columns, expected {(CHANNELS * 3 // 4) ** 2}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resnet50 = lambda: timm.create_model("resnet50")  # noqa: E731
    work = {
        "ResNet-50, ours": (resnet50, lambda model: ours(model, verify=False)),
        "ResNet-50, ours with the proof": (resnet50, lambda model: ours(model, verify=True)),
        "ResNet-50, Torch-Pruning": (resnet50, theirs),
        "bilinear classifier, ours": (BilinearHead, prune_bilinear),
    }
    params = {}

    def step(name: str) -> float:
        build, prune = work[name]
        model = build()
        before = count_params(model)
        seconds = timed(prune, model)
        params[name] = f"{before / 1e6:.1f} -> {count_params(model) / 1e6:.1f}"
        return seconds

    times = times_in_turns({name: partial(step, name) for name in work}, args.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    title = f"seconds from the dense to the pruned network, medians of {args.rounds} interleaved rounds"
    table = make_table(title, ("network", "params (M)", "median s", "least", "most"), ["network"])
    for name, seconds in times.items():
        table.add_row(name, params[name], *(f"{v:.3f}" for v in (medians[name], min(seconds), max(seconds))))
    console = Console(width=120)
    console.print(table)
    mine, proven, other, head = medians.values()
    console.print(f"ours / Torch-Pruning: {mine / other:.2f}x, with the proof {proven / other:.2f}x")
    wrong = {
        f"ResNet-50 takes {proven:.2f} s, expected {SECONDS} at most": proven > SECONDS,
        f"ResNet-50 takes {mine / other:.2f}x of Torch-Pruning's time, expected 1 at most": mine > other,
        f"the bilinear classifier takes {head:.2f} s, expected {SECONDS_HEAD} at most": head > SECONDS_HEAD,
    }
    return print_failures(console, [text for text, is_so in wrong.items() if is_so])


if __name__ == "__main__":
    sys.exit(main())
