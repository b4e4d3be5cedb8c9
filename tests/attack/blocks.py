"""Random affine blocks in five coding styles, and look-alikes: the first are merged or named, the second are never merged.

python -m tests.attack.blocks 17      # the source of both, and what became of them
"""

import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import rep_plugin
from rep_plugin.errors import NothingToMergeError
from rep_plugin.reparam.linear_parts import KIND
from tests.attack._oracle import Reference

SHORT, LONG = 10, 2000
CHANNELS = 8
BEFORE = (
    "x = F.relu(x)",
    "x = torch.tanh(x) * self.gain",
    "x = F.pad(x, (0, 1, 0, 1))",
    "x = self.act(self.before(x))",
)
ACTIVATIONS = ("self.act({})", "F.relu({})", "{}.relu()", "F.silu({})", "F.hardswish({})", "{}")
NOT_LINEAR = (
    "({0} + 30.0).relu() - 30.0",
    "{0}.clamp(-1e3, 1e3)",
    "torch.maximum({0}, {0} * 0.999)",
    "({0} if x.shape[-1] < 40 else {0} * 0.5)",
    "({0} if x.abs().max() < 300 else {0} * 0.5)",
    "F.dropout({0}, 0.2, True)",
    "{0} * self.place[..., : {0}.shape[-2], : {0}.shape[-1]]",
    "F.layer_norm({0}, {0}.shape[1:])",
    "{0} * torch.sigmoid({0}.mean((2, 3), keepdim=True))",
    "F.max_pool2d({0}, 3, 1, 1)",
    "F.avg_pool2d({0}, 3, 1, 1, count_include_pad=False)",
    "F.pad({0}, (1, 1, 1, 1), 'reflect')[..., 1:-1, 1:-1]",
    "{0}.abs()",
    "{0} ** 2",
    "torch.where({0} > -50, {0}, -50 + 0 * {0})",
)


