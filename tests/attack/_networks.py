"""Random small networks, written as Python source in several styles, so that a fault can be read and not only repeated."""

import linecache
import random
from collections.abc import Callable

import torch
from torch import nn

from rep_plugin.testing import calibrate_random_bn_

HEADER = """
import collections, dataclasses, functools, math, types
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from timm.layers import BatchNormAct2d, DropPath, SqueezeExcite
from timm.models.byobnet import MobileOneBlock as TimmMobileOne, RepVggBlock as TimmRepVGG
from rep_plugin.blocks import (
    ACBConv2d, ACBlock, DBBConv2d, DiverseBranchBlock, LargeKernelBlock, MobileOneBlock, MobileOneConv2d, RepConv2d,
    RepInvertedResidual, RepVGGBlock, Scale,
)


@dataclasses.dataclass
class Outputs:
    first: Tensor
    second: object = None


Pair = collections.namedtuple("Pair", "first second")


class FrozenBN(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class ConvBN(nn.Module):
    def __init__(self, ins, outs, k=3, stride=1, groups=1, act=nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, k, stride, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outs)
        self.act = act()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class StandardConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ClampedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-40, 40)


class ClampedBN(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-40, 40)


class HalfWeight(nn.Module):
    def forward(self, w):
        return w * 0.5


class Heads(nn.Module):
    # Heads of a width of their own: q, k and v by layers of theirs, and what may stand between them.
    def __init__(self, dim, heads, deep, table=False, norms=False, across=False):
        super().__init__()
        self.heads, self.inner, self.across = heads, heads * deep, across
        self.q, self.kv, self.proj = nn.Linear(dim, self.inner), nn.Linear(dim, 2 * self.inner), nn.Linear(self.inner, dim)
        self.q_norm = nn.LayerNorm(deep) if norms else nn.Identity()
        self.table = nn.Parameter(torch.randn(7, heads)) if table else None
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q_norm(self.q(x).view(n, t, self.heads, -1).transpose(1, 2))
        k, v = self.kv(x).reshape(n, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.across:  # channels attend to channels
            q, k, v = (part.transpose(-2, -1) for part in (q, k, v))
        weights = q @ k.transpose(-2, -1) / x.shape[1] * self.temperature
        if self.table is not None and not self.across:
            place = torch.arange(t, device=x.device)
            weights = weights + self.table[(place[:, None] - place) % 7].permute(2, 0, 1)
        out = weights.softmax(-1) @ v
        out = out.transpose(-2, -1) if self.across else out
        return self.proj(out.transpose(1, 2).reshape(n, t, self.inner))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Wrap(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class TwoMin(nn.Sequential):
    def forward(self, x):
        return torch.minimum(super().forward(x), x.new_tensor(30.0))


"""

# Multi-branch blocks as others write them: names of children, their layers, and what is applied after the sum.
FOREIGN = {
    "RepVGGBlock": ("rbr_dense", "rbr_1x1", "rbr_identity", "nonlinearity"),
    "RepConv": ("rbr_dense", "rbr_1x1", "rbr_identity", "act"),
    "RepVggBlock": ("conv_kxk", "conv_1x1", "identity", "act"),
    "RepVGGLayer": ("branch_3x3", "branch_1x1", "branch_norm", "act"),
    "ReparamLargeKernelConv": ("lkb_origin", "small_conv", None, None),
    "LargeKernel": ("large_conv", "small_conv", None, "act"),
}
SUM = "a + b"
WRONG_SUMS = (
    "torch.maximum(a, b)",
    "(a + b).clamp(-40, 40)",
    "(a + b).clamp(max=1e3)",
    "F.relu(a + b + 1e4) - 1e4",
    "F.relu(a + 60) - 60 + b",
    "a - b",
    "a + 0.5 * b",
    "a + b + b",
    "a * torch.sigmoid(b)",
    "a + b * torch.linspace(1, 1.001, b.shape[-1], dtype=b.dtype)",
    "(a + b) * (1 + 1e-3 * (x.shape[0] - 2))",
    "a + b.flip(-1)",
    "a + F.dropout(b, 0.1, True)",
    "a + b.mean((2, 3), keepdim=True)",
    "(a + b) if x.shape[-1] < 40 else a",
    "(a + b) if x.abs().max() < 100 else a",
    "(a + b) if x.shape[0] < 4 else b",
    "torch.where(x.abs().amax() < 100, a + b, a)",
    "(a + b) / (1 + 1e-7 * x.abs().mean())",
)
ACTIVATIONS = (
    "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU6()", "nn.Hardswish()", "nn.SiLU(inplace=True)", "nn.GELU()",
    "nn.PReLU()", "nn.PReLU({c})", "nn.LeakyReLU(0.1, True)", "nn.ELU()", "nn.CELU(1.3)", "nn.Softplus()", "nn.Mish()",
    "nn.Tanh()", "nn.Sigmoid()", "nn.Hardtanh(-2, 3)", "nn.RReLU()", "nn.Threshold(0.1, -0.2)", "nn.Hardsigmoid()",
    "nn.Softshrink(0.3)", "nn.LogSigmoid()", "nn.Identity()",
)  # fmt: skip
FUNCTIONS = (
    "F.relu({x})", "F.relu({x}, inplace=True)", "torch.relu_({x})", "{x}.clamp(-3, 3)", "{x}.clamp_(min=0)", "F.gelu({x})",
    "F.leaky_relu({x}, 0.2)", "torch.tanh({x})", "{x}.sigmoid()", "{x}.abs()", "{x} * {x}", "F.hardswish({x})", "-{x}",
    "{x} * 0.5 + 1", "1 - {x}", "{x}.square().add(1).sqrt()", "F.dropout({x}, 0.3, self.training)", "F.normalize({x}, dim=1)",
    "torch.exp(-{x}.abs())", "torch.where({x} > 0, {x}, 0.1 * {x})", "{x}.float().to({x}.dtype)" , "F.silu({x}) + {x}",
)  # fmt: skip


