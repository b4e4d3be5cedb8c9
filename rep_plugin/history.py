"""What was done to a model since it was built: plain data on its root, from which the same structure can be built again."""

from torch import nn

ATTRIBUTE = "rep_history"


def history_of(model: nn.Module) -> list[dict]:
    """Return the steps so far, oldest first: ``{"step": "prune", "plan": ...}``, ``{"step": "reparameterize", ...}``."""
    return list(getattr(model, ATTRIBUTE, []))


def record_(model: nn.Module, before: list[dict], **step: object) -> None:
    """Note that ``model`` is what one more step has made of a model with the history ``before``."""
    setattr(model, ATTRIBUTE, [*before, step])
