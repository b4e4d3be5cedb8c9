"""Convert a RepVGG, MobileOne or RepLKNet checkpoint between the authors', timm's, mmpretrain's and our keys.

rep-plugin convert RepVGG-A0-train.pth a0.safetensors                # for rep_repvgg_a0
rep-plugin convert RepVGG-A0-train.pth a0_mm.pth --to rep_plugin_mm  # for mmpretrain configs

The keys of IN show its format: training or merged form, with or without a classifier. Files are .safetensors or what
torch.save writes.
"""

import argparse

from rep_plugin.commands.written import print_written

HELP = "convert a checkpoint between the keys of several projects"
FORMATS = ("rep_plugin", "rep_plugin_mm", "official", "timm", "mmpretrain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the format."""
    parser.add_argument("source", metavar="IN", help="checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="file to write: .safetensors, or .pth")
    parser.add_argument(
        "--to",
        default="rep_plugin",
        choices=FORMATS,
        help="rep_plugin: our plain backbones and timm names; rep_plugin_mm: our types in an ImageClassifier; default: "
        "%(default)s",
    )
    parser.add_argument("--arch", help="A0, s0, 31B ...: must be that one; any: need not be a published one, nor whole")


def run(args: argparse.Namespace) -> None:
    """Convert, print the report."""
    from rep_plugin.conversion.convert import convert_file

    print(convert_file(args.source, args.target, args.to, args.arch))
    print_written([args.target])
