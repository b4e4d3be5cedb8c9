"""Data from files of others: JSON of the expected types, and checkpoints whose content can be walked through."""

import json
import os
import typing
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rep_plugin.arguments import MOST_BITS, fits, shown
from rep_plugin.errors import ArgumentError, UnreadableCheckpointError, first_line

MOST_BYTES = 2**28  # of JSON
# References make 2^40 values of a file of 1 KB. Real checkpoints hold up to 10^5, 10 levels deep.
MOST_VALUES, MOST_LEVELS = 10**7, 100
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


def read_json_source(source: str | Path) -> tuple[Any, str]:
    """Read JSON that is given as its text, an object in braces, or as the path of its file.

    Args:
        source: the text or the path.

    Returns:
        The data, and what holds it, for messages.

    Raises:
        ArgumentError: it is no JSON.
        FileNotFoundError: there is no such file.
    """
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    what = "source, a plan as text," if is_text else str(source)
    return parse_json(source, what) if is_text else read_json(source), what


def tuples_of(value: Any) -> Any:
    """Return data of JSON with tuples in the place of its lists."""
    if isinstance(value, dict):
        return {key: tuples_of(item) for key, item in value.items()}
    return tuple(map(tuples_of, value)) if isinstance(value, list) else value


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
            raise ArgumentError(f"{source}: {name} is {shown(data[name])}, expected {expected}")
    return data


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
            raise UnreadableCheckpointError(f"it holds {shown(node)}")
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
