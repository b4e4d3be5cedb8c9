"""Cross-layer equalisation: the same function, with channels of a more even size, which lose less in int8.

Of two convolutions with a ReLU between them, channel i of the first may be divided by s and what the second reads of it
multiplied by s (Nagel et al., ICCV 2019, section 4.1). Here s is a power of two, so that no weight is rounded.
"""

import time
from collections import Counter, OrderedDict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rep_plugin.arguments import checked
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.layers import require_eval_mode
from rep_plugin.errors import NothingToMergeError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_params
from rep_plugin.measure.forward import Example, require_bare, takes_examples
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.report import BlockReport, Report
from rep_plugin.measure.undo import undone_on_error
from rep_plugin.measure.verify import default_inputs, verify_equivalence
from rep_plugin.reparam.fixed import find_fixed
from rep_plugin.reparam.fx_parts import trace_parts
from rep_plugin.reparam.runs import ACT, CONV, Element, find_runs

HOMOGENEOUS = {"ReLU", "LeakyReLU", "Identity"}  # act(s x) = s act(x) for s > 0
BOUNDED = {"ReLU6": 6.0}  # these as well, where the bound is scaled too
SWEEPS = 5  # over chains of several convolutions
TOLERANCE = 1e-9


class BoundedReLU(nn.Module):
    """ReLU with an upper bound for each channel: what ReLU6 becomes between layers that are scaled.

    Args:
        bound: of each channel, (C,).
    """

    def __init__(self, bound: Tensor):
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.bound.view(-1, 1, 1))


class _Pair(NamedTuple):
    """Names of two convolutions, and of the bounded activations between them."""

    first: str
    second: str
    bounded: tuple[str, ...]


@checked
@takes_examples
@working("equalizing")
@private_random()
def equalize(
    model: nn.Module, example_input: Example | None = None, inplace: bool = False, bounds: bool = False
) -> tuple[nn.Module, Report]:
    """Even out the channels of convolutions with a ReLU between them; return the same function, proven, and a report.

    The widest weight of a channel and of what reads it become alike, up to a factor of two. Layers with a BN between them are
    left: merge first. So are layers around other activations (Hardswish, SiLU): scaled, they would be others.

    Around ReLU6 it is the same function where the bound is scaled as well, to one for each channel. For files of ONNX Runtime
    that is no gain, as int8 has no such clip: it is done with ``bounds`` alone.

    Args:
        model: a merged model in eval mode; it stays as it was where an error is raised.
        example_input: images (N, C, H, W) for the proof; or a tuple or a dict of all that the model is called with.
        inplace: work on the given model, not on a copy.
        bounds: around ReLU6 too, which becomes a :class:`BoundedReLU`.

    Returns:
        The model and the report: a block for each pair.

    Raises:
        NothingToMergeError: no two layers can be equalised; its notes say why.
        TrainModeError: a BN is in train mode.
        EquivalenceError: the proof fails.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> model[0].weight.data[0] *= 100
        >>> even, report = equalize(model)
        >>> bool(even[0].weight[0].abs().max() < model[0].weight[0].abs().max()), report.max_rel_error < 1e-12
        (True, True)
    """
    started = time.perf_counter()
    require_bare(model)
    require_eval_mode(model)
    inputs = default_inputs(model, example_input)
    pairs, notes = _pairs_of(model, bounds)
    if not pairs:
        raise NothingToMergeError(f"{type(model).__name__} holds no two layers that can be equalised", notes)
    report = Report(
        "equalize", count_params(model), count_params(model), input_shape=tuple(inputs[0].shape), notes=notes
    )
    report.blocks = [BlockReport(f"{pair.first}, {pair.second}", "equalised") for pair in pairs]
    exact = copy_model(model).double()
    _equalize_(exact, pairs)
    report.add_proof(verify_equivalence(model, exact, inputs, (), TOLERANCE))
    with undone_on_error(*([model] if inplace else [])):
        done = model if inplace else copy_model(model)
        _equalize_(done, pairs)
    report.seconds = time.perf_counter() - started
    return done, report


