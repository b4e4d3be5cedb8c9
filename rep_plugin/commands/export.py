"""Write a trained model as ONNX, once ONNX Runtime and OpenVINO give the same as PyTorch on images.

rep-plugin export CONFIG CHECKPOINT OUT.onnx                   # also deploy.py deploy.pth, pruned.py pruned.pth
rep-plugin export rep_repvgg_a0 OUT.onnx --checkpoint last.pth.tar --images FOLDER
rep-plugin export local-dir:FOLDER OUT.onnx --images FOLDER    # what save_timm wrote
rep-plugin export CONFIG CHECKPOINT OUT.onnx --int8            # quantised, judged on images that it has not seen

Branches are merged first, and the outputs are logits, without softmax. A config's validation images are compared, or
those of --images; a timm model without --images is compared on random ones. The report is written to OUT.onnx.json and .html.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rep_plugin.commands.models import ANY, add_timm_arguments, is_config, require_packages
from rep_plugin.commands.parser import add_cfg_options, add_size, count, number_in, read_size
from rep_plugin.commands.written import print_written

if TYPE_CHECKING:
    from rep_plugin.measure.report import Report

HELP = "write a trained model as ONNX, compared in its runtimes first"
OPSET, TOLERANCE, RUNTIMES = 18, 1e-4, ("onnxruntime", "openvino")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the file, and how they are compared."""
    parser.add_argument("model", metavar="MODEL", help=ANY)
    parser.add_argument("files", nargs="+", metavar="FILE", help="[CHECKPOINT, after a config] OUT.onnx")
    parser.add_argument("--images", metavar="FOLDER", help="images to compare on")
    add_size(parser)
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width open")
    numbers = parser.add_mutually_exclusive_group()
    numbers.add_argument("--batch", type=count, help="fix the number of images; default: open")
    numbers.add_argument("--dynamic-batch", action="store_true", help="leave the number of images open: the default")
    parser.add_argument("--as-it-stands", action="store_true", help="do not merge or fold anything")
    parser.add_argument("--class-names", metavar="FILE", help="one name a line; default: those of the config or model")
    parser.add_argument("--opset", type=count, default=OPSET, help="default: %(default)s")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        default=list(RUNTIMES),
        choices=RUNTIMES,
        help="where to compare; default: both. With --int8 one, where it is judged and timed; default: onnxruntime",
    )
    parser.add_argument(
        "--tolerance", type=number_in("(0, inf)"), default=TOLERANCE, help="relative, default: %(default)s"
    )
    parser.add_argument(
        "--rounds", type=number_in("[0, inf)", int), default=20, help="timed calls, 0: none; default: %(default)s"
    )
    int8 = parser.add_argument_group("int8")
    int8.add_argument("--int8", action="store_true", help="quantise, by the config's validation images or --images")
    int8.add_argument("--int8-images", type=count, default=256, metavar="N", help="at most; default: %(default)s")
    int8.add_argument(
        "--keep-float", type=count, default=0, metavar="K", help="the K layers that cost most stay in float"
    )
    int8.add_argument(
        "--min-agreement",
        type=number_in("[0, 1]"),
        metavar="SHARE",
        help="of the held-out images that must be classified as in float, or nothing is written; default: 0.9",
    )
    mm = parser.add_argument_group("with a config")
    mm.add_argument("--no-real-data", action="store_true", help="compare on random images; needs --size")
    add_cfg_options(mm)
    named = parser.add_argument_group("with a timm name")
    named.add_argument("--checkpoint", help="weights: what timm's train.py or torch.save wrote, or .safetensors")
    add_timm_arguments(named)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go with the model, and read the size."""
    config = is_config(args.model)
    if len(args.files) != 1 + config:
        args.parser.error(f"expected {'CONFIG CHECKPOINT' if config else 'NAME'} OUT.onnx, got {len(args.files)} files")
    read_size(args)
    if args.int8:
        if not config and args.images is None:
            args.parser.error("--int8 needs --images FOLDER, to calibrate with")
        default = args.parser.get_default
        for name in ("dynamic_size", "batch", "as_it_stands", "no_real_data", "opset", "tolerance"):
            if getattr(args, name) != default(name):
                args.parser.error(f"--{name.replace('_', '-')} does not go with --int8")
    else:
        for name in ("keep_float", "min_agreement"):
            if getattr(args, name):
                args.parser.error(f"--{name.replace('_', '-')} goes with --int8")
    wrong = ("checkpoint", "pretrained", "model_args") if config else ("no_real_data", "cfg_options")
    for name in wrong:
        if getattr(args, name):
            args.parser.error(f"--{name.replace('_', '-')} does not go with {args.model}")


def options_of(args: argparse.Namespace) -> dict:
    """Return the options of export_onnx or export_int8, whatever the model."""
    from rep_plugin.export.int8 import int8_images

    names = ("keep_float", "rounds") if args.int8 else ("dynamic_size", "opset", "runtimes", "tolerance", "rounds")
    options = {name: getattr(args, name) for name in names}
    if args.class_names:
        if not Path(args.class_names).is_file():
            raise FileNotFoundError(f"{args.class_names} does not exist, expected a file of names")
        options["class_names"] = Path(args.class_names).read_text().splitlines()
    options |= {"size": args.size, "with_report": True}
    if args.int8:
        options |= {} if args.min_agreement is None else {"min_agreement": args.min_agreement}
        options |= {"runtime": args.runtimes[0]} if len(args.runtimes) == 1 else {}
        return options | {"write": int8_images}
    return options | {"reparameterize": not args.as_it_stands, "batch": args.batch}


def from_config(args: argparse.Namespace) -> "Report":
    """Export the model of a config."""
    import torch

    from rep_plugin.openmmlab.cli import open_trained
    from rep_plugin.openmmlab.export import read_images, write_onnx
    from rep_plugin.openmmlab.load import labelled_batches

    options, real_data = options_of(args), not args.no_real_data and args.images is None
    cfg, model, inputs, dataset_meta, _ = open_trained(args.model, args.files[0], args.cfg_options, real_data)
    if args.images is not None:
        inputs = read_images(model, cfg, args.images, *([args.int8_images] if args.int8 else []))
    elif args.int8:
        images, labels = zip(*labelled_batches(model, cfg, args.int8_images))
        inputs, options["labels"] = torch.cat(images), torch.cat(labels)
    return write_onnx(model, cfg, args.files[-1], inputs, dataset_meta, **options)


def from_timm(args: argparse.Namespace) -> "Report":
    """Export the model of a timm name."""
    from rep_plugin.timm.export import export_timm

    return export_timm(
        args.model,
        args.files[-1],
        checkpoint=args.checkpoint,
        pretrained=args.pretrained,
        model_args=dict(args.model_args),
        folder=args.images,
        **({"count": args.int8_images} if args.int8 else {}),
        **options_of(args),
    )


def run(args: argparse.Namespace) -> None:
    """Load, merge, export, compare, print the report."""
    config = is_config(args.model)
    require_packages("export", config)
    if config:
        from rep_plugin.openmmlab.cli import session

        with session():
            report = from_config(args)
    else:
        report = from_timm(args)
    report.print()
    print_written([args.files[-1], *(f"{args.files[-1]}.{kind}" for kind in ("json", "html"))])
