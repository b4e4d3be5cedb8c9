"""Tables, plots and verdicts from the records of experiments (:mod:`rep_plugin.openmmlab.experiments`).

A claim of a set is a dict: ``says`` (one line), ``source``, the rows ``better`` and ``than``, and ``by`` (points that the
first must be ahead, negative: may be behind).
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from scipy import stats

from rep_plugin.errors import ArgumentError
from rep_plugin.measure.tables import new_table
from rep_plugin.openmmlab.experiments import ExperimentSet, score

if TYPE_CHECKING:
    from rich.table import Table

Records = dict[str, list[dict[str, Any]]]
CONFIDENCE = 0.95
INT8 = (
    "Int8 files are calibrated with 512 training images and judged on the whole validation set, in ONNX Runtime. "
    "The naive ones are by its defaults: MinMax, one scale for a layer."
)
COLUMNS = ("trained as", "after removal", "mean", "each seed", "difference", "params", "MACs", "CPU minutes")


def read_records(folder: Path, name: str) -> Records:
    """Return the records of a set: {row: records, by seed}.

    Args:
        folder: of all records.
        name: of the set.

    Returns:
        The records, by row and seed.

    Raises:
        ArgumentError: a file is no record; names it.
    """
    records: Records = {}
    for path in sorted((folder / name).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            records.setdefault(record["row"], []).append(record)
            score(record)
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f"{path} is no record of a run, expected what rep-plugin experiments writes") from None
    return {row: sorted(runs, key=lambda run: run["seed"]) for row, runs in records.items()}


Columns = Mapping[str, Mapping[str, str]]


def read_columns(folder: Path, name: str) -> Columns:
    """Return what was measured beside the trainings of a set: {column: {row: text}}; nothing where nothing was.

    Args:
        folder: of all records.
        name: of the set.

    Returns:
        The columns of ``NAME_latency.json`` and of ``NAME_int8.json``.

    Raises:
        ArgumentError: a file is no such record.
    """
    readers = {
        "latency": (_latency_columns, "latency, expected what rep-plugin experiments --time writes"),
        "int8": (_int8_columns, "int8, expected what rep-plugin experiments --int8 writes"),
    }
    columns: dict[str, Mapping[str, str]] = {}
    for kind, (read, expected) in readers.items():
        if (path := folder / f"{name}_{kind}.json").is_file():
            try:
                columns |= read(json.loads(path.read_text()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ArgumentError(f"{path} is no record of {expected}") from None
    return columns


def _latency_columns(record: Mapping[str, Any]) -> Columns:
    return {f"ms, {runtime}": _milliseconds(rows) for runtime, rows in record["milliseconds"].items()}


def _milliseconds(rows: Mapping[str, float]) -> dict[str, str]:
    return {row: f"{value:.2f}" for row, value in rows.items()}


def _int8_columns(record: Mapping[str, Any]) -> Columns:
    rows = {row: [seeds[seed] for seed in sorted(seeds, key=int)] for row, seeds in record["rows"].items()}
    columns = {
        title: {row: _mean([run[key] for run in runs]) for row, runs in rows.items()}
        for title, key in (("float", "float"), ("naive int8", "naive"), ("int8", "int8"))
    }
    columns["int8 - float"] = {
        row: _difference(spread_of([run["int8"] - run["float"] for run in runs])) for row, runs in rows.items()
    }
    for title, key in (("MB", "size_float"), ("MB, int8", "size_bytes")):
        columns[title] = {row: f"{runs[0][key] / 1e6:.2f}" for row, runs in rows.items()}
    for runtime, kinds in record["milliseconds"].items():
        columns |= {f"ms {kind}, {runtime}": _milliseconds(times) for kind, times in kinds.items()}
    return columns


def paired(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> tuple[float, float | None] | None:
    """Compare two rows seed by seed.

    Args:
        ours: records of a row.
        theirs: records of another.

    Returns:
        The mean difference over the seeds that both have, and half of its 95 % interval (Student's t; None of one seed);
        None where they share no seed.
    """
    other = {run["seed"]: score(run) for run in theirs}
    return spread_of([score(run) - other[run["seed"]] for run in ours if run["seed"] in other])


def spread_of(gaps: Sequence[float]) -> tuple[float, float | None] | None:
    """Return the mean of differences and half of its 95 % interval (Student's t; None of one); None of none.

    Args:
        gaps: one a seed.
    """
    if len(gaps) < 2:
        return (gaps[0], None) if gaps else None
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return statistics.mean(gaps), float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * error


def _verdict(claim: Mapping[str, Any], records: Records) -> str:
    """Return one line: what a source says, what was measured, whether it holds.

    A claim holds where the whole interval is on its side, and fails where the whole interval is on the other.
    """
    says = f"{claim['says']} ({claim['source']})"
    found = paired(records.get(claim["better"], ()), records.get(claim["than"], ()))
    if found is None:
        return f"{says}: not measured yet"
    mean, half = found
    by = claim.get("by", 0.0)
    measured = f"measured {_difference(found)} of {claim['better']} against {claim['than']}"
    if half is None:
        return f"{says}: {measured}, one seed only"
    word = "holds" if mean - half > by else "does not hold" if mean + half < by else "not decided by these seeds"
    return f"{says}: {measured}, **{word}**"


def _difference(found: tuple[float, float | None] | None) -> str:
    """Return ``+0.31 ± 0.12``, or what there is of it."""
    if found is None:
        return ""
    mean, half = found
    return f"{mean:+.2f}" if half is None else f"{mean:+.2f} ± {half:.2f}"


def _rows_of(experiments: ExperimentSet, records: Records, columns: Columns) -> list[dict[str, str]]:
    """Return a table: of each row that has records the cell of each column. Without removals there is no such column."""
    cells = []
    for name in experiments.rows:
        if not (runs := records.get(name)):
            continue
        base = records.get(experiments.baseline or "", ())
        final = next(value for key in ("deployed", "pruned", "trained") if (value := runs[0]["costs"].get(key)))
        minutes = statistics.mean(sum(go["cpu"] for go in run["seconds"]) for run in runs) / 60
        removed = [run["rounds"][-1]["after"] for run in runs if run.get("rounds")]
        texts = (
            name,
            _mean([score for score in removed if score is not None]),
            _mean([score(run) for run in runs]),
            " ".join(f"{score(run):.2f}" for run in runs),
            "" if name == experiments.baseline else _difference(paired(runs, base)),
            f"{final['params']:,}",
            f"{final['macs'] / 1e6:.2f} M",
            f"{minutes:.1f}",
        )
        more = {column: rows.get(name, "") for column, rows in columns.items()}
        cells.append(dict(zip(COLUMNS, texts, strict=True)) | more)
    empty = {"after removal"} if not any(row["after removal"] for row in cells) else set()
    return [{column: text for column, text in row.items() if column not in empty} for row in cells]


def _mean(scores: Sequence[float]) -> str:
    """Return ``86.50 ± 0.48``, without a spread of one score, or nothing of none."""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}" if scores else ""


def _missing(experiments: ExperimentSet, records: Records) -> str:
    """Return a line that names the rows with fewer seeds than the set asks for; empty where nothing is missing."""
    few = {
        name: len(records.get(name, ()))
        for name, row in experiments.rows.items()
        if not row.hidden and len(records.get(name, ())) < experiments.seeds_of(name)
    }
    rows = ", ".join(f"{name} ({count} of {experiments.seeds_of(name)} seeds)" for name, count in few.items())
    return f"Not complete: {rows}." if few else ""


def table_of(experiments: ExperimentSet, records: Records, columns: Columns = MappingProxyType({})) -> "Table":
    """Return what the command prints.

    Args:
        experiments: the set.
        records: of its rows.
        columns: what else was measured, see :func:`read_columns`.

    Returns:
        The table.
    """
    headers, *rows = cells_of(experiments, records, columns)
    table = new_table(experiments.title, headers)
    table.caption = _missing(experiments, records) or None
    for cells in rows:
        table.add_row(*cells)
    return table


def cells_of(experiments: ExperimentSet, records: Records, columns: Columns = MappingProxyType({})) -> list[list[str]]:
    """Return a table.

    Args:
        experiments: the set.
        records: of its rows.
        columns: what else was measured, see :func:`read_columns`.

    Returns:
        The headers, the baseline's name among them, and the cells of each row.
    """
    rows = _rows_of(experiments, records, columns)
    named = {"difference": f"against {experiments.baseline}, 95 %"} if experiments.baseline else {}
    return [
        [named.get(column, column) for column in (rows[0] if rows else COLUMNS)],
        *([*row.values()] for row in rows),
    ]


def markdown_of(cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        cells: the headers, and the cells of each row.

    Returns:
        Its lines.
    """
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_of(experiments: ExperimentSet, records: Records, columns: Columns = MappingProxyType({})) -> str:
    """Return the page of a set: the table, the claims, how it was measured.

    Args:
        experiments: the set.
        records: of its rows.
        columns: what else was measured, see :func:`read_columns`.

    Returns:
        The page, in Markdown.
    """
    first = next(run for runs in records.values() for run in runs)
    screens = any(len(runs) == 1 for runs in records.values())
    commits = sorted({run["commit"] for runs in records.values() for run in runs})
    machines = sorted(
        {f"{run['processor']}, torch {run['versions']['torch']}" for runs in records.values() for run in runs}
    )
    lines = [
        f"# {experiments.title}",
        "",
        f"`rep-plugin experiments {experiments.called}` trains this, `make results` writes this page from the records.",
        f"Numbers are {first['main_metric']} of the last validation, means over the seeds and their standard deviation.",
        "Differences are paired by seed, with a 95 % interval.",
        "Costs are those of the network that is deployed, for one image.",
        *(
            ["Milliseconds are for one image, on one thread, all rows in turns."]
            if any("ms" in c for c in columns)
            else []
        ),
        *([INT8] if "int8" in columns else []),
        *(["A row with one seed screens: no conclusion is drawn from it alone."] if screens else []),
        "",
        markdown_of(cells_of(experiments, records, columns)),
        "",
        *(f"- {_verdict(claim, records)}" for claim in experiments.claims),
        *([""] if experiments.claims else []),
        *filter(None, [_missing(experiments, records)]),
        f"Measured on {'; '.join(machines)}, one thread a run, at {', '.join(commits)}.",
    ]
    return "\n".join(lines)


def figure_of(experiments: ExperimentSet, records: Records) -> Figure:
    """Plot all rows: every seed a dot, the mean a line.

    Args:
        experiments: the set.
        records: of its rows.

    Returns:
        The plot.
    """
    names = [name for name in experiments.rows if name in records]
    figure = Figure(figsize=(7.5, 1 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        scores = [score(run) for run in records[name]]
        color = "#b9c3cf" if name == experiments.baseline else "#2f6db5"
        axes.plot(scores, [place] * len(scores), "o", color=color, markersize=5)
        axes.plot([statistics.mean(scores)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title(experiments.title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def latency_figure_of(experiments: ExperimentSet, records: Records, columns: Columns) -> Figure | None:
    """Plot the mean of each row over its milliseconds, one panel a runtime; None where no times were measured.

    Args:
        experiments: the set.
        records: of its rows.
        columns: what else was measured, see :func:`read_columns`.

    Returns:
        The plot.
    """
    timed = {column: rows for column, rows in columns.items() if column.startswith("ms, ")}
    if not timed:
        return None
    names = [
        name for name in experiments.rows if name in records and not any(name not in rows for rows in timed.values())
    ]
    figure = Figure(figsize=(4.6 * len(timed) + 2.6, 4.2), layout="constrained")
    for axes, (column, rows) in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed.items()):
        for place, name in enumerate(names):
            mean = statistics.mean(score(run) for run in records[name])
            axes.plot(float(rows[name]), mean, "os^Dv"[place // 10], color=f"C{place % 10}", label=name)
        axes.set_xlabel(column, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(next(iter(records.values()))[0]["main_metric"], fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(experiments.title, fontsize=9)
    return figure