class Scaled(nn.Module):
    """A factor for each channel, as some blocks hold."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(CHANNELS, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.gamma


class Source:
    """The source of one block: branches of one stride and their sum."""

    def __init__(self, rng: random.Random, name: str):
        self.rng, self.name = rng, name
        self.stride = rng.choice((1, 1, 1, 2))
        self.depthwise = rng.random() < 0.3
        self.groups = CHANNELS if self.depthwise else rng.choice((1, 1, 2))

    def chain(self, averages: bool) -> list[str]:
        rng, stride = self.rng, self.stride
        side, dilation = rng.choice((1, 3, 3, 5)), rng.choice((1, 1, 2))
        bias = rng.random() < 0.5
        padding, groups = dilation * (side - 1) // 2, self.groups
        layers = [f"nn.Conv2d(8, 8, {side}, {stride}, {padding}, {dilation}, {groups}, bias={bias})"]
        if not self.depthwise and rng.random() < 0.25:
            layers = ["nn.Conv2d(8, 8, 1, bias=False)", *layers]
        elif stride == 1 and rng.random() < 0.15:
            layers = [*layers, "nn.Conv2d(8, 8, 1)"] if not self.depthwise else layers
        elif rng.random() < 0.15 and averages:
            layers = [f"nn.AvgPool2d(3, {stride}, 1)"]
        norm = rng.choice(("nn.BatchNorm2d(8)", "nn.BatchNorm2d(8)", "FrozenBatchNorm2d(8)", "Scaled()", None))
        return layers + [norm] * (norm is not None)

    def write(self, middle: str = "{}") -> str:
        """A class whose forward is an activation of ``middle`` of the sum of branches."""
        rng = self.rng
        chains = [self.chain(averages=index > 0) for index in range(rng.randint(2, 4))]  # one at least is a convolution
        act = rng.choice(ACTIVATIONS)
        skip = " + x" if self.stride == 1 and rng.random() < 0.3 else ""
        factor = rng.choice(("", "", " * 0.5", " * self.gain"))
        style = rng.choice(("loop", "sum", "nested", "inherited", "closure"))
        init = ["super().__init__()", "self.act = nn.GELU()", "self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)"]
        init.append("self.register_buffer('place', torch.rand(1, 1, 200, 200) + 0.5)")
        base, before = "nn.Module", ""
        sequences = [f"nn.Sequential({', '.join(chain)})" for chain in chains]
        if style == "loop":
            init.append(f"self.branches = nn.ModuleList([{', '.join(sequences)}])")
            body = ["y = 0", "for branch in self.branches:", "    y = y + branch(x)", f"y = y{factor}{skip}"]
        elif style == "inherited":
            before = (
                f"class {self.name}Base(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                f"        self.first = {sequences[0]}\n\n    def forward(self, x):\n        return self.first(x)\n\n\n"
            )
            base = f"{self.name}Base"
            init += [f"self.branch{i} = {s}" for i, s in enumerate(sequences) if i]
            terms = " + ".join(f"self.branch{i}(x)" for i in range(1, len(sequences)))
            body = [f"y = (super().forward(x) + {terms}){factor}{skip}"]
        else:
            holder = "nn.Sequential({})".format if style == "nested" else "{}".format
            init += [f"self.branch{i} = {holder(s)}" for i, s in enumerate(sequences)]
            terms = [f"self.branch{i}(x)" for i in range(len(sequences))]
            if style == "closure":
                body = ["def run(layer):", "    return layer(x)", ""]
                body[2] = "y = " + " + ".join(f"run(self.branch{i})" for i in range(len(sequences)))
                body.append(f"y = y{factor}{skip}")
            elif rng.random() < 0.5:
                body = [f"y = torch.stack([{', '.join(terms)}]).sum(0){factor}{skip}"]
            else:
                body = [f"y = ({' + '.join(terms)}){factor}{skip}"]
        if rng.random() < 0.4:
            init.append("self.before = nn.Conv2d(8, 8, 1)")
            body.insert(0, rng.choice(BEFORE))
        around = " + x" if self.stride == 1 and rng.random() < 0.2 else ""
        body += [f"y = {middle.format('y')}", f"return {act.format('y')}{around}"]
        init, body = ("".join(f"        {line}\n" for line in lines) for lines in (init, body))
        return f"{before}class {self.name}({base}):\n    def __init__(self):\n{init}\n    def forward(self, x):\n{body}"


def build(seed: int, middle: str = "{}") -> tuple[nn.Module, str]:
    """A network round one block, with random numbers everywhere, in float64."""
    rng = random.Random(seed)
    source = Source(rng, "Block").write(middle)
    space = {
        "__name__": "block",
        "nn": nn,
        "F": F,
        "torch": torch,
        "FrozenBatchNorm2d": FrozenBatchNorm2d,
        "Scaled": Scaled,
    }
    exec(compile(source, f"<block {seed}>", "exec"), space)
    torch.manual_seed(seed)
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), space["Block"](), nn.Conv2d(8, 4, 1)).double().eval()
    )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not name.endswith("place"):
            tensor.data.uniform_(0.5, 1.5) if "running_var" in name else tensor.data.normal_(0, 0.5)
    return model, source


def merge(model: nn.Module) -> tuple[nn.Module | None, list[str], list[str]]:
    """Return the merged model, the kinds of its blocks, and the notes."""
    x = torch.randn(2, 3, 13, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged, report = rep_plugin.reparameterize(model, x, fold_bn=False, merge_linear=True)
    except NothingToMergeError as error:
        return None, [], list(error.notes)
    return merged, [block.kind for block in report.blocks], report.notes


def attack(seed: int, folder: Path) -> Counter:
    """One affine block, which is merged without an adapter or named, and one look-alike, which is not.

    Args:
        seed: of both.
        folder: not used.

    Returns:
        Counts by outcome.

    Raises:
        AssertionError: a merge is wrong, an affine block is left without a word, or a look-alike is merged.
    """
    counts: Counter = Counter()
    model, _ = build(seed)
    merged, kinds, notes = merge(model)
    if any(kind.endswith(KIND) for kind in kinds):
        assert (wrong := Reference(model, (3, 13, 18), 1e-12).compare(merged)) is None, wrong
        counts["affine merged"] += 1
    else:
        assert any("block '2'" in note or "sequence" in note for note in notes), (
            f"left without a word: {notes}, {kinds}"
        )
        counts["affine named"] += 1
    middle = NOT_LINEAR[seed % len(NOT_LINEAR)]
    other, _ = build(seed, middle)
    merged, kinds, _ = merge(other)
    if "dropout" in middle and merged is not None:  # what is drawn follows the layout of the map in memory
        x = torch.ones(1, 3, 13, 18, dtype=torch.float64)
        assert not torch.equal(merged(x), merged(x)), "nothing is dropped any more"
    elif merged is not None:
        assert (wrong := Reference(other, (3, 13, 18), 1e-12).compare(merged)) is None, f"look-alike: {wrong}"
    counts["look-alikes right"] += 1
    return counts


if __name__ == "__main__":
    number = int(sys.argv[1])
    for text in ("{}", NOT_LINEAR[number % len(NOT_LINEAR)]):
        network, code = build(number, text)
        print(code, merge(network)[1:], sep="\n")
    print(attack(number, Path()))
