"""Prune one sparse-trained network at many rates (and L1 strengths), fine-tune each, and print one table.

rep-plugin sweep CONFIG                                            # starts from the config's load_from
rep-plugin sweep CONFIG --checkpoint work_dirs/sparse/epoch_30.pth --rates 0.2 0.4 0.6
rep-plugin sweep CONFIG --sparse SPARSE_CONFIG --strengths 1e-5 1e-4 1e-3

CONFIG has a PruneHook or a SoftPruneHook with ``prune_fraction``, which is set to each rate; SPARSE_CONFIG has the
SparsityHook. Every run is a ``rep-plugin train`` in a folder of its own; finished ones are not repeated, cut off ones go on.
Into the work folder: sweep.json, and sweep.png with the accuracy over the rate.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rep_plugin.commands.parser import add_cfg_options, number_in
from rep_plugin.commands.written import print_written
from rep_plugin.optional import require

if TYPE_CHECKING:
    from rich.table import Table

HELP = "prune at many rates, fine-tune each, print one table"
RATES = [round(0.1 * n, 1) for n in range(1, 10)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where to start, the rates and the strengths."""
    parser.add_argument("config", metavar="CONFIG", help="config that prunes and fine-tunes")
    parser.add_argument(
        "--rates",
        type=number_in("[0, 1)"),
        nargs="+",
        default=RATES,
        help="shares of channels to remove; default: 0.1 0.2 .. 0.9",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="where all start; default: the config's load_from")
    parser.add_argument(
        "--sparse", metavar="CONFIG", help="config to train that checkpoint with first, in the work folder"
    )
    parser.add_argument(
        "--strengths", type=number_in("(0, 1000]"), nargs="+", help="L1 strengths to train --sparse with"
    )
    parser.add_argument(
        "--work-dir", metavar="FOLDER", help="folder of all runs; default: work_dirs/sweep_<name of the config>"
    )
    add_cfg_options(parser, what="the config of every pruning run")
    add_cfg_options(parser, "--sparse-options", "the config of every sparse training")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and put the rates in order."""
    if args.strengths and not args.sparse:
        args.parser.error("--strengths needs --sparse, the config to train with each")
    if args.sparse and args.checkpoint:
        args.parser.error("give --checkpoint or --sparse, not both")
    for rate in args.rates:
        if not 0 < rate < 1:
            args.parser.error(f"--rates must lie in (0, 1), got {rate}")
    args.rates = sorted(set(args.rates))


def table_of(rows: list[dict], title: str) -> "Table":
    """Return a table of all rows, and of each start the network before.

    Args:
        rows: those of :func:`rep_plugin.openmmlab.sweep.sweep`.
        title: the table's.

    Returns:
        The table.
    """
    from rep_plugin.measure.tables import new_table

    several = any(row["start"] for row in rows)
    columns = (["start"] if several else []) + ["rate", "before", "pruned", "fine-tuned", "params", "MACs", "ms"]
    table = new_table(title, columns)
    starts = set()
    for row in rows:
        lead = [row["start"]] if several else []
        if row["start"] not in starts:
            starts.add(row["start"])
            costs = f"{row['params_before']:,}", f"{row['macs_before']:,}", f"{row['ms_before']:.2f}"
            table.add_row(*lead, "0", _number(row["before"]), "", "", *costs)
        metrics = (_number(row[when]) for when in ("before", "after", "tuned"))
        costs = f"{row['params_after']:,}", f"{row['macs_after']:,}", f"{row['ms']:.2f}"
        table.add_row(*lead, f"{row['rate']:g}", *metrics, *costs)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def run(args: argparse.Namespace) -> None:
    """Train what is missing, print one table."""
    for package in ("mmengine", "mmcv"):
        require(package, "openmmlab", "rep-plugin sweep")
    from rich.console import Console

    from rep_plugin.openmmlab.cli import session
    from rep_plugin.openmmlab.sweep import sweep

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file has room for the table
    out = Path(args.work_dir or f"work_dirs/sweep_{Path(args.config).stem}")
    with session():
        rows = sweep(
            args.config,
            out,
            args.rates,
            checkpoint=args.checkpoint,
            sparse=args.sparse,
            strengths=args.strengths or (),
            cfg_options=args.cfg_options,
            sparse_options=args.sparse_options,
            log=lambda text: console.print(text, markup=False),
        )
        title = f"{Path(args.config).stem}: {rows[0]['metric']}, costs of one image, one thread"
        console.print(table_of(rows, title))
        print_written(path for path in (out / "sweep.json", out / "sweep.png") if path.is_file())
