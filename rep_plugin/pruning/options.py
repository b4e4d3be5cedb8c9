"""The numbers that ``plan_pruning`` takes, checked before anything is traced or timed."""

import math
from collections.abc import Mapping

BUDGETS = ("prune_fraction", "params", "macs", "latency", "latency_ms")


def check_options(budgets: Mapping[str, object], min_channels: object, round_to: object) -> None:
    """Raise ValueError unless exactly one of ``budgets`` is given, and every number lies in its range."""
    named = [name for name in BUDGETS if budgets[name] is not None]
    if len(named) != 1:
        raise ValueError(f"give exactly one of {', '.join(BUDGETS[:-1])} and {BUDGETS[-1]}, got {named or 'none'}")
    (name,), value = named, budgets[named[0]]
    if name == "prune_fraction":
        check_fraction(name, value)
    elif not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {value!r}")
    elif name == "latency" and value > 1:
        raise ValueError(f"latency must be a share in (0, 1], got {value!r}: milliseconds are latency_ms")
    elif name in ("params", "macs") and isinstance(value, float) and value > 1:
        raise ValueError(f"{name} must be a share (a float <= 1.0) or a whole number, got {value!r}")
    for name, value in (("min_channels", min_channels), ("round_to", round_to)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
