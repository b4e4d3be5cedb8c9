"""Checkpoint files that cannot run code when read and are never left half-written when saved.

mmengine's training checkpoints hold ``HistoryBuffer`` objects, which ``torch.load(weights_only=True)`` refuses. They
are read here with an allow-list of our own, checked at every call, never with the normal pickle module.
"""
# torch.serialization.safe_globals does not do: torch's unpickler reads protocol 2 alone, lets BUILD set any state of arrays
# and dtypes, and its allow-list belongs to the whole process, so that other threads would read with it.

import functools
import importlib
import os
import pickle
import sys
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch._weights_only_unpickler import _get_allowed_globals

from rep_plugin.arguments import checked
from rep_plugin.checkpoints.plain import require_bounded
from rep_plugin.errors import UnreadableCheckpointError, UnsafeCheckpointError, first_line

HISTORY_BUFFER_MODULE = "mmengine.logging.history_buffer"
# The methods mmengine registers by default: the only attributes a checkpoint may ask for by name.
STATISTICS_METHODS = frozenset({"min", "max", "mean", "current"})
# (module, class) -> the methods a checkpoint may name: mmengine's OneCycle schedulers keep their annealing function.
NAMED_METHODS = {
    (HISTORY_BUFFER_MODULE, "HistoryBuffer"): STATISTICS_METHODS,
    ("mmengine.optim.scheduler.param_scheduler", "OneCycleParamScheduler"): frozenset(
        {"_annealing_cos", "_annealing_linear"}
    ),
}
HISTORY_BUFFER_STATE = frozenset({"max_length", "_log_history", "_count_history", "statistics_methods"})
NUMERIC_KINDS = "biufc"
REFUSED = ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")


def _history_buffer() -> type:
    """Imported only when a pickle asks for it, so that this module works without mmengine."""
    return importlib.import_module(HISTORY_BUFFER_MODULE).HistoryBuffer


def _named_method(owner: Any, name: Any) -> Callable:
    """Stand-in for ``getattr``: pickles name the methods of HistoryBuffer and of OneCycle schedulers through it."""
    for (module, kind), methods in NAMED_METHODS.items():
        loaded = sys.modules.get(module)  # find_class has imported it where the pickle named the class
        if loaded is not None and owner is getattr(loaded, kind) and isinstance(name, str) and name in methods:
            return getattr(owner, name)
    allowed = ", ".join(
        f"{kind}.{method}" for (_, kind), methods in NAMED_METHODS.items() for method in sorted(methods)
    )
    raise UnsafeCheckpointError(f"refused getattr of {name!r} on {_describe(owner)}, expected one of {allowed}")


def _plain_dtype(spec: Any, align: bool = False, copy: bool = False) -> np.dtype:
    """Stand-in for ``numpy.dtype``: numbers only, since object and structured dtypes carry pickles of their own."""
    dtype = np.dtype(spec) if isinstance(spec, str) else None
    if dtype is None or dtype.kind not in NUMERIC_KINDS:
        raise UnsafeCheckpointError(f"refused numpy dtype {spec!r}, expected a number type")
    return dtype


