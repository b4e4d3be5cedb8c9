"""ResRep: a network learns in compactors what it can forget, while its own weights go on remembering.

Source: Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting" (ICCV 2021).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rep_plugin.arguments import Shape, checked
from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.verify import require_castable, require_rounded, verify_equivalence
from rep_plugin.pruning.apply import TOLERANCE, PruneReport, apply_plan, proof_inputs
from rep_plugin.pruning.methods.compactors import (
    Site,
    compactors_of,
    find_sites,
    insert_compactors_,
    merge_compactors_,
    require_running,
)
from rep_plugin.pruning.methods.sparsity import Sparsity, directions
from rep_plugin.pruning.planning.options import Budget, PruneOptions
from rep_plugin.pruning.planning.plan import PrunePlan, make_plan
from rep_plugin.pruning.planning.select import (
    Candidate,
    Choice,
    above_floors,
    find_candidates,
    in_order,
    nothing_to_prune,
    round_widths,
    take_units,
    to_budget,
)
from rep_plugin.pruning.tracing.groups import frozen_roots
from rep_plugin.pruning.tracing.kept_channels import count_costs
from rep_plugin.pruning.tracing.tracer import trace_channels

_WITHOUT = "cannot lose channels, no compactor can make them zero"
_ADVICE = "that takes a convolution with a BN, prune such layers with PruneHook"


@checked
class ResRep:
    """Where a model's compactors stand, which channels are to be forgotten, and how the narrow network comes out.

    Every Conv-BN pair that makes channels of a group gets a compactor, the group shares what is forgotten, and a channel's
    score is the root mean square of its rows' norms over the pairs of the group. A depthwise convolution's factors are in
    no score, and bring what its own norm adds (beta) to zero with the channel. A group that a forgotten channel would leave
    traces of is frozen: one that a linear layer, a block or a convolution without a batch norm makes channels of (a gate of
    squeeze and excite multiplies, and leaves none).

    Args:
        model: Nothing of it is changed before :meth:`insert_`.
        shape: Of an input, (N, C, H, W).
        budget: How many channels go, or the parameters or multiply-adds that may remain, by the costs of a plan: compactors
            are not counted, they merge.
        options: Of these count ``min_channels``, ``max_prune_fraction``, ``round_to`` and ``ignore``.

    Raises:
        ArgumentError: The budget is one of latency or cannot be met, a pattern fits no layer, or the model has no place for
            a compactor.

    Attributes:
        before: What the dense model has of what the budget counts.
        target: What may remain of it.
        macs_before: Multiply-adds of the dense model.
        TraceError: The model cannot be traced.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods import ResRep
        >>> from rep_plugin.pruning.planning import Budget
        >>> layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 1)
        >>> resrep = ResRep(torch.nn.Sequential(*layers), (1, 3, 8, 8), Budget(macs=0.5))
        >>> [site.conv for site in resrep.sites], resrep.macs_before, resrep.target
        (['0'], 8928, 4464)
    """

    def __init__(self, model: nn.Module, shape: Shape, budget: Budget, options: PruneOptions | None = None):
        self.unit = budget.item[0]
        if self.unit not in ("prune_fraction", "params", "macs"):
            raise ArgumentError(f"ResRep needs a budget of prune_fraction, params or macs, got {budget}")
        self.options = options or PruneOptions()
        sites = find_sites(model, trace_channels(model, shape))
        self.trace = trace_channels(model, shape, makers=[site.norm for site in sites])
        for name, dim in self.trace.masked_inputs:
            labels = self.trace.slices[name][dim]
            self.trace.channels.freeze(labels, f"{_WITHOUT}: {name} would still see something of them")
        choice = self._candidates({site: torch.ones(len(self._labels(site))) for site in sites})
        roots, frozen = self.trace.channels.roots(), frozen_roots(self.trace)
        self.sites = [
            site for site in sites if site.conv not in choice.frozen and not frozen[roots[self._labels(site)]].all()
        ]
        if not self.sites or not choice.units:
            raise _no_place(model, choice.frozen)
        costs = count_costs(self.trace)
        self.macs_before = costs.macs
        if self.unit == "prune_fraction":
            self.before = sum(len(candidate.units) for group in choice.candidates for candidate in group)
            self.target = self.before - budget.limit(self.before)
        else:
            self.before = getattr(costs, self.unit)
            self.target = budget.limit(self.before)
        self._take(choice, self.target)

    def _labels(self, site: Site) -> Tensor:
        return self.trace.layers[site.conv].labels

    def _candidates(self, norms: dict[Site, Tensor]) -> Choice:
        """What may be forgotten, from the norms of the rows of each site."""
        roots = self.trace.channels.roots()
        total = torch.zeros(self.trace.channels.count, dtype=torch.float64)
        number = torch.zeros_like(total)
        for site, values in norms.items():
            if site.scored:
                units = roots[self._labels(site)]
                total.index_add_(0, units, values.double().square())
                number.index_add_(0, units, torch.ones(len(units), dtype=torch.float64))
        return find_candidates(
            self.trace, (total / number).sqrt(), self.options.frozen_patterns, f"{_WITHOUT}: {_ADVICE}"
        )

    def _floors(self, choice: Choice) -> dict[str, tuple[int, int]]:
        return {name: self.options.floors(width) for name, width in choice.widths.items()}

    def _take(self, choice: Choice, remain: int) -> list[Candidate]:
        order = above_floors(in_order(choice.candidates, "global"), choice.widths, self._floors(choice))
        if self.unit == "prune_fraction":
            taken = take_units(order, self.before - remain)
            return round_widths(taken, choice.widths, self.options.multiples(choice.widths))
        return to_budget(self.trace, order, choice.widths, Budget(**{self.unit: remain}), self.options)[0]

    def insert_(self, model: nn.Module) -> None:
        """Put the compactors, identities still, into a model (or a copy of it) that was given to the constructor."""
        insert_compactors_(model, self.sites)
        require_running(model, self.sites, self.trace.shape)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the weights of a model's compactors."""
        return [compactor.weight for compactor in compactors_of(model, self.sites).values()]

    def choose(self, model: nn.Module, remain: int | None = None) -> PrunePlan:
        """Return the plan of what is to be forgotten: the channels of the lowest scores.

        Args:
            model: With compactors; the plan is for the model without.
            remain: What shall remain of what the budget counts (default: the target).

        Returns:
            The plan.

        Raises:
            ArgumentError: So little cannot remain, or a row is not finite.
        """
        remain = self.target if remain is None else remain
        compactors = compactors_of(model, self.sites)
        norms = {site: compactors[site.conv].row_norms() for site in self.sites}
        for site, values in norms.items():
            if not torch.isfinite(values).all():
                raise ArgumentError(f"the compactor behind {site.norm!r} holds NaN or infinity: training has diverged")
        choice = self._candidates(norms)
        what = f"{remain} of {self.before} channels" if self.unit == "prune_fraction" else f"{self.unit}={remain}"
        why = f"{what} by compactors, {self.options}"
        return make_plan(model, self.trace, choice, self._take(choice, remain), why, False, self._floors(choice))

    def forgotten(self, plan: PrunePlan) -> dict[str, Tensor]:
        """Return the rows that a plan forgets, by the names of the convolutions."""
        rows = {}
        for site in self.sites:
            stays = torch.zeros(len(self._labels(site)), dtype=torch.bool)
            stays[list(plan.kept.get(site.conv, range(len(stays))))] = True
            rows[site.conv] = (~stays).nonzero().flatten()
        return rows

    def rows_left(self, model: nn.Module, plan: PrunePlan) -> dict[str, float]:
        """Return the progress of forgetting.

        Args:
            model: With compactors.
            plan: Of :meth:`choose`.

        Returns:
            ``largest_dropped_row`` and ``smallest_kept_row``, norms, and ``largest_dropped_share``, a dropped row's norm by
            the mean of those that stay beside it.
        """
        forgotten, compactors = self.forgotten(plan), compactors_of(model, self.sites)
        norms_left = dict(largest_dropped_row=0.0, largest_dropped_share=0.0, smallest_kept_row=torch.inf)
        for name, compactor in compactors.items():
            norms = compactor.row_norms()
            dropped = torch.zeros(len(norms), dtype=torch.bool).index_fill_(0, forgotten[name], True)
            stays = norms[~dropped]
            largest = max(norms[dropped].tolist(), default=0.0)
            norms_left["largest_dropped_row"] = max(norms_left["largest_dropped_row"], largest)
            share = largest / max(stays.mean().item(), torch.finfo(norms.dtype).tiny)
            norms_left["largest_dropped_share"] = max(norms_left["largest_dropped_share"], share)
            norms_left["smallest_kept_row"] = min(norms_left["smallest_kept_row"], stays.min().item())
        return norms_left

    def compact_(self, model: nn.Module, plan: PrunePlan, example_input: Tensor | None = None) -> PruneReport:
        """Merge the compactors of a model and remove what ``plan`` forgets, in place.

        The one thing that is lost are the forgotten rows, as small as they are by now: they are set to zero. Two proofs in
        float64 (relative tolerance 1e-9), on copies: the plan's, and the narrow network against the one with compactors.
        Where something is raised, as by :func:`rep_plugin.apply_plan`, the model is as it was.

        Args:
            model: With compactors.
            plan: Of :meth:`choose`.
            example_input: For the proofs, (N, C, H, W); random by default.

        Returns:
            The report.
        """
        reference = copy_model(model).double()
        compactors, forgotten = compactors_of(reference, self.sites), self.forgotten(plan)
        with torch.no_grad():
            for name, rows in forgotten.items():
                weight = compactors[name].weight
                weight.index_fill_(0, rows.to(weight.device), 0)
        merged = copy_model(reference)
        merge_compactors_(merged, self.sites)
        report = apply_plan(merged, plan, example_input=example_input)
        inputs = proof_inputs(model, plan.input_shape, example_input)
        proof = verify_equivalence(reference, merged, inputs, tolerance=TOLERANCE, keep=False, name="example_input")
        report.max_abs_error = max(report.max_abs_error, proof.total.max_abs)
        report.max_rel_error = max(report.max_rel_error, proof.total.max_rel)
        require_castable(merged, model)  # before the given one is changed
        merge_compactors_(model, self.sites)
        apply_plan(model, plan, verify=False)
        model.load_state_dict(merged.state_dict())  # rounded once
        require_rounded(model, merged)
        return report


