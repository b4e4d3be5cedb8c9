"""Train a set of configs over several seeds, keep a record of every run, print one table.

rep-plugin experiments                                      # the sets that are shipped
rep-plugin experiments warm_start --seeds 1                 # screen
rep-plugin experiments warm_start --budget-minutes 60       # and go on later: the same command again
rep-plugin experiments warm_start --time                    # and milliseconds beside the accuracy
rep-plugin experiments warm_start --show                    # the table of what is there

Every run is a ``rep-plugin train`` of an ordinary config in a folder of its own, with one thread, one a core side by side.
Finished ones are not repeated, cut off ones go on from their last epoch.
"""

import argparse
from pathlib import Path

from rep_plugin.commands.parser import add_cfg_options, count, number_in
from rep_plugin.optional import require

HELP = "train a set of configs over several seeds, with a record of every run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the set, how much of it, and where."""
    parser.add_argument("name", nargs="?", metavar="SET", help="name of a shipped set, or a file; none: list them")
    parser.add_argument("--seeds", type=count, metavar="N", help="seeds of every row; default: as many as the set says")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows, and those they need")
    parser.add_argument(
        "--budget-minutes", type=number_in("(0, inf)"), metavar="M", help="end after this time; the rest another time"
    )
    parser.add_argument("--workers", type=count, metavar="N", help="runs side by side; default: one a core")
    parser.add_argument(
        "--resume", action="store_true", help="go on with what is there, as it always does (for scripts that say so)"
    )
    parser.add_argument(
        "--time", action="store_true", help="then time what the rows deploy, side by side, in ONNX Runtime and OpenVINO"
    )
    parser.add_argument(
        "--int8", action="store_true", help="then write int8 files of what the rows deploy, judge and time them"
    )
    parser.add_argument("--show", action="store_true", help="train nothing, print the table of the records")
    parser.add_argument("--work-dir", metavar="FOLDER", help="folder of all runs; default: work_dirs/experiments/<set>")
    parser.add_argument("--records", metavar="FOLDER", help="folder of the records; default: <work dir>/records")
    add_cfg_options(parser, what="every config")


def run(args: argparse.Namespace) -> None:
    """Train what is missing, print the table."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin experiments")
    from rich.console import Console

    from rep_plugin.openmmlab.cli import parse_options, session
    from rep_plugin.openmmlab.experiments import list_sets, quantise_rows, read_set, run_experiments, time_rows
    from rep_plugin.openmmlab.results import read_columns, read_records, table_of

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file has room for the table

    def log(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    if args.name is None:
        for name in list_sets():
            log(f"{name}: {read_set(name).title}")
        return
    options = parse_options(args.cfg_options)
    experiments = read_set(args.name, options)
    work_dir = Path(args.work_dir or f"work_dirs/experiments/{experiments.name}")
    records = Path(args.records or work_dir / "records")
    if not args.show:
        with session():
            run_experiments(
                args.name,
                work_dir,
                records,
                seeds=args.seeds,
                rows=args.rows,
                workers=args.workers,
                minutes=args.budget_minutes,
                options=options,
                log=log,
            )
    if args.time:
        with session():
            log(f"written: {time_rows(experiments, work_dir, records)}")
    if args.int8:
        with session():
            log(f"written: {quantise_rows(experiments, work_dir, records, log=log)}")
    console.print(
        table_of(experiments, read_records(records, experiments.name), read_columns(records, experiments.name))
    )
