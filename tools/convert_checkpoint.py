#!/usr/bin/env python
"""Convert a RepVGG, MobileOne or RepLKNet checkpoint between the authors', timm's, mmpretrain's and our keys.

The keys of IN show its format: training or merged form, with or without a classifier. Files are .safetensors or what
torch.save writes.
"""

import argparse

from rep_plugin.conversion.convert import convert_file
from rep_plugin.conversion.key_maps import FORMATS
from rep_plugin.errors import exit_on_user_errors


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="IN", help="checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="file to write: .safetensors, or .pth")
    parser.add_argument(
        "--to",
        default="rep_plugin",
        choices=FORMATS,
        help="rep_plugin: our plain backbones and timm names; rep_plugin_mm: our types in an ImageClassifier",
    )
    parser.add_argument("--arch", help="A0, s0, 31B ...: must be that one; any: need not be a published one, nor whole")
    return parser.parse_args()


def main() -> None:
    """Convert, print the report."""
    args = parse_args()
    with exit_on_user_errors():
        print(convert_file(args.source, args.target, args.to, args.arch))
        print(f"written: {args.target}")


if __name__ == "__main__":
    main()
