"""The one report of every verb: what was done, what it cost before and after, and how equal it was measured to be."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rep_plugin.arguments import Anything, checked
from rep_plugin.checkpoints.files import write_text
from rep_plugin.measure.tables import new_table
from rep_plugin.measure.verify import Equivalence

if TYPE_CHECKING:  # imported where something is printed
    from rich.console import Console
    from rich.table import Table

    from rep_plugin.measure.plots import Figure


@dataclass
class BlockReport:
    """One replaced module.

    Args:
        name: full name.
        kind: what it was.
        max_abs_error: largest absolute error (None: not verified).
        max_rel_error: largest relative error (None: not verified).
    """

    name: str
    kind: str
    max_abs_error: float | None = None
    max_rel_error: float | None = None


@checked
@dataclass
class Report:
    """The measurements of one transformation. Errors are in float64, the largest over all outputs.

    Args:
        action: name of the verb.
        params_before: number of parameters.
        params_after: number of parameters.
        macs_before: multiply-adds of convolutions and matrix products for one image (None: not counted).
        macs_after: multiply-adds, likewise.
        input_shape: shape of the example; one image of it is counted.
        max_abs_error: largest absolute error (None, as the next ones: not verified).
        max_rel_error: relative to the largest value of the reference output.
        border_rel_error: the same in the outermost pixels of any compared map, those of blocks too.
        interior_rel_error: the same in all other pixels.
        sensitivity: how much another input changes the output, relative; below 1e-3 the proof is inconclusive.
        seconds: duration.
        blocks: the replaced modules.
        notes: what a user should know, one sentence each.

    Example:
        >>> report = Report("reparameterize", params_before=10, params_after=4)
        >>> report.params_after, report.max_rel_error
        (4, None)
    """

    action: str
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    input_shape: tuple[int, ...] | None = None
    max_abs_error: Anything | None = None
    max_rel_error: Anything | None = None
    border_rel_error: Anything | None = None
    interior_rel_error: Anything | None = None
    sensitivity: Anything | None = None
    seconds: float | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_proof(self, proof: Equivalence) -> None:
        """Fill in the errors, of the whole model and of :attr:`blocks`, the sensitivity and the notes of a proof."""
        self.max_abs_error, self.max_rel_error = proof.total.max_abs, proof.total.max_rel
        maps = [proof.total, *proof.blocks.values()]  # logits have no border: the blocks' own maps count as well
        self.border_rel_error = max(difference.border_rel for difference in maps)
        self.interior_rel_error = max(difference.interior_rel for difference in maps)
        self.sensitivity = proof.sensitivity
        self.notes += proof.notes
        for block in self.blocks:
            if block.name in proof.blocks and block.name not in proof.not_run:
                difference = proof.blocks[block.name]
                block.max_abs_error, block.max_rel_error = difference.max_abs, difference.max_rel

    @checked
    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` where one is given, whole or not at all."""
        text = json.dumps(asdict(self), indent=2)
        if path is not None:
            write_text(path, text)
        return text

    @checked
    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one HTML page that holds everything, and write it to ``path`` where one is given.

        Args:
            path: the file, written whole or not at all.

        Returns:
            The page: what :meth:`print` prints, the error of each block, and plots.

        Example:
            >>> Report("reparameterize", params_before=10, params_after=4).to_html().count("<table>")
            1
        """
        from rep_plugin.measure.html import page_of

        text = page_of(self.pages_tables(), self.notes, self.figures())
        if path is not None:
            write_text(path, text)
        return text

    def files(self, stem: str) -> dict[str, bytes]:
        """Return the files ``STEM.json`` and ``STEM.html``: name -> contents.

        Args:
            stem: of their names.
        """
        return {f"{stem}.json": f"{self.to_json()}\n".encode(), f"{stem}.html": f"{self.to_html()}\n".encode()}

    def tables(self) -> "list[Table]":
        """Return all rich tables that are printed."""
        return [self.table()]

    def pages_tables(self) -> "list[Table]":
        """Return the rich tables of :meth:`to_html`; the title of the first is the page's."""
        return [*self.tables(), *self.details()]

    def details(self) -> "list[Table]":
        """Return the rich tables that are too long to be printed: the blocks, with their errors where they are known."""
        if not self.blocks:
            return []
        known = any(block.max_rel_error is not None for block in self.blocks)
        columns = ("block", "what it was", *(("max absolute error", "max relative error") if known else ()))
        table = new_table("blocks", columns, left=columns[:2])
        for block in self.blocks:
            errors = (block.max_abs_error, block.max_rel_error) if known else ()
            table.add_row(block.name, block.kind, *("" if value is None else f"{value:.2e}" for value in errors))
        return [table]

    def figures(self) -> "list[Figure]":
        """Return the plots of :meth:`to_html`."""
        return []

    def _costs(self, title: str) -> "Table":
        table = new_table(title, ("metric", "before", "after"))
        table.add_row("parameters", f"{self.params_before:,}", f"{self.params_after:,}")
        if self.macs_before is not None and self.macs_after is not None:
            size = " of " + "x".join(map(str, self.input_shape[1:])) if self.input_shape else ""
            table.add_row(f"multiply-adds, one image{size}", f"{self.macs_before:,}", f"{self.macs_after:,}")
        return table

    def table(self) -> "Table":
        """Return the metrics as a rich table."""
        table = self._costs(f"{self.action}: {len(self.blocks)} modules replaced")
        rows = {
            "max absolute error (float64)": self.max_abs_error,
            "max relative error (float64)": self.max_rel_error,
            "  at the border of any map": self.border_rel_error,
            "  inside of any map": self.interior_rel_error,
            "sensitivity to another input": self.sensitivity,
        }
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, "", f"{value:.2e}")
        if self.seconds is not None:
            table.add_row("seconds", "", f"{self.seconds:.2f}")
        return table

    def print(self, console: "Console | None" = None) -> None:
        """Print the tables and the notes."""
        from rich.console import Console

        console = console or Console()
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", markup=False)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, record=True, file=None, quiet=True)
        with console.capture() as capture:
            console.quiet = False
            self.print(console)
        return capture.get().rstrip()
