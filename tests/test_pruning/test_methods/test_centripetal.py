"""Clusters, the pull against the same training written out by hand, and merges against the snapped model in float64."""

import copy
import json
import math
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmpretrain.models import build_classifier
from torch import nn

from rep_plugin import EquivalenceError
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.bilinear.pooling import BilinearPooling
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.pruning import TraceError
from rep_plugin.pruning.methods import centripetal
from rep_plugin.pruning.methods.centripetal import (
    Centripetal,
    Members,
    cluster_distances,
    merge_clusters_,
    snap_clusters_,
)
from rep_plugin.pruning.methods.clusters import Clusters, cluster_points, plan_clusters
from rep_plugin.pruning.planning import Budget, PruneOptions
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_pruning.loops import batches, gradients_by_hand, new_scaler, run_training
from tests.test_pruning.nets import Call, Concat, ConvBN, Flat, Gate, Normed, Pooled, Residual, ready
from tests.test_pruning.test_methods.clustered import CLUSTERS, DECAY, LR, STRENGTH, clusters_of_net, net
from tests.test_pruning.test_random_nets import networks

X = torch.randn(2, 3, 13, 12, generator=torch.Generator().manual_seed(0))


def by_hand(dtype, accumulate: int, clip: float | None, scale: float) -> nn.Module:
    """SGD with momentum and weight decay; a filter's averaged, clipped gradient becomes the cluster's, and the pull."""
    model = net(amp=dtype is not None)
    momentum = {p: torch.zeros_like(p) for p in model.parameters()}
    for grads in gradients_by_hand(model, dtype, accumulate, clip, scale):
        for name, p in model.named_parameters():
            grad = grads[p].clone()
            for cluster in CLUSTERS if not name.startswith("8") else ():
                for j in cluster:
                    mean_grad = sum(grads[p][k] for k in cluster) / len(cluster)
                    mean = sum(p[k] for k in cluster) / len(cluster)
                    grad[j] = mean_grad + STRENGTH * (p[j] - mean)
            momentum[p] = 0.9 * momentum[p] + grad + DECAY * p
        for p in model.parameters():
            p -= LR * momentum[p]
    return model


def by_optimizer(dtype, accumulate, clip, scaled, fused) -> nn.Module:
    model = net(amp=dtype is not None)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=DECAY, fused=fused)
    Centripetal(model, clusters_of_net(model), STRENGTH).attach([optimizer])
    run_training(model, optimizer, dtype, accumulate, clip, new_scaler() if scaled else None)
    return model


CASES = {
    "fp32": (None, 1, None, False, False),
    "bf16": (torch.bfloat16, 1, None, False, False),
    "fp16, scaled": (torch.float16, 1, None, True, False),
    "accumulated": (None, 4, None, False, False),
    "clipped": (None, 1, 0.05, False, False),
    "all": (torch.float16, 4, 0.05, True, False),
    "fused, scaled": (None, 4, None, True, True),
    "fused, scaled, clipped": (None, 1, 0.05, True, True),
}


