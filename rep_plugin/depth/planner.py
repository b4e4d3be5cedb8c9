"""``plan_depth``: which runs of a network become one convolution, under a budget of measured latency or of multiply-adds."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from rep_plugin.arguments import In, OneOf, Positive, That, checked
from rep_plugin.blocks.activations import FUNCTIONS
from rep_plugin.blocks.annealed_layers import in_segments
from rep_plugin.checkpoints.files import write_text
from rep_plugin.checkpoints.plain import read_json, require_fields
from rep_plugin.checkpoints.tensors import digest_of
from rep_plugin.depth.importance import (
    Evaluate,
    Images,
    curvature,
    linear_copy,
    output_change,
    outputs_of,
    score_of,
)
from rep_plugin.depth.plan import Candidate, DepthPlan, Point
from rep_plugin.depth.segments import Segment, find_segments
from rep_plugin.depth.selection import Choice, Item, best_choices, choices_for, frontier, most_saving
from rep_plugin.depth.timing import (
    EAGER,
    FASTER,
    LatencyTable,
    Runtime,
    Threads,
    input_sizes,
    read_latency_table,
    signature,
    time_segments,
    time_whole,
)
from rep_plugin.errors import AnnealError, ArgumentError
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.measure.costs import count_macs
from rep_plugin.measure.forward import eval_mode, of_user, require_bare, run_model
from rep_plugin.measure.progress import track, working

CLOSE = 0.10  # predicted latency against measured
Share = Annotated[float, In("(0, 1]")]
Macs = Annotated[float, In("(0, inf)")]
Batches = Annotated[Tensor | Iterable, That(lambda value: True, "images (N, C, H, W), or batches of them")]
Metric = Annotated[Evaluate, That(callable, "a function (model) -> float, higher is better")]
Trainer = Annotated[Callable[[nn.Module], object], That(callable, "a function (model) that trains a model in place")]


@checked
@working("planning depth")
def plan_depth(
    model: nn.Module,
    example_input: Images,
    evaluate: Metric | None = None,
    latency: Share | None = None,
    latency_ms: Positive | None = None,
    macs: Macs | None = None,
    runtime: Runtime = EAGER,
    calibration: Batches | None = None,
    act_after: Annotated[str, OneOf(FUNCTIONS)] | None = None,
    latency_table: str | Path | LatencyTable | None = None,
    threads: Threads = 1,
    measure: bool = True,
    skip: bool = False,
    train: Trainer | None = None,
    record: str | Path | None = None,
) -> DepthPlan:
    """Choose which activations go, so that what lies between them becomes one convolution; the model stays as it is.

    Segments (inverted residuals, residual blocks, runs of plain convolutions, across blocks too) are found by tracing. Each
    is timed as it is and merged, in the runtime, in turns with all others, on one thread. What a segment is expected to cost
    in accuracy, its loss, is what ``evaluate`` loses with that segment linear, after its BNs were estimated anew on
    ``calibration``. Without ``evaluate`` it is how far the outputs on ``calibration`` move, relative; without both, how far
    the activations are from the identity for what the batch norms give them. These are losses before any training: they rank
    segments. ``train`` gives each a few steps first, and the network as it is as many; ``plan.correlation`` is then how well
    the ranks before training foretell those after it. The choice is exact, by dynamic programming over segments that share no
    layer; as losses need not add up, the five best are compared by ``evaluate`` whole.

    Where one convolution is slower everywhere, the plan chooses nothing and says so: ``plan.print()`` has the table.

    Args:
        model: the model.
        example_input: images (N, C, H, W) of the size to be timed, best one image.
        evaluate: ``(model) -> float``, higher is better; given copies in eval mode.
        latency: share of the network's own time (BNs folded) that may remain, in (0, 1].
        latency_ms: milliseconds that may remain.
        macs: multiply-adds for one image that may remain: a share as a float <= 1, or their number.
        runtime: ``eager``, ``onnxruntime`` or ``openvino``.
        calibration: images (N, C, H, W), or an iterable of batches, for the BNs' statistics.
        act_after: an activation to be annealed in behind each merged segment that is a block's output, or None.
        latency_table: what :func:`rep_plugin.depth.write_latency_table` measured on another machine.
        threads: inside an operator.
        measure: time the chosen network whole, too.
        skip: residual blocks may be skipped whole, too: their shortcut is left.
        train: ``(model) -> anything``, a few training steps in place; given copies in train mode. Needs ``evaluate``. Each
            run begins at the same random state.
        record: JSON file that keeps the scores, each as soon as it is there: planning goes on from it where it was ended.
            It is of one model and one pair of functions, of which it can check the model alone.

    Returns:
        The plan.

    Raises:
        ArgumentError: none or several budgets, one that cannot be met (it says what can), a table without these layers, a
            score that is no finite number, a record of another model, or ``train`` or ``record`` without ``evaluate``.
        AnnealError: the model is linearized already.
        MissingPackageError: the runtime is not installed.
        TraceError: the model cannot be traced.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.ReLU(), torch.nn.Conv2d(64, 4, 1)).eval()
        >>> plan_depth(net, torch.zeros(1, 3, 8, 8), macs=0.5).activations
        ['1']
    """
    budgets = {"latency": latency, "latency_ms": latency_ms, "macs": macs}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise ArgumentError(f"give exactly one of latency, latency_ms and macs, got {given or 'none'}")
    for name, value in (("train", train), ("record", record)):
        if value is not None and evaluate is None:
            raise ArgumentError(f"{name} goes with evaluate, which judges what was trained: give it too")
    require_bare(model)
    if any(True for _ in in_segments(model)):
        raise AnnealError("the model is linearized already: plan before that")
    batches = _batches(calibration)
    with eval_mode(model):
        with of_user(model, example_input):
            run_model(copy_model(model), copy_inputs(example_input))
        found, notes = find_segments(model, example_input, skip)
        total = count_macs(model, example_input)
        timed = macs is None
        table = _table(model, example_input, found, runtime, threads, latency_table, total) if timed else None
        costs = _Costs(model, example_input, found, table, total)
        search = _Search(model, evaluate, batches, act_after, train, record)
        candidates = [costs.candidate(segment) for segment in found]
        paying = [one for one in candidates if one.pays]
        losses = {one.name: search.loss(one) for one in track(paying, "judging segments")}
    candidates = [replace(one, loss=losses.get(one.name), loss_untrained=search.untrained(one)) for one in candidates]
    # What seems to gain is noise, or a network that is not trained yet: it is no reason to take away more than was asked.
    items = [
        Item(one, costs.saving(one), max(0.0, one.loss)) for one in candidates if one.pays and one.loss is not None
    ]
    state = best_choices(items)
    limit = costs.limit(given[0], budgets[given[0]])
    asked = f"{given[0]}={budgets[given[0]]:g}"
    best = Choice(0.0, 0.0, ())
    if not items:
        why = "no segment is cheaper as one convolution" if found else "there is no segment"
        notes.append(f"nothing pays here: {why}")
    else:
        options = choices_for(state, costs.before - limit)
        if not options:
            least = costs.describe(most_saving(state))
            raise ArgumentError(f"{asked} cannot be met: {least} is the least that merging reaches")
        with eval_mode(model):
            best = search.best_of(options)
    chosen = tuple(one.name for one in candidates if one.name in {item.segment.name for item in best.items})
    measured = None
    if timed and chosen and measure and latency_table is None:
        with eval_mode(model):
            measured = _measure(model, example_input, best, table)
        notes += _compare(costs.before - best.saving, measured)
    return DepthPlan(
        type(model).__name__, tuple(example_input.shape), tuple(candidates), chosen, table.runtime if table else runtime,
        search.kind, asked, *costs.latencies(best), measured, total, costs.macs(best), search.before,
        search.score(best) if chosen else search.before, act_after,
        tuple(costs.point(choice) for choice in frontier(state)),
        tuple(notes), correlation=_correlation(candidates),
    )  # fmt: skip


def _batches(calibration: object) -> list[Tensor]:
    if calibration is None:
        return []
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)  # type: ignore[call-overload]
    if not batches or not all(isinstance(b, Tensor) and b.dim() == 4 and b.is_floating_point() for b in batches):
        raise ArgumentError(
            "calibration must be images (N, C, H, W), or an iterable of such batches, got others or none"
        )
    return batches


def _table(
    model: nn.Module,
    x: Tensor,
    found: Sequence[Segment],
    runtime: str,
    threads: int,
    given: str | Path | LatencyTable | None,
    macs: int,
) -> LatencyTable:
    if given is None:
        return time_segments(model, x, found, runtime, threads)
    table = given if isinstance(given, LatencyTable) else read_latency_table(given)
    what = "latency_table" if isinstance(given, LatencyTable) else f"latency_table {given}"
    if table.input_shape != tuple(x.shape):
        raise ArgumentError(f"{what} was measured on {table.input_shape}, example_input is {tuple(x.shape)}")
    if runtime not in (EAGER, table.runtime):
        raise ArgumentError(f"{what} was measured in {table.runtime}, runtime is {runtime!r}")
    if table.macs not in (0, macs):
        raise ArgumentError(f"{what} is of another model, of {table.macs:,} multiply-adds: this one has {macs:,}")
    return table


class _Costs:
    """What segments save, in milliseconds or multiply-adds."""

    def __init__(self, model: nn.Module, x: Tensor, found: Sequence[Segment], table: LatencyTable | None, total: int):
        self.table, self.total = table, total
        self.before = table.whole if table else float(total)
        self.times: dict[str, tuple[float, float]] = {}
        if table:
            sizes = input_sizes(model, x, [segment.layers[0] for segment in found])
            keys = {segment.name: signature(segment, model, sizes[segment.layers[0]]) for segment in found}
            self.times = {name: table.segments[key] for name, key in keys.items() if key in table.segments}
            if found and not self.times and table.segments:
                raise ArgumentError("latency_table has none of this model's segments: it is of another model")

    def candidate(self, segment: Segment) -> Candidate:
        before, after = self.times.get(segment.name, (None, None))
        if self.table:
            pays = before is not None and after is not None and after < FASTER * before
        else:
            pays = segment.macs_after < segment.macs_before
        return Candidate(**vars(segment), ms_before=before, ms_after=after, pays=pays)

    def saving(self, segment: Segment) -> float:
        if self.table:
            before, after = self.times[segment.name]
            return self.table.scale * (before - after)
        return float(segment.macs_before - segment.macs_after)

    def limit(self, budget: str, value: float | None) -> float:
        assert value is not None
        share = budget == "latency" or (budget == "macs" and value <= 1)
        return value * self.before if share else value

    def describe(self, choice: Choice) -> str:
        left = self.before - choice.saving
        what = (
            f"{left:.3g} of {self.before:.3g} ms" if self.table else f"{left:,.0f} of {self.before:,.0f} multiply-adds"
        )
        return f"{left / self.before:.3g} ({what})"

    def latencies(self, choice: Choice) -> tuple[float | None, float | None]:
        return (self.before, self.before - choice.saving) if self.table else (None, None)

    def point(self, choice: Choice) -> Point:
        chosen = tuple(item.segment.name for item in choice.items)
        return Point(self.latencies(choice)[1], self.macs(choice), choice.loss, chosen)

    def macs(self, choice: Choice) -> int:
        return self.total - sum(item.segment.macs_before - item.segment.macs_after for item in choice.items)


class _Search:
    """Judges segments, one by one and together."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluate | None,
        batches: Sequence[Tensor],
        act_after: str | None,
        train: Callable[[nn.Module], object] | None,
        record: str | Path | None,
    ):
        self.model, self.evaluate, self.batches, self.act_after = model, evaluate, batches, act_after
        self.train = train
        self.kind = "training" if train else "evaluate" if evaluate else "calibration" if batches else "batch norms"
        self.record = None if record is None else _Record(Path(record), model, act_after, self.kind)
        self.known: dict[str, list[float]] = {} if self.record is None else self.record.scores
        self.before = None if evaluate is None else self._judge(())
        self.outputs = outputs_of(model, batches) if self.kind == "calibration" else []

    def _scores(self, segments: Sequence[Segment]) -> list[float]:
        """The score with these segments linear, or minus what becomes of the outputs; and the score after training."""
        key = " + ".join(segment.name for segment in segments)
        if key not in self.known:
            if segments:
                linear = linear_copy(self.model, segments, self.act_after, self.batches)
            else:
                linear = copy_model(self.model, training=False)
            if self.evaluate is None:
                self.known[key] = [-output_change(self.outputs, outputs_of(linear, self.batches))]
            else:
                self.known[key] = [score_of(self.evaluate, linear)]
            if self.train is not None and self.evaluate is not None:
                with torch.enable_grad(), torch.random.fork_rng():  # each from the same state
                    self.train(linear.train())
                linear.eval()
                self.known[key].append(score_of(self.evaluate, linear))
            if self.record is not None:
                self.record.write()
        return self.known[key]

    def _judge(self, segments: Sequence[Segment]) -> float:
        return self._scores(segments)[-1]

    def loss(self, segment: Segment) -> float:
        if self.kind == "batch norms":
            return curvature(self.model, segment)
        return (self.before or 0.0) - self._judge([segment])

    def untrained(self, segment: Segment) -> float | None:
        """What a segment cost before the training steps, None where there were none."""
        if self.train is None or segment.name not in self.known:
            return None
        return self._scores(())[0] - self._scores([segment])[0]

    def best_of(self, options: Sequence[Choice]) -> Choice:
        if self.kind == "batch norms" or len(options) == 1:
            return options[0]
        return max(track(options, "comparing plans"), key=lambda choice: self._judge([i.segment for i in choice.items]))

    def score(self, choice: Choice) -> float | None:
        return None if self.evaluate is None else self._judge([item.segment for item in choice.items])