def _pairs_of(model: nn.Module, bounds: bool) -> tuple[list[_Pair], list[str]]:
    """Names of convolutions that follow each other with nothing, or a homogeneous activation, between them."""
    pairs: list[_Pair] = []
    left: Counter[str] = Counter()
    fixed, opened = find_fixed(model), _opened(model)
    for part in trace_parts(opened, nn.Conv2d)[0]:
        for run in find_runs(opened, part):
            places = [index for index, element in enumerate(run.elements) if element.kind == CONV]
            for first, second in pairwise(places):
                one, other, between = run.elements[first], run.elements[second], run.elements[first + 1 : second]
                why = _why_not(between, bounds)
                bounded = [element for element in between if type(element.module).__name__ in BOUNDED]
                for element in (one, other, *bounded):
                    why = why or fixed.why_not_folded(element.name, lambda name: True, removed=False)
                if why is None:
                    pairs.append(_Pair(one.name, other.name, tuple(element.name for element in bounded)))
                else:
                    left[why] += 1
    return pairs, [
        f"left as {'it is' if n == 1 else 'they are'}, {n} pair{'s' * (n > 1)}: {why}" for why, n in left.items()
    ]


def _opened(model: nn.Module) -> nn.Module:
    """A copy in which deployed blocks, leaves to the tracer, are their two layers."""
    whole = nn.ModuleDict({"model": copy_model(model)})  # the root may be a block
    for name, module in list(whole.named_modules()):
        if isinstance(module, RepBlock) and module.deployed:
            layers = OrderedDict(reparam_conv=module.reparam_conv, act=module.act)
            whole.set_submodule(name, nn.Sequential(layers).eval())
    return whole["model"]


def _why_not(between: list[Element], bounds: bool) -> str | None:
    for element in between:
        kind = type(element.module).__name__
        if element.kind != ACT:
            return f"a {kind} stands between them" if element.module is not None else "a sum stands between them"
        if kind in BOUNDED and not bounds:
            return f"{kind} between them needs a bound a channel, with which int8 is slower and less exact: bounds=True"
        if kind not in HOMOGENEOUS and kind not in BOUNDED:
            return f"{kind} between them is another function when it is scaled"
    return None


@torch.no_grad()
def _equalize_(model: nn.Module, pairs: list[_Pair]) -> None:
    for pair in pairs:
        weight = model.get_submodule(pair.first).weight
        for name in pair.bounded:
            bound = BOUNDED[type(model.get_submodule(name)).__name__]
            model.set_submodule(name, BoundedReLU(weight.new_full((len(weight),), bound)).eval())
    for _ in range(SWEEPS):
        for pair in pairs:
            first, second = (model.get_submodule(name) for name in (pair.first, pair.second))
            one, other = first.weight.flatten(1).abs().amax(1), _widest_read(second)
            alive = (one > 0) & (other > 0)
            scale = torch.where(alive, torch.exp2((0.5 * torch.log2(one / other)).round()), torch.ones_like(one))
            first.weight /= scale.view(-1, 1, 1, 1)
            if first.bias is not None:
                first.bias /= scale
            second.weight *= _as_read(second, scale)
            for name in pair.bounded:
                model.get_submodule(name).bound /= scale


def _widest_read(conv: nn.Module) -> Tensor:
    """The widest weight that reads each input channel, (I,)."""
    outputs, inputs, *window = conv.weight.shape
    grouped = conv.weight.view(conv.groups, outputs // conv.groups, inputs, *window)
    return grouped.abs().amax((1, 3, 4)).flatten()


def _as_read(conv: nn.Module, scale: Tensor) -> Tensor:
    """A number for each input channel, in the shape of the weights that read it."""
    outputs, inputs = conv.weight.shape[:2]
    each = scale.view(conv.groups, 1, inputs).expand(-1, outputs // conv.groups, -1)
    return each.reshape(outputs, inputs, 1, 1)
