"""The report of an export: what the file holds, how equal each runtime was measured to be, and how fast."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rep_plugin.measure.report import Report

if TYPE_CHECKING:  # imported where something is printed
    from rich.console import Console
    from rich.table import Table


@dataclass
class RuntimeReport:
    """One runtime: its largest differences from PyTorch in float32, and the latency of one call.

    Args:
        name: name of the runtime.
        version: installed version.
        max_abs_error: largest absolute error.
        max_rel_error: largest relative error.
        milliseconds: median latency (None: not timed).
    """

    name: str
    version: str
    max_abs_error: float
    max_rel_error: float
    milliseconds: float | None = None


@dataclass
class ExportReport(Report):
    """The report of an exported file. ``max_*_error`` are the largest over the runtimes, in float32.

    ``params_*`` and ``macs_*`` are of the given model and of the one in the file; ``input_shape`` is that of the images of
    the call that was counted and timed.

    Args:
        path: the file.
        size_bytes: its size.
        opset: version of the ONNX operators.
        tolerance: largest allowed relative error.
        inputs: name -> shape, with names for dimensions that vary.
        input_types: name -> type of its numbers, as ``float32``.
        outputs: name -> shape, likewise.
        metadata: ``class_names`` and ``preprocessing``, where known.
        compared: shapes of the images that were compared.
        runtimes: one report each.
        pytorch_milliseconds: median latency in PyTorch (None: not timed).
        merge_rel_error: the merge's own error, in float64 (None: nothing was merged).
    """

    path: str = ""
    size_bytes: int = 0
    opset: int = 0
    tolerance: float = 0.0
    inputs: dict[str, list[int | str]] = field(default_factory=dict)
    input_types: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, list[int | str]] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    compared: list[tuple[int, ...]] = field(default_factory=list)
    runtimes: list[RuntimeReport] = field(default_factory=list)
    pytorch_milliseconds: float | None = None
    merge_rel_error: float | None = None

    def table(self) -> "Table":
        """Return the costs and the file's facts as a rich table."""
        table = self._costs(f"{self.action}: {self.path}, {self.size_bytes / 1e6:.1f} MB, opset {self.opset}")
        for kind, entries in (("input", self.inputs), ("output", self.outputs)):
            for name, shape in entries.items():
                words = " x ".join(map(str, shape)) or "one number"
                kept = self.input_types.get(name, "float32") if kind == "input" else "float32"
                table.add_row(f"{kind} {name}", "", words if kept == "float32" else f"{words}, {kept}")
        if self.merge_rel_error is not None:
            table.add_row(
                f"{len(self.blocks)} modules merged, max relative error (float64)", "", f"{self.merge_rel_error:.2e}"
            )
        if self.sensitivity is not None:
            table.add_row("sensitivity to another input", "", f"{self.sensitivity:.2e}")
        table.add_row("seconds", "", f"{self.seconds:.2f}")
        return table

    def runtimes_table(self) -> "Table":
        """Return errors and times of the runtimes as a rich table."""
        from rich.table import Table

        compared = ", ".join("x".join(map(str, shape)) for shape in self.compared)
        table = Table(title=f"against PyTorch in float32, inputs {compared}")
        for column in ("runtime", "max absolute", "max relative", "tolerance", "ms"):
            table.add_column(column, justify="left" if column == "runtime" else "right")
        table.add_row("PyTorch", "", "", "", _milliseconds(self.pytorch_milliseconds))
        for one in self.runtimes:
            errors = (f"{one.max_abs_error:.2e}", f"{one.max_rel_error:.2e}", f"{self.tolerance:.0e}")
            table.add_row(f"{one.name} {one.version}", *errors, _milliseconds(one.milliseconds))
        return table

    def print(self, console: "Console | None" = None) -> None:
        """Print both tables and the notes."""
        from rich.console import Console

        console = console or Console()
        console.print(self.table())
        console.print(self.runtimes_table())
        for note in self.notes:
            console.print(f"note: {note}", markup=False)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
