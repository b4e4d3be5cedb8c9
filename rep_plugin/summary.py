"""What a model consists of, and which of the verbs apply to it: nothing is changed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import RepPluginError, first_line
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.costs import MacCounter, count_macs, count_params
from rep_plugin.measure.forward import eval_mode, of_user, run_model
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.tables import new_table
from rep_plugin.pruning import PrunePlan
from rep_plugin.reparam import reparameterize
from rep_plugin.reparam.expand import find_expandable, own_convs


class LayerRow(NamedTuple):
    """A layer that has parameters; a block of ours is one layer.

    Attributes:
        name: full name.
        kind: its class.
        shape: of its output, for one image; None where it makes no single tensor.
        params: its parameters.
        macs: its multiply-adds for one image.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    params: int
    macs: int


@dataclass
class Verb:
    """Which layers a verb changes.

    Args:
        layers: their names.
        notes: what it leaves, and why.
        result: what comes out of it, one line.
    """

    layers: list[str]
    notes: list[str] = field(default_factory=list)
    result: str = ""


@dataclass
class Summary:
    """The layers of a model and what can be done to it.

    Args:
        model: its class.
        input_shape: of the image that was run, (1, C, H, W).
        layers: in the order of the forward pass.
        params: parameters.
        macs: multiply-adds for one image.
        merge: what :func:`rep_plugin.reparameterize` merges and folds.
        prune: what :func:`rep_plugin.plan_pruning` can narrow.
        expand: what :func:`rep_plugin.expand` replaces.
    """

    model: str
    input_shape: tuple[int, ...]
    layers: list[LayerRow]
    params: int
    macs: int
    merge: Verb
    prune: Verb
    expand: Verb

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        data = asdict(self)
        data["layers"] = [row._asdict() for row in self.layers]
        return json.dumps(data, indent=1)

    def print(self) -> None:
        """Print the layers, the totals, and each verb in a few lines."""
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, 120)  # a file has room for long names
        title = f"{self.model}, one image of {'x'.join(map(str, self.input_shape[1:]))}"
        table = new_table(title, ("layer", "type", "output", "params", "multiply-adds"), left=["type"])
        for row in self.layers:
            shape = "x".join(map(str, row.shape)) if row.shape else ""
            table.add_row(row.name, row.kind, shape, f"{row.params:,}", f"{row.macs:,}")
        table.add_section()
        table.add_row("all", "", "", f"{self.params:,}", f"{self.macs:,}")
        console.print(table)
        for name in ("merge", "prune", "expand"):
            verb: Verb = getattr(self, name)
            console.print(f"{name}: {len(verb.layers)} layers{verb.result}", markup=False, soft_wrap=True)
            for note in verb.notes:
                console.print(f"  {note}", markup=False, soft_wrap=True)


@private_random()
def summarize(model: nn.Module, example_input: Tensor) -> Summary:
    """Run a model once, and find what can be merged, pruned and expanded; the model stays as it is.

    Args:
        model: the model, in any mode.
        example_input: images (N, C, H, W); the first is run.

    Returns:
        The summary.

    Raises:
        ArgumentError: the images do not go through the model.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> found = summarize(net, torch.zeros(1, 3, 8, 8))
        >>> [(row.name, row.shape, row.macs) for row in found.layers][0], found.merge.layers, found.prune.layers
        (('0', (8, 6, 6), 7776), ['0'], ['0'])
    """
    image = copy_inputs(example_input[:1])
    model = copy_model(model)
    model.eval()  # not chained: mmpretrain's return None
    with of_user(model, image):
        layers = _layers(model, image)
    return Summary(
        type(model).__name__,
        tuple(image.shape),
        layers,
        count_params(model),
        count_macs(model, image),
        _merge(model, image),
        _prune(model, image),
        _expand(model),
    )


def _own(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with parameters of its own; our blocks whole."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, RepBlock):
            inside.append(f"{name}." if name else "")
        if isinstance(module, RepBlock) or next(module.parameters(recurse=False), None) is not None:
            yield name, module


@torch.no_grad()
def _layers(model: nn.Module, image: Tensor) -> list[LayerRow]:
    found: dict[str, LayerRow] = {}
    began: dict[str, int] = {}
    handles = []
    with eval_mode(model), MacCounter() as counter:

        def before(name: str) -> None:
            began[name] = counter.total

        def after(name: str, module: nn.Module, output: object) -> None:
            shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else None
            macs = counter.total - began[name] + (found[name].macs if name in found else 0)
            params = sum(p.numel() for p in module.parameters(recurse=isinstance(module, RepBlock)))
            found[name] = LayerRow(name, type(module).__name__, shape, params, macs)

        own = list(_own(model))
        for name, module in own:
            handles.append(module.register_forward_pre_hook(lambda m, x, name=name: before(name)))
            handles.append(module.register_forward_hook(lambda m, x, out, name=name: after(name, m, out)))
        try:
            run_model(model, copy_inputs(image))
        finally:
            for handle in handles:
                handle.remove()
    for name, module in own:  # one that the forward reaches by another way than a call, or not at all
        params = sum(p.numel() for p in module.parameters(recurse=isinstance(module, RepBlock)))
        found.setdefault(name, LayerRow(name, type(module).__name__, None, params, 0))
    return list(found.values())


def _merge(model: nn.Module, image: Tensor) -> Verb:
    try:
        _, report = reparameterize(model, image, verify=False)
    except RepPluginError as error:
        return Verb([], [first_line(error)])
    text = f"; {report.params_after:,} parameters, {report.macs_after:,} multiply-adds are left"
    return Verb([block.name for block in report.blocks], report.notes, text)


def _prune(model: nn.Module, image: Tensor) -> Verb:
    try:
        plan = PrunePlan.from_widths(model, image, {})
    except RepPluginError as error:
        return Verb([], [first_line(error)])
    layers = [name for name in plan.widths if name not in plan.frozen]
    coupled = sum(len(set(group) & set(layers)) > 1 for group in plan.groups)
    text = f" of {len(plan.widths)} that make channels; {coupled} groups of them are only narrowed together"
    return Verb(layers, _by_reason(plan.frozen), text)


def _expand(model: nn.Module) -> Verb:
    if next(own_convs(model), None) is None:
        return Verb([], ["no convolution stands outside of a block"])
    try:
        layers, notes = find_expandable(model)
    except RepPluginError as error:
        return Verb([], [first_line(error)])
    return Verb(layers, notes)


def _by_reason(frozen: dict[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{len(names)} stay, {reason}: {_listed(names)}" for reason, names in reasons.items()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