class Failed(Exception):
    """A node does not fit here: it is left out."""


class Writer:
    """Writes one class: lines of ``__init__``, lines of ``forward``, and the shapes of the variables."""

    def __init__(self, rng: random.Random, name: str, shape: tuple, space: dict, classes: list[str], traps: bool):
        self.rng, self.name, self.space, self.classes, self.traps = rng, name, space, classes, traps
        self.inits: list[str] = []
        self.lines: list[str] = []
        self.uses = {"x": 0}
        self.values = {"x": torch.randn(2, *shape)}
        self.scratch = nn.Module()
        self.count = 0
        self.home = rng.choice(("", "", "", "dict", "list"))
        self.pairs: list[tuple[str, str, str]] = []  # convolution, BN, and the variable between them
        self.kinds: list[str] = []
        if self.home:
            self.init(f"self.parts = nn.Module{'Dict' if self.home == 'dict' else 'List'}()")

    # What templates call

    def init(self, line: str) -> None:
        exec(line, self.space, {"self": self.scratch})
        self.inits.append(line)

    def module(self, code: str, kind: str = "layer") -> str:
        """Register a module; return how forward names it."""
        self.count += 1
        if self.home == "dict":
            self.init(f"self.parts['{kind}{self.count}'] = {code}")
            return f"self.parts['{kind}{self.count}']"
        if self.home == "list":
            self.init(f"self.parts.append({code})")
            return f"self.parts[{len(self.scratch.parts) - 1}]"
        self.init(f"self.{kind}{self.count} = {code}")
        return f"self.{kind}{self.count}"

    def line(self, text: str, reads: tuple[str, ...]) -> str:
        """Add ``new = text``; return the new variable."""
        self.count += 1
        new = f"v{self.count}"
        self.run(f"{new} = {text}")
        for read in reads:
            self.uses[read] += 1
        self.uses[new] = 0
        value = self.values[new]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not torch.isfinite(value).all():
            raise Failed
        if not 0 < value.numel() < 8000 or value.abs().max() > 1e4:
            raise Failed
        return new

    def run(self, text: str) -> None:
        with torch.no_grad():
            exec(text, self.space, box := {"self": self.scratch, **self.values})
        self.values = {key: value for key, value in box.items() if key != "self"}
        self.lines.append(text)

    def channels(self, var: str) -> int:
        return self.values[var].shape[1]

    def is_map(self, var: str) -> bool:
        return self.values[var].dim() == 4

    def pick(self) -> str:
        """A map, mostly one that nothing reads yet."""
        maps = [var for var in self.values if self.is_map(var)]
        fresh = [var for var in maps if not self.uses[var]]
        return self.rng.choice(fresh[-2:] if fresh and self.rng.random() < 0.8 else maps)

    # Growing and writing

    def grow(self, nodes: int, templates: list) -> None:
        tries = 0
        while nodes > 0 and tries < 60:
            tries += 1
            add = self.rng.choice(templates)
            saved = (list(self.inits), list(self.lines), dict(self.uses), dict(self.values), list(self.pairs))
            classes, parts = list(self.classes), dict(self.scratch._modules)
            inner = dict(self.scratch.parts._modules) if self.home else {}
            try:
                add(self, self.pick())
                nodes -= 1
                self.kinds.append(add.__name__)
            except Exception:  # a template that does not fit these shapes
                self.inits, self.lines, self.uses, self.values, self.pairs = saved
                self.classes[:] = classes
                self.scratch._modules.clear()
                self.scratch._modules.update(parts)
                if self.home:
                    self.scratch.parts._modules.clear()
                    self.scratch.parts._modules.update(inner)

    def write(self, result: str) -> str:
        """Source of the class, in one of several styles."""
        pad, style = "\n        ", self.rng.choice(("plain", "plain", "inherited", "parts"))
        inits, lines = list(self.inits), list(self.lines)
        if style == "inherited":
            cut = self.rng.randint(0, len(inits))
            base = f"class {self.name}Base(nn.Module):\n    def __init__(self):\n        super().__init__(){pad}"
            self.classes.append(base + pad.join(inits[:cut] or ["pass"]))
            head = f"class {self.name}({self.name}Base):\n    def __init__(self):\n        super().__init__(){pad}"
            inits = inits[cut:]
        else:
            head = f"class {self.name}(nn.Module):\n    def __init__(self):\n        super().__init__(){pad}"
        text = head + pad.join(inits or ["pass"]) + "\n\n"
        simple = all(" = " in line and line.split(" = ")[0].replace("v", "").isdigit() for line in lines)
        if style == "parts" and simple and len(lines) > 2:
            cut = self.rng.randint(1, len(lines) - 1)
            given = ["x"] + [line.split(" = ")[0] for line in lines[:cut]]
            names = ", ".join(given)
            text += f"    def features(self, x):{pad}{pad.join(lines[:cut])}{pad}return {names}\n\n"
            lines = [f"{names} = self.features(x)", *lines[cut:]]
        return text + f"    def forward(self, x):{pad}{pad.join(lines)}{pad}return {result}\n"


# Templates: each adds one node that reads a variable.

Template = Callable[[Writer, str], object]
TEMPLATES: list[Template] = []
TRAPS: list[Template] = []


def template(times: int, into: list | None = None) -> Callable[[Template], Template]:
    def add(function: Template) -> Template:
        (TEMPLATES if into is None else into).extend([function] * times)
        return function

    return add


