#!/usr/bin/env python
"""expand -> train -> merge on timm networks: what changes at the start, and what comes back after training.

    python benchmarks/expand.py                    # about two minutes on one thread

The networks are given calibrated random BNs (as after training), expanded, trained for some SGD steps on a small random
task, and merged both ways. ``stock`` is how far the given network is from its own float64 form, in float32.
"""

import argparse
import copy

import timm
import torch
from common import make_table
from rich.console import Console
from torch import Tensor, nn

import rep_plugin
from rep_plugin.measure.verify import compare_outputs
from rep_plugin.testing import calibrate_random_bn_


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Largest relative difference of two models' outputs."""
    with torch.no_grad():
        return compare_outputs(a(x), b(x)).max_rel


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: int) -> tuple[float, float]:
    """Plain SGD; return the loss of the first and of the last step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    losses = []
    for step in range(steps):
        x, target = batches[step % len(batches)]
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


def measure(name: str, block: str, args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3, args.size, args.size), torch.randint(10, (16,))) for _ in range(4)]
    stock = calibrate_random_bn_(timm.create_model(name, num_classes=10), batches[0][0])
    x = torch.randn(4, 3, args.size + 1, args.size)
    expanded, report = rep_plugin.expand(stock, block)
    start = difference(stock, expanded, x)
    noise = compare_outputs(copy.deepcopy(stock).double()(x.double()).detach(), stock(x).detach()).max_rel
    first, last = train(expanded, batches, args.steps)
    kept, kept_report = rep_plugin.reparameterize(expanded, fold_bn=False)
    _, folded_report = rep_plugin.reparameterize(expanded, fold_bn=True)
    fresh = timm.create_model(name, num_classes=10).eval()
    fresh.load_state_dict(kept.state_dict(), strict=True)
    back = "yes" if list(fresh.state_dict()) == list(kept.state_dict()) and torch.equal(fresh(x), kept(x)) else "NO"
    errors = (report.max_rel_error, start, noise, kept_report.max_rel_error, folded_report.max_rel_error)
    sensitivity = f"{min(kept_report.sensitivity, folded_report.sensitivity):.2f}"
    return [name, block, *(f"{value:.1e}" for value in errors), sensitivity, f"{first:.2f} -> {last:.2f}", back]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["resnet18", "mobilenetv2_100"])
    parser.add_argument("--blocks", nargs="+", default=["dbb", "acb"])
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    columns = (
        "network", "block", "start, float64", "start, float32", "stock's own", "merged, BN kept", "merged, BN folded",
        "sensitivity", "loss", "stock keys",
    )  # fmt: skip
    table = make_table(f"expand, {args.steps} steps, merge: relative differences", columns, ["network", "block"])
    for name in args.names:
        for block in args.blocks:
            table.add_row(*measure(name, block, args))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
