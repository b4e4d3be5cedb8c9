"""The report of an export: what the file holds, how equal each runtime was measured to be, and how fast."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rep_plugin.measure.report import Report
from rep_plugin.measure.tables import new_table
from rep_plugin.optional import is_missing

if TYPE_CHECKING:  # imported where something is printed
    from rich.table import Table

    from rep_plugin.measure.plots import Figure

MOST = 10  # layers that are printed


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
        compared = ", ".join("x".join(map(str, shape)) for shape in self.compared)
        columns = ("runtime", "max absolute", "max relative", "tolerance", "ms")
        table = new_table(f"against PyTorch in float32, inputs {compared}", columns)
        table.add_row("PyTorch", "", "", "", _milliseconds(self.pytorch_milliseconds))
        for one in self.runtimes:
            errors = (f"{one.max_abs_error:.2e}", f"{one.max_rel_error:.2e}", f"{self.tolerance:.0e}")
            table.add_row(f"{one.name} {one.version}", *errors, _milliseconds(one.milliseconds))
        return table

    def tables(self) -> "list[Table]":
        """Return both rich tables."""
        return [self.table(), self.runtimes_table()]


@dataclass
class Int8Trial:
    """One way to quantise, judged on the held-out images.

    Args:
        method: how activations were calibrated.
        per_channel: weights have a scale for each channel.
        agreement: share of images with the same largest logit as in float; None: no logits.
        sqnr: signal-to-noise ratio of the outputs, in dB.
        top1: share of images that are classified right; None: no labels.
        equalised: the channels were evened out before.
    """

    method: str
    per_channel: bool
    agreement: float | None
    sqnr: float
    top1: float | None = None
    equalised: bool = False


@dataclass
class Int8Layer:
    """What a layer has to do with the error.

    Ranges are those of its outputs, before an activation, on the images that calibrate. What it was before the merge are all
    layers of the block that became it. None: not known.

    Args:
        name: of its node in the file.
        largest: its largest weight, merged.
        spread: how much wider its widest channel is than its narrowest.
        gain: dB that the outputs gain where it alone stays in float.
        range: lowest and highest output.
        largest_before: the same of the layers before the merge, as are the others.
        spread_before: the largest of theirs.
        range_before: lowest and highest output of any of them.
    """

    name: str
    largest: float
    spread: float
    gain: float
    range: tuple[float, float] | None = None
    largest_before: float | None = None
    spread_before: float | None = None
    range_before: tuple[float, float] | None = None


@dataclass
class Int8Report(Report):
    """The report of a quantised file. ``max_*_error`` are those of the merge before, in float64.

    Args:
        path: the file.
        runtime: where it was run.
        size_bytes: its size.
        size_float: size of the float file.
        images: number of images that calibrated.
        held_out: number of images that it was judged on.
        method: how activations were calibrated.
        per_channel: weights have a scale for each channel.
        equalised: channels were evened out before.
        kept_float: nodes that stay in float.
        agreement: share of the held-out images with the same largest logit as in float; None: no logits.
        sqnr: signal-to-noise ratio of the outputs, in dB.
        top1_float: top-1 of the float file on the held-out images, None without labels.
        top1: top-1 of the int8 file.
        milliseconds_float: for one image on one thread, None where it was not timed.
        milliseconds: the same in int8.
        trials: all that was tried.
        layers: what each layer costs, in the order of the forward.
    """

    path: str = ""
    runtime: str = ""
    size_bytes: int = 0
    size_float: int = 0
    images: int = 0
    held_out: int = 0
    method: str = ""
    per_channel: bool = False
    equalised: bool = False
    kept_float: list[str] = field(default_factory=list)
    agreement: float | None = None
    sqnr: float = 0.0
    top1_float: float | None = None
    top1: float | None = None
    milliseconds_float: float | None = None
    milliseconds: float | None = None
    trials: list[Int8Trial] = field(default_factory=list)
    layers: list[Int8Layer] = field(default_factory=list)

    def table(self) -> "Table":
        """Return float against int8 as a rich table."""
        scales = _scales(self.per_channel)
        even = ", equalised" * self.equalised
        title = f"{self.action}: {self.path}, {self.method}, a scale for {scales}{even}, {self.images} images"
        table = new_table(title, ("metric", "float", "int8"))
        table.add_row("MB", f"{self.size_float / 1e6:.2f}", f"{self.size_bytes / 1e6:.2f}")
        if self.milliseconds is not None:
            times = _milliseconds(self.milliseconds_float), _milliseconds(self.milliseconds)
            table.add_row(f"ms in {self.runtime}, one thread", *times)
        if self.agreement is not None:
            table.add_row(f"same class as float, {self.held_out} held-out images", "", f"{self.agreement:.1%}")
        if self.top1 is not None:
            table.add_row("top-1 on these", f"{self.top1_float:.1%}", f"{self.top1:.1%}")
        table.add_row("signal-to-noise ratio of the outputs", "", f"{self.sqnr:.1f} dB")
        return table

    def layers_table(self, most: int = MOST) -> "Table":
        """Return the layers that cost most as a rich table."""
        from rich.text import Text

        known = any(layer.largest_before is not None for layer in self.layers)
        columns = ("layer", "dB", "largest weight", "widest / narrowest channel", "lowest to highest output")
        table = new_table(
            f"what the outputs gain where one layer stays in float{' (before -> after the merge)' * known}", columns
        )
        for layer in sorted(self.layers, key=lambda one: -one.gain)[:most]:
            table.add_row(
                Text(layer.name), f"{layer.gain:+.2f}", _then(layer.largest_before, layer.largest),
                _then(layer.spread_before, layer.spread), _then(layer.range_before, layer.range),
            )  # fmt: skip
        return table

    def tables(self) -> "list[Table]":
        """Return float against int8, and the layers that cost most."""
        return [self.table(), *([self.layers_table()] if self.layers else [])]

    def trials_table(self) -> "Table":
        """Return what was tried as a rich table, the best first."""
        columns = ("calibration", "a scale for", "equalised", "same class", "top-1", "dB")
        table = new_table(f"what was tried, on {self.held_out} held-out images", columns, left=columns[1:3])
        for one in sorted(self.trials, key=lambda trial: trial.sqnr, reverse=True):
            shares = ("" if share is None else f"{share:.1%}" for share in (one.agreement, one.top1))
            table.add_row(
                one.method, _scales(one.per_channel), "yes" if one.equalised else "", *shares, f"{one.sqnr:.1f}"
            )
        return table

    def pages_tables(self) -> "list[Table]":
        """Return float against int8, all that was tried, all layers, and the error of each block of the merge."""
        trials = [self.trials_table()] if self.trials else []
        layers = [self.layers_table(len(self.layers))] if self.layers else []
        return [self.table(), *trials, *layers, *self.details()]

    def figures(self) -> "list[Figure]":
        """Return the plot of what each layer costs; none where the layers were not judged, or matplotlib is not installed."""
        if not self.layers or is_missing("matplotlib"):
            return []
        from rep_plugin.measure.plots import layers_figure

        gains = {layer.name: layer.gain for layer in self.layers}
        spreads = {layer.name: (layer.spread_before, layer.spread) for layer in self.layers}
        return [layers_figure(gains, spreads, f"{self.path}: {self.sqnr:.1f} dB")]


def _scales(per_channel: bool) -> str:
    return "each channel" if per_channel else "each layer"


def _then(before: object, after: object) -> str:
    """Two values or ranges, one after the other; one where the other is the same or not known."""
    shown = ["..".join(f"{number:.3g}" for number in value) if isinstance(value, tuple) else f"{value:.3g}"
             for value in (before, after) if value is not None]  # fmt: skip
    return " -> ".join(dict.fromkeys(shown))


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
