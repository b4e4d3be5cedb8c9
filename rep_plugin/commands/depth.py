"""Plan which layers of a trained checkpoint become one: depth_plan.json, and depth_plan.png with all budgets.

rep-plugin depth CONFIG CHECKPOINT --latency 0.8 --runtime onnxruntime     # of the time it takes on this machine
rep-plugin depth CONFIG CHECKPOINT --latency 0.8 --record scores.json      # ended, it goes on from there
rep-plugin depth CONFIG CHECKPOINT --macs 0.7 --no-real-data --shape 3 224 224
rep-plugin depth CONFIG --write-table table.json --runtime onnxruntime     # on another machine; no checkpoint, no data
rep-plugin depth CONFIG CHECKPOINT --latency-ms 4 --table table.json       # and here, with its times

What a segment costs is what the first metric of the config's val_evaluator loses on a few batches of validation with that
segment linear, its batch norms estimated anew on training images. The plan is for rep_plugin.LinearizeHook(plan=...).
"""

import argparse
from pathlib import Path
from typing import Any

from rep_plugin.commands.parser import add_trained_arguments, amount, count, number_in
from rep_plugin.commands.written import print_written
from rep_plugin.errors import ArgumentError, DataError
from rep_plugin.optional import require

HELP = "plan which layers of a trained checkpoint become one"
OUTPUTS = ("depth_plan.json", "depth_plan.png")
RUNTIMES = ("eager", "onnxruntime", "openvino")
ACTIVATIONS = ("relu", "relu6", "hardswish", "silu", "gelu")
JUDGE_BATCHES = 4
OF_PLANS = (
    "table",
    "act_after",
    "skip",
    "record",
    "no_accuracy",
    "judge_batches",
    "no_real_data",
    "out_dir",
    "overwrite",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the budget, where it is measured, by what segments are judged, and those of all that read a checkpoint."""
    add_trained_arguments(
        parser, no_real_data="judge by batch norms alone; needs --shape", optional="with --write-table"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--latency", type=number_in("(0, 1]"), help="share of the network's own time that may remain")
    what.add_argument("--latency-ms", type=number_in("(0, inf)"), help="milliseconds of one image that may remain")
    what.add_argument(
        "--macs", type=amount, help="multiply-adds of one image that may remain: a share (0.5) or a number"
    )
    what.add_argument("--write-table", metavar="FILE", help="no plan: measure the times on this machine and write them")
    parser.add_argument("--table", metavar="FILE", help="times that --write-table measured on another machine")
    parser.add_argument("--runtime", choices=RUNTIMES, help=f"where it is measured; default: {RUNTIMES[0]}")
    parser.add_argument(
        "--threads", type=lambda text: count(text, 1024), metavar="N", help="of the runtime; default: 1"
    )
    parser.add_argument("--act-after", choices=ACTIVATIONS, help="activation behind each merged block; default: none")
    parser.add_argument("--skip", action="store_true", help="residual blocks may go whole, too")
    parser.add_argument(
        "--record", metavar="FILE", help="keep what each segment costs there, as soon as it is known, and go on from it"
    )
    parser.add_argument(
        "--no-accuracy",
        action="store_true",
        help="judge by how far outputs on training images move, without validation",
    )
    parser.add_argument(
        "--judge-batches",
        type=count,
        metavar="N",
        help=f"batches of validation that judge a segment; default: {JUDGE_BATCHES}",
    )
    parser.add_argument(
        "--shape", type=count, nargs="+", help="input size C H W; default: that of the validation images"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what would be ignored, and a plan without weights."""
    measured = args.latency is not None or args.latency_ms is not None
    against = [("macs", ("table", "runtime", "threads"))] if not measured else []
    against += [
        ("write_table", OF_PLANS),
        ("table", ("runtime", "threads")),
        ("no_accuracy", ("judge_batches", "record")),
    ]
    against.append(("no_real_data", ("no_accuracy", "judge_batches", "record")))
    for name, others in against:
        for other in others if getattr(args, name) not in (None, False) else ():
            if getattr(args, other) not in (None, False):
                first, second = (word.replace("_", "-") for word in (other, name))
                args.parser.error(f"--{first} does not go with --{second}")
    if args.checkpoint is None and args.write_table is None:
        budget = next(
            name for name in ("latency", "latency-ms", "macs") if getattr(args, name.replace("-", "_")) is not None
        )
        args.parser.error(f"--{budget} needs a CHECKPOINT after {args.config}, the trained weights")
    if args.shape and len(args.shape) != 3:
        args.parser.error(f"--shape takes three numbers, C H W, got {args.shape}")
    if args.no_real_data and not args.shape:
        args.parser.error("--no-real-data needs the input size: --shape C H W")


def next_step(cfg: Any, plan: Path, checkpoint: str) -> str:
    """Return what a config needs to train what the plan says.

    Args:
        cfg: that the checkpoint was trained with.
        plan: path of the plan.
        checkpoint: path of the checkpoint.

    Returns:
        A part of a config.
    """
    epochs = (cfg.get("train_cfg") or {}).get("max_epochs")
    end = max(1, round(0.6 * epochs)) if isinstance(epochs, int) else 6
    return f"""in the config, to train it so (and train some epochs after end):
load_from = {str(checkpoint)!r}
custom_hooks = [
    dict(type="rep_plugin.LinearizeHook", begin=0, end={end}, plan={str(plan)!r}),
    dict(type="rep_plugin.ReparamHook"),
]"""


def _write_table(args: argparse.Namespace) -> None:
    import torch

    from rep_plugin.checkpoints.files import check_writable, require_regular
    from rep_plugin.depth import write_latency_table
    from rep_plugin.openmmlab.cli import open_trained, require_files, resolve_config

    target = require_regular(args.write_table)
    try:
        check_writable(target.parent)
    except OSError as error:
        raise OSError(f"--write-table {args.write_table}: {error}") from None
    if target.resolve() in require_files(resolve_config(args.config), args.checkpoint):
        raise ArgumentError(f"--write-table {args.write_table} is read and would be replaced: give another file")
    try:
        trained = open_trained(args.config, args.checkpoint, args.cfg_options, not args.shape)
    except DataError as error:  # the data set is wanted for its images' size alone
        raise DataError(f"{error}; or give the input size: --shape C H W") from None
    image = torch.randn(_shape(args, trained.inputs), generator=torch.Generator().manual_seed(0))
    runtime, threads = args.runtime or RUNTIMES[0], args.threads or 1
    table = write_latency_table(trained.model, image, target, runtime, threads)
    size = "x".join(map(str, table.input_shape))
    print(f"{size}: {table.whole:.3g} ms in {runtime}, threads: {threads}; segments timed: {len(table.segments)}")
    print(f"plan with it: rep-plugin depth {args.config} CHECKPOINT --latency 0.8 --table {args.write_table}")
    print_written([args.write_table])


def _shape(args: argparse.Namespace, inputs: object) -> tuple[int, ...]:
    if inputs is None and not args.shape:
        raise ArgumentError("without validation images the input size is needed: --shape C H W")
    return (1, *(args.shape or inputs.shape[1:]))  # type: ignore[attr-defined]


def _plan(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from rep_plugin.checkpoints.files import check_writable, write_together
    from rep_plugin.depth import read_latency_table
    from rep_plugin.openmmlab.accuracy import plan_by_validation
    from rep_plugin.openmmlab.cli import open_trained, output_folder

    known = args.record if args.record and Path(args.record).exists() else None
    out_dir = output_folder(args, OUTPUTS, (args.table, known))
    if args.record:
        check_writable(Path(args.record).resolve().parent)
    if args.table:
        read_latency_table(args.table)  # what is wrong with it is said before the model is built
    trained = open_trained(args.config, args.checkpoint, args.cfg_options, not args.no_real_data)
    image = torch.randn(_shape(args, trained.inputs), generator=torch.Generator().manual_seed(0))
    batches = 0 if args.no_accuracy else args.judge_batches or JUDGE_BATCHES
    plan = plan_by_validation(
        trained, image, batches, latency=args.latency, latency_ms=args.latency_ms, macs=args.macs, act_after=args.act_after,
        runtime=args.runtime or RUNTIMES[0], threads=args.threads or 1, latency_table=args.table,
        skip=args.skip, record=args.record,
    )  # fmt: skip
    write_together(out_dir, dict(zip(OUTPUTS, (plan.to_json, plan.plot))))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file has room for the table
    plan.print(console)
    if plan.chosen:
        print(next_step(trained.cfg, out_dir / OUTPUTS[0], args.checkpoint))
    print_written(out_dir / name for name in OUTPUTS)


def run(args: argparse.Namespace) -> None:
    """Plan and write the plan, or measure and write the table."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin depth")
    from rep_plugin.depth.timing import needed
    from rep_plugin.openmmlab.cli import session

    with session():
        if args.macs is None and args.table is None:
            needed(args.runtime or RUNTIMES[0])
        _write_table(args) if args.write_table else _plan(args)
