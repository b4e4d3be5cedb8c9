"""Put blocks of several branches in the place of a network's convolutions: the same function, which trains better.

rep-plugin expand CONFIG CHECKPOINT --block dbb                  # expanded.pth and expanded.py, which trains on
rep-plugin expand resnet18 --pretrained --out-dir expanded      # a folder for timm.create_model("local-dir:expanded")
rep-plugin expand resnet18 model_best.pth.tar --where 'layer4*' --out-dir expanded

After training, rep-plugin reparameterize (of a timm model: rep-plugin save --merge) gives the network back.
"""

import argparse
from pathlib import Path

from rep_plugin.commands.models import ANY, add_any_model_arguments, is_config, open_model, require_packages
from rep_plugin.commands.parser import add_overwrite
from rep_plugin.commands.written import print_written

HELP = "turn convolutions into blocks of several branches"
TIMM_OUTPUTS = ("config.json", "model.safetensors")
OUTPUTS = ("expanded.pth", "expanded.py", "expanded.json")
BLOCKS = ("dbb", "acb", "rep", "repvgg", "mobileone")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the block and where it goes."""
    parser.add_argument("model", metavar="MODEL", help=ANY)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="its weights; needed with a config")
    parser.add_argument("--block", default="dbb", choices=BLOCKS, help="what to put there; default: %(default)s")
    parser.add_argument(
        "--where", nargs="+", metavar="PATTERN", help="names of convolutions, as 'layer4*'; default: all that can be"
    )
    parser.add_argument(
        "--out-dir", metavar="FOLDER", help="folder for the files; default with a config: the checkpoint's"
    )
    add_overwrite(parser)
    add_any_model_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go with the model."""
    if is_config(args.model):
        if args.checkpoint is None:
            args.parser.error(f"the config {args.model} needs a CHECKPOINT after it, the weights to expand")
    elif args.out_dir is None:
        args.parser.error(f"{args.model} needs --out-dir, the folder to write")


def run(args: argparse.Namespace) -> None:
    """Load, expand, prove, write, print the report."""
    require_packages("expand", is_config(args.model))
    if is_config(args.model):
        from rep_plugin.openmmlab.artefacts import write_expanded
        from rep_plugin.openmmlab.cli import output_folder, session

        args.config = args.model
        with session():
            out_dir = output_folder(args, OUTPUTS)
            model, cfg, _ = open_model(args)
            report = write_expanded(model, cfg, args.block, args.where, out_dir)
        names = OUTPUTS
    else:
        from rep_plugin.checkpoints.files import check_writable, refuse_existing
        from rep_plugin.reparam import expand
        from rep_plugin.timm import save_timm

        out_dir = Path(args.out_dir)
        check_writable(out_dir)
        refuse_existing(out_dir, TIMM_OUTPUTS, args.overwrite)
        expanded, report = expand(open_model(args)[0], args.block, where=args.where)
        save_timm(expanded, out_dir)
        names = TIMM_OUTPUTS
    report.print()
    print_written(out_dir / name for name in names)
