"""Several prunings of one model as a single plan for the model they began with."""

from collections.abc import Sequence
from dataclasses import replace

from rep_plugin.pruning.plan import PrunePlan


def compose_plans(plans: Sequence[PrunePlan]) -> PrunePlan:
    """Return the plan that removes at once what ``plans``, each made for the result of the one before, remove in turn.

    Scores are dropped: they belong to different weights. Raises ValueError for no plans, or where one does not follow the
    other.
    """
    if not plans:
        raise ValueError("got no plans, expected at least 1")
    whole = replace(plans[0], scores={})
    for plan in plans[1:]:
        ends = {name: after for name, (_, after) in whole.widths.items()}
        starts = {name: before for name, (before, _) in plan.widths.items()}
        if ends != starts:
            name = next(n for n in (*ends, *starts) if ends.get(n) != starts.get(n))
            raise ValueError(
                f"plans do not follow each other: {name!r} ends with {ends.get(name)} channels, the next plan begins "
                f"with {starts.get(name)}"
            )
        kept = {}
        for name, (before, _) in whole.widths.items():
            if name in whole.kept or name in plan.kept:
                first = whole.kept.get(name, tuple(range(before)))
                kept[name] = tuple(first[i] for i in plan.kept.get(name, range(len(first))))
        whole = replace(
            whole,
            kept=kept,
            widths={name: (before, plan.widths[name][1]) for name, (before, _) in whole.widths.items()},
            why=f"{whole.why}; then {plan.why}",
            params_after=plan.params_after,
            macs_after=plan.macs_after,
            units=(whole.units[0], whole.units[1] + plan.units[1]),
        )
    return whole
