"""Data from files of others: JSON of the expected types, and checkpoints whose content can be walked through."""

import json
import math
import os
import types
import typing
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rep_plugin.errors import ArgumentError, UnreadableCheckpointError, first_line

MOST_BYTES = 2**28  # of JSON
# References make 2^40 values of a file of 1 KB. Real checkpoints hold up to 10^5, 10 levels deep.
MOST_VALUES, MOST_LEVELS, MOST_BITS = 10**7, 100, 1024
MOST_REPEATED = 10**8  # values of a tensor whose storage is smaller


def read_json(path: str | os.PathLike) -> Any:
    """Return the data of a JSON file. Raises ArgumentError, naming it, for what is no JSON, FileNotFoundError without one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected a file")
    if not path.is_file():
        raise ArgumentError(f"{path} is no regular file, expected JSON")
    if path.stat().st_size > MOST_BYTES:
        raise ArgumentError(f"{path} has {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse a JSON text.

    Args:
        text: the text.
        source: what holds it, for the message.

    Returns:
        The data.

    Raises:
        ArgumentError: it is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ArgumentError(f"{source} is not JSON that can be read: it nests too deeply") from None
    except ValueError as error:  # also bytes that are no text, and integers of thousands of digits
        raise ArgumentError(f"{source} is not JSON: {first_line(error)}") from None


def fits(value: object, kind: Any) -> bool:
    """Return whether plain data is of an annotated type.

    Args:
        value: the data.
        kind: an annotation of numbers, texts, sequences, mappings and unions; a bool is no int, an int is a float.

    Returns:
        Whether it is.

    Example:
        >>> fits({"conv": [1, 2]}, dict[str, tuple[int, ...]]), fits({"conv": 3}, dict[str, tuple[int, ...]])
        (True, False)
    """
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in arguments)
    if origin in (int, float, types.NoneType):
        return value is None if origin is types.NoneType else fits_number(value, origin)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(fits(one, each) for one, each in zip(value, arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        pair = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, pair[0]) and fits(v, pair[1]) for k, v in value.items())
    if isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
        return isinstance(value, (list, tuple)) and all(fits(one, (arguments or (Any,))[0]) for one in value)
    return isinstance(value, origin)


def fits_number(value: object, kind: type) -> bool:
    """Return whether a value is a finite number of 64 bits. A bool is none, an integer is a float.

    Args:
        value: the value.
        kind: int or float.

    Returns:
        Whether it is.
    """
    if isinstance(value, bool) or not isinstance(value, (int,) if kind is int else (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def require_fields(data: object, fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return data that is a dict of exactly these fields.

    Args:
        data: the data.
        fields: name -> its annotation.
        source: what holds it, for the message.

    Returns:
        The data.

    Raises:
        ArgumentError: a field is missing, unknown or of another type.

    Example:
        >>> require_fields({"rounds": 3}, {"rounds": int}, "plan.json")
        {'rounds': 3}
    """
    if not isinstance(data, dict) or set(data) != set(fields):
        odd = sorted(set(map(str, data)) ^ set(fields)) if isinstance(data, dict) else type(data).__name__
        raise ArgumentError(f"{source}: missing or unknown {odd}")
    for name, kind in fields.items():
        if not fits(data[name], kind):
            expected = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else kind
            raise ArgumentError(f"{source}: {name} is {short(data[name])}, expected {expected}")
    return data


def short(value: object, most: int = 60) -> str:
    """Return a value for a message, cut; of a large one only its type and size.

    Args:
        value: the value.
        most: letters of the text.

    Returns:
        One line.
    """
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value) if isinstance(value, (str, int, float, bool, types.NoneType)) else type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def require_bounded(content: object, storage_needed: bool = True) -> None:
    """Refuse what no loop over a checkpoint's content gets through, or what shadows the methods of its dicts.

    Args:
        content: what a checkpoint holds.
        storage_needed: a tensor without data is refused.

    Raises:
        UnreadableCheckpointError: with the reason.

    Example:
        >>> require_bounded({"state_dict": {"weight": torch.zeros(3)}})
    """
    known: dict[int, tuple[int, int]] = {}  # id -> values inside, levels inside
    open_ids: set[int] = set()

    def measure(node: Any, depth: int) -> tuple[int, int]:
        if isinstance(node, Tensor):
            _require_data(node, storage_needed)
            return 1, 0
        if isinstance(node, int) and node.bit_length() > MOST_BITS:
            raise UnreadableCheckpointError(f"it holds {short(node)}")
        if isinstance(node, dict):
            parts = [*node.keys(), *node.values()]
            if isinstance(node, OrderedDict) and (own := node.__dict__):
                if set(own) != {"_metadata"}:
                    raise UnreadableCheckpointError(f"a dict has the attributes {sorted(map(str, own))[:3]}")
                parts.append(own["_metadata"])
        elif isinstance(node, (list, tuple, set, frozenset)):
            parts = list(node)
        else:
            return 1, 0
        if id(node) in known:
            return known[id(node)]
        if id(node) in open_ids or depth > MOST_LEVELS:
            raise UnreadableCheckpointError(f"its values nest more than {MOST_LEVELS} levels deep")
        open_ids.add(id(node))
        inside = [measure(part, depth + 1) for part in parts]
        open_ids.discard(id(node))
        values, levels = 1 + sum(count for count, _ in inside), 1 + max((level for _, level in inside), default=0)
        if levels > MOST_LEVELS:
            raise UnreadableCheckpointError(f"its values nest more than {MOST_LEVELS} levels deep")
        if values > MOST_VALUES:
            raise UnreadableCheckpointError(f"it holds more than {MOST_VALUES:,} values")
        known[id(node)] = values, levels
        return values, levels

    measure(content, 0)


def _require_data(tensor: Tensor, storage_needed: bool) -> None:
    if tensor.device.type == "meta":
        if storage_needed:
            raise UnreadableCheckpointError("a tensor has no data")
        return
    if tensor.layout is not torch.strided or tensor.numel() <= MOST_REPEATED:
        return
    if (size := tensor.numel() * tensor.element_size()) > (there := tensor.untyped_storage().nbytes()):
        raise UnreadableCheckpointError(f"a tensor of {size:,} bytes has {there:,} bytes of data")
