"""Which modules a verb works on, as its user says: by shell patterns on full names, or by a function."""

import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

from rep_plugin.errors import ArgumentError, ArgumentTypeError

Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def selector(
    where: Where, names: Sequence[str], what: str, argument: str = "where"
) -> Callable[[str, nn.Module], bool]:
    """Return a selection as a predicate of name and module.

    Args:
        where: a shell pattern, several, or the predicate; None: all.
        names: the names that a pattern must fit one of.
        what: what has these names, for messages.
        argument: name of the argument, for messages.

    Returns:
        The predicate.

    Raises:
        ArgumentError: a pattern fits no name, or ``where`` has none.
        ArgumentTypeError: it is something else.
    """
    if where is None:
        return lambda name, module: True
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    if not patterns and argument == "where":
        raise ArgumentError(f"{argument} must name something, got an empty list; None is the default")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(f"{argument} must be a pattern, a list of patterns or a function, got {pattern!r}")
        if not fnmatch.filter(names, pattern):
            raise ArgumentError(
                f"{argument}={pattern!r} fits none of {len(names)} {what} (first: {', '.join(names[:3])})"
            )
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def select_modules(model: nn.Module, where: Where, skip: Where) -> set[str] | None:
    """Return the names of the modules that are selected, and of all inside them.

    Args:
        model: the model.
        where: which; None: all.
        skip: which not; None: none.

    Returns:
        The names; None where all are.
    """
    if where is None and skip is None:
        return None
    modules = list(model.named_modules())
    names = [name for name, _ in modules if name]
    chosen, left = selector(where, names, "modules"), selector(skip, names, "modules", "skip")
    inside: dict[str, bool] = {}
    out: dict[str, bool] = {}
    for name, module in modules:
        parent = name.rpartition(".")[0]
        inside[name] = bool(chosen(name, module)) or (name != parent and inside.get(parent, False))
        out[name] = (skip is not None and bool(left(name, module))) or (name != parent and out.get(parent, False))
    return {name for name, _ in modules if inside[name] and not out[name]}
