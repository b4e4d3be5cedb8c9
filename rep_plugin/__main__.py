"""The console command ``rep-plugin``, also ``python -m rep_plugin`` and ``torchrun -m rep_plugin``."""

import os
import re
import sys
import warnings
from contextlib import nullcontext
from importlib import import_module

from rep_plugin.commands import COMMANDS, LIGHT
from rep_plugin.commands.parser import Parser
from rep_plugin.errors import exit_on_user_errors
from rep_plugin.version import __version__

# What mmengine and mmcv warn of on every start, and a user cannot change: the pinned setuptools, and the operators that
# mmcv-lite does not have.
NOISE = ("pkg_resources is deprecated as an API", "Fail to import ``MultiScaleDeformableAttention``")


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="rep-plugin", description="Structural re-parameterization and channel pruning of networks.")
    parser.add_argument("--version", action="version", version=f"rep-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"rep_plugin.commands.{name}")
        own = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(own)
        own.set_defaults(module=module, parser=own)
    return parser


def _require_file(checkpoint: str | None) -> None:
    """Say that a checkpoint is missing before seconds are spent on imports; a training form may be a folder (deepspeed)."""
    if isinstance(checkpoint, str) and "://" not in checkpoint and not os.path.exists(os.path.expanduser(checkpoint)):
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist, expected a file")


def main(argv: list[str] | None = None) -> None:
    """Run the command of a command line, ``sys.argv[1:]`` by default. What a user can mend ends in one line."""
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if not words:
        parser.print_help()
        sys.exit(2)
    if words[0].endswith(".py"):
        more = " ..." if words[1:] else ""
        parser.error(f"{words[0]} is no command: to run a script write 'rep-plugin script {words[0]}{more}'")
    args = parser.parse_args(words)
    if check := getattr(args.module, "check_arguments", None):
        check(args)
    for message in NOISE:
        warnings.filterwarnings("ignore", re.escape(message))
    # A script's errors are its own: they keep their traceback.
    with nullcontext() if args.command == "script" else exit_on_user_errors():
        if args.command not in LIGHT:
            _require_file(getattr(args, "checkpoint", None))
            import_module("rep_plugin.face")  # timm must know our names, also where a config alone names them
        try:
            args.module.run(args)
        except KeyboardInterrupt:
            if args.command == "script":
                raise
            print(f"error: rep-plugin {args.command} was interrupted", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
