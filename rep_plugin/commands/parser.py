"""argparse with "did you mean", and the arguments that several commands share."""

import argparse
from collections.abc import Callable
from contextlib import suppress

from rep_plugin.arguments import NUMBERS, In
from rep_plugin.errors import did_you_mean

MOST = 1_000_000


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest option or choice, and keeps the line breaks of its description."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})

    def parse_known_args(self, args=None, namespace=None):
        """Parse, and refuse what is left over: a command's own parser knows its options, the one above it does not."""
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            known = [option for action in self._actions for option in action.option_strings]
            options = [word for word in left if word.startswith("-")]
            hint = did_you_mean(options[0].partition("=")[0], known) if options else ""
            self.error(f"unrecognized arguments: {' '.join(left)}{hint}")
        return namespace, left

    def _get_value(self, action, arg_string):
        if not arg_string and action.nargs not in (
            argparse.REMAINDER,
            argparse.PARSER,
        ):  # of a variable of the shell that is not set
            raise argparse.ArgumentError(action, "expected a value, got ''")
        return super()._get_value(action, arg_string)

    def _check_value(self, action, value) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), map(str, action.choices))
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint} (choose from {known})")


def count(text: str, most: int = MOST) -> int:
    """Read a whole number from 1 to a million: more is a slip, and would take for ever.

    Args:
        text: the number.
        most: the largest.

    Returns:
        The number.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(
            f"expected a whole number {'>= 1' if number < 1 else f'<= {most}'}, got {text!r}"
        )
    return number


def amount(text: str) -> int | float:
    """A share with a point in it (0.5), or a whole number (300000000, 3e8)."""
    for kind in (int, float):
        with suppress(ValueError):
            if (value := kind(text)) in In("(0, inf)"):
                return value
    raise argparse.ArgumentTypeError(f"expected a share (0.5) or a whole number, got {text!r}")


def side(text: str) -> int:
    """Height or width of an image: more than 8192 pixels is a slip, and would fill the memory."""
    return count(text, 8192)


def add_size(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add ``--size``; :func:`read_size` reads it.

    Args:
        parser: the parser.
        default: in words, for the help.
    """
    more = f"; default: {default}" if default else ""
    parser.add_argument(
        "--size", type=side, nargs="+", metavar="N", help=f"height and width, one number for both{more}"
    )


def read_size(args: argparse.Namespace) -> None:
    """Make a pair of ``--size``, or None. Of more than two numbers the parser tells."""
    if args.size is not None and len(args.size) > 2:
        args.parser.error(f"--size takes one or two numbers, got {args.size}")
    args.size = tuple(args.size * 2)[:2] if args.size else None


def key_value(text: str) -> str:
    """KEY=VALUE, the key of a config."""
    key, found, _ = text.partition("=")
    if not found or not all(part and not set(part) & set(" \t[](){},'\"") for part in key.split(".")):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


def number_in(interval: str, kind: type = float) -> Callable[[str], float]:
    """Return what reads a number of a range.

    Args:
        interval: ends as mathematics writes them, ``[0, 1)``.
        kind: int or float.

    Returns:
        A type for :mod:`argparse`.
    """
    allowed = In(interval)

    def number(text: str) -> float:
        with suppress(ValueError):
            if (value := kind(text)) in allowed:
                return value
        raise argparse.ArgumentTypeError(f"expected a {NUMBERS[kind]}{allowed}, got {text!r}")

    return number


def add_trained_arguments(parser: argparse.ArgumentParser, no_real_data: str, optional: str | None = None) -> None:
    """Add the arguments of a command that reads a trained checkpoint and writes what it makes of it.

    Args:
        parser: the command's.
        no_real_data: the help of that flag.
        optional: when the checkpoint may be left out.
    """
    parser.add_argument(
        "config", metavar="CONFIG", help="config the checkpoint was trained with, or the name of a shipped one"
    )
    needed, nargs = (f"; none {optional}", "?") if optional else ("", None)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs=nargs, help=f"trained checkpoint{needed}")
    parser.add_argument("--out-dir", metavar="FOLDER", help="folder for the files; default: the checkpoint's")
    add_overwrite(parser)
    parser.add_argument("--no-real-data", action="store_true", help=no_real_data)
    add_cfg_options(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``: without it, files whose names the user did not choose are not replaced."""
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in that folder")


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share."""
    parser.add_argument(
        "config", metavar="CONFIG", help="config file, or the name of a shipped one (rep_mbv2_mini_cub)"
    )
    parser.add_argument(
        "--work-dir", metavar="FOLDER", help="folder for logs and results; default: work_dirs/<name of the config>"
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision (bfloat16 on the CPU)")
    parser.add_argument("--no-pin-memory", action="store_true", help="set pin_memory=False in the dataloaders")
    add_cfg_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes; default: %(default)s",
    )
    # torch.distributed.launch passes the spelling with a hyphen.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_cfg_options(parser: argparse.ArgumentParser, name: str = "--cfg-options", what: str = "the config") -> None:
    """Add ``--cfg-options KEY=VALUE ...``; what it collects is for :func:`rep_plugin.openmmlab.cli.parse_options`.

    Args:
        parser: the command's, or a group of it.
        name: the option.
        what: what it changes, for its help.
    """
    parser.add_argument(
        name,
        nargs="+",
        type=key_value,
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f'changes to {what}; lists as key="[a,b]" or key=a,b, in quotes and without blanks',
    )