def _empty_array(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    """Stand-in for numpy's ``_reconstruct``; the content follows in the BUILD step."""
    if kind is not np.ndarray:
        raise UnsafeCheckpointError(f"refused array type {_describe(kind)}, expected numpy.ndarray")
    return np.ndarray((0,), dtype="b")


def _scalar(dtype: Any, data: Any) -> np.generic:
    """Stand-in for numpy's ``scalar``."""
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise UnsafeCheckpointError(f"refused numpy scalar of {dtype!r}, expected a number with its bytes")
    return np.frombuffer(data, dtype)[0]


def _rebuild_from_type(function: Any, kind: Any, arguments: tuple, state: Any) -> torch.Tensor:
    """Stand-in for torch's, which would call any ``function`` on the stack and ``__setstate__`` of any class."""
    if id(function) not in _torch_callables() or not (isinstance(kind, type) and issubclass(kind, torch.Tensor)):
        raise UnsafeCheckpointError(f"refused rebuild of {_describe(kind)}, expected a tensor")
    return torch._tensor._rebuild_from_type_v2(function, kind, arguments, state)


STAND_INS = {
    "builtins.getattr": _named_method,
    "numpy.dtype": _plain_dtype,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
} | {
    f"numpy.{core}.multiarray.{name}": function
    for core in ("core", "_core")
    for name, function in (("_reconstruct", _empty_array), ("scalar", _scalar))
}


@functools.cache
def _torch_callables() -> frozenset[int]:
    return frozenset(id(value) for name, value in _get_allowed_globals().items() if name not in STAND_INS)


def _describe(value: Any) -> str:
    if isinstance(value, type) or callable(value):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return f"{type(value).__module__}.{type(value).__qualname__} object"


_PythonUnpickler: Any = pickle._Unpickler  # its stack is in no type stub


class _RestrictedUnpickler(_PythonUnpickler):
    """Unpickler whose lookups, calls, object creations and state settings all go through the allow-list.

    The pure Python class is used because the C one lets a subclass guard ``find_class`` only: BUILD could then still
    overwrite attributes of torch's own functions.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        path = f"{module}.{name}"
        if path in STAND_INS:
            return STAND_INS[path]
        if path in _get_allowed_globals():
            return _get_allowed_globals()[path]
        if path == "numpy.ndarray":
            return np.ndarray
        kind, _, method = name.partition(".")  # pickle protocol 4 and later name a method by its dotted path
        if (module, kind) in NAMED_METHODS:
            owner = getattr(importlib.import_module(module), kind)
            return _named_method(owner, method) if method else owner
        raise UnsafeCheckpointError(f"refused global {path!r}, which is not in the allow-list")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if id(function) not in _torch_callables() and not any(function is known for known in STAND_INS.values()):
            raise UnsafeCheckpointError(f"refused call of {_describe(function)}, which is not in the allow-list")
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack[-1]
        is_buffer = isinstance(kind, type) and kind.__module__ == HISTORY_BUFFER_MODULE and not arguments
        if not isinstance(kind, type) or not (is_buffer or id(kind) in _torch_callables()):
            raise UnsafeCheckpointError(f"refused new object of {_describe(kind)}, which is not in the allow-list")
        self.stack[-1] = kind.__new__(kind, *arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is torch.Tensor:
            target.set_(*state)
        elif type(target) is torch.nn.Parameter:
            target.__setstate__(state)
        elif type(target) is OrderedDict:
            target.__dict__.update(state)
        elif type(target) is np.ndarray:
            if not isinstance(state[2], np.dtype):
                raise UnsafeCheckpointError("refused array state, expected a number type")
            target.__setstate__(state)
        elif isinstance(target, np.dtype):
            # A native number type is complete as made, so that its state only needs to be checked.
            native = ("|", "=", "<" if sys.byteorder == "little" else ">")
            if state[1] not in native or tuple(state[2:]) != (None, None, None, -1, -1, 0):
                raise UnsafeCheckpointError(f"refused numpy dtype state {state!r}, expected a native number type")
        elif type(target).__module__ == HISTORY_BUFFER_MODULE:
            _check_history_state(state)
            target.__setstate__(state)
        else:
            raise UnsafeCheckpointError(f"refused state of {_describe(target)}, which is not in the allow-list")

    def load_binpersid(self) -> None:
        key = self.stack.pop()
        if not (isinstance(key, int) or (isinstance(key, tuple) and key and key[0] in ("storage", b"storage"))):
            raise UnsafeCheckpointError(f"refused persistent object {key!r}, expected a tensor storage")
        self.append(self.persistent_load(key))

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._expect(list)
        self.stack[-1].extend(items)

    def load_append(self) -> None:
        item = self.stack.pop()
        self._expect(list)
        self.stack[-1].append(item)

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._expect(set)
        self.stack[-1].update(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._expect(dict, OrderedDict, Counter)
        self.stack[-1][key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._expect(dict, OrderedDict, Counter)
        for i in range(0, len(items), 2):
            self.stack[-1][items[i]] = items[i + 1]

    def _expect(self, *kinds: type) -> None:
        if type(self.stack[-1]) not in kinds:
            raise UnsafeCheckpointError(f"refused filling of {_describe(self.stack[-1])}, expected {kinds[0].__name__}")

    def load_refused(self) -> None:
        raise UnsafeCheckpointError("refused a pickle instruction which no checkpoint needs")

    dispatch = {
        **_PythonUnpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        **dict.fromkeys((getattr(pickle, name)[0] for name in REFUSED), load_refused),
    }


def _check_history_state(state: Any) -> None:
    """HistoryBuffer merges ``statistics_methods`` into a table shared by all buffers: only its own may enter."""
    if not isinstance(state, dict) or not set(state) <= HISTORY_BUFFER_STATE:
        raise UnsafeCheckpointError(f"refused HistoryBuffer state, expected only {sorted(HISTORY_BUFFER_STATE)}")
    for name, method in state.get("statistics_methods", {}).items():
        if method is not _named_method(_history_buffer(), name):
            raise UnsafeCheckpointError(f"refused HistoryBuffer statistics method {name!r}, which is not its own")


def _restricted_load(file: BinaryIO, **options: Any) -> Any:
    return _RestrictedUnpickler(file, **options).load()


_restricted_pickle = types.SimpleNamespace(
    __name__="rep_plugin.checkpoints.safe_load",
    Unpickler=_RestrictedUnpickler,
    UnpicklingError=pickle.UnpicklingError,
    load=_restricted_load,
)


def _check_archive(file: Any) -> None:
    """Look at a zip file's directory and checksums, which torch does not do. torch.save compresses nothing."""
    start = file.tell() if hasattr(file, "tell") else 0
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            size = archive.fp.seek(0, os.SEEK_END)
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise UnsafeCheckpointError(
                    "refused an archive with compressed parts, expected a file written by torch.save"
                )
            if sum(part.file_size for part in parts) > size:
                raise UnreadableCheckpointError("its parts are larger than the file")
            if (damaged := archive.testzip()) is not None:
                raise UnreadableCheckpointError(f"wrong checksum of {damaged}")
    if hasattr(file, "seek"):
        file.seek(start)


Place = torch.device | str | Mapping | Callable | None


@checked
def load_checkpoint_file(path: str | os.PathLike | BinaryIO, map_location: Place = "cpu") -> Any:
    """Read a checkpoint written by ``torch.save`` without ever running code from it.

    A file that ``weights_only=True`` refuses is read once more with an allow-list that adds numpy arrays of numbers and
    mmengine's HistoryBuffer.

    Args:
        path: a file, or a seekable binary file object.
        map_location: where tensors go, as for ``torch.load``.

    Returns:
        The content.

    Raises:
        FileNotFoundError: ``path`` is no file.
        UnsafeCheckpointError: the file asks for a global, call or state outside the allow-list.
        UnreadableCheckpointError: the file is torn, or is no checkpoint.

    Example:
        >>> torch.save({"epoch": 3}, "checkpoint.pth")
        >>> load_checkpoint_file("checkpoint.pth")
        {'epoch': 3}
    """
    is_stream = hasattr(path, "read")
    label = getattr(path, "name", "checkpoint stream") if is_stream else os.fspath(path)
    if not is_stream and not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {label} is missing, expected a file")
    try:
        _check_archive(path)
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            # Only this error: TorchScript and tar archives raise others, and no second reading may reach them.
            if is_stream:
                path.seek(0)
            content = torch.load(
                path, map_location=map_location, pickle_module=_restricted_pickle, weights_only=False, mmap=False
            )
        require_bounded(content, storage_needed="meta" not in str(map_location))
        return content
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"checkpoint {label}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # a torn file may raise anything, OSError without a name (EINVAL) included
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if "weights_only" in str(error):
            raise UnsafeCheckpointError(
                f"checkpoint {label}: refused a TorchScript or tar archive, expected a file written by torch.save"
            ) from None
        raise UnreadableCheckpointError(
            f"checkpoint {label} is not readable ({first_line(error)}), expected a complete file written by torch.save"
        ) from None


def load_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.safetensors`` file.

    Args:
        path: the file.

    Returns:
        Name -> tensor.

    Raises:
        FileNotFoundError: ``path`` is no file.
        UnreadableCheckpointError: the file is torn, or is none of safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist, expected the weights of a model")
    try:
        return load_file(path)
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a number type that torch has not
        raise UnreadableCheckpointError(
            f"checkpoint {os.fspath(path)} is not readable ({first_line(error)}), expected a complete file of safetensors"
        ) from None
