"""Prune a trained checkpoint: pruned.pth, pruned.py, the plan, the report (JSON, HTML) and a plot of the widths.

rep-plugin prune CONFIG CHECKPOINT --fraction 0.3
rep-plugin prune CONFIG CHECKPOINT --macs 0.5 --scores l1
rep-plugin prune CONFIG CHECKPOINT --latency 0.6                     # of the time it takes on this machine
rep-plugin train pruned.py --work-dir tuned                          # fine-tune: pruned.py loads pruned.pth

Top-1, or what else the config's val_evaluator measures, is stated before and after. Statistics of batch norms are then
measured anew on training images, and written: those of the network before the removal are not its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rep_plugin.commands.parser import add_trained_arguments, amount, count, number_in
from rep_plugin.commands.written import print_written
from rep_plugin.errors import ArgumentError
from rep_plugin.optional import require

if TYPE_CHECKING:
    from torch import nn

    from rep_plugin.pruning import PrunePlan

HELP = "remove channels of a trained checkpoint"
OUTPUTS = ("pruned.pth", "pruned.py", "pruned.plan.json", "pruned.json", "pruned.html", "pruned.png")
SCORES = ("flow", "bn_gamma", "l1", "l2", "fpgm", "taylor", "random")
TAYLOR_IMAGES = 256


def override(text: str) -> tuple[str, float | str]:
    """PATTERN=FRACTION or PATTERN=frozen."""
    pattern, _, value = text.rpartition("=")
    if not pattern:
        raise argparse.ArgumentTypeError(f"expected PATTERN=FRACTION or PATTERN=frozen, got {text!r}")
    return pattern, value if value == "frozen" else number_in("[0, 1)")(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much goes, which channels, and those of all commands that read a trained checkpoint."""
    add_trained_arguments(parser, no_real_data="prove on random images alone; needs --shape")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--fraction", "--prune-fraction", type=number_in("[0, 1)"), help="share of the prunable channels to remove"
    )
    how.add_argument("--params", type=amount, help="parameters that may remain: a share (0.5) or a number")
    how.add_argument(
        "--macs", type=amount, help="multiply-adds of one image that may remain: a share (0.5) or a number"
    )
    how.add_argument(
        "--latency", type=number_in("(0, 1]"), help="share of the time on this machine, one thread, one image"
    )
    how.add_argument(
        "--latency-ms", type=number_in("(0, inf)"), help="milliseconds on this machine, one thread, one image"
    )
    how.add_argument("--widths", help="JSON file {layer name: channels kept}, taken as it is")
    how.add_argument("--plan", help="plan file of an earlier run, applied as it is")
    parser.add_argument(
        "--scores",
        default="flow",
        choices=SCORES,
        help="how channels are scored; taylor: by gradients on validation images; default: %(default)s",
    )
    parser.add_argument(
        "--scope",
        default="global",
        choices=["global", "layer"],
        help="compare over all layers, or in each; default: %(default)s",
    )
    parser.add_argument(
        "--min-channels",
        type=count,
        help="no layer falls below; default: 8, half of narrower layers, where the budget can be met so",
    )
    parser.add_argument(
        "--max-prune-fraction",
        type=number_in("[0, 1)"),
        help="no layer loses a larger share; default: 0.9, where the budget can be met so",
    )
    parser.add_argument(
        "--round-to",
        type=count,
        help="narrowed layers keep a multiple of this; default: 8 (4 below 16 channels) with --macs and --params, else 1",
    )
    parser.add_argument(
        "--override",
        type=override,
        nargs="+",
        default=[],
        metavar="PATTERN=FRACTION",
        help="layers with a share of their own (0.2), or that stay as they are (frozen)",
    )
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PATTERN", help="layers that stay as they are")
    parser.add_argument("--no-accuracy", action="store_true", help="do not run validation before and after")
    parser.add_argument(
        "--bn-images",
        type=number_in("[0, inf)", int),
        default=512,
        metavar="N",
        help="training images on which the batch norms' statistics are measured anew, 0: they stay; default: %(default)s",
    )
    parser.add_argument(
        "--shape", type=count, nargs="+", help="input size C H W; default: that of the validation images"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse --scores taylor where it has no images, or nothing to score."""
    for name in ("no_real_data", "widths", "plan"):
        if args.scores == "taylor" and getattr(args, name):
            args.parser.error(f"--scores taylor does not go with --{name.replace('_', '-')}")


def read_widths(path: Path) -> dict[str, int]:
    """Return the {layer name: channels kept} of a file. Raises ArgumentError, naming the file, for anything else."""
    from rep_plugin.arguments import fits
    from rep_plugin.checkpoints.plain import read_json

    widths = read_json(path)
    if not isinstance(widths, dict):
        raise ArgumentError(f"{path} must hold {{layer name: channels kept}}, got a {type(widths).__name__}")
    if odd := [name for name, width in widths.items() if not fits(width, int)]:
        raise ArgumentError(f"{path} must hold {{layer name: channels kept}}, got {odd[0]!r}: {widths[odd[0]]!r:.40}")
    return widths


def make_plan(
    model: "nn.Module", shape: tuple[int, ...], args: argparse.Namespace, batches: Sequence = ()
) -> "PrunePlan":
    """Return the plan that the arguments ask for.

    Args:
        model: the network.
        shape: (1, C, H, W) of its input.
        args: the command line.
        batches: of (images, labels), for ``--scores taylor``.

    Returns:
        The plan.
    """
    from torch.nn.functional import cross_entropy

    from rep_plugin.pruning import PrunePlan, plan_pruning

    if args.plan:
        return PrunePlan.from_json(Path(args.plan))
    if args.widths:
        return PrunePlan.from_widths(model, shape, read_widths(Path(args.widths)), args.scores)
    return plan_pruning(
        model, shape, args.scores, args.fraction, params=args.params, macs=args.macs, latency=args.latency,
        latency_ms=args.latency_ms, scope=args.scope, min_channels=args.min_channels, round_to=args.round_to,
        overrides=dict(args.override), ignore=args.ignore, max_prune_fraction=args.max_prune_fraction,
        loader=batches, loss=cross_entropy,
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Load, plan, prune, prove, write, print the report."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin prune")
    from rich.console import Console

    from rep_plugin.openmmlab.accuracy import prune_and_measure
    from rep_plugin.openmmlab.artefacts import write_pruned_model
    from rep_plugin.openmmlab.cli import open_trained, output_folder, session
    from rep_plugin.openmmlab.load import labelled_batches

    with session():
        out_dir = output_folder(args, OUTPUTS, (args.widths, args.plan))
        trained = open_trained(args.config, args.checkpoint, args.cfg_options, not args.no_real_data)
        if args.shape and len(args.shape) != 3:
            raise ArgumentError(f"--shape takes three numbers, C H W, got {args.shape}")
        if trained.inputs is None and not args.shape:
            raise ArgumentError("without validation images the input size is needed: --shape C H W")
        shape = (1, *(args.shape or trained.inputs.shape[1:]))  # costs are those of one image
        batches = labelled_batches(trained.model, trained.cfg, TAYLOR_IMAGES) if args.scores == "taylor" else ()
        plan = make_plan(trained.model, shape, args, batches)
        pruned, report = prune_and_measure(trained, plan, accuracy=not args.no_accuracy, bn_images=args.bn_images)
        write_pruned_model(pruned, trained.cfg, plan, report, out_dir, trained.inputs, trained.dataset_meta)
        Console().print(plan.table())  # the report has the notes
        report.print()
        print_written(out_dir / name for name in OUTPUTS)
