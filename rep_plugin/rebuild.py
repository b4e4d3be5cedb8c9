"""Structure from history: the steps that narrowed or merged a model, repeated on a freshly built one."""

import json
from collections.abc import Mapping, Sequence

from torch import nn

from rep_plugin.pruning import PrunePlan, apply_plan
from rep_plugin.reparam import reparameterize

# What each step of a history holds.
STEPS = {
    "prune": {"plan"},
    "reparameterize": {"fold_bn", "merge_linear"},
    "classifier": {"layer", "num_classes"},
}


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


def check_history(history: Sequence[Mapping]) -> None:
    """Raise ValueError, naming the step, for what is no history."""
    if not isinstance(history, (list, tuple)):
        raise ValueError(f"a history must be a list of steps, got {type(history).__name__}")
    for place, step in enumerate(history):
        if not isinstance(step, Mapping) or step.get("step") not in STEPS:
            what = step.get("step") if isinstance(step, Mapping) else step
            raise ValueError(f"unknown step {what!r} in the history, expected one of {', '.join(STEPS)}")
        if odd := sorted((step.keys() - {"step"}) ^ STEPS[step["step"]]):
            raise ValueError(f"step {place} of the history ({step['step']}): missing or unknown {odd}")


def set_classes_(model: nn.Module, layer: str, num_classes: int) -> None:
    """Put a fresh linear layer of ``num_classes`` in the place of one (0: none); ``model.num_classes`` follows.

    The live weights tell its inputs, where timm's ``reset_classifier`` reads them from attributes that pruning leaves as
    they were. Raises ValueError where ``layer`` is not linear.
    """
    old = model.get_submodule(layer)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"num_classes (={num_classes}) needs a linear classifier, the model has {type(old).__name__}")
    new = nn.Linear(old.in_features, num_classes, old.bias is not None) if num_classes else nn.Identity()
    model.set_submodule(layer, new.to(old.weight.device, old.weight.dtype).train(old.training))
    model.num_classes = num_classes


def rebuild_(model: nn.Module, history: Sequence[Mapping]) -> nn.Module:
    """Give a freshly built model the structure that ``history`` describes; return it (the root may be another object).

    The weights mean nothing yet, so nothing is proven: load the state dict next, strictly. The mode is kept. Raises
    ValueError for an unknown step or a plan that is not for this model.
    """
    check_history(history)
    training = model.training
    for step in history:
        model.train(False)  # not chained: mmpretrain's return None
        if step["step"] == "prune":
            apply_plan(model, as_plan(step["plan"]), verify=False)
        elif step["step"] == "reparameterize":
            how = {key: step[key] for key in ("fold_bn", "merge_linear")}
            model, _ = reparameterize(model, inplace=True, verify=False, **how)
        else:
            set_classes_(model, step["layer"], step["num_classes"])
    model.train(training)
    return model
