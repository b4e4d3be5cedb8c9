"""Write a timm model as a folder that timm.create_model("local-dir:FOLDER") loads after import rep_plugin.

rep-plugin save rep_repvgg_a0 FOLDER --checkpoint output/train/model_best.pth.tar            # EMA weights come first
rep-plugin save rep_repvgg_a0 FOLDER --checkpoint output/train/model_best.pth.tar --merge    # the deployed form
rep-plugin save local-dir:EXPANDED FOLDER --checkpoint model_best.pth.tar --merge --keep-bn  # the stock network again
"""

import argparse
from pathlib import Path

from rep_plugin.commands.models import TIMM, add_timm_arguments, require_packages
from rep_plugin.commands.parser import add_overwrite
from rep_plugin.commands.written import print_written

OUTPUTS = ("config.json", "model.safetensors")
HELP = "write a timm model, trained or merged, as a folder that timm loads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the folder and the form."""
    parser.add_argument("model", metavar="MODEL", help=TIMM)
    parser.add_argument("folder", metavar="FOLDER", help="folder to write: config.json, model.safetensors")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights: what timm's train.py or torch.save wrote, or .safetensors"
    )
    parser.add_argument("--merge", action="store_true", help="merge the blocks and fold BNs first, proven equal")
    parser.add_argument("--keep-bn", action="store_true", help="with --merge: keep the network's own BNs")
    add_overwrite(parser)
    add_timm_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse --keep-bn without --merge."""
    if args.keep_bn and not args.merge:
        args.parser.error("--keep-bn needs --merge")


def run(args: argparse.Namespace) -> None:
    """Load, merge where asked, write."""
    require_packages("save", False)
    from rep_plugin.checkpoints.files import check_writable, refuse_existing
    from rep_plugin.reparam import reparameterize
    from rep_plugin.timm import load_timm, save_timm

    folder = Path(args.folder)
    check_writable(folder)
    refuse_existing(folder, OUTPUTS, args.overwrite)
    model = load_timm(args.model, args.checkpoint, args.pretrained, dict(args.model_args))
    if args.merge:
        model, report = reparameterize(model, fold_bn=not args.keep_bn)
        report.print()
    save_timm(model, folder)
    print_written(folder / name for name in OUTPUTS)
