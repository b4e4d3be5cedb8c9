"""What a plan is asked for: how much shall remain (:class:`Budget`), and how channels are chosen (:class:`PruneOptions`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated

from rep_plugin.arguments import Count, Fraction, OneOf, Positive, Seed, That, checked
from rep_plugin.errors import ArgumentError

SCORES = ("bn_gamma", "flow", "l1", "l2", "fpgm", "taylor", "random")
SCOPES = ("global", "layer")
REDUCTIONS = ("mean", "sum", "max")
MIN_CHANNELS, MAX_PRUNE_FRACTION = 8, 0.9  # where none is given

# Of arguments that more than one verb has.
Scores = Annotated[str, OneOf(SCORES)] | Mapping[str, Sequence[float]]
Scope = Annotated[str, OneOf(SCOPES)]
Reduction = Annotated[str, OneOf(REDUCTIONS)]
Overrides = Mapping[str, Fraction | Annotated[str, OneOf(("frozen",))]]
Widths = Mapping[str, Count]
Cost = int | Positive  # a number, or a share of what is there
Latency = Annotated[float, That(lambda share: 0 < share <= 1, "a share in (0, 1] (milliseconds are latency_ms)")]


@checked
@dataclass(frozen=True)
class Budget:
    """How much is removed, or how much may remain: exactly one of these is given.

    Args:
        prune_fraction: Share of the prunable channels that is removed, in [0, 1); coupled channels count once.
        params: Parameters that may remain: a share as a float (0.5 keeps half), or their number (300_000).
        macs: Multiply-adds for one image that may remain: a share as a float, or their number.
        latency: Share of the model's own time that may remain, in (0, 1].
        latency_ms: Milliseconds that may remain.

    Raises:
        ArgumentError: None or several are given, or the number is out of its range.

    Example:
        >>> from rep_plugin.pruning.planning import Budget
        >>> str(Budget(macs=0.5)), Budget(macs=0.5).limit(1001), Budget(macs=300).limit(1001)
        ('macs=0.5', 500, 300)
    """

    prune_fraction: Fraction | None = None
    params: Cost | None = None
    macs: Cost | None = None
    latency: Latency | None = None
    latency_ms: Positive | None = None

    def __post_init__(self):
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ArgumentError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}, got {given or 'none'}")
        name, value = self.item
        if name not in ("params", "macs"):
            return
        if isinstance(value, float) and value > 1 and value.is_integer():  # 3e8 is a number as well
            object.__setattr__(self, name, int(value))
        elif value <= 1 if isinstance(value, int) else value > 1:
            what = {"params": "parameters", "macs": "multiply-adds for one image"}[name]
            hint = f": 1.0 keeps all, 2 is a number of {what}" if value == 1 else ""
            raise ArgumentError(f"{name} must be a share (a float <= 1.0) or a whole number > 1, got {value!r}{hint}")

    @property
    def item(self) -> tuple[str, int | float]:
        """The name and the value of the one that is given."""
        return next((f.name, value) for f in fields(self) if (value := getattr(self, f.name)) is not None)

    def limit(self, before: int | float) -> int | float:
        """Return the budget in absolute terms: the given number, or the given share of ``before``.

        ``before`` is what the dense model has: prunable channels, parameters, multiply-adds, or milliseconds. Of
        ``prune_fraction`` it is the number of channels that are removed, of all others what may remain.
        """
        name, value = self.item
        if name == "prune_fraction":
            return round(value * before)
        if name in ("params", "macs"):
            return int(value * before) if isinstance(value, float) else value
        return value * before if name == "latency" else value

    def __str__(self) -> str:
        return "{}={}".format(*self.item)


@checked
@dataclass(frozen=True)
class PruneOptions:
    """How the channels that are removed are chosen.

    Args:
        scores: A name of ``SCORES``, or {layer: a number for each of its channels}; low ones are removed.
        scope: ``global`` compares scores over all layers, ``layer`` takes an equal share of each group.
        min_channels: No layer falls below this width. Default: 8, half of narrower layers; where a budget cannot be met
            otherwise it gives way as little as needed, with a note in the plan.
        max_prune_fraction: No layer loses more than this share of its channels. Default: 0.9, which gives way likewise.
        round_to: Widths that shrink are rounded up to multiples of this, where coupling lets them. Default: 8 (4 below 16
            channels) with budgets of params and macs, as runtimes are much slower at others; 1 where such a budget would
            be missed by more than 5 %, and with other budgets.
        overrides: {layer pattern: a fraction of its own, or ``'frozen'``}.
        ignore: Layer patterns whose groups stay as they are.
        reduction: Joins the scores of coupled layers: ``mean``, ``sum`` or ``max``.
        prune_outputs: Output maps (N, C, H, W) may lose channels as well, a bare backbone's for example.
        seed: Of ``scores='random'`` and of k-means.

    Raises:
        ArgumentError: An option is of another type, or out of its range.

    Example:
        >>> from rep_plugin.pruning.planning import PruneOptions
        >>> PruneOptions("l1", round_to=8, overrides={"stem*": "frozen"}).frozen_patterns
        ('stem*',)
    """

    scores: Scores = "bn_gamma"
    scope: Scope = "global"
    min_channels: Count | None = None
    round_to: Count | None = None
    overrides: Overrides | None = None
    ignore: Sequence[str] = ()
    reduction: Reduction = "mean"
    prune_outputs: bool = False
    seed: Seed = 0
    max_prune_fraction: Fraction | None = None

    def __post_init__(self):
        object.__setattr__(self, "overrides", dict(self.overrides or {}))
        object.__setattr__(self, "ignore", tuple(self.ignore))

    @property
    def score_name(self) -> str:
        """The name of the scores, for ``why``."""
        return self.scores if isinstance(self.scores, str) else "given scores"

    @property
    def reason_without_score(self) -> str:
        """Why a layer without scores stays as it is, as what is said of it."""
        no_bn = "has no BN for bn_gamma: use scores='l1'"
        return no_bn if self.scores == "bn_gamma" else f"is not scored by {self.score_name}: add it, or use scores='l1'"

    @property
    def frozen_patterns(self) -> tuple[str, ...]:
        """All patterns whose layers stay: those of ``ignore``, and those that ``overrides`` freezes."""
        return (*self.ignore, *(pattern for pattern, value in self.overrides.items() if value == "frozen"))

    @property
    def limits(self) -> str:
        """The floors that were given, for messages; empty without any."""
        given = (f"{name}={value}" for name in ("min_channels", "max_prune_fraction") if (value := getattr(self, name)))
        return " and ".join(given)

    def multiples(self, widths: Mapping[str, int], by_cost: bool = False) -> dict[str, int]:
        """Return the numbers of which widths are multiples.

        ONNX Runtime has its fast convolutions for multiples of 4 only, and pads those to 8 or 16.

        Args:
            widths: {layer: channels}.
            by_cost: The budget is one of params or macs, for which there is a default.

        Returns:
            {layer: number}.
        """
        if self.round_to is None and by_cost:
            return {name: 8 if width >= 16 else 4 if width >= 8 else 1 for name, width in widths.items()}
        return dict.fromkeys(widths, self.round_to or 1)

    def floors(self, width: int, first: int = 0) -> tuple[int, int]:
        """Return the widths below which a layer must not fall, and should not.

        Args:
            width: Of the layer.
            first: Of the same layer before anything was pruned, for the default floors.

        Returns:
            (the floor by what was given, that with the defaults as well).
        """
        least = max(self.min_channels or 1, _left(width, self.max_prune_fraction or 1.0))
        first = max(width, first)
        default = least
        if self.min_channels is None:
            default = max(default, min(MIN_CHANNELS, -(-first // 2)))
        if self.max_prune_fraction is None:
            default = max(default, _left(first, MAX_PRUNE_FRACTION))
        return least, max(least, min(width, default))

    def __str__(self) -> str:
        names = ("min_channels", "max_prune_fraction", "round_to")
        return ", ".join(f"{name} {value}" for name in names if (value := getattr(self, name)) is not None)


def _left(width: int, fraction: float) -> int:
    """How many channels stay where this share goes, rounded up; 12 stay of 120 when 0.9 go, not 13."""
    return math.ceil(round(width * (1 - fraction), 6))
