"""What would be left of a model is run once, without numbers: widths that its code has written out show here.

``view(-1, 288)``, ``assert x.shape[1] == 64`` or ``x.reshape(n, self.dim, -1)`` hold for the dense network alone. The layers
that such a line binds are found, by halving what is removed, and stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import nn

from rep_plugin.errors import first_line
from rep_plugin.measure.copies import copy_model
from rep_plugin.measure.differences import flatten_outputs
from rep_plugin.measure.forward import forward_of
from rep_plugin.measure.randomness import private_random
from rep_plugin.pruning.planning.select import Candidate, kept_without
from rep_plugin.pruning.surgery.remove import remove_channels_
from rep_plugin.pruning.tracing.graph import Trace
from rep_plugin.pruning.tracing.kept_channels import KeptChannels
from rep_plugin.pruning.tracing.tracer import ShapesAlone, location_of


def misfit(model: nn.Module, trace: Trace, kept: KeptChannels) -> str | None:
    """Run what stays of a model.

    Args:
        model: Left as it is.
        trace: Of the model.
        kept: The channels that stay.

    Returns:
        Why it does not run, with file and line; None where it does.
    """
    empty: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    left = copy_model(model, empty, training=False)
    if any(not p.is_meta for p in left.parameters()):  # of a class whose copies share their weights
        return None
    shape = trace.shape
    x = torch.empty(shape, dtype=next((p.dtype for p in model.parameters()), torch.float32), device="meta")
    try:
        remove_channels_(left, trace, kept)
        with torch.no_grad(), private_random(), ShapesAlone():
            outputs = flatten_outputs(forward_of(left).run(left, x))
    except Exception as error:  # whatever the model's own code raises
        return f"{location_of(error)}: {first_line(error)}"
    for index, (output, labels) in enumerate(zip(outputs, trace.outputs)):
        if not kept.changes(labels) and output.shape != labels.shape:
            return f"its output {index}: {tuple(output.shape)} instead of {tuple(labels.shape)}"
    return None


def bound_groups(model: nn.Module, trace: Trace, chosen: Sequence[Candidate]) -> dict[int, str]:
    """Return the groups of candidates whose removal the model's code does not follow.

    Args:
        model: Left as it is.
        trace: Of the model.
        chosen: The candidates that would be removed.

    Returns:
        {group: where its width is written out}; {} where the model runs, or does not run even whole.
    """
    groups = sorted({candidate.group for candidate in chosen})

    def fails(number: int) -> str | None:
        inside = set(groups[:number])
        return misfit(model, trace, kept_without(trace, [c for c in chosen if c.group in inside]))

    found: dict[int, str] = {}
    if not groups or fails(len(groups)) is None or fails(0) is not None:
        return found
    while (reason := fails(len(groups))) is not None:
        low, high = 0, len(groups)  # the first `low` groups run, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if (other := fails(middle)) is None:
                low = middle
            else:
                high, reason = middle, other
        found[groups.pop(high - 1)] = reason
    return found


def reason_of(layers: Sequence[str], where: str) -> str:
    """Say why the layers of a group stay.

    Args:
        layers: Of the group.
        where: Its width is written out.

    Returns:
        The reason, as plans have it.
    """
    return f"{layers[0]!r} has its number of channels written out in the model's code ({where}): take it from the map's shape"