@pytest.mark.parametrize("case", list(CASES))
def test_equals_training_written_by_hand(case):
    dtype, accumulate, clip, scaled, fused = CASES[case]
    expected = by_hand(dtype, accumulate, clip, 256.0 if scaled else 1.0)
    found = by_optimizer(dtype, accumulate, clip, scaled, fused)
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert relative_error(a, b) < (1e-9 if dtype is None else 2e-6), name
    moved = [relative_error(a, b.double()) for a, b in zip(net().parameters(), found.parameters())]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflowed_leaves_everything(kind, fused):
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = kind(model.parameters(), LR, fused=fused)
    Centripetal(model, clusters_of_net(model), STRENGTH).attach([optimizer])
    grads = torch.amp.GradScaler("cpu", init_scale=256.0)
    grads.scale(nn.functional.cross_entropy(model.eval()(batches(1)[0][0]), torch.zeros(4).long())).backward()
    model[0].weight.grad[0, 0, 0, 0] = torch.inf
    grads.step(optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=LR, momentum=0.9), STRENGTH),
    "sgd, decay": (torch.optim.SGD, dict(lr=LR, momentum=0.9, weight_decay=DECAY), STRENGTH),
    "adam, decay": (torch.optim.Adam, dict(lr=0.01, weight_decay=DECAY), 10.0),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=DECAY), 10.0),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x, target in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_members_of_a_cluster_become_equal_statistics_too_and_others_do_not(name):
    kind, options, strength = OPTIMIZERS[name]
    model = net()
    clusters = clusters_of_net(model)
    assert all(relative > 0.1 for _, relative in cluster_distances(model, clusters).values())
    optimizer = kind(model.parameters(), **options)
    pull = Centripetal(model, clusters, strength)
    pull.attach([optimizer])
    train(model, optimizer, 250)
    ((_, relative),) = cluster_distances(model, clusters).values()
    assert relative < 1e-3
    for tensor in (model[3].weight, model[1].running_mean, model[4].running_var, model[1].bias):
        assert relative_error(tensor[[0, 0, 1]], tensor[[2, 5, 4]]) < 1e-2, tensor
        assert relative_error(tensor[[0, 1]], tensor[[1, 3]]) > 5e-2
    pull.detach()
    before = [model[0].weight[0] - model[0].weight[2], model[0].weight[1].clone()]
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer.step()
    assert relative_error(before[0], model[0].weight[0] - model[0].weight[2]) > 1
    assert not torch.equal(before[1], model[0].weight[1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_distance_falls_as_the_rule_says(kind):
    model = net()
    clusters = clusters_of_net(model)
    if kind is torch.optim.SGD:
        optimizer, strength, expected = kind(model.parameters(), 0.01, momentum=0.9, weight_decay=0.005), 0.02, 0.25
    else:
        optimizer, strength, expected = kind(model.parameters(), 0.01, weight_decay=0.05), 0.2, 0.25
    Centripetal(model, clusters, strength).attach([optimizer])
    (before, _), *_ = cluster_distances(model, clusters).values()
    train(model, optimizer, 100)
    (after, _), *_ = cluster_distances(model, clusters).values()
    assert math.log(before / after) == pytest.approx(expected, rel=0.1)


TWO_PROCESSES = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from tests.test_pruning.test_methods.clustered import LR, STRENGTH, clusters_of_net, net
from tests.test_pruning.loops import batches
from rep_plugin.pruning.methods.centripetal import Centripetal

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = net().eval()
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), LR, momentum=0.9)
Centripetal(model, clusters_of_net(model), STRENGTH).attach([optimizer])
for x, target in batches(6):
    optimizer.zero_grad()
    nn.functional.cross_entropy(wrapped(x[2 * rank : 2 * rank + 2]), target[2 * rank : 2 * rank + 2]).backward()
    optimizer.step()
