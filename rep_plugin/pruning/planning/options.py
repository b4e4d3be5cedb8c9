"""What a plan is asked for: how much shall remain (:class:`Budget`), and how channels are chosen (:class:`PruneOptions`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from rep_plugin.errors import ArgumentError

SCORES = ("bn_gamma", "l1", "l2", "fpgm", "taylor", "random")
SCOPES = ("global", "layer")
REDUCTIONS = ("mean", "sum", "max")


@dataclass(frozen=True)
class Budget:
    """How much is removed, or how much may remain: exactly one of these is given.

    Args:
        prune_fraction: Share of the prunable channels that is removed, in [0, 1); coupled channels count once.
        params: Parameters that may remain, a share as a float or a whole number.
        macs: Multiply-adds that may remain, a share as a float or a whole number.
        latency: Share of the model's own time that may remain, in (0, 1].
        latency_ms: Milliseconds that may remain.

    Raises:
        ArgumentError: None or several are given, or the number is out of its range.

    Example:
        >>> from rep_plugin.pruning.planning import Budget
        >>> str(Budget(macs=0.5)), Budget(macs=0.5).limit(1001), Budget(macs=300).limit(1001)
        ('macs=0.5', 500, 300)
    """

    prune_fraction: float | None = None
    params: int | float | None = None
    macs: int | float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self):
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ArgumentError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}, got {given or 'none'}")
        name, value = self.item
        if name == "prune_fraction":
            check_fraction(name, value)
        elif not _is_number(value) or not 0 < value < math.inf:
            raise ArgumentError(f"{name} must be a number > 0, got {value!r}")
        elif name == "latency" and value > 1:
            raise ArgumentError(f"latency must be a share in (0, 1], got {value!r}: milliseconds are latency_ms")
        elif name in ("params", "macs") and isinstance(value, float) and value > 1:
            raise ArgumentError(f"{name} must be a share (a float <= 1.0) or a whole number, got {value!r}")

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


@dataclass(frozen=True)
class PruneOptions:
    """How the channels that are removed are chosen.

    Args:
        scores: A name of ``SCORES``, or {layer: a number for each of its channels}; low ones are removed.
        scope: ``global`` compares scores over all layers, ``layer`` takes an equal share of each group.
        min_channels: No layer falls below this width.
        round_to: Widths that shrink are rounded up to multiples of this, where coupling lets them.
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

    scores: str | Mapping[str, Sequence[float]] = "bn_gamma"
    scope: str = "global"
    min_channels: int = 1
    round_to: int = 1
    overrides: Mapping[str, float | str] | None = None
    ignore: Sequence[str] = ()
    reduction: str = "mean"
    prune_outputs: bool = False
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.scores, Mapping) and self.scores not in SCORES:
            raise ArgumentError(f"unknown scores {self.scores!r}, expected one of {SCORES} or numbers by layer")
        for name, known in (("scope", SCOPES), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in known:
                raise ArgumentError(f"unknown {name} {getattr(self, name)!r}, expected one of {known}")
        for name in ("min_channels", "round_to"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{name} must be a whole number >= 1, got {value!r}")
        if not isinstance(self.seed, int):
            raise ArgumentError(f"seed must be a whole number, got {self.seed!r}")
        if not isinstance(self.overrides or {}, Mapping):
            raise ArgumentError(f"overrides must be a dict of pattern: fraction or 'frozen', got {self.overrides!r}")
        for pattern, value in (self.overrides or {}).items():
            if value != "frozen":
                check_fraction(f"overrides[{pattern!r}]", value)
        if isinstance(self.ignore, str) or not isinstance(self.ignore, Sequence):
            raise ArgumentError(f"ignore must be a list of patterns, got {self.ignore!r}")
        object.__setattr__(self, "overrides", dict(self.overrides or {}))
        object.__setattr__(self, "ignore", tuple(self.ignore))

    @property
    def score_name(self) -> str:
        """The name of the scores, for ``why``."""
        return self.scores if isinstance(self.scores, str) else "given scores"

    @property
    def reason_without_score(self) -> str:
        """Why a layer without scores stays as it is."""
        no_bn = "it has no BN for bn_gamma: use scores='l1'"
        return no_bn if self.scores == "bn_gamma" else f"not scored by {self.score_name}"

    @property
    def frozen_patterns(self) -> tuple[str, ...]:
        """All patterns whose layers stay: those of ``ignore``, and those that ``overrides`` freezes."""
        return (*self.ignore, *(pattern for pattern, value in self.overrides.items() if value == "frozen"))

    def __str__(self) -> str:
        return f"min_channels {self.min_channels}, round_to {self.round_to}"


def check_fraction(name: str, value: object) -> None:
    """Require a number in [0, 1).

    Args:
        name: Of the argument, for the message.
        value: The number.

    Raises:
        ArgumentError: It is none.
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise ArgumentError(f"{name} must lie in [0, 1), got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
