"""Structure from history: the steps that narrowed or merged a model, repeated on a freshly built one."""

import json
from collections.abc import Mapping, Sequence

from torch import nn

from rep_plugin.pruning import PrunePlan, apply_plan
from rep_plugin.reparam import reparameterize

STEPS = ("prune", "reparameterize")


def as_plan(plan: PrunePlan | Mapping | str) -> PrunePlan:
    """Return a plan that is given as such, as its plain data, as JSON text, or as the path of a JSON file.

    Raises ValueError, in one line, for what is none of these; FileNotFoundError for a path that does not exist.
    """
    if isinstance(plan, PrunePlan):
        return plan
    if isinstance(plan, Mapping):
        return PrunePlan.from_json(json.dumps(plan))
    if isinstance(plan, str):
        return PrunePlan.from_json(plan)
    raise ValueError(f"plan must be a PrunePlan, its data, JSON text or a path, got {type(plan).__name__}")


def rebuild_(model: nn.Module, history: Sequence[Mapping]) -> nn.Module:
    """Give a freshly built model the structure that ``history`` describes; return it (the root may be another object).

    The weights mean nothing yet, so nothing is proven: load the state dict next, strictly. The mode is kept. Raises
    ValueError for an unknown step or a plan that is not for this model.
    """
    training = model.training
    for step in history:
        model.train(False)  # not chained: mmpretrain's return None
        if step.get("step") == "prune":
            apply_plan(model, as_plan(step["plan"]), verify=False)
        elif step.get("step") == "reparameterize":
            how = {key: step[key] for key in ("fold_bn", "merge_linear")}
            model, _ = reparameterize(model, inplace=True, verify=False, **how)
        else:
            raise ValueError(f"unknown step {step.get('step')!r} in the history, expected one of {STEPS}")
    model.train(training)
    return model
