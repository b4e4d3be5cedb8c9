#!/usr/bin/env python
"""A training step of ResNet-18 with and without the terms of sparse training, in turns.

    python benchmarks/sparsity_cost.py                  # a minute

Forward, backward and SGD step, batch 16 at 64 pixels, one thread; medians. The terms are those of SparsityHook: L1 on all
prunable gammas, by sub-gradient or proximal, and group lasso on all their kernels as well. Exits with 1 where sub-gradient
or proximal L1 costs more than 1 %.
"""

import argparse
import statistics
import sys
import time
from functools import partial

import timm
import torch
from common import make_table, times_in_turns
from rich.console import Console
from torch import nn

from rep_plugin.pruning.methods.sparsity import Sparsity

LIMIT, STRENGTH = 1.01, 1e-4


def build(mode: str | None, lasso: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same network and optimizer, with the terms attached where there is a mode."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    if mode is not None:
        gammas = {m.weight: STRENGTH for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        kernels = {m.weight: STRENGTH for m in model.modules() if isinstance(m, nn.Conv2d)} if lasso else {}
        Sparsity(gammas, kernels, mode).attach([optimizer])
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of one training step."""
    started = time.perf_counter()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    forms = {
        "off": build(None, False),
        "sub-gradient": build("subgradient", False),
        "proximal": build("proximal", False),
        "sub-gradient, group lasso": build("subgradient", True),
    }
    steps = {name: partial(step, model, optimizer, x, y) for name, (model, optimizer) in forms.items()}
    times = times_in_turns(steps, args.rounds, 2)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    title = f"ResNet-18, a training step, {args.rounds} rounds in turns, one thread"
    table = make_table(title, ("terms", "ms a step", "times off"), ["terms"])
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:.1f}", f"{median / medians['off']:.3f}")
    Console().print(table)
    return int(max(medians["sub-gradient"], medians["proximal"]) > LIMIT * medians["off"])


if __name__ == "__main__":
    sys.exit(main())