def _no_place(model: nn.Module, frozen: Mapping[str, str]) -> ArgumentError:
    """The error for a model without a place for a compactor."""
    blocks = [module for module in model.modules() if isinstance(module, RepBlock)]
    if blocks:
        return ArgumentError(
            f"{type(model).__name__} has {len(blocks)} blocks of several branches ({type(blocks[0]).__name__}), and a "
            "compactor stands behind one convolution and its batch norm: take another way of pruning (docs/pruning.md)"
        )
    return nothing_to_prune(model, frozen, "pruned by compactors")


class Forgetting:
    """Makes compactors forget, at every real step of an optimizer.

    Group lasso of ``strength`` pulls all rows. The gradient of the objective does not reach those that are marked, and
    these are pulled by ``marked_strength`` instead. A marked row that reaches zero stays there, its momentum too: the
    paper's swing through it, for as long as momentum lasts. It goes straight there: what momentum has of the objective is
    dropped when a row is marked.

    It acts where :class:`rep_plugin.pruning.methods.sparsity.Sparsity` does, after accumulation, unscaling and clipping.

    Args:
        compactors: {name: weight of a compactor}.
        strength: Of the lasso on all rows.
        marked_strength: Of the lasso on marked rows, ``strength`` by default.

    Example:
        >>> import torch
        >>> from rep_plugin.pruning.methods.resrep import Forgetting
        >>> weight = torch.nn.Parameter(torch.eye(2).view(2, 2, 1, 1))
        >>> forgetting = Forgetting({"conv": weight}, 0.1)
        >>> forgetting.mark({"conv": torch.tensor([1])})
        >>> forgetting.attach([torch.optim.SGD([weight], 0.1, momentum=0.9)])
    """

    def __init__(self, compactors: dict[str, nn.Parameter], strength: float, marked_strength: float | None = None):
        self.compactors = compactors
        self.rows: dict[nn.Parameter, Tensor] = {}
        self._before: dict[nn.Parameter, Tensor] = {}  # marked rows, before the step
        self._more = 0.0 if marked_strength is None else marked_strength - strength
        self._lasso = Sparsity({}, {weight: strength for weight in compactors.values()})
        self._optimizers: list[torch.optim.Optimizer] = []
        self._handles: list = []

    @torch.no_grad()
    def mark(self, rows: dict[str, Tensor]) -> None:
        """Let these rows (by the names of the compactors) be forgotten, and no others.

        Before :meth:`attach` nothing is known of momentum, and it stays: so a training that goes on restores what is marked.
        """
        old, self.rows = self.rows, {w: rows[name].to(w.device) for name, w in self.compactors.items()}
        for weight, now in self.rows.items():
            new = now[~torch.isin(now, old[weight])] if weight in old else now
            for optimizer in self._optimizers:
                _forget_momentum_(optimizer, weight, new)

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Act on the steps of these optimizers.

        Raises:
            ArgumentError: None of them has any of the compactors.
        """
        self._optimizers = optimizers = list(optimizers)
        # Hooks run in the order in which they are registered: the gradient is replaced, then the lasso is added.
        self._handles = [one.register_step_pre_hook(lambda optimizer, *_: self._mask(optimizer)) for one in optimizers]
        self._lasso.attach(optimizers)
        for one in optimizers:
            self._handles.append(one.register_step_post_hook(lambda optimizer, *_: self._settle(optimizer)))

    def detach(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._lasso.detach()
        self._optimizers = []

    @torch.no_grad()
    def _mask(self, optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # see Sparsity
        self._before = {weight: weight[rows] for weight, rows in self.rows.items() if weight.grad is not None}
        for weight, before in self._before.items():
            rows, term = self.rows[weight], directions(before) * self._more
            weight.grad.index_copy_(0, rows, term if scale is None else term * scale.to(term.device))

    @torch.no_grad()
    def _settle(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, before in self._before.items():
            rows = self.rows[weight]
            past = rows[(weight[rows] * before).flatten(1).sum(1) <= 0]
            weight.index_fill_(0, past, 0)
            _forget_momentum_(optimizer, weight, past)


def _forget_momentum_(optimizer: torch.optim.Optimizer, weight: nn.Parameter, rows: Tensor) -> None:
    for tensor in optimizer.state.get(weight, {}).values():
        if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
            tensor.index_fill_(0, rows, 0)