class _Record:
    """Scores in a file, and of which model they are."""

    def __init__(self, path: Path, model: nn.Module, act_after: str | None, kind: str):
        weights = digest_of(model.state_dict())
        own = {"model": type(model).__name__, "weights": weights, "act_after": act_after or "", "kind": kind}
        self.path, self.own, self.scores = path, own, {}
        if path.exists():
            hints = {**dict.fromkeys(own, str), "scores": dict[str, list[float]]}
            data = require_fields(read_json(path), hints, str(path))
            for key, value in own.items():
                if data[key] != value:
                    raise ArgumentError(f"record {path} is of another planning: {key} is {data[key]!r}, here {value!r}")
            self.scores = data["scores"]
            count = 2 if kind == "training" else 1
            if odd := [key for key, scores in self.scores.items() if len(scores) != count]:
                raise ArgumentError(f"record {path} must hold {count} scores of each, got others of {odd[0]!r}")

    def write(self) -> None:
        write_text(self.path, json.dumps(self.own | {"scores": self.scores}, indent=1))


def _correlation(candidates: Sequence[Candidate]) -> float | None:
    """Spearman's rank correlation of the losses before training with those after it; None where there are too few."""
    from scipy import stats  # takes a while to import

    both = [(one.loss_untrained, one.loss) for one in candidates if one.loss_untrained is not None]
    if len({before for before, _ in both}) < 2 or len({after for _, after in both}) < 2:
        return None
    return float(stats.spearmanr(*zip(*both)).statistic)


@torch.no_grad()
def _measure(model: nn.Module, x: Tensor, choice: Choice, table: LatencyTable | None) -> float:
    """Milliseconds of the whole network, merged, in the share that it takes of the network before, in turns."""
    assert table is not None
    segments = [item.segment for item in choice.items]
    before, after = time_whole(model, x.float(), segments, table.runtime, table.threads)
    return table.whole * after / before


def _compare(predicted: float, measured: float) -> list[str]:
    if abs(predicted / measured - 1) <= CLOSE:
        return []
    apart = f"predicted {predicted:.2f} ms, measured {measured:.2f} ms, more than {CLOSE:.0%} apart"
    return [f"{apart}: time again on an idle machine"]
