"""One family of errors: what a user can mend. Messages are one line."""

import difflib
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class RepPluginError(Exception):
    """What every error of ours derives from."""


class ArgumentError(RepPluginError, ValueError):
    """An argument, a flag, a config or a plan does not fit. The message names the value and what was expected."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of another type than expected."""


class MissingPackageError(RepPluginError, ModuleNotFoundError):
    """A package that is needed here is not installed. The message holds the command that installs it."""


class NotMergeableError(RepPluginError, TypeError):
    """A layer is not linear, or computes something else than its class says: it cannot be merged."""


class TrainModeError(RepPluginError, RuntimeError):
    """A model is in train mode: batch statistics cannot be merged."""


class EquivalenceError(RepPluginError, RuntimeError):
    """Two models that must compute the same function do not."""


class InconclusiveWarning(UserWarning):
    """The output hardly depends on the input, so equality proves little (an untrained net can be like that)."""


class ExportError(RepPluginError, RuntimeError):
    """A model cannot be written as ONNX, or a runtime cannot run what was written. The message is one line."""


class UnsafeCheckpointError(RepPluginError, pickle.UnpicklingError):
    """A checkpoint asks for something outside the allow-list; nothing of it was executed."""


class UnreadableCheckpointError(RepPluginError, RuntimeError):
    """A file is torn or is no checkpoint at all."""


class DataError(RepPluginError, RuntimeError):
    """A data set or one of its files is missing, empty or broken. The message is one line."""


class HookError(RepPluginError, ValueError):
    """A hook's settings do not fit the training; the message is one line."""


class TrainingError(RepPluginError, RuntimeError):
    """A training that a tool has started failed. The message names its log."""


class CheckpointMismatchError(RepPluginError, RuntimeError):
    """A checkpoint is not exactly the model's; nothing of it was loaded."""


class TraceError(RepPluginError, RuntimeError):
    """The model cannot be traced: its path depends on values, or leaves torch."""


class NothingToMergeError(RepPluginError, ValueError):
    """A model holds no block that can be merged, and no BN that can be folded: it may be merged already.

    Args:
        message: the first part of the message.
        notes: what was seen and left as it is, one sentence each.
    """

    def __init__(self, message: str, notes: Sequence[str] = ()):
        super().__init__("; ".join((message, *notes)))
        self.notes = list(notes)


class KeyMapError(RepPluginError, ValueError):
    """A checkpoint is of no known layout, of several, or has no counterpart in the wanted one."""


class AnnealError(RepPluginError, RuntimeError):
    """An anneal is not over, cannot begin, or there is nothing to anneal."""


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its class where it has none; of a dataloader worker's traceback the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Original Traceback" not in str(error):
        return lines[0]
    _, found, message = lines[-1].partition(f"{type(error).__name__}: ")
    return message if found else lines[-1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``, did you mean 'NAME'?`` for the nearest known name, '' where none is near; upper case does not count.

    Args:
        word: What was written.
        known: The names that exist.

    Returns:
        The end of a message.

    Example:
        >>> did_you_mean("SDG", ["Adam", "SGD"]), did_you_mean("Ranger", ["Adam", "SGD"])
        (", did you mean 'SGD'?", '')
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f", did you mean {names[near[0]]!r}?" if near else ""


@contextmanager
def exit_on_user_errors() -> Iterator[None]:
    """End a command line tool in one line for what a user can mend; any other error is a bug and keeps its traceback."""
    try:
        yield
    except (RepPluginError, OSError) as error:
        sys.exit(f"error: {first_line(error)}")
