"""List the shipped configs, which the other commands take by these names.

rep-plugin configs
rep-plugin configs 'rep_mbv2*' --paths
"""

import argparse

from rep_plugin.errors import ArgumentError
from rep_plugin.shipped import find_config, list_configs

HELP = "list the shipped configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the filter."""
    parser.add_argument("filter", nargs="*", metavar="FILTER", help="wildcards in quotes, as 'rep_mbv2*'; default: all")
    parser.add_argument("--paths", action="store_true", help="print the files, to read or to copy")


def run(args: argparse.Namespace) -> None:
    """Print one name a line."""
    names = list_configs(args.filter or "")
    if not names:
        raise ArgumentError(
            f"no shipped config is named {' or '.join(args.filter)}, expected a wildcard as 'rep_mbv2*'"
        )
    print(*[find_config(name) if args.paths else name for name in names], sep="\n")
