"""Parameters that join an optimizer after it was built, and the schedulers that drive it."""

from collections.abc import Sequence

from mmengine.runner import Runner
from torch import nn


def add_param_group(runner: Runner, parameters: Sequence[nn.Parameter], **changes: float) -> None:
    """Give the Runner's one optimizer a group more: like its largest, with ``changes``.

    Schedulers, which keep what they have begun with for every group, go on with the new group as with the one it is like.
    """
    wrapper = runner.optim_wrapper
    optimizer, place = wrapper.optimizer, len(wrapper.optimizer.param_groups)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    like = sizes.index(max(sizes))
    options = {k: v for k, v in optimizer.param_groups[like].items() if k not in ("params", "param_names")} | changes
    for name, value in changes.items():
        if f"initial_{name}" in options:
            options[f"initial_{name}"] = value
    optimizer.add_param_group({"params": list(parameters), **options})
    for scheduler in runner.param_schedulers or []:
        if hasattr(scheduler, "base_values"):
            scheduler.base_values.insert(place, options[f"initial_{scheduler.param_name}"])
        if hasattr(scheduler, "min_values"):
            scheduler.min_values.insert(place, scheduler.min_values[like])
        scheduler._last_value = [group[scheduler.param_name] for group in scheduler.optimizer.param_groups]
