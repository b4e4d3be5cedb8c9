"""Show what a model consists of, and what can be merged, pruned and expanded; the reasons where something cannot.

rep-plugin summary resnet18
rep-plugin summary rep_mbv2_cub
rep-plugin summary local-dir:FOLDER --json
rep-plugin summary work_dirs/mine/pruned.py work_dirs/mine/pruned.pth
"""

import argparse

from rep_plugin.commands.models import ANY, add_any_model_arguments, is_config, open_model, require_packages
from rep_plugin.commands.parser import add_size, read_size

HELP = "show layers and costs of a model, and what can be done to it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, and how it is shown."""
    parser.add_argument("model", metavar="MODEL", help=ANY)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="its weights; not needed")
    add_size(parser, "the model's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_any_model_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Read the size."""
    read_size(args)


def run(args: argparse.Namespace) -> None:
    """Build, run once, print."""
    require_packages("summary", is_config(args.model))
    import torch
    from torch import nn

    from rep_plugin.summary import summarize

    model, _, size = open_model(args)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    found = summarize(model, torch.zeros(1, channels, *(args.size or size)))
    if args.json:
        print(found.to_json())
    else:
        found.print()
