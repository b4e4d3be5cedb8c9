import copy
import math

import pytest
import torch
from torch import nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning
from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.pruning import EagerTimer
from rep_plugin.pruning.planning.latency_search import Search
from rep_plugin.pruning.planning.latency_table import LatencyTable, timed_copy
from rep_plugin.pruning.planning.options import PruneOptions
from rep_plugin.pruning.planning.scores import score_units
from rep_plugin.pruning.planning.select import find_candidates, in_order, kept_without
from rep_plugin.pruning.tracing.tracer import trace_channels
from tests.test_pruning.nets import ConvBN, Gate, Pooled, Residual, ready

X = torch.randn(1, 3, 13, 13, generator=torch.Generator().manual_seed(0))


def by_eight(width: int) -> int:
    return math.ceil(width / 8) * 8


class FakeTimer:
    """A machine that works on eight channels at a time; a whole model takes ``factor`` of the sum of its layers."""

    def __init__(self, lanes=by_eight, factor: float = 1.3, pace=lambda call: 1.0):
        self.lanes, self.factor, self.pace, self.calls, self.timed = lanes, factor, pace, 0, []

    def of(self, module: nn.Module) -> float:
        convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        assert not any(isinstance(m, RepBlock) and not m.deployed for m in module.modules())
        assert not any(m.training for m in module.modules())
        work = sum(
            self.lanes(m.in_channels // m.groups) * self.lanes(m.out_channels) * m.weight[0, 0].numel() for m in convs
        )
        return (work + 10) * 1e-6 * (1 if module in convs else self.factor)

    def __call__(self, jobs, seconds):
        self.calls += 1
        self.timed += list(jobs)
        return {key: self.of(module) * self.pace(self.calls) for key, (module, _) in jobs.items()}


def net_of():
    torch.manual_seed(0)
    return ready(ConvBN(3, 48), Residual(48, 64), ConvBN(48, 96), Gate(96, 16), ConvBN(96, 96, groups=96), Pooled(96))


def fresh_share(net: nn.Module, plan: PrunePlan, timer: FakeTimer) -> float:
    pruned = copy.deepcopy(net)
    apply_plan(pruned, plan, verify=False)
    return timer.of(pruned) / timer.of(net)


@pytest.mark.parametrize(("share", "scores"), [(0.8, "random"), (0.6, "l1"), (0.3, "l1")])
def test_the_pruned_model_takes_the_asked_share(share, scores):
    net, timer = net_of(), FakeTimer()
    plan = plan_pruning(net, X, scores, latency=share, timer=timer)
    found = fresh_share(net, plan, timer)
    assert abs(found / share - 1) <= 0.1
    assert plan.latency_after / plan.latency_before == pytest.approx(found)
    assert plan.latency_before == pytest.approx(timer.of(net) * 1e3)
    assert f"latency={share} (measured: {plan.latency_after:.4g} of {plan.latency_before:.4g} ms)" in plan.why
    apply_plan(net, plan)


def test_milliseconds_are_the_same_as_their_share():
    net, timer = net_of(), FakeTimer()
    ms = timer.of(net) * 1e3
    plan = plan_pruning(net, X, "l1", latency_ms=0.5 * ms, timer=timer)
    assert plan.kept == plan_pruning(net, X, "l1", latency=0.5, timer=timer).kept
    assert plan.latency_after == pytest.approx(0.5 * ms, rel=0.1) and "latency_ms=" in plan.why


@pytest.mark.parametrize("budget", [{"latency": 1.0}, {"latency_ms": 1e6}])
def test_a_budget_that_is_met_already_removes_nothing(budget):
    plan = plan_pruning(net_of(), X, "l1", **budget, timer=FakeTimer())
    assert plan.units[1] == 0 and not plan.kept and plan.latency_before == plan.latency_after > 0


def search_of(timer) -> tuple[Search, dict[str, int]]:
    net = net_of()
    trace = trace_channels(net, X)
    choice = find_candidates(trace, score_units(net, trace, PruneOptions("l1")))
    order = in_order(choice.candidates, "global")
    group = {name: index for index, layers in enumerate(choice.layers) for name in layers}
    return Search(net, trace, X, order, list, timer), group


@pytest.mark.parametrize(
    ("lanes", "wanted", "width"),
    [
        (by_eight, 45, 48),  # as fast as 48: the channels come for nothing
        (by_eight, 41, 40),  # one more would cost as much as eight
        (by_eight, 49, 48),
        (lambda width: width * (2 if width % 8 == 0 else 1), 43, 43),  # multiples of eight are slow here
        (lambda width: 100, 43, 48),  # narrower is no faster: the widest of those near
    ],
)
def test_widths_go_either_way_to_what_is_faster(lanes, wanted, width):
    search, group = search_of(FakeTimer(lanes))
    inner = group["1.first.conv"]
    nothing = dict.fromkeys(search.groups, 0)
    counts = search.snap({**nothing, inner: 64 - wanted}, {**nothing, inner: 64 - wanted})
    assert search.widths[inner][counts.pop(inner)] == width
    assert set(counts.values()) == {0}


def test_narrowed_layers_fill_the_lanes():
    plan = plan_pruning(net_of(), X, "random", latency=0.6, timer=FakeTimer())
    narrower = [after for before, after in plan.widths.values() if after < before and before > 16]
    assert len(narrower) >= 5 and all(after % 8 == 0 for after in narrower)


def test_a_budget_out_of_reach_says_what_can_be_met():
    net, timer = net_of(), FakeTimer()
    message = (
        r"latency \(=0.01 \([\d.]+ ms\) of [\d.]+ ms\) cannot be met: the least that remains is (0\.\d+) \([\d.]+ ms\)$"
    )
    with pytest.raises(ValueError, match=message) as caught:
        plan_pruning(net, X, "l1", latency=0.01, timer=timer)
    assert "\n" not in str(caught.value)
    least = float(str(caught.value).rsplit("is ", 1)[1].split(" ")[0])
    plan = plan_pruning(net, X, "l1", latency=least * 1.02, timer=timer)
    assert plan.latency_after / plan.latency_before <= least * 1.03


def test_a_model_that_only_gets_slower_is_refused():
    class Slower(FakeTimer):
        def of(self, module):
            if not list(module.children()):
                return super().of(module)
            return 1.0 if module[0].conv.out_channels == 48 and module[2].conv.out_channels == 96 else 1.2

    with pytest.raises(ValueError, match=r"cannot be met: the least that remains is 1.2 \(1.2e\+03 ms\)$"):
        plan_pruning(net_of(), X, "l1", latency=0.95, timer=Slower())


def test_where_no_width_comes_near_the_faster_side_is_taken():
    class Steps(FakeTimer):
        def of(self, module):
            if not list(module.children()):
                return super().of(module)
            left = super().of(module) / whole
            return whole * (1.0 if left > 0.9 else 0.7 if left > 0.6 else 0.4)

    whole = FakeTimer().of(net_of())
    plan = plan_pruning(net_of(), X, "l1", latency=0.6, timer=Steps())
    assert plan.latency_after / plan.latency_before == pytest.approx(0.4)


def test_minimum_rounding_overrides_and_frozen_layers_hold():
    net, timer = net_of(), FakeTimer()
    options = {"min_channels": 12, "round_to": 4, "overrides": {"1.first*": 0.25}, "ignore": ["3.down"]}
    plan = plan_pruning(net, X, "random", latency=0.5, timer=timer, **options)
    assert plan.widths["1.first.conv"] == (64, 48) and plan.widths["3.down"] == (16, 16)
    changed = [after for before, after in plan.widths.values() if after < before]
    assert min(changed) >= 12 and all(after % 4 == 0 for after in changed)
    assert abs(fresh_share(net, plan, timer) / 0.5 - 1) <= 0.1


def test_blocks_are_timed_as_one_convolution_and_nothing_is_touched():
    net = ready(RepVGGBlock(3, 32), RepVGGBlock(32, 48), ConvBN(48, 32), Pooled(32)).train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    pointers = {name: p.data_ptr() for name, p in net.named_parameters()}
    plan = plan_pruning(net, X, "l1", latency=0.5, timer=FakeTimer())  # the timer refuses branches, and train mode
    assert plan.units[1] > 0 and all(m.training for m in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert pointers == {name: p.data_ptr() for name, p in net.named_parameters()}


def test_plan_and_report_hold_the_milliseconds(tmp_path):
    net = net_of()
    plan = plan_pruning(net, X, "l1", latency=0.5, timer=FakeTimer())
    assert (
        PrunePlan.from_json(plan.to_json(tmp_path / "plan.json")) == plan == PrunePlan.from_json(tmp_path / "plan.json")
    )
    report = apply_plan(net, plan)
    assert (report.latency_before, report.latency_after) == (plan.latency_before, plan.latency_after)
    assert "milliseconds when planned" in str(report)
    other = net_of()
    assert "milliseconds" not in str(apply_plan(other, plan_pruning(other, X, "l1", 0.2)))


def test_the_table_measures_each_configuration_once():
    net, timer = nn.Sequential(*(ConvBN(8, 8) for _ in range(3)), ConvBN(8, 12)).eval(), FakeTimer()
    table, x = LatencyTable(timer), torch.zeros(1, 8, 9, 9)
    (total,) = table.add_up([net], x)
    assert len(timer.timed) == 2 + 2 + 1 + 1  # two convolutions, BNs and activations of two widths
    expected = 3 * timer.of(net[0].conv) + timer.of(net[3].conv) + 4 * timer.of(net[0].bn) + 4 * timer.of(net[0].act)
    assert total == pytest.approx(expected)
    assert table.add_up([net, net[:3]], x)[0] == total and timer.calls == 1
    table.add_up([net], torch.zeros(1, 8, 5, 5))
    assert timer.calls == 2 and len(timer.timed) == 2 * 6 + 1  # other sizes, and the reference


def test_layers_measured_in_a_busy_minute_count_as_in_the_first():
    busy = FakeTimer(pace=lambda call: 1.0 if call == 1 else 3.0)
    table, x = LatencyTable(busy), torch.zeros(1, 8, 9, 9)
    table.add_up([ConvBN(8, 8).eval()], x)
    later = ConvBN(8, 24).eval()
    assert table.add_up([later], x)[0] == pytest.approx(sum(busy.of(m) for m in (later.conv, later.bn, later.act)))


def test_a_timed_copy_is_the_pruned_model():
    net = net_of()
    trace = trace_channels(net, X)
    plan = plan_pruning(net, X, "l1", 0.4)
    choice = find_candidates(trace, score_units(net, trace, PruneOptions("l1")))
    taken = in_order(choice.candidates, "global")[: plan.units[1]]
    twin = timed_copy(net, trace, kept_without(trace, taken))
    apply_plan(net, plan, verify=False)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert torch.equal(twin(X), net(X))


def test_the_eager_timer_keeps_to_its_threads_and_to_the_cpu():
    class Asks(nn.Module):
        def forward(self, x):
            seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))
            return x

    seen, before = set(), torch.get_num_threads()
    found = EagerTimer(threads=2, rounds=(2, 3))({"a": (Asks(), (X,))}, 0.1)
    assert seen == {(2, True)} and torch.get_num_threads() == before and found["a"] > 0
    with pytest.raises(ValueError, match="latency is measured on the CPU, the model is on meta"):
        EagerTimer()({"a": (Asks(), (X.to("meta"),))}, 0.1)


def test_a_real_measurement():
    torch.manual_seed(0)
    net = ready(ConvBN(3, 64), ConvBN(64, 96), ConvBN(96, 64), Pooled(64))
    x, timer = torch.randn(1, 3, 28, 28), EagerTimer(rounds=(9, 25))
    plan = plan_pruning(net, x, "l1", latency=0.6, timer=timer)
    pruned = copy.deepcopy(net)
    apply_plan(pruned, plan, verify=False)
    assert plan.latency_after <= 0.66 * plan.latency_before

    def is_faster() -> bool:
        times = timer({"dense": (net, (x,)), "pruned": (pruned, (x,))}, 1.0)
        return times["pruned"] < 0.8 * times["dense"]

    assert any(is_faster() for _ in range(5))  # other processes disturb one of them, now and then
