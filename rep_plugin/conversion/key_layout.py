"""The keys of one project's checkpoints as pairs of templates, theirs and ours, that are read both ways.

``{s}`` in a template is a number and ``{s+1}`` the number after it. A template that ends in a dot stands for all tensors of
that layer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

CLASSIFIER = "classifier."  # of a network of ours under timm's names

Pair = tuple[str, str]  # their template, ours


@dataclass(frozen=True)
class Layout:
    """The keys of one project's networks of one family.

    Args:
        family: ``repvgg``, ``mobileone`` or ``replknet``.
        format: the project.
        pairs: templates of keys, theirs and ours.
        head: prefix of its classifier.
        wrapped: a network with a classifier keeps the backbone under ``backbone.``.
    """

    family: str
    format: str
    pairs: tuple[Pair, ...]
    head: str
    wrapped: bool = False

    @cached_property
    def _readers(self) -> list:
        return [_translator(theirs, ours) for theirs, ours in self.pairs]

    @cached_property
    def _writers(self) -> list:
        return [_translator(ours, theirs) for theirs, ours in self.pairs]

    def read(self, keys: Iterable[str]) -> tuple[dict[str, str], str | None]:
        """Return our key of each of theirs, and the first one that has none."""
        keys, found = list(keys), {}
        prefix = "backbone." if self.wrapped and any(key.startswith("backbone.") for key in keys) else ""
        for key in keys:
            new = _first(self._readers, key[len(prefix) :]) if key.startswith(prefix) else None
            if new is None and (prefix or not self.wrapped):
                new = _swap_head(key, self.head, CLASSIFIER)
            if new is None:
                return found, key
            found[key] = new
        return found, None

    def write(self, keys: Iterable[str]) -> tuple[dict[str, str], str | None]:
        """Return their key of each of ours, and the first one that has none."""
        keys, found = list(keys), {}
        prefix = "backbone." if self.wrapped and any(key.startswith(CLASSIFIER) for key in keys) else ""
        for key in keys:
            new = _first(self._writers, key)
            new = _swap_head(key, CLASSIFIER, self.head) if new is None else prefix + new
            if new is None:
                return found, key
            found[key] = new
        return found, None


def _swap_head(key: str, old: str, new: str) -> str | None:
    return new + key[len(old) :] if key in (f"{old}weight", f"{old}bias") else None


def _first(translators: list, key: str) -> str | None:
    return next((new for translate in translators if (new := translate(key)) is not None), None)


_FIELD = re.compile(r"\{(\w)(?:\+(\d))?\}")


def _translator(source: str, target: str):
    """Return a function from a key of template ``source`` to the one of ``target``, None for any other key."""
    shifts = {name: int(shift or 0) for name, shift in _FIELD.findall(source)}
    pattern = "".join(
        rf"(?P<{piece}>0|[1-9]\d*)" if index % 3 == 1 else re.escape(piece)
        for index, piece in enumerate(_FIELD.split(source))
        if index % 3 != 2
    )
    compiled = re.compile(pattern + (r"(?P<rest>[a-z_]+)" if source.endswith(".") else ""))

    def translate(key: str) -> str | None:
        match = compiled.fullmatch(key)
        if match is None:
            return None
        numbers = {name: int(match[name]) - shift for name, shift in shifts.items()}
        if min(numbers.values(), default=0) < 0:
            return None
        new = _FIELD.sub(lambda field: str(numbers[field[1]] + int(field[2] or 0)), target)
        return new + match["rest"] if source.endswith(".") else new

    return translate
