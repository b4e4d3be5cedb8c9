"""Run a script with our names registered in timm.

rep-plugin script train.py IMAGES --model rep_mobilenetv2_050
rep-plugin script make_mini_fgvc.py --out data/mini_cub    # a shipped one
torchrun --nproc-per-node 2 -m rep_plugin script train.py IMAGES --model rep_mobilenetv2_050

timm's own train.py and validate.py (in its repository, not in its package) have no flag that imports another package.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

from rep_plugin.errors import ArgumentError
from rep_plugin.shipped import find_script

HELP = "run a script, as timm's train.py, with our names known to timm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the script and its arguments."""
    parser.add_argument("file", metavar="FILE", help="the script, as timm's train.py, or the name of a shipped one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, as they are")


def check_arguments(args: argparse.Namespace) -> None:
    """Find the script, or refuse it."""
    if not os.path.isfile(args.file):
        try:
            args.file = str(find_script(args.file))
        except ArgumentError as error:
            args.parser.error(f"{error} (timm's train.py and validate.py are in its repository, not in its package)")


def run(args: argparse.Namespace) -> None:
    """Run the script as Python would."""
    sys.argv = [args.file, *args.arguments]
    sys.path[0] = str(Path(args.file).resolve().parent)
    runpy.run_path(args.file, run_name="__main__")
