"""Plans of real networks: budgets, what they are judged by, tables of other machines, refusals."""

import json

import pytest
import torch
import torchvision
from torch import nn

import rep_plugin
import rep_plugin.depth.timing as timing
from rep_plugin.depth import LatencyTable, read_latency_table, write_latency_table
from rep_plugin.depth.planner import plan_depth
from rep_plugin.errors import AnnealError, ArgumentError
from rep_plugin.testing import calibrate_random_bn_
from tests.test_depth.nets import build

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(1, 3, 33, 33, generator=RANDOM)
IMAGES = torch.randn(6, 3, 33, 33, generator=RANDOM)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.5)


class Net(nn.Module):
    """Four bottlenecks; with each that is linear ``score`` loses its own number of points."""

    losses = (1.0, 3.0, 0.5, 2.0)

    def __init__(self):
        super().__init__()
        for index in range(4):
            layers = [
                nn.Conv2d(4, 24, 1),
                nn.BatchNorm2d(24),
                nn.ReLU(),
                nn.Conv2d(24, 4, 3, padding=1),
                nn.BatchNorm2d(4),
            ]
            self.add_module(f"block{index}", nn.Sequential(*layers))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = x.repeat(1, 2, 1, 1)[:, :4]
        for index in range(4):
            x = torch.tanh(getattr(self, f"block{index}")(x))
        return self.fc(x.mean((2, 3)))


def score(model: nn.Module) -> float:
    linear = [getattr(getattr(model, f"block{i}")[2], "linear", False) for i in range(4)]
    return 90.0 - sum(loss for loss, gone in zip(Net.losses, linear) if gone)


def table_of(model: nn.Module, x=X) -> LatencyTable:
    """A table in which each segment of Net saves 1 ms of 10."""
    from rep_plugin.depth.segments import find_segments
    from rep_plugin.depth.timing import input_sizes, signature

    found, _ = find_segments(model, x)
    sizes = input_sizes(model, x, [s.layers[0] for s in found])
    keys = {signature(s, model, sizes[s.layers[0]]): (2.0, 1.0) for s in found}
    return LatencyTable("onnxruntime", 1, tuple(x.shape), 10.0, keys)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return calibrate_random_bn_(Net(), IMAGES)


def test_the_least_loss_is_chosen_for_a_budget(net):
    plan = plan_depth(net, X, score, latency=0.8, latency_table=table_of(net), calibration=IMAGES)
    assert plan.chosen == ("block0.0..block0.3", "block2.0..block2.3") and plan.importance == "evaluate"
    assert (plan.latency_before, plan.latency_after, plan.runtime) == (10.0, 8.0, "onnxruntime")
    assert (plan.score_before, plan.score_after) == (90.0, 88.5)
    assert [one.loss for one in plan.segments] == pytest.approx(Net.losses)
    assert [(p.latency, p.loss) for p in plan.frontier] == [(10, 0), (9, 0.5), (8, 1.5), (7, 3.5), (6, 6.5)]
    assert plan.macs_after < plan.macs_before and plan.activations == ["block0.2", "block2.2"]
    assert not any(module.training for module in net.modules())


def test_what_seems_to_gain_is_no_reason_to_take_more(net):
    plan = plan_depth(net, X, lambda model: 180 - score(model), latency=0.9, latency_table=table_of(net))
    assert [one.loss for one in plan.segments] == pytest.approx([-loss for loss in Net.losses])
    assert len(plan.chosen) == 2  # of the five that take least, four blocks and a pair, the best by evaluate; not all


def test_budgets_are_of_three_kinds(net):
    table = table_of(net)
    by_ms = plan_depth(net, X, score, latency_ms=9.0, latency_table=table)
    assert by_ms.chosen == ("block2.0..block2.3",) and by_ms.why == "latency_ms=9"
    whole = plan_depth(net, X, macs=1.0)
    assert whole.chosen == () and whole.latency_before is None
    saved = whole.segments[0].macs_before - whole.segments[0].macs_after
    by_macs = plan_depth(net, X, score, macs=float(whole.macs_before - 2 * saved))
    assert by_macs.chosen == ("block0.0..block0.3", "block2.0..block2.3")
    assert by_macs.macs_after == whole.macs_before - 2 * saved


def test_the_best_five_are_compared_whole(net):
    """Together two blocks cost more than alone: the plan knows once it has tried."""

    def jealous(model):
        both = [getattr(getattr(model, f"block{i}")[2], "linear", False) for i in (0, 2)]
        return score(model) - 10 * all(both)

    plan = plan_depth(net, X, jealous, latency=0.8, latency_table=table_of(net))
    assert plan.chosen == ("block2.0..block2.3", "block3.0..block3.3") and plan.score_after == 87.5