def conv_code(w: Writer, var: str, outs: int | None = None, bias: bool | None = None, kind: str = "nn.Conv2d") -> str:
    rng, ins = w.rng, w.channels(var)
    k = rng.choice((1, 1, 2, 3, 3, 3, 5, (1, 3), (3, 1)))
    outs = outs or rng.choice((ins, ins, 2, 4, 6, 8, 12, 16))
    groups = rng.choice([g for g in (1, 1, 1, 2, 3, 4, ins) if ins % g == 0 and outs % g == 0])
    dilation = rng.choice((1, 1, 1, 2))
    sides = k if isinstance(k, tuple) else (k, k)
    padding: object = rng.choice(
        (0, *[tuple((s - 1) * dilation // 2 for s in sides)] * 5, "same", rng.choice((1, 2, (2, 1))))
    )
    stride = 1 if padding == "same" else rng.choice((1, 1, 1, 2, (2, 1)))
    mode = rng.choice(("zeros",) * 12 + ("reflect", "circular", "replicate"))
    bias = rng.random() < 0.4 if bias is None else bias
    return f"{kind}({ins}, {outs}, {k}, {stride}, {padding!r}, {dilation}, {groups}, {bias}, {mode!r})"


def bn_code(w: Writer, channels: int) -> str:
    return w.rng.choice(
        (f"nn.BatchNorm2d({channels})",) * 8
        + (
            f"nn.BatchNorm2d({channels}, 1e-3, 0.03)",
            f"nn.BatchNorm2d({channels}, affine=False)",
            f"FrozenBN({channels})",
            f"nn.BatchNorm2d({channels}, momentum=None)",
            f"nn.BatchNorm2d({channels}).requires_grad_(False)",
            f"nn.SyncBatchNorm({channels})" if w.traps else f"nn.BatchNorm2d({channels})",
            f"BatchNormAct2d({channels})",
            f"nn.BatchNorm2d({channels}, track_running_stats=False)" if w.traps else f"nn.BatchNorm2d({channels})",
        )
    )


def out_of(w: Writer, code: str) -> int:
    return eval(code, w.space).out_channels


@template(3)
def conv(w: Writer, v: str) -> None:
    w.line(f"{w.module(conv_code(w, v), 'conv')}({v})", (v,))


@template(10)
def conv_bn(w: Writer, v: str) -> None:
    code = conv_code(w, v)
    conv_name, bn = w.module(code, "conv"), w.module(bn_code(w, out_of(w, code)), "bn")
    if w.rng.random() < 0.5:
        w.pairs.append((conv_name, bn, ""))
        text = f"{bn}({conv_name}({v}))"
        for _ in range(w.rng.random() < 0.6):
            text = f"{w.module(w.rng.choice(ACTIVATIONS).format(c=out_of(w, code)), 'act')}({text})"
        w.line(text, (v,))
    else:
        middle = w.line(f"{conv_name}({v})", (v,))
        new = w.line(f"{bn}({middle})", (middle,))
        w.pairs.append((conv_name, bn, middle))
        if w.rng.random() < 0.6:
            w.line(w.rng.choice(FUNCTIONS).format(x=new), (new,))


@template(2)
def bn_alone(w: Writer, v: str) -> None:
    w.line(f"{w.module(bn_code(w, w.channels(v)), 'bn')}({v})", (v,))


@template(3)
def activation(w: Writer, v: str) -> None:
    w.line(f"{w.module(w.rng.choice(ACTIVATIONS).format(c=w.channels(v)), 'act')}({v})", (v,))


@template(4)
def function(w: Writer, v: str) -> None:
    w.line(w.rng.choice(FUNCTIONS).format(x=v), (v,))


@template(6)
def our_block(w: Writer, v: str) -> None:
    rng, ins = w.rng, w.channels(v)
    kind = rng.choice(
        ("RepVGGBlock", "ACBlock", "DiverseBranchBlock", "MobileOneBlock", "LargeKernelBlock", "RepInvertedResidual")
        + ("DBBConv2d", "ACBConv2d", "RepConv2d", "MobileOneConv2d")
    )
    outs, stride = rng.choice((ins, ins, 4, 8)), rng.choice((1, 1, 2))
    if kind == "RepInvertedResidual":
        branches = tuple(rng.sample(("bottleneck", "identity", "avgpool", "conv1x1", "conv3x3"), rng.randint(1, 5)))
        more = ", online=True" if rng.random() < 0.2 else ""
        code = f"{kind}({ins}, {outs}, {stride}, {rng.choice((1, 2))}, {branches}{more})"
    else:
        groups = rng.choice([g for g in (1, 1, 2, ins) if ins % g == 0 and outs % g == 0])
        k = rng.choice((3, 3, 5, 1)) if kind != "LargeKernelBlock" else rng.choice((7, 9))
        like = kind.endswith("Conv2d")
        more = "" if like else f", act={rng.choice(ACTIVATIONS).format(c=outs)}" if rng.random() < 0.6 else ""
        more += ", online=True" if rng.random() < 0.15 else ""
        more += ", copies=2" if kind == "MobileOneBlock" and rng.random() < 0.5 else ""
        more += ", post_bn=True" if kind == "RepVGGBlock" and rng.random() < 0.2 else ""
        code = f"{kind}({ins}, {outs}, {k}, {stride}, {k // 2}, {rng.choice((1, 1, 2))}, {groups}{more})"
    name = w.module(code, "block")
    text = f"{name}({v})"
    if kind.endswith("Conv2d") and rng.random() < 0.8:
        text = f"{w.module(f'nn.BatchNorm2d({outs})', 'bn')}({text})"
    w.line(text, (v,))


def foreign_block(w: Writer, v: str, total: str) -> None:
    rng, ins = w.rng, w.channels(v)
    kind = rng.choice(list(FOREIGN))
    dense, point, identity, act = FOREIGN[kind]
    outs, stride = rng.choice((ins, ins, 4, 8)), rng.choice((1, 1, 2))
    groups = rng.choice([g for g in (1, 1, 2, ins) if ins % g == 0 and outs % g == 0])
    k = 3 if "arge" not in kind else rng.choice((5, 7))
    small = 1 if "arge" not in kind else 3
    if dense.startswith("rbr") or dense in ("lkb_origin", "branch_3x3", "small_conv"):
        holder = "nn.Sequential(collections.OrderedDict(conv=nn.Conv2d({i}, {o}, {k}, {s}, {p}, groups={g}, bias=False), bn=nn.BatchNorm2d({o})))"
    else:
        holder = "ConvNormAct({i}, {o}, {k}, {s}, {p}, {g})"
        w.classes.append(
            "class ConvNormAct(nn.Module):\n    def __init__(self, i, o, k, s, p, g):\n        super().__init__()\n"
            "        self.conv = nn.Conv2d(i, o, k, s, p, groups=g, bias=False)\n        self.bn = nn.BatchNorm2d(o)\n\n"
            "    def forward(self, x):\n        return self.bn(self.conv(x))\n"
        )
    rows = [
        f"self.{name} = " + holder.format(i=ins, o=outs, k=side, s=stride, p=side // 2, g=groups)
        for name, side in ((dense, k), (point, small))
    ]
    calls = f"a, b = self.{dense}(x), self.{point}(x)"
    if identity:
        keep = ins == outs and stride == 1
        rows.append(f"self.{identity} = " + (f"nn.BatchNorm2d({outs})" if keep else "None"))
        if keep:
            calls += f"; b = b + self.{identity}(x)"
    if act:
        rows.append(f"self.{act} = {rng.choice(ACTIVATIONS).format(c=outs)}")
    text = f"self.{act}({total})" if act else total
    w.count += 1
    name = f"{kind}{w.count}" if rng.random() < 0.5 else kind
    if name in w.space or any(f"class {name}(" in other for other in w.classes):  # ours, or another's
        name = f"{kind}x{w.count}"
    pad = "\n        "
    source = f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__(){pad}{pad.join(rows)}\n\n"
    source += f"    def forward(self, x):{pad}{calls}{pad}return {text}\n"
    w.classes.append(source)
    exec("\n".join(w.classes), w.space)
    w.line(f"{w.module(f'{name}()', 'block')}({v})", (v,))


@template(3)
def foreign(w: Writer, v: str) -> None:
    foreign_block(w, v, SUM)


@template(9, TRAPS)
def look_alike(w: Writer, v: str) -> None:
    foreign_block(w, v, w.rng.choice(WRONG_SUMS))


@template(2)
def timm_block(w: Writer, v: str) -> None:
    rng, ins = w.rng, w.channels(v)
    outs, stride = rng.choice((ins, ins, 8)), rng.choice((1, 1, 2))
    kind = rng.choice(
        (f"TimmRepVGG({ins}, {outs}, 3, {stride})", f"TimmMobileOne({ins}, {outs}, 3, {stride}, num_conv_branches=2)")
    )
    w.line(f"{w.module(kind, 'block')}({v})", (v,))


@template(4)
def join(w: Writer, v: str) -> None:
    shape = w.values[v].shape
    others = [o for o in w.values if w.is_map(o) and w.values[o].shape[2:] == shape[2:]]
    same = [o for o in others if w.values[o].shape == shape]
    if w.rng.random() < 0.6:
        other = w.rng.choice(same)
        how = w.rng.choice(
            (
                "{a} + {b}",
                "{a} + {b}",
                "torch.add({a}, {b})",
                "{a} * {b}",
                "{a} - {b}",
                "torch.maximum({a}, {b})",
                "{a}.add_({b})",
            )
        )
        w.line(how.format(a=v, b=other), (v, other))
    else:
        other = w.rng.choice(others)
        if w.channels(v) + w.channels(other) > 24:
            raise Failed
        w.line(f"torch.cat([{v}, {other}], {w.rng.choice((1, 'dim=1', -3))})", (v, other))


@template(3)
def residual(w: Writer, v: str) -> None:
    c = w.channels(v)
    k = w.rng.choice((1, 3))
    code = f"nn.Conv2d({c}, {c}, {k}, 1, {k // 2}, bias=False)"
    conv_name, bn = w.module(code, "conv"), w.module(f"nn.BatchNorm2d({c})", "bn")
    w.pairs.append((conv_name, bn, ""))
    text = f"{bn}({conv_name}({v}))"
    if w.rng.random() < 0.3:
        text = f"{w.module('DropPath(0.2)', 'drop')}({text})"
    w.line(
        w.rng.choice(
            ("F.relu({v} + {t})", "{v} + {t}", "{t} + {v}", "{v} + 0.5 * {t}", "F.relu_({t}.add_({v}))")
        ).format(v=v, t=text),
        (v,),
    )


@template(3)
def split(w: Writer, v: str) -> None:
    c = w.channels(v)
    half = c // 2
    if half < 1:
        raise Failed
    w.line(
        w.rng.choice(
            (
                f"torch.cat([{v}.chunk(2, 1)[1], {v}.chunk(2, 1)[0]], 1)",
                f"torch.cat({v}.split([{half}, {c - half}], 1)[::-1], 1)",
                f"{v}[:, :{half}]",
                f"{v}[:, ::2]",
                f"{v}[:, {half}:] * 2",
                f"{v}[:, [{', '.join(str(w.rng.randrange(c)) for _ in range(half))}]]",
                f"{v}.view({v}.shape[0], 2, {half}, {v}.shape[2], {v}.shape[3]).transpose(1, 2).reshape({v}.shape)",
                f"F.channel_shuffle({v}, 2)",
                f"{v}.flip(1)",
                f"{v}.roll(1, 1)",
                f"torch.unbind({v}, 1)[0].unsqueeze(1) + {v}",
                f"{v}.index_select(1, torch.arange({half}))",
                f"{v}.narrow(1, 0, {half})",
                f"{v}.sum(1, keepdim=True) + {v}",
                f"{v} / {v}.abs().amax(1, keepdim=True).clamp(min=1)",
                f"torch.softmax({v}, 1)",
                f"F.glu({v}, 1)",
            )
        ),
        (v,),
    )


@template(2)
def space(w: Writer, v: str) -> None:
    w.line(
        w.rng.choice(
            (
                f"{v}.flip(-1)", f"{v}.transpose(2, 3)", f"{v}[..., 1:, :-1]", f"F.pad({v}, (1, 1, 1, 1))", f"F.pad({v}, (1, 0), value=0.3)",
                f"{v} - {v}.mean((2, 3), keepdim=True)", f"{v} / (1 + {v}.std())", f"F.interpolate({v}, scale_factor=2)",
                f"F.interpolate({v}, size=(9, 7), mode='bilinear', align_corners=False)", f"F.pixel_unshuffle({v}[..., :6, :6], 2)",
                f"{v}.contiguous(memory_format=torch.channels_last)", f"F.unfold({v}, 3, padding=1).view({v}.shape[0], -1, *{v}.shape[2:])",
                f"{v} * torch.linspace(0.5, 1.5, {v}.shape[-1], dtype={v}.dtype)", f"F.avg_pool2d({v}, 2)", f"F.max_pool2d({v}, 3, 2, 1)",
                f"F.adaptive_avg_pool2d({v}, 4)",
            )
        ),
        (v,),
    )  # fmt: skip


@template(2)
def pool(w: Writer, v: str) -> None:
    w.line(
        w.module(
            w.rng.choice(
                ("nn.MaxPool2d(2)", "nn.MaxPool2d(3, 2, 1)", "nn.AvgPool2d(2)", "nn.AvgPool2d(3, 1, 1)", "nn.AvgPool2d(3, 2, 1, True, False)",
                 "nn.AdaptiveAvgPool2d(5)", "nn.AdaptiveMaxPool2d((4, 3))", "nn.LPPool2d(2, 2)", "nn.Upsample(scale_factor=2)", "nn.PixelShuffle(2)",
                 "nn.ZeroPad2d(1)", "nn.ReflectionPad2d(1)", "nn.Dropout(0.4)", "nn.Dropout2d(0.2)", "DropPath(0.3)")
            ),
            "pool",
        )
        + f"({v})",
        (v,),
    )  # fmt: skip


@template(3)
def gate(w: Writer, v: str) -> None:
    c, s = w.channels(v), w.rng.choice((1, 2, 3))
    kind = w.rng.randrange(5)
    if kind == 0:
        down, up = w.module(f"nn.Conv2d({c}, {s}, 1)", "down"), w.module(f"nn.Conv2d({s}, {c}, 1)", "up")
        w.line(f"{v} * torch.sigmoid({up}(F.relu({down}(F.adaptive_avg_pool2d({v}, 1)))))", (v,))
    elif kind == 1:
        down, up = w.module(f"nn.Linear({c}, {s})", "down"), w.module(f"nn.Linear({s}, {c})", "up")
        w.line(f"{v} * {up}(F.relu({down}({v}.mean((2, 3))))).sigmoid()[:, :, None, None]", (v,))
    elif kind == 2:
        w.line(f"{v} * torch.sigmoid({w.module(f'nn.Conv2d({c}, 1, 3, 1, 1)', 'gate')}({v}))", (v,))
    elif kind == 3:
        w.line(f"{w.module(f'SqueezeExcite({c}, rd_channels={s})', 'se')}({v})", (v,))
    else:
        w.line(
            f"{v} * F.hardsigmoid({w.module('nn.Conv1d(1, 1, 3, padding=1)', 'eca')}({v}.mean((2, 3)).unsqueeze(1))).view({v}.shape[0], -1, 1, 1)",
            (v,),
        )


@template(2)
def other_layer(w: Writer, v: str) -> None:
    c = w.channels(v)
    text = w.rng.choice(
        (
            f"nn.GroupNorm({w.rng.choice([g for g in (1, 2, c) if c % g == 0])}, {c})", f"nn.InstanceNorm2d({c}, affine=True)",
            f"nn.ConvTranspose2d({c}, {w.rng.choice((c, 4))}, 2, 2)", f"nn.ConvTranspose2d({c}, {c}, 3, 1, 1, groups={c})", f"Scale({c}, 0.7)",
            "nn.LocalResponseNorm(3)", f"nn.Sequential(nn.ConvTranspose2d({c}, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU())",
            f"nn.Sequential(nn.Conv2d({c}, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))",
            f"nn.Sequential(nn.Conv2d({c}, 4, 3, 1, 1), nn.AvgPool2d(2), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))",
            f"ConvBN({c}, 8, 3, 2)", f"ConvBN({c}, {c}, 3, 1, {c}, nn.SiLU)", f"Wrap(ConvBN({c}, 6, 1))",
            f"nn.Sequential(ConvBN({c}, 12, 1), ConvBN(12, 12, 3, 1, 12), nn.Conv2d(12, {c}, 1, bias=False), nn.BatchNorm2d({c}))",
        )
    )  # fmt: skip
    w.line(f"{w.module(text)}({v})", (v,))


@template(2)
def by_hand(w: Writer, v: str) -> None:
    """Parameters and buffers of the class itself."""
    c = w.channels(v)
    w.count += 1
    n = f"own{w.count}"
    kind = w.rng.randrange(6)
    if kind == 0:
        w.init(f"self.{n} = nn.Parameter(torch.randn(6, {c}, 3, 3) * 0.2)")
        text = f"F.conv2d({v}, self.{n}, None, 1, 1)"
    elif kind == 1:
        w.init(
            f"self.register_buffer('{n}', torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]]).expand({c}, 1, 3, 3) / 16)"
        )
        text = f"F.conv2d({v}, self.{n}, padding=1, groups={c})"
    elif kind == 2:
        w.init(f"self.{n} = nn.Parameter(torch.rand({c}) + 0.5)")
        text = f"{v} * self.{n}[:, None, None]"
    elif kind == 3:
        w.init(f"self.{n} = nn.Parameter(torch.randn(1, {c}, 1, 1))")
        text = f"{v} + self.{n}"
    elif kind == 4:
        norm = w.module(f"nn.LayerNorm({c})", "norm")
        text = f"{norm}({v}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    else:
        up, down = w.module(f"nn.Linear({c}, 8)", "up"), w.module(f"nn.Linear(8, {c})", "down")
        text = f"{v} + {down}(F.gelu({up}({v}.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)"
    w.line(text, (v,))


@template(2)
def attention(w: Writer, v: str) -> None:
    c = w.channels(v)
    if w.rng.random() < 0.4:
        name = w.module(f"Attention({c}, {w.rng.choice([h for h in (1, 2, 4) if c % h == 0])})", "attention")
        text = f"{name}({{t}})"
    elif w.rng.random() < 0.6:
        options = f"table={w.rng.random() < 0.5}, norms={w.rng.random() < 0.4}, across={w.rng.random() < 0.3}"
        name = w.module(f"Heads({c}, {w.rng.randint(2, 4)}, {w.rng.randint(1, 5)}, {options})", "attention")
        text = f"{name}({{t}})"
    else:
        name = w.module(f"nn.MultiheadAttention({c}, 1, batch_first=True)", "attention")
        text = f"{name}({{t}}, {{t}}, {{t}}, need_weights=False)[0]"
    tokens = w.line(f"{v}.flatten(2).transpose(1, 2)", (v,))
    w.line(f"{v} + {text.format(t=tokens)}.transpose(1, 2).reshape({v}.shape)", (v, tokens))


@template(2)
def sequence(w: Writer, v: str) -> None:
    """Layers in a ModuleList, run in a loop."""
    c, n = w.channels(v), w.rng.randint(2, 3)
    k = w.rng.choice((1, 3))
    act = w.rng.choice(("nn.ReLU()", "nn.Identity()", "nn.SiLU()"))
    w.count += 1
    name = f"loop{w.count}"
    layers = f"nn.Conv2d({c}, {c}, {k}, padding={k // 2}, bias=False), nn.BatchNorm2d({c}), {act}"
    w.init(f"self.{name} = nn.ModuleList(nn.Sequential({layers}) for _ in range({n}))")
    w.run(f"y{w.count} = {v}")
    loop = (
        w.rng.choice(("y = layer(y)", "y = y + layer(y)"))
        .replace("y", f"y{w.count}")
        .replace(f"lay{w.count}er", "layer")
    )
    w.run(f"for layer in self.{name}: {loop}")
    w.values.pop("layer", None)
    hidden = f"y{w.count}"
    value = w.values.pop(hidden)
    w.values[hidden] = value
    w.uses[v] += 1
    w.uses[hidden] = 0


@template(1)
def shared(w: Writer, v: str) -> None:
    c = w.channels(v)
    name = w.module(
        w.rng.choice(
            (f"nn.Conv2d({c}, {c}, 3, 1, 1)", f"nn.BatchNorm2d({c})", f"ConvBN({c}, {c})", f"RepVGGBlock({c}, {c})")
        ),
        "shared",
    )
    middle = w.line(f"{name}({v})", (v,))
    w.line(
        w.rng.choice((f"{name}({middle})", f"{middle} + {name}({v}.flip(-1))", f"{name}(F.relu({middle}))")), (middle,)
    )


@template(1)
def dead(w: Writer, v: str) -> None:
    c = w.channels(v)
    name = w.module(
        w.rng.choice(
            (f"nn.Sequential(nn.Conv2d({c}, 4, 1), nn.BatchNorm2d(4))", f"RepVGGBlock({c}, 4)", f"ConvBN({c}, 4)")
        ),
        "dead",
    )
    if w.rng.random() < 0.5:
        w.run(f"{name}({v})")
    w.line(f"{v} + 0", (v,))


@template(3)
def nested(w: Writer, v: str) -> None:
    """A class of its own, with nodes inside."""
    if w.name != "Net":
        raise Failed
    w.count += 1
    inner = Writer(w.rng, f"Stage{w.count}", tuple(w.values[v].shape[1:]), w.space, w.classes, w.traps)
    inner.grow(w.rng.randint(1, 4), TEMPLATES + (TRAPS if w.traps else []))
    result = [var for var in inner.values if inner.is_map(var)][-1]
    w.classes.append(inner.write(result))
    exec("\n".join(w.classes), w.space)
    w.line(f"{w.module(f'{inner.name}()', 'stage')}({v})", (v,))


# Traps: what a model does besides its classes.


@template(4, TRAPS)
def odd_layer(w: Writer, v: str) -> None:
    c = w.channels(v)
    w.line(
        w.module(
            w.rng.choice(
                (
                    f"nn.Sequential(StandardConv({c}, 8, 3, 1, 1), nn.BatchNorm2d(8))",
                    f"nn.Sequential(ClampedConv({c}, 8, 3, 1, 1), nn.BatchNorm2d(8))",
                    f"nn.Sequential(nn.Conv2d({c}, 8, 3, 1, 1), ClampedBN(8))",
                    f"TwoMin(nn.Conv2d({c}, {c}, 3, 1, 1), nn.BatchNorm2d({c}))",
                    f"nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d({c}, 8, 3, 1, 1)), nn.BatchNorm2d(8))",
                    f"nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d({c}, 8, 3, 1, 1)), nn.BatchNorm2d(8))",
                    f"nn.Sequential(nn.Conv2d({c}, 8, 3, 1, 1), nn.Dropout(0.3), nn.BatchNorm2d(8))",
                )
            )
        )
        + f"({v})",
        (v,),
    )


@template(4, TRAPS)
def branch(w: Writer, v: str) -> None:
    """A path that depends on values, sizes or the batch."""
    c = w.channels(v)
    code = f"nn.Conv2d({c}, {c}, 3, 1, 1)"
    a, bn, b = (
        w.module(code, "conv"),
        w.module(f"nn.BatchNorm2d({c})", "bn"),
        w.module(f"nn.Conv2d({c}, {c}, 1)", "conv"),
    )
    cond = w.rng.choice(
        (
            "{v}.shape[-1] < 24",
            "{v}.abs().max() < 50",
            "{v}.shape[0] < 4",
            "{v}.mean() < 20",
            "self.training",
            "len({v}) > 1",
            "{v}.sum().item() < 1e4",
        )
    )
    cond = cond.format(v=v)
    t = w.line(f"{a}({v})", (v,))
    w.line(
        w.rng.choice(
            (
                f"{bn}({t}) if {cond} else {t}",
                f"{bn}({t}) if {cond} else {bn}({b}({v}))",
                f"{bn}({t}) + ({a}.weight.sum() if {cond} else {a}.weight.mean())",
                f"{bn}({t}) if {cond} else F.relu({bn}({t}))",
                f"{bn}({t}) * (1.0 if {cond} else 0.5)",
            )
        ),
        (t,),
    )


@template(4, TRAPS)
def hooked(w: Writer, v: str) -> None:
    c = w.channels(v)
    code = w.rng.choice(
        (
            f"nn.Conv2d({c}, 8, 3, 1, 1)",
            f"RepVGGBlock({c}, 8)",
            f"ConvBN({c}, 8)",
            f"nn.Sequential(nn.Conv2d({c}, 8, 1), nn.BatchNorm2d(8))",
        )
    )
    name, bn = w.module(code, "hooked"), w.module("nn.BatchNorm2d(8)", "bn")
    target = w.rng.choice((name, name, bn))
    w.init(
        w.rng.choice(
            (
                f"{target}.register_forward_hook(lambda m, a, out: out.clamp(-40, 40))",
                f"{target}.register_forward_hook(lambda m, a, out: None)",
                f"{target}.register_forward_pre_hook(lambda m, a: (a[0].clamp(-40, 40),))",
                f"{target}.register_forward_hook(lambda m, a, out: out if out.abs().max() < 60 else out * 0.5)",
                f"{target}.forward = types.MethodType(lambda m, x: type(m).forward(m, x).clamp(-40, 40), {target})",
                f"{target}.forward = types.MethodType(lambda m, x: type(m).forward(m, x), {target})",
                f"nn.utils.parametrize.register_parametrization({target}, 'weight', HalfWeight())",
            )
        )
    )
    w.line(f"{bn}({name}({v}))", (v,))


@template(3, TRAPS)
def weights_elsewhere(w: Writer, v: str) -> None:
    """A layer whose weights another part reads too."""
    c = w.channels(v)
    a, bn = w.module(f"nn.Conv2d({c}, {c}, 3, 1, 1)", "conv"), w.module(f"nn.BatchNorm2d({c})", "bn")
    kind = w.rng.randrange(6)
    if kind == 0:
        b = w.module(f"nn.Conv2d({c}, {c}, 3, 1, 1)", "conv")
        w.init(f"{b}.weight = {a}.weight")
        text = f"{bn}({a}({v})) + {b}({v})"
    elif kind == 1:
        text = f"{bn}({a}({v})) + F.conv2d({v}, {a}.weight, padding=1)"
    elif kind == 2:
        text = f"{bn}(F.conv2d({v}, {a}.weight * 0.5, {a}.bias, padding=1))"
    elif kind == 3:
        text = f"F.batch_norm({a}({v}), {bn}.running_mean, {bn}.running_var, {bn}.weight, {bn}.bias)"
    elif kind == 4:
        text = f"{bn}({a}({v})) * {bn}.weight.mean()"
    else:
        block = w.module(f"RepVGGBlock({c}, {c})", "block")
        text = f"{block}({v}) + {block}.branches['conv'].conv.weight.mean()"
    w.line(text, (v,))


def result_of(w: Writer) -> str:
    """What forward returns: one or several outputs, in several containers."""
    rng = w.rng
    maps = [var for var in w.values if var != "x"]
    unread = [var for var in maps if not w.uses[var]] or maps[-1:]
    outs = rng.sample(unread, min(len(unread), rng.randint(1, 3)))
    if unread[-1] not in outs:
        outs.append(unread[-1])
    texts = []
    for var in outs:
        if not w.is_map(var):
            texts.append(var)
            continue
        c, area = w.channels(var), w.values[var][0, 0].numel()
        kind = rng.randrange(9)
        if kind == 0:
            texts.append(f"{w.module(f'nn.Linear({c}, 5)', 'fc')}({var}.mean((2, 3)))")
        elif kind == 1 and c * area < 600:
            texts.append(f"{w.module(f'nn.Linear({c * area}, 4)', 'fc')}({var}.flatten(1))")
        elif kind == 2:
            head = w.module(f"nn.Conv2d({c}, 3, 1)", "head")
            texts.append(rng.choice((f"{head}({var})", f"{head}({var}).argmax(1)", f"({head}({var}) > 0.3)")))
        elif kind == 3:
            texts.append(f"{w.module(f'nn.Linear({c * 4}, 4)', 'fc')}(F.adaptive_avg_pool2d({var}, 2).flatten(1))")
        elif kind == 4:
            texts.append(
                f"{w.module(f'nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d({c}), nn.Dropout(0.2), nn.Linear({c}, 3))', 'head')}({var})"
            )
        else:
            texts.append(var)
    if all("argmax" in text or " > " in text for text in texts):
        texts.append(outs[-1])
    if len(texts) == 1:
        return rng.choice(
            (texts[0], texts[0], texts[0], f"[{texts[0]}]", f"{{'out': {texts[0]}}}", f"Outputs({texts[0]})")
        )
    joined = ", ".join(texts)
    items = ", ".join(f"'{name}': {text}" for name, text in zip("abcde", texts))
    return rng.choice(
        (f"({joined})", f"[{joined}]", f"{{{items}}}", f"collections.OrderedDict({{{items}}})", f"Pair({texts[0]}, [{joined}])",
         f"Outputs({texts[0]}, ({joined}))", f"collections.UserDict({{{items}}})", f"({texts[0]}, {{'more': [{joined}], 'none': None}})")
    )  # fmt: skip


class Network:
    """A random network: its source, how it is built, and the input that it was written for."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.filename = f"<network {seed}>"
        space: dict = {"__name__": f"network_{seed}"}
        exec(compile(HEADER, "<header>", "exec"), space)
        self.traps = rng.random() < 0.4
        self.shape = (rng.choice((1, 2, 3, 3, 3, 4)), rng.randint(7, 16), rng.randint(7, 16))
        classes: list[str] = []
        writer = Writer(rng, "Net", self.shape, space, classes, self.traps)
        width = rng.choice((4, 6, 8))
        stem = writer.module(f"nn.Conv2d({self.shape[0]}, {width}, 3, 1, 1, bias=False)", "stem")
        bn = writer.module(f"nn.BatchNorm2d({width})", "bn")
        writer.pairs.append((stem, bn, ""))
        writer.line(f"F.relu({bn}({stem}(x)))", ("x",))
        writer.grow(rng.randint(2, 10), TEMPLATES + (TRAPS if self.traps else []))
        main = writer.write(result_of(writer))
        self.source = "\n\n".join([*classes, main])
        self.draws = any(
            word in self.source for word in ("F.dropout(b, 0.1, True)", "nn.Dropout(0.3)")
        )  # in eval mode too
        self.kinds, self.space = writer.kinds, space
        # A BN that alone reads its convolution: to be folded, or to be told of.
        self.pairs = [(conv, bn) for conv, bn, middle in writer.pairs if not middle or writer.uses[middle] == 1]
        text = HEADER + self.source
        exec(compile(text, self.filename, "exec"), space)
        linecache.cache[self.filename] = (len(text), None, text.splitlines(True), self.filename)  # inspect.getsource
        self.dtype = torch.float64 if rng.random() < 0.7 else torch.float32
        self.style = rng.choice(("", "", "", "channels_last", "frozen"))

    def build(self) -> nn.Module:
        """A new model: random calibrated BNs, in eval mode (but for what was put in train mode by name)."""
        torch.manual_seed(self.seed)
        model = self.space["Net"]()
        x = torch.randn(4, *self.shape, generator=torch.Generator().manual_seed(self.seed))
        calibrate_random_bn_(model, x, self.seed)
        for module in model.modules():
            if type(module) is nn.Dropout and module.p == 0.3:
                module.train()  # Monte Carlo dropout: the template odd_layer
        model.to(self.dtype)
        if self.style == "channels_last":
            model.to(memory_format=torch.channels_last)
        if self.style == "frozen":
            for index, parameter in enumerate(model.parameters()):
                parameter.requires_grad_(index % 3 > 0)
        return model

    def build_sequence(self, rng: random.Random) -> nn.Sequential:
        """Two to five layers in a row, mostly linear, as ``merge_sequence`` takes them."""
        torch.manual_seed(self.seed)
        width = first = rng.choice((2, 3, 4, 6))
        codes = []
        for _ in range(rng.randint(2, 5)):
            bias, after = rng.random() < 0.5, rng.choice((2, 4, 6))
            codes.append(
                rng.choice(
                    (f"nn.Conv2d({width}, {after}, 1, bias={bias})", f"nn.Conv2d({width}, {after}, 1, bias={bias})", f"nn.Conv2d({width}, {after}, 3, bias={bias})")
                    + (f"nn.Conv2d({width}, {width}, 3, 1, 1, groups={width})", f"nn.Conv2d({width}, {after}, 3, {rng.choice((1, 2))}, 1, bias={bias})")
                    + (f"nn.BatchNorm2d({width})",) * 4 + ("nn.Identity()", "nn.Dropout(0.1)", "DropPath(0.1)", "nn.AvgPool2d(2)", "nn.AvgPool2d(3, 1, 1)")
                    + (f"nn.Sequential(nn.Conv2d({width}, {width}, 1, groups={width}), nn.BatchNorm2d({width}, affine=False))",)
                    + ((f"ConvBN({width}, {width}, act=nn.Identity)", f"ClampedConv({width}, {width}, 1)", f"ClampedBN({width})", f"TwoMin(nn.Conv2d({width}, {width}, 1))",
                        f"StandardConv({width}, {width}, 1)", f"nn.utils.parametrizations.weight_norm(nn.Conv2d({width}, {width}, 1))", "nn.ReLU()",
                        f"nn.ConvTranspose2d({width}, {width}, 2)", f"nn.Conv2d({width}, {width}, 3, padding=1, padding_mode='circular')", f"RepVGGBlock({width}, {width})")
                       if self.traps else ())
                )
            )  # fmt: skip
            convs = [m for m in eval(codes[-1], self.space).modules() if isinstance(m, nn.Conv2d)]
            width = convs[-1].out_channels if convs else width
        codes.insert(0, f"nn.Conv2d({first}, {first}, 1)") if not any("Conv2d" in code for code in codes) else None
        layers = eval(f"nn.Sequential({', '.join(codes)})", self.space)
        calibrate_random_bn_(layers, torch.randn(4, first, 64, 64, generator=torch.Generator().manual_seed(self.seed)))
        if self.traps and rng.random() < 0.2:
            rng.choice(list(layers)).register_forward_hook(lambda module, args, output: output.clamp(-3, 3))
        return layers.to(self.dtype)
