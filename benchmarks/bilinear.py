#!/usr/bin/env python
"""Bilinear pooling at the size of a B-CNN (N=32, C=512, 28x28): time of ``full`` and of the others, memory of the sketch.

    python benchmarks/bilinear.py             # about two minutes on two cores; the FFT form takes 6.4 GB
    python benchmarks/bilinear.py --batch 4   # an eighth of both

Times are forward + backward, medians over interleaved rounds, as ratios to the same round of a bare reference
(``torch.bmm``, division by the positions, signed square root, ``F.normalize``). Peak memory is what a fresh process adds to
its own size before the call, forward + backward. Exits with 1 where a target is missed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import growth_of_child, make_table, median_ratio, print_growth, times_in_turns
from rich.console import Console
from torch import Tensor

from rep_plugin.bilinear.methods import METHODS
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.functional.bilinear import SQRT_EPS, draw_signs

TIME_TARGET, MEMORY_TARGET = 1.1, 0.25


def reference(x: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
    """The textbook form: (N, C, H, W) -> (N, C * C)."""
    x = x.flatten(2)
    return F.normalize(root((torch.bmm(x, x.transpose(1, 2)) / x.shape[2]).flatten(1)))


REFERENCES = {
    "bmm + L2 alone": lambda z: z,
    "bmm + sign * sqrt + L2": lambda z: z.sign() * torch.sqrt(z.abs() + SQRT_EPS),
    "bmm + two ReLU roots + L2": lambda z: torch.sqrt(F.relu(z) + SQRT_EPS) - torch.sqrt(F.relu(-z) + SQRT_EPS),
}


class FFTSketch:
    """Tensor Sketch as published: count sketches of every position, multiplied as spectra, summed over positions."""

    def __init__(self, channels: int, dim: int):
        generator = torch.Generator().manual_seed(0)
        self.dim = dim
        self.hashes = [torch.randint(dim, (channels,), generator=generator) for _ in range(2)]
        self.signs = [draw_signs((channels,), generator) for _ in range(2)]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        spectra = []
        for place, sign in zip(self.hashes, self.signs):
            sketch = x.new_zeros(*x.shape[:2], self.dim).index_add(2, place, x * sign)
            spectra.append(torch.fft.rfft(sketch))
        pooled = torch.fft.irfft((spectra[0] * spectra[1]).mean(1), self.dim)
        return F.normalize(torch.sqrt(F.relu(pooled) + SQRT_EPS) - torch.sqrt(F.relu(-pooled) + SQRT_EPS))


def build(name: str, channels: int, dim: int) -> Callable[[Tensor], Tensor]:
    """A pooling by its name in the tables."""
    if name == "FFT form":
        return FFTSketch(channels, dim)
    if name in REFERENCES:
        return lambda x: reference(x, REFERENCES[name])
    neck = BilinearPooling(channels, name, dim=dim)
    return lambda x: neck((x,))[0]


def step(pooling: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    x.grad = None
    started = time.perf_counter()
    out = pooling(x)
    out.backward(torch.ones_like(out))
    return time.perf_counter() - started


def make_map(args: argparse.Namespace) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(args.batch, args.channels, args.side, args.side, requires_grad=True)


def time_all(names: list[str], args: argparse.Namespace, rounds: int) -> dict[str, list[float]]:
    """Seconds of every pooling in every round."""
    x = make_map(args)
    return times_in_turns({name: partial(step, build(name, args.channels, args.dim), x) for name in names}, rounds)


def measure_memory(args: argparse.Namespace) -> None:
    """What the child process does: run one pooling, print by how many MB it grew at most."""
    torch.set_num_threads(1)
    small = argparse.Namespace(**{**vars(args), "batch": 1, "side": 2})
    pooling = build(args.memory_of, args.channels, args.dim)
    step(pooling, make_map(small))  # libraries are loaded
    x = make_map(args)
    print_growth(lambda: step(pooling, x))


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """MB that forward and backward take in a fresh process."""
    sizes = [f"--{key}={getattr(args, key)}" for key in ("batch", "channels", "side", "dim")]
    return growth_of_child(__file__, [*sizes, f"--memory-of={name}"])


def verdict(value: float, target: float) -> str:
    return f"[green]{value:.2f} <= {target}[/]" if value <= target else f"[red]{value:.2f} > {target}[/]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of bilinear pooling")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--side", type=int, default=28, help="of the square map")
    parser.add_argument("--dim", type=int, default=8192, help="of the sketch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--all", action="store_true", help="time the slow methods too (several minutes)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args)
        return
    console, met = Console(), True
    size = f"N={args.batch}, C={args.channels}, {args.side}x{args.side}, float32"
    slow = ("random_maclaurin", "isqrt_cov")
    for threads in args.threads:
        torch.set_num_threads(threads)
        names = [*REFERENCES, *(name for name in METHODS if args.all or name not in slow)]
        times = time_all(names, args, args.rounds)
        columns = ("pooling", "median ms", *(f"x of {name}" for name in REFERENCES))
        table = make_table(f"{size}, {threads} threads", columns, ["pooling"])
        for name in names:
            row = []
            for base in REFERENCES:
                ratio = median_ratio(times[name], times[base])
                row.append(verdict(ratio, TIME_TARGET) if name == "full" else f"{ratio:.2f}")
                met &= name != "full" or ratio <= TIME_TARGET
            table.add_row(name, f"{1000 * statistics.median(times[name]):.0f}", *row)
        console.print(table)
    title = f"{size}, D={args.dim}: memory of forward + backward"
    table = make_table(title, ("pooling", "peak MB", "x of the FFT form"), ["pooling"])
    fft, ours = peak_memory("FFT form", args), peak_memory("tensor_sketch", args)
    met &= ours <= MEMORY_TARGET * fft
    table.add_row("FFT form", f"{fft:.0f}", "1.00")
    table.add_row("tensor_sketch", f"{ours:.0f}", verdict(ours / fft, MEMORY_TARGET))
    console.print(table)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