torch.save(model.state_dict(), f"{folder}/{rank}.pth")
dist.destroy_process_group()
os._exit(0)  # torch 2.14 with gloo now and then aborts while Python takes it down
"""


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    model = net().eval()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    Centripetal(model, clusters_of_net(model), STRENGTH).attach([optimizer])
    for x, target in batches(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pth")
        assert all(relative_error(p, found[name]) < 1e-12 for name, p in model.named_parameters())


def test_kmeans_finds_what_was_planted_and_is_deterministic():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 40, generator=generator)
    planted = torch.arange(30) % 5
    points = centres[planted] + 0.05 * torch.randn(30, 40, generator=generator)
    state = torch.get_rng_state()
    found = torch.tensor(cluster_points(points, 5, "kmeans"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(len(found[planted == c].unique()) == 1 for c in range(5)) and len(found.unique()) == 5
    assert found.tolist() == cluster_points(points, 5, "kmeans")
    assert cluster_points(points, 4, "even") == sorted(place * 4 // 30 for place in range(30))


@pytest.mark.parametrize("number", [1, 3, 6, 7])
@pytest.mark.parametrize("distinct", [1, 2, 7])
def test_no_cluster_is_empty_even_where_points_are_equal(number, distinct):
    points = torch.randn(distinct, 3).repeat(7, 1)[:7]
    assert set(cluster_points(points, number, "kmeans")) == set(range(number))


def test_coupled_layers_share_clusters_and_kernels_of_all_decide():
    """Pairs of equal rows in both producers of a sum; in one of them alone other pairs would be as near."""
    model = ready(ConvBN(3, 8), Residual(8, 6), Pooled(8))
    pairs = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    with torch.no_grad():
        model[0].conv.weight.copy_(
            torch.randn(4, 3, 3, 3)[pairs] * torch.tensor([1, 1, 0.01, 0.01])[pairs, None, None, None]
        )
        model[1].second.conv.weight.copy_(torch.randn(4, 6, 3, 3)[pairs])
    clusters = plan_clusters(model, X, {"0.conv": 4})
    assert clusters.stands_for == {name: (0, 1, 2, 3, 0, 1, 2, 3) for name in ("0.conv", "1.second.conv")}
    members = Members(model, clusters)
    assert set(members.rows) == {
        f"{layer}.{part}"
        for layer in ("0", "1.second")
        for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    }
    assert set(members.columns) == {"1.first.conv.weight", "2.fc.weight"}


NETS = {
    "chain": lambda: ready(ConvBN(3, 8), ConvBN(8, 10), Pooled(10)),
    "residual": lambda: ready(ConvBN(3, 8), Residual(8, 12), Residual(8, 6), Flat(8)),
    "depthwise, gate": lambda: ready(
        ConvBN(3, 8, act=nn.Hardswish()), ConvBN(8, 16, groups=8), Gate(16, 6), Gate(16, 8, True), ConvBN(16, 8, 1), Pooled(8)
    ),
    "concat": lambda: ready(ConvBN(3, 8), Concat(8, 6, 10), ConvBN(16, 8), Flat(8)),
    "grouped": lambda: ready(ConvBN(3, 8), ConvBN(8, 12, groups=2), ConvBN(12, 8), Pooled(8)),
    "not zero when masked": lambda: ready(ConvBN(3, 8, act=nn.Sigmoid()), ConvBN(8, 8, act=nn.Softplus()), Flat(8)),
    "timm": lambda: calibrate_random_bn_(
        timm.create_model("mobilenetv3_small_050", num_classes=5), torch.randn(4, 3, 33, 33)
    ),
    "mmpretrain": lambda: calibrate_random_bn_(
        build_classifier(
            dict(
                type="ImageClassifier",
                backbone=dict(type="ResNet_CIFAR", depth=18, stem_channels=8, base_channels=8),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=4, in_channels=64),
            )
        ),
        torch.randn(4, 3, 15, 15),
    ),
    "blocks": lambda: calibrate_random_bn_(
        nn.Sequential(RepMobileNetV2(widen_factor=0.35, out_indices=(3,)), Call(lambda maps: maps[0]), Pooled(24)),
        torch.randn(4, 3, 33, 33),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NETS))
def test_merged_equals_snapped_in_float64(name):
    torch.manual_seed(1)
    model = NETS[name]()
    shape = (2, 3, 33, 32) if name in ("timm", "blocks") else (2, 3, 13, 12)
    clusters = plan_clusters(model, shape, Budget(0.5))
    assert Clusters.from_json(clusters.to_json()) == clusters
    assert clusters.plan.units[1] >= 0.4 * clusters.plan.units[0] > 2
    distances = snap_clusters_(model, clusters)
    assert all(0.1 < relative < 1 < 100 * largest for largest, relative in distances.values())
    assert all(found == (0, 0) for found in cluster_distances(model, clusters).values())
    # Statistics that fit the snapped weights: means of random filters are weak, and would hide an error.
    model.train()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.reset_running_stats()
        bn.momentum = None
    model(torch.randn(4, *shape[1:]))
    model.eval()
    snap_clusters_(model, clusters)
    snapped, x = copy.deepcopy(model), torch.randn(shape)
    report = merge_clusters_(model, clusters, example_input=x)
    assert report.max_rel_error <= 1e-9 and report.sensitivity > 1e-3, report
    assert report.params_after == count_params(model) < report.params_before
    if name != "blocks":  # a plan counts their merged form
        assert (clusters.plan.params_after, clusters.plan.macs_after) == (
            count_params(model),
            count_macs(model, x),
        )
    with torch.no_grad():
        assert relative_error(snapped(x), model(x)) < 1e-5
    model.train()
    model(x).sum().backward()


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from(["kmeans", "even"]))
def test_merged_equals_snapped_on_random_networks(model, fraction, method):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))
    clusters = plan_clusters(model, x, Budget(fraction), clusters=method)
    snap_clusters_(model, clusters)
    snapped = copy.deepcopy(model).double()
    report = merge_clusters_(model, clusters)
    assert report.max_rel_error <= 1e-9
    assume(report.sensitivity > 1e-3)
    with torch.no_grad():
        assert (
            relative_error(snapped(x.double()), model.double()(x.double())) < 1e-5
        )  # the sums were rounded to float32


def test_amounts_and_shares():
    model = ready(ConvBN(3, 16), Residual(16, 32), ConvBN(32 // 2, 24), Pooled(24))
    for name in ("macs", "params"):
        plan = plan_clusters(model, X, Budget(**{name: 0.5})).plan
        before, after = getattr(plan, f"{name}_before"), getattr(plan, f"{name}_after")
        assert 0.4 * before < after <= 0.5 * before
    options = PruneOptions(min_channels=4, round_to=4, overrides={"1.first.*": "frozen"})
    plan = plan_clusters(model, X, Budget(macs=0.6), options).plan
    assert plan.widths["1.first.conv"] == (32, 32) and all(
        w % 4 == 0 and w >= 4 for _, w in list(plan.widths.values())[:-1]
    )
    assert plan.why == "macs=0.6, in kmeans clusters, min_channels 4, round_to 4" and not plan.scores
    shares = [after / before for before, after in plan_clusters(model, X, Budget(0.5)).plan.widths.values()][:-1]
    assert max(shares) - min(shares) < 0.05
    widths = plan_clusters(model, X, {"2.conv": 7, "0.conv": 3}).plan.widths
    assert (widths["2.conv"], widths["1.second.conv"]) == ((24, 7), (16, 3))


def normed(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(x, dim=1)


def swapped(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, 1)
    return x + torch.cat([second, first], 1)


def bilinear(projection: int | None) -> list[nn.Module]:
    pool = BilinearPooling(8, projection=projection)
    return [Call(lambda x: (x,)), pool, Call(lambda maps: maps[0]), nn.Linear(pool.out_channels, 5)]


COUNTED = {
    "norm": (lambda: [Call(normed), Pooled(8)], "1.conv", "a norm over channels in '2'"),
    "layer norm": (lambda: [Normed(8), Pooled(8)], "1.conv", "a norm over channels in '2.norm'"),
    "swapped": (lambda: [Call(swapped), Pooled(8)], "1.conv", "none answers to another"),
    "bilinear": (lambda: bilinear(None), "1.conv", "'3', which multiplies its channels"),
    "bilinear, projected": (lambda: bilinear(6), "3.projection.conv", "'3', which multiplies its channels"),
}


@pytest.mark.parametrize("case", list(COUNTED))
def test_channels_that_are_counted_stay_and_the_rest_merges(case):
    """Masking them is exact, merging them is not: twice the same number has another norm than one of twice the weight."""
    make, layer, reason = COUNTED[case]
    torch.manual_seed(0)
    model = ready(ConvBN(3, 8), ConvBN(8, 8), *make())
    clusters = plan_clusters(model, X, Budget(0.5))
    assert reason in clusters.plan.frozen[layer] and clusters.plan.widths[layer][0] == clusters.plan.widths[layer][1]
    assert ("1.conv" in clusters.plan.kept) == (layer != "1.conv") and "0.conv" in clusters.plan.kept
    snap_clusters_(model, clusters)
    assert merge_clusters_(model, clusters).max_rel_error <= 1e-9


def test_merge_refuses_unequal_filters_and_a_failed_proof_leaves_the_model(monkeypatch):
    model = ready(ConvBN(3, 8), ConvBN(8, 10), Pooled(10))
    clusters = plan_clusters(model, X, Budget(0.5))
    with pytest.raises(
        ValueError, match=r"the filters of a cluster in '0.conv.weight' are not equal: call snap_clusters_"
    ):
        merge_clusters_(model, clusters)
    snap_clusters_(model, clusters)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(centripetal, "_sum_columns_", lambda *_: None)
    with pytest.raises(EquivalenceError, match="differs by"):
        merge_clusters_(model, clusters)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


BAD = {
    "method": (dict(clusters="ward"), r"clusters must be one of even, kmeans, got 'ward'"),
    "budget": (dict(budget=Budget(macs=0.01)), r"macs \(=.*\) cannot be met: the least that remains is"),
    "pattern": (dict(options=PruneOptions(ignore=["nothing"])), "no layer is named like 'nothing'"),
    "layer": (dict(budget={"nothing": 2}), "the model has no layer 'nothing'"),
    "frozen": (dict(budget={"2.fc": 2}), "'2.fc' cannot be merged to 2 channels: '2.fc' makes the model output"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit_is_named(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        plan_clusters(ready(ConvBN(3, 8), ConvBN(8, 10), Pooled(10)), X, **dict(budget=Budget(macs=0.5)) | arguments)
    assert "\n" not in str(caught.value)


def test_other_models_and_broken_texts_are_refused():
    model = ready(ConvBN(3, 8), ConvBN(8, 10), Pooled(10))
    clusters = plan_clusters(model, X, Budget(0.5))
    with pytest.raises(ValueError, match="the plan is for another model"):
        snap_clusters_(ready(ConvBN(3, 9), ConvBN(9, 10), Pooled(10)), clusters)
    data = json.loads(clusters.to_json())
    data["stands_for"]["0.conv"][1] = 7 if data["stands_for"]["0.conv"][1] != 7 else 6
    for text, message in (
        ("[]", "the text holds no clusters"),
        (json.dumps(data), "clusters of '0.conv' do not stand for"),
    ):
        with pytest.raises(ValueError, match=message):
            Clusters.from_json(text)
    model[0].conv.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.conv.weight' \(1 of 6 such tensors\) is not trained"):
        Centripetal(model, clusters).attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)])
    with pytest.raises(ValueError, match="nothing in Sequential can be merged: '0' makes the model output"):
        plan_clusters(nn.Sequential(nn.Conv2d(3, 4, 3)), X, Budget(0.5))
    with pytest.raises(TraceError):
        plan_clusters(nn.Sequential(Call(lambda x: x if x.sum() > 0 else -x)), X, Budget(0.5))
