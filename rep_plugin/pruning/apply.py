"""``apply_plan``: remove the channels that a plan does not keep, proven on copies first, and report it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Anything, That, checked
from rep_plugin.attached import own_forwards
from rep_plugin.errors import ArgumentError, EquivalenceError, first_line
from rep_plugin.history import before_step, record_, replays
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import Example, takes_examples
from rep_plugin.measure.progress import working
from rep_plugin.measure.randomness import private_random
from rep_plugin.measure.report import BlockReport, Report
from rep_plugin.measure.tables import new_table
from rep_plugin.measure.undo import undone_on_error
from rep_plugin.measure.verify import default_inputs, require_castable, verify_equivalence
from rep_plugin.optional import is_missing
from rep_plugin.pruning.planning.plan import MERGED, PrunePlan, as_plan, frozen_notes
from rep_plugin.pruning.surgery.constants import fold_constants_
from rep_plugin.pruning.surgery.mask import KeptNorms, KeptOutputs, mask_channels_
from rep_plugin.pruning.surgery.remove import remove_channels_, require_sliceable
from rep_plugin.pruning.tracing.features import entries_of
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.groups import frozen_roots
from rep_plugin.pruning.tracing.kept_channels import KeptChannels, count_costs
from rep_plugin.pruning.tracing.tracer import trace_channels

TOLERANCE = 1e-9  # relative, in float64

if TYPE_CHECKING:  # imported where something is printed
    from rich.table import Table

    from rep_plugin.measure.plots import Figure


# A wrapper with an optimizer inside will do, as mmengine's.
AnOptimizer = Annotated[
    Any,
    That(lambda one: isinstance(one, torch.optim.Optimizer) or hasattr(one, "optimizer"), "a torch.optim.Optimizer"),
]
Optimizers = Annotated[Sequence[AnOptimizer], That(lambda _: True, "a list of them")]
APlan = Annotated[PrunePlan, That(lambda _: True, "a PrunePlan (see PrunePlan.from_json)")]


@checked
@dataclass
class PruneReport(Report):
    """A report of :func:`apply_plan`, with the widths of layers.

    Attributes:
        model: Class of the pruned model.
        why: The budget and the scores of the plan.
        widths: {layer: (channels before, after)}.
        frozen: {layer: why it stays as it is}.
        latency_before: Milliseconds of the dense model, where the plan was made by latency.
        latency_after: Milliseconds of the pruned one.
        planned_macs: (before, after) as the plan counts multiply-adds, where that is another number: a block as the one
            convolution that it deploys as.
        metrics: {``before``, ``after``, ``after_bn`` (with statistics of batch norms measured anew): {name: value}}, where a
            validation set was measured.

    Example:
        >>> from rep_plugin.pruning import PruneReport
        >>> report = PruneReport("apply_plan", 500, 300, widths={"conv": (16, 9)})
        >>> report.table().title
        'apply_plan: 1 of 1 layers narrower, 0 frozen'
    """

    model: str = ""
    why: str = ""
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    latency_before: float | None = None
    latency_after: float | None = None
    planned_macs: tuple[int, int] | None = None
    metrics: dict[str, dict[str, Anything]] = field(default_factory=dict)

    def add_plan(self, plan: PrunePlan) -> None:
        """Fill in what a plan says; after :attr:`macs_before` is known."""
        self.model, self.why = plan.model, plan.why
        self.widths, self.frozen = dict(plan.widths), dict(plan.frozen)
        self.latency_before, self.latency_after = plan.latency_before, plan.latency_after
        if plan.macs_before != self.macs_before:
            self.planned_macs = plan.macs_before, plan.macs_after
            text = f"merged, {plan.macs_before:,} multiply-adds are {plan.macs_after:,}: what budgets count"
            self.notes.append(f"{text} ({plan.macs_after / plan.macs_before:.1%})")
        self.notes += [note for note in plan.notes if note != MERGED] + frozen_notes(plan.frozen)

    def _costs(self, title: str) -> "Table":
        table = super()._costs(title)
        if self.planned_macs is not None:
            table.add_row("  once merged, as budgets count", *(f"{macs:,}" for macs in self.planned_macs))
        return table

    def table(self) -> "Table":
        """Return the metrics as a rich table."""
        table = super().table()
        changed = sum(before != after for before, after in self.widths.values())
        asked = f"{self.model}, {self.why}: " if self.why else ""
        counts = f"{changed} of {len(self.widths)} layers narrower, {len(self.frozen)} frozen"
        table.title = f"{self.action}: {asked}{counts}"
        if self.latency_before is not None and self.latency_after is not None:
            table.add_row("milliseconds when planned", f"{self.latency_before:.2f}", f"{self.latency_after:.2f}")
        for name, value in self.metrics.get("before", {}).items():
            table.add_row(name, f"{value:.4g}", f"{self.metrics['after'][name]:.4g}")
            if "after_bn" in self.metrics:
                table.add_row("  with new batch norm statistics", "", f"{self.metrics['after_bn'][name]:.4g}")
        return table

    def details(self) -> "list[Table]":
        """Return the widths of all layers, and what is frozen and why."""
        widths = new_table("channels of layers", ("layer", "before", "after", "left"))
        for name, (before, after) in self.widths.items():
            widths.add_row(name, str(before), str(after), f"{after / before:.0%}")
        frozen = new_table("layers that stay as they are", ("layer", "why"), left=["why"])
        for name, why in self.frozen.items():
            frozen.add_row(name, why)
        return [*([widths] if self.widths else []), *([frozen] if self.frozen else [])]

    def figures(self) -> "list[Figure]":
        """Return the plot of the widths; none where no layer is narrower, or matplotlib is not installed."""
        if not self.widths or is_missing("matplotlib"):
            return []
        from rep_plugin.measure.plots import widths_figure

        return [widths_figure(self.widths, "channels before and after", self.frozen)]


@checked
@takes_examples
@working("removing channels")
@private_random()
def apply_plan(
    model: nn.Module,
    plan: APlan,
    optimizer: AnOptimizer | Optimizers | None = None,
    *,
    ema: nn.Module | None = None,
    verify: bool = True,
    example_input: Example | None = None,
) -> PruneReport:
    """Remove the channels that ``plan`` does not keep, in place.

    Parameters stay the same objects, with their gradients.

    Args:
        model: Not wrapped: pass the ``.module`` of DDP, and wrap it again after.
        plan: Made for this model.
        optimizer: One or several whose state is sliced along; a wrapper with an ``optimizer`` inside will do.
        ema: A second copy of the model (or a wrapper with one as ``module``), pruned alike.
        verify: First compare, in float64 and on copies, the model with removed channels set to zero and the one without
            them, at a relative tolerance of 1e-9.
        example_input: For that, (N, C, H, W); random and of the plan's shape by default. Another size is tried as well. Or a
            tuple or a dict of all that the model is called with.

    Returns:
        The report.

    Raises:
        ArgumentError: The plan is not for this model, the model is wrapped, or an optimizer or ``ema`` does not fit.
            Everything is then as it was.
        EquivalenceError: The proof fails. Everything is then as it was.

    Example:
        >>> import torch
        >>> from rep_plugin import apply_plan, plan_pruning
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)).eval()
        >>> report = apply_plan(net, plan_pruning(net, (1, 3, 8, 8), "l1", 0.5))
        >>> net[0].weight.shape, report.max_rel_error < 1e-9
        (torch.Size([4, 3, 3, 3]), True)
    """
    started = time.perf_counter()
    plan.check()  # its dicts may have been changed
    trace = trace_channels(model, plan.input_shape, plan.prune_outputs)
    kept = kept_by(plan, model, trace)
    optimizers = _optimizers(optimizer, model)
    require_sliceable(optimizers)
    shadow = None if ema is None else _shadow(ema, model)
    copies = [(one, before_step(one)) for one in (model, shadow) if one is not None]
    report = PruneReport("apply_plan", count_params(model), 0, input_shape=trace.shape)
    report.macs_before = _macs(model, trace, KeptChannels(trace))
    if verify:
        _prove(model, trace, kept, proof_inputs(model, plan.input_shape, example_input), report)
    table = getattr(ema, "avg_parameters", None)
    tables = [entry for one, _ in copies for module in one.modules() for entry in entries_of(module)]
    tables += [table] if isinstance(table, dict) else []
    with undone_on_error(*(one for one, _ in copies), optimizers=optimizers, tables=tables, values=False):
        report.notes += fold_constants_(model, trace, kept)
        remove_channels_(model, trace, kept, optimizers, report.notes)
        if shadow is not None:
            fold_constants_(shadow, trace, kept)
            remove_channels_(shadow, trace, kept)
            _refresh_table(ema, shadow)
        report.params_after, report.macs_after = count_params(model), _macs(model, trace, kept)
        report.blocks = [
            BlockReport(name, f"{layer.kind} {len(layer.labels)} -> {kept.count(layer.labels)}")
            for name, layer in trace.layers.items()
            if kept.changes(layer.labels)
        ]
        report.add_plan(plan)
        # The scores are not needed to do it again, and are most of the plan.
        for one, before in copies:
            record_(one, before, step="prune", plan=asdict(replace(plan, scores={})))
    report.seconds = time.perf_counter() - started
    return report


@replays("prune", "plan")
def _replay(model: nn.Module, plan: Mapping | str) -> nn.Module:
    if isinstance(plan, str) and not plan.lstrip().startswith("{"):
        raise ArgumentError("the plan of a step must be its data or its JSON text, got the name of a file")
    apply_plan(model, as_plan(plan), verify=False)
    return model


def _macs(model: nn.Module, trace: Trace, kept: KeptChannels) -> int:
    """Multiply-adds of one forward pass of the model as it is; the trace contains them where it counts no merged form."""
    if not trace.block_parameters:
        return count_costs(trace, kept).macs
    first = next(model.parameters())
    return count_macs(model, torch.zeros(trace.shape, dtype=first.dtype, device=first.device))


def kept_by(plan: PrunePlan, model: nn.Module, trace: Trace) -> KeptChannels:
    """Return what a plan keeps of a traced model.

    Args:
        plan: Of this model.
        model: For its name in messages.
        trace: Of the model.

    Returns:
        The channels that stay.

    Raises:
        ArgumentError: The plan does not fit; the message names the layer.
    """
    for name, (before, _) in plan.widths.items():
        if name not in trace.layers:
            raise ArgumentError(
                f"the plan is for another model ({plan.model}): {type(model).__name__} has no layer {name!r}"
            )
        if (have := len(trace.layers[name].labels)) != before:
            raise ArgumentError(
                f"the plan is for another model: layer {name!r} has {have} channels, the plan says {before}"
            )
    if missing := set(trace.layers) - set(plan.widths):
        raise ArgumentError(f"the plan is for another model: it does not know layer {sorted(missing)[0]!r}")
    roots, frozen = trace.channels.roots(), frozen_roots(trace)
    removed = []
    for name, indices in plan.kept.items():
        if name not in trace.layers:
            raise ArgumentError(f"the plan keeps channels of {name!r}, for which it has no width")
        stays = torch.zeros(len(trace.layers[name].labels), dtype=torch.bool)
        stays[list(indices)] = True
        removed += roots[trace.layers[name].labels[~stays]].tolist()
    kept = KeptChannels(trace, removed)
    for name, layer in trace.layers.items():
        if (frozen[roots[layer.labels]] & ~kept.mask[layer.labels]).any():
            raise ArgumentError(f"the plan removes channels of {name!r}, which cannot be removed")
        want = plan.kept.get(name, tuple(range(len(layer.labels))))
        if tuple(kept.index(layer.labels).tolist()) != tuple(want):
            raise ArgumentError(f"the plan keeps channels of {name!r} that go with removed ones of a coupled layer")
    for rows in trace.channels.balanced:
        if len(set(kept.mask[rows].sum(1).tolist())) > 1:
            raise ArgumentError("the plan keeps unequally many channels in the groups of a convolution or a norm")
    for name, (_, after) in plan.widths.items():
        if (count := kept.count(trace.layers[name].labels)) != after:
            raise ArgumentError(f"the plan says that {after} channels of {name!r} stay, but keeps {count}")
    return kept


def _optimizers(optimizer, model: nn.Module) -> list[torch.optim.Optimizer]:
    given = [] if optimizer is None else list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    outer = [getattr(one, "optimizer", one) for one in given]
    own = set(model.parameters())
    for one in outer:
        if not isinstance(one, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
        if not any(p in own for group in one.param_groups for p in group["params"]):
            raise ArgumentError(f"the {type(one).__name__} holds no parameter of this {type(model).__name__}")
    for one in outer:  # timm's Lookahead keeps the optimizer that it wraps
        outer += [
            inner for inner in vars(one).values() if isinstance(inner, torch.optim.Optimizer) and inner not in outer
        ]
    return outer


def _shadow(ema: nn.Module, model: nn.Module) -> nn.Module:
    if set(ema.parameters()) & set(model.parameters()):
        raise ArgumentError(f"ema ({type(ema).__name__}) shares parameters with the model, expected a copy of it")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for candidate in (ema, getattr(ema, "module", None)):
        if isinstance(candidate, nn.Module) and {n: p.shape for n, p in candidate.named_parameters()} == shapes:
            return candidate
    raise ArgumentError(f"ema ({type(ema).__name__}) does not hold the parameters of {type(model).__name__}")


def _refresh_table(ema: nn.Module, shadow: nn.Module) -> None:
    """Tensors that a wrapper keeps by name (mmengine's ``avg_parameters``) are those of the model again."""
    table = getattr(ema, "avg_parameters", None)
    if isinstance(table, dict):
        parameters, state = dict(shadow.named_parameters()), shadow.state_dict()
        for name, old in table.items():
            table[name] = parameters[name] if isinstance(old, nn.Parameter) else state[name]


def proof_inputs(model: nn.Module, shape: Sequence[int], example_input: Tensor | None) -> list[Tensor]:
    """Return the inputs of a proof: the example, or two random images of the traced shape, and another size.

    Args:
        model: That is compared.
        shape: Of the traced input, (N, C, H, W).
        example_input: Taken instead of random images where one is given.

    Returns:
        The inputs.
    """
    if example_input is None:
        shape = (max(2, shape[0]), *shape[1:])
        example_input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return default_inputs(model, example_input)


def _attached(model: nn.Module) -> str:
    """What may be bound to a number of channels, for a message."""
    found = [f"{name!r} {what}" for name, what in own_forwards(model).items() if "backward" not in what]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"; {found[0]}{more}: that may be what is bound to the channels" if found else ""


def _prove(model: nn.Module, trace: Trace, kept: KeptChannels, inputs: list[Tensor], report: PruneReport) -> None:
    # In float64 from the start: gains of normalised filters change, and would be rounded.
    masked, removed = copy_model(model).double(), copy_model(model).double()
    for copied in (masked, removed):
        fold_constants_(copied, trace, kept)
    masked, removed = mask_channels_(masked, trace, kept), remove_channels_(removed, trace, kept)
    if any(map(kept.changes, trace.averaged())):
        masked = KeptNorms(masked, trace, kept)
    if any(kept.changes(labels) for labels in trace.outputs):
        masked = KeptOutputs(masked, trace, kept)
    try:
        proof = verify_equivalence(masked, removed, inputs, tolerance=TOLERANCE, keep=False, name="example_input")
    except EquivalenceError as error:
        raise EquivalenceError(
            f"removing channels does not equal setting them to zero: {error}{_attached(model)}"
        ) from error
    except (RuntimeError, IndexError) as error:  # torch's, of shapes that do not fit
        raise EquivalenceError(
            f"the model does not run without the removed channels: {first_line(error)}{_attached(model)}"
        ) from error
    report.add_proof(proof)
    require_castable(removed, model)  # gains of normalised filters change
