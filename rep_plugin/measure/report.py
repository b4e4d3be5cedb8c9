"""The one report of every verb: what was done, what it cost before and after, and how equal it was measured to be."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class BlockReport:
    """One replaced module: its name, what it was, its largest errors (None: not verified)."""

    name: str
    kind: str
    max_abs_error: float | None = None
    max_rel_error: float | None = None


@dataclass
class Report:
    """Figures of one transformation.

    ``params_*``: number of parameters; ``macs_*``: multiply-adds of convolutions and matrix products for one
    ``input_shape`` (None where not counted). Errors are the largest over all outputs, in float64: absolute, and relative
    to the largest value of the reference output; ``border`` is the outer ring of one pixel of every compared map.
    ``sensitivity`` is how much another input changes the output, relative; below 1e-3 the check is inconclusive.
    Errors are None where the transformation was not verified.
    """

    action: str
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    input_shape: tuple[int, ...] | None = None
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    border_rel_error: float | None = None
    interior_rel_error: float | None = None
    sensitivity: float | None = None
    seconds: float | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` where one is given (missing figures are null)."""
        text = json.dumps(asdict(self), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def table(self) -> Table:
        """Return the figures as a rich table."""
        table = Table(title=f"{self.action}: {len(self.blocks)} modules replaced")
        for column in ("figure", "before", "after"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        table.add_row("parameters", f"{self.params_before:,}", f"{self.params_after:,}")
        if self.macs_before is not None:
            shape = "x".join(map(str, self.input_shape))
            table.add_row(f"multiply-adds at {shape}", f"{self.macs_before:,}", f"{self.macs_after:,}")
        rows = {
            "max absolute error (float64)": self.max_abs_error,
            "max relative error (float64)": self.max_rel_error,
            "  of it at the border": self.border_rel_error,
            "  of it inside": self.interior_rel_error,
            "sensitivity to another input": self.sensitivity,
        }
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, "", f"{value:.2e}")
        if self.seconds is not None:
            table.add_row("seconds", "", f"{self.seconds:.2f}")
        return table

    def print(self, console: Console | None = None) -> None:
        """Print the table and the notes."""
        console = console or Console()
        console.print(self.table())
        for note in self.notes:
            console.print(f"note: {note}", markup=False)

    def __str__(self) -> str:
        console = Console(width=100, record=True, file=None, quiet=True)
        with console.capture() as capture:
            console.quiet = False
            self.print(console)
        return capture.get().rstrip()