def test_without_a_metric_outputs_or_batch_norms_rank(net):
    by_outputs = plan_depth(net, X, latency=0.9, latency_table=table_of(net), calibration=[IMAGES[:3], IMAGES[3:]])
    assert by_outputs.importance == "calibration" and by_outputs.score_before is None
    assert all(0 < one.loss < 2 for one in by_outputs.segments) and by_outputs.chosen
    assert by_outputs.frontier[1].chosen == (min(by_outputs.segments, key=lambda one: one.loss).name,)
    with torch.no_grad():
        net.block1[1].bias.fill_(9.0)  # its ReLU passes nearly all
    by_norms = plan_depth(net, X, latency=0.9, latency_table=table_of(net))
    assert by_norms.importance == "batch norms" and by_norms.chosen == ("block1.0..block1.3",)


def trained(model: nn.Module) -> None:
    """Steps that win back what block1 lost, and draw random numbers."""
    assert model.training and torch.is_grad_enabled()
    model.seen = torch.rand(1).item()
    model.gain = 3.0 if getattr(model.block1[2], "linear", False) else 0.0


def test_importance_after_training_steps(net):
    def judge(model):
        seen.append(getattr(model, "seen", None))
        return score(model) + getattr(model, "gain", 0.0)

    seen: list = []
    state = torch.get_rng_state()
    plan = plan_depth(net, X, judge, latency=0.9, latency_table=table_of(net), train=trained)
    assert torch.equal(torch.get_rng_state(), state) and len({one for one in seen if one is not None}) == 1
    assert plan.importance == "training" and plan.chosen == ("block1.0..block1.3",)
    assert [one.loss_untrained for one in plan.segments] == [*Net.losses]
    assert [one.loss for one in plan.segments] == [1.0, 0.0, 0.5, 2.0]
    assert plan.correlation == pytest.approx(-0.2) and "rank correlation" in str(plan)
    assert rep_plugin.DepthPlan.from_json(plan.to_json()) == plan


def test_planning_goes_on_from_its_record(net, tmp_path):
    count = [0]

    def judge(model):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return score(model)

    arguments = dict(latency=0.8, latency_table=table_of(net), train=lambda model: None)
    with pytest.raises(KeyboardInterrupt):
        plan_depth(net, X, judge, record=tmp_path / "scores.json", **arguments)
    kept = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert list(kept) == ["", "block0.0..block0.3"]
    whole = plan_depth(net, X, judge, record=tmp_path / "scores.json", **arguments)
    assert whole == plan_depth(net, X, score, **arguments)
    with torch.no_grad():
        net.fc.bias += 1
    with pytest.raises(ArgumentError, match=r"scores.json is of another planning: weights is .*, here "):
        plan_depth(net, X, judge, record=tmp_path / "scores.json", **arguments)
    for name in ("train", "record"):
        value = trained if name == "train" else tmp_path / "new.json"
        with pytest.raises(ArgumentError, match=f"^{name} goes with evaluate"):
            plan_depth(net, X, macs=0.9, **{name: value})
    assert not (tmp_path / "new.json").exists()


def test_blocks_are_skipped_where_asked(tmp_path):
    model = calibrate_random_bn_(build("mobilenetv2").eval(), IMAGES)
    plan = plan_depth(model, X, macs=0.6, calibration=IMAGES, skip=True)
    assert any(one.skip for one in plan.segments) and "its shortcut" in str([*plan.table().columns[1].cells])
    assert not any(one.skip for one in plan_depth(model, X, macs=0.9).segments)
    gone = {one.name for one in plan.chosen_segments if one.skip}
    _, report = rep_plugin.linearize(model, plan)
    assert {block.name for block in report.blocks if "shortcut stays" in block.kind} == gone
    old = json.loads(plan_depth(model, X, macs=0.9).to_json())
    for segment in old["segments"]:
        del segment["skip"], segment["loss_untrained"]
    del old["correlation"]
    assert rep_plugin.DepthPlan.from_json(json.dumps(old)).chosen


