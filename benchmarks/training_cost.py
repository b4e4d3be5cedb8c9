#!/usr/bin/env python
"""What a training step costs: forward + backward of multi-branch networks, ours and others', batch 16 at 224 pixels.

    python benchmarks/training_cost.py                    # about six minutes on one thread
    python benchmarks/training_cost.py --networks dbb_resnet18 --batch 4

Times are medians over interleaved rounds, beside the same network with one plain Conv-BN for every block. Peak memory is
what a fresh process adds during one step to its size before. ``branch by branch`` is the block as published, every layer of
every branch run by itself.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from common import growth_of_child, make_table, median_ratio, print_growth, times_in_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rep_plugin  # noqa: F401  (registers our names with timm)
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.families import DiverseBranchBlock


class BorderBN(nn.Module):
    """BN, then padding by what a zero would have become: how the published DBB keeps its border mergeable."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.bn, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.bn(x), [self.padding] * 4)
        scale = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        border = (self.bn.bias - self.bn.running_mean * scale).view(1, -1, 1, 1)
        p = self.padding
        y[:, :, :p], y[:, :, -p:], y[:, :, :, :p], y[:, :, :, -p:] = border, border, border, border
        return y


class BranchByBranch(nn.Module):
    """A Diverse Branch Block run layer by layer."""

    def __init__(self, replaced: nn.Conv2d):
        super().__init__()

        def conv(i: int, o: int, k: int, s: int = 1, p: int = 0) -> nn.Conv2d:
            return nn.Conv2d(i, o, k, s, p, bias=False)

        kernel, stride = replaced.kernel_size[0], replaced.stride[0]
        pad, i, o = kernel // 2, replaced.in_channels, replaced.out_channels
        self.origin = nn.Sequential(conv(i, o, kernel, stride, pad), nn.BatchNorm2d(o))
        # Not conv(i, o, 1, stride): that crashes in oneDNN for the stem's three channels in channels_last.
        self.point = nn.Sequential(nn.AvgPool2d(1, stride), conv(i, o, 1), nn.BatchNorm2d(o))
        self.sequence = nn.Sequential(conv(i, i, 1), BorderBN(i, pad), conv(i, o, kernel, stride), nn.BatchNorm2d(o))
        self.average = nn.Sequential(conv(i, o, 1), BorderBN(o, pad), nn.AvgPool2d(kernel, stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return self.origin(x) + self.point(x) + self.sequence(x) + self.average(x)


def resnet18(block: Callable[[nn.Conv2d], nn.Module] | None) -> nn.Module:
    """timm's ResNet-18, every spatial Conv-BN replaced by ``block(conv)``."""
    model = timm.create_model("resnet18")
    for name, module in list(model.named_modules()):
        if block and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            model.set_submodule(name, block(module))
            model.set_submodule(name.replace("conv", "bn"), nn.Identity())
    return model


def dbb(conv: nn.Conv2d, **options) -> nn.Module:
    """Our block for a convolution."""
    return DiverseBranchBlock(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, **options)


def rep_mobilenet_v2(**options) -> nn.Module:
    """Rep-MobileNetV2 with a pooled scalar output."""
    return nn.Sequential(RepMobileNetV2(**options), Last())


def one_conv_each(model: nn.Module) -> nn.Module:
    """A deployed network of ours with a BN behind each convolution: plain training."""
    for module in model.modules():
        if isinstance(module, RepBlock):
            conv = module.reparam_conv
            shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            plain = nn.Conv2d(conv.in_channels, conv.out_channels, *shape, bias=False)
            module.reparam_conv = nn.Sequential(plain, nn.BatchNorm2d(conv.out_channels))
    return model


class Last(nn.Module):
    """The last map of a tuple."""

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return maps[-1]


class ChannelsFirst(nn.Module):
    """A network in torch's default format. timm's RepVGG needs it on CPU: the strided 1x1 of its stem crashes oneDNN."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.to(memory_format=torch.contiguous_format)(x.contiguous())


NETWORKS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "dbb_resnet18": {
        "plain Conv-BN": lambda: resnet18(None),
        "branch by branch": lambda: resnet18(BranchByBranch),
        "ours": lambda: resnet18(dbb),
        "ours, online": lambda: resnet18(lambda conv: dbb(conv, online=True)),
    },
    "repvgg_a0": {
        "plain Conv-BN": lambda: one_conv_each(timm.create_model("rep_repvgg_a0", deploy=True)),
        "timm, channels first": lambda: ChannelsFirst(timm.create_model("repvgg_a0")),
        "ours": lambda: timm.create_model("rep_repvgg_a0"),
        "ours, channels first": lambda: ChannelsFirst(timm.create_model("rep_repvgg_a0")),
        "ours, online": lambda: timm.create_model("rep_repvgg_a0", online=True),
    },
    "rep_mobilenetv2_100": {
        "plain Conv-BN": lambda: one_conv_each(rep_mobilenet_v2(deploy=True)),
        "ours": rep_mobilenet_v2,
        "ours, online": lambda: rep_mobilenet_v2(online=True),
    },
}  # fmt: skip


def build(network: str, contender: str, channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[network][contender]().train()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def make_batch(args: argparse.Namespace) -> Tensor:
    x = torch.randn(args.batch, 3, args.size, args.size)
    return x.contiguous(memory_format=torch.channels_last) if args.channels_last else x


def step(model: nn.Module, x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    started = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - started


def measure_memory(args: argparse.Namespace) -> None:
    """What the child process does: run one step, print by how many MB it grew at most."""
    torch.set_num_threads(args.threads)
    model = build(args.networks[0], args.memory_of, args.channels_last)
    step(model, make_batch(argparse.Namespace(batch=2, size=64, channels_last=args.channels_last)))
    x = make_batch(args)
    print_growth(lambda: step(model, x))


def peak_memory(network: str, contender: str, args: argparse.Namespace) -> float:
    """MB that one step takes in a fresh process."""
    options = [f"--batch={args.batch}", f"--size={args.size}", f"--threads={args.threads}"]
    options += [] if args.channels_last else ["--no-channels-last"]
    return growth_of_child(__file__, ["--networks", network, "--memory-of", contender, *options])


def compare(network: str, args: argparse.Namespace) -> Table:
    """Measure one network's contenders; return the table."""
    models = {name: build(network, name, args.channels_last) for name in NETWORKS[network]}
    x = make_batch(args)
    times = times_in_turns({name: partial(step, model, x) for name, model in models.items()}, args.rounds, 1, network)
    base, other, *_ = models
    columns = ("trained as", "ms a step", f"x {base}", f"x {other}", "peak memory, MB")
    table = make_table(
        f"{network}, batch {args.batch} at {args.size}, {args.threads} thread(s)", columns, ["trained as"]
    )
    for name in models:
        ratios = [median_ratio(times[name], times[to]) for to in (base, other)]
        memory = f"{peak_memory(network, name, args):,.0f}"
        table.add_row(name, f"{statistics.median(times[name]) * 1e3:.0f}", *(f"{r:.2f}" for r in ratios), memory)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-channels-last", dest="channels_last", action="store_false")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return measure_memory(args)
    torch.set_num_threads(args.threads)
    for network in args.networks:
        Console(width=120).print(compare(network, args))


if __name__ == "__main__":
    main()