def test_a_plan_is_plain_data(net, tmp_path):
    plan = plan_depth(net, X, score, latency=0.8, latency_table=table_of(net), act_after="relu")
    again = rep_plugin.DepthPlan.from_json(plan.to_json(tmp_path / "plan.json"))
    assert again == plan == rep_plugin.DepthPlan.from_json(tmp_path / "plan.json")
    assert "2 of 4 segments merged, 10.00 -> 8.00 ms in onnxruntime" in str(plan)
    plan.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG" and "merged" in plan.table().columns[3].header
    data = json.loads(plan.to_json())
    for change, message in (
        ({"chosen": ["x"]}, "chosen of a depth plan must name its segments, got 'x'"),
        ({"version": 9}, "is no depth plan of version 1, got 9"),
        ({"segments": 3}, "segments must be a list, got int"),
        ({"latency_before": "fast"}, "latency_before must be"),
    ):
        with pytest.raises(ArgumentError, match=message) as caught:
            rep_plugin.DepthPlan.from_json(json.dumps(data | change))
        assert "\n" not in str(caught.value)
    del data["why"]
    with pytest.raises(ArgumentError, match=r"missing or unknown \['why'\] of a DepthPlan"):
        rep_plugin.DepthPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_segments_are_timed_in_every_runtime(runtime, net, tmp_path):
    x = torch.randn(1, 3, 64, 64, generator=RANDOM)
    table = write_latency_table(net, x, tmp_path / "table.json", runtime)
    assert read_latency_table(tmp_path / "table.json") == table and table.runtime == runtime
    ((before, after),) = table.segments.values()  # four segments, all alike
    assert 0 < after < before < table.whole and table.scale > 0
    plan = plan_depth(net, x, score, latency=1.0, latency_table=str(tmp_path / "table.json"))
    assert plan.latency_before == table.whole and plan.runtime == runtime and plan.latency_measured is None
    assert [(one.ms_before, one.ms_after, one.pays) for one in plan.segments] == [(before, after, True)] * 4
    last = plan.frontier[-1]
    assert last.latency == pytest.approx(table.whole - 4 * table.scale * (before - after)) and len(last.chosen) == 4


def test_a_chosen_network_is_timed_whole():
    model = build("mobilenetv2").eval()
    plan = plan_depth(model, X, latency=0.9)
    assert plan.chosen and plan.latency_after <= 0.9 * plan.latency_before and plan.latency_measured > 0
    merged = rep_plugin.linearize(model, plan, example_input=X)[0]
    rep_plugin.set_alpha_(merged, 1.0)
    report = rep_plugin.reparameterize(merged, X)[1]
    assert report.macs_after == plan.macs_after and report.max_rel_error < 1e-9


def test_where_nothing_pays_the_table_says_so():
    model = torchvision.models.resnet18(num_classes=2).eval()
    plan = plan_depth(model, X, macs=0.9)
    assert plan.chosen == () and plan.notes[-1].startswith("nothing pays here")
    assert "are called more than once" in plan.notes[0]
    with pytest.raises(ArgumentError, match="chooses nothing to linearize"):
        rep_plugin.linearize(model, plan)


def refuse(message: str, *arguments, kind=ArgumentError, **options) -> None:
    with pytest.raises(kind, match=message) as caught:
        plan_depth(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_refusals_are_one_line(net, tmp_path):
    table = table_of(net)
    refuse(r"latency=0.5 cannot be met: 0.6 \(6 of 10 ms\) is the least", net, X, latency=0.5, latency_table=table)
    refuse(r"macs=10 cannot be met: .* multiply-adds\) is the least", net, X, macs=10.0)
    refuse("give exactly one of latency, latency_ms and macs, got none", net, X)
    refuse(r"give exactly one .* got \['latency', 'macs'\]", net, X, latency=0.5, macs=0.5)
    refuse("latency must be a number in", net, X, latency=1.5)
    refuse("runtime must be one of", net, X, latency=0.5, runtime="tensorrt")
    refuse("evaluate must return a finite number", net, X, lambda model: None, latency=0.9, latency_table=table)
    refuse("calibration must be images", net, X, latency=0.9, latency_table=table, calibration=[])
    refuse("measured on .*33, 33.*, example_input is", net, X[..., :9], latency=0.9, latency_table=table)
    refuse(
        "measured in onnxruntime, runtime is 'openvino'", net, X, latency=0.9, latency_table=table, runtime="openvino"
    )
    other = build("mobilenetv2").eval()
    refuse("latency_table has none of this model's segments", other, X, latency=0.9, latency_table=table)
    (tmp_path / "table.json").write_text("{}")
    refuse("table.json", net, X, latency=0.9, latency_table=str(tmp_path / "table.json"))
    annealed, _ = rep_plugin.linearize(net, ["block0.2"])
    refuse("linearized already: plan before that", annealed, X, macs=0.9, kind=AnnealError)
