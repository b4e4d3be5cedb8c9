"""Compactors: exact in float64 wherever they stand, forgetting against the same training written out by hand."""

import copy

import pytest
import timm
import torch
from mmpretrain.models import build_classifier
from torch import nn

from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.errors import EquivalenceError
from rep_plugin.pruning import apply_plan, trace_channels
from rep_plugin.pruning.methods.compactors import (
    Compactor,
    compactors_of,
    find_sites,
    insert_compactors_,
    merge_compactors_,
)
from rep_plugin.pruning.methods.resrep import Forgetting, ResRep
from rep_plugin.pruning.planning import Budget, PruneOptions
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_pruning.loops import gradients_by_hand, new_scaler, run_training
from tests.test_pruning.nets import Call, Concat, ConvBN, Flat, Gate, Ghost, Halves, Last, Pooled, Residual, ready

SHAPE = (1, 3, 15, 13)
X = torch.randn(3, *SHAPE[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Inverted(nn.Module):
    """Expand, depthwise, gate, project, with a shortcut."""

    def __init__(self, width: int, inner: int, act: type = nn.ReLU6):
        super().__init__()
        self.expand = ConvBN(width, inner, 1, act=act())
        self.depthwise = ConvBN(inner, inner, groups=inner, act=act())
        self.gate, self.project = Gate(inner, 4), ConvBN(inner, width, 1, act=nn.Identity())

    def forward(self, x):
        return x + self.project(self.gate(self.depthwise(self.expand(x))))


def biased() -> ConvBN:
    layer = ConvBN(8, 9)
    layer.conv.bias = nn.Parameter(torch.randn(9))
    return layer


NETS = {
    "chain": lambda: ready(ConvBN(3, 8), ConvBN(8, 10, 5, 2), Pooled(10)),
    "convolution with a bias": lambda: ready(ConvBN(3, 8), biased(), Flat(9)),
    "residual": lambda: ready(ConvBN(3, 8), Residual(8, 6), Residual(8, 7), Pooled(8)),
    "inverted residual": lambda: ready(ConvBN(3, 8), Inverted(8, 16), Inverted(8, 12, nn.Hardswish), Pooled(8)),
    "separable": lambda: ready(ConvBN(3, 8), ConvBN(8, 8, groups=8), ConvBN(8, 16, 3, groups=8), ConvBN(16, 6), Flat(6)),
    "grouped": lambda: ready(ConvBN(3, 8, 1), ConvBN(8, 12, groups=4), ConvBN(12, 6, 1), Pooled(6)),
    "concat": lambda: ready(ConvBN(3, 8), Concat(8, 5, 7), ConvBN(12, 6), Pooled(6)),
    "shuffle": lambda: ready(ConvBN(3, 8), Halves(8), Halves(8), ConvBN(8, 6), Pooled(6)),
    "ghost": lambda: ready(ConvBN(3, 8), Ghost(8, 10), ConvBN(10, 6), Pooled(6)),
}  # fmt: skip


def learnt(model: nn.Module, macs: float | int = 0.6, shape=SHAPE, noise: float = 0.3, **options) -> ResRep:
    """Compactors as after a training: anything but identities, the rows to be forgotten zero but for a rest."""
    resrep = ResRep(model, shape, Budget(macs=macs), PruneOptions(**options))
    resrep.insert_(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in resrep.parameters(model):
            weight.add_(noise * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype))
    return resrep


def forget_(resrep: ResRep, model: nn.Module, plan) -> None:
    with torch.no_grad():
        for name, rows in resrep.forgotten(plan).items():
            compactors_of(model, resrep.sites)[name].weight[rows] = 0


def check(model: nn.Module, x: torch.Tensor, shape, **options) -> tuple[nn.Module, nn.Module]:
    """Return the network with compactors whose forgotten rows are zero, and what it is compacted to."""
    stock = copy.deepcopy(model)
    resrep = learnt(model, shape=shape, **options)
    plan = resrep.choose(model)
    forget_(resrep, model, plan)
    narrow = copy.deepcopy(model)
    report = resrep.compact_(narrow, plan)
    assert report.macs_after <= resrep.target < report.macs_before and report.max_rel_error < 1e-9
    assert list(narrow.state_dict()) == list(stock.state_dict())
    expected, got = model(x), narrow(x)
    assert relative_error(expected, got) < 1e-9
    assert ((expected[0] - expected[1]).abs().max() / expected.abs().max()) > 1e-3
    assert relative_error(stock(x), expected) > 1e-3  # the compactors did something
    apply_plan(stock, plan, verify=False)
    assert {k: v.shape for k, v in stock.state_dict().items()} == {k: v.shape for k, v in narrow.state_dict().items()}
    return model, narrow


@pytest.mark.parametrize("case", list(NETS))
def test_compacted_network_computes_the_same(case):
    check(NETS[case]().double(), X, SHAPE)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18d"])
def test_timms_networks(name):
    """BatchNormAct2d, squeeze and excite, and an average pool before the shortcut's convolution."""
    torch.manual_seed(0)
    width = {} if name == "mobilenetv3_small_050" else {"block_args": {}, "stem_width": 8, "channels": (8, 12, 16, 20)}
    model = timm.create_model(name, num_classes=5, **width)
    calibrate_random_bn_(model, torch.randn(4, 3, 48, 48))
    x = torch.randn(2, 3, 41, 48, generator=torch.Generator().manual_seed(2)).double()
    check(model.double(), x, (1, 3, 48, 48), macs=0.7, noise=0.05)  # a deep random network with more amplifies rounding


@pytest.mark.parametrize(
    "backbone",
    [
        dict(type="MobileNetV2", widen_factor=0.25),
        dict(type="ResNet_CIFAR", depth=18, stem_channels=8, base_channels=8),
    ],
)
def test_mmpretrains_networks(backbone):
    torch.manual_seed(0)
    width = 1280 if backbone["type"] == "MobileNetV2" else 64
    head = dict(type="LinearClsHead", num_classes=3, in_channels=width)
    model = build_classifier(
        dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head)
    )
    calibrate_random_bn_(model, torch.randn(8, 3, 32, 32))
    x = torch.randn(2, 3, 33, 32, generator=torch.Generator().manual_seed(2)).double()
    check(model.double(), x, (1, 3, 32, 32), macs=0.7, noise=0.05)  # a deep random network with more amplifies rounding


def test_single_precision_is_rounded_once():
    model = NETS["inverted residual"]()
    resrep = learnt(model)
    plan = resrep.choose(model)
    twin, double = copy.deepcopy(model), copy.deepcopy(model).double()
    resrep.compact_(twin, plan, X[:2].float())
    resrep.compact_(double, plan)
    for (name, ours), theirs in zip(twin.state_dict().items(), double.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), name


def test_a_depthwise_norms_beta_goes_with_its_channel():
    """Without the factor behind it, what it adds to a channel of zeros would be lost at the removal."""
    model = NETS["inverted residual"]().double()
    resrep = learnt(model)
    plan = resrep.choose(model)
    forget_(resrep, model, plan)
    narrow = copy.deepcopy(model)
    resrep.compact_(narrow, plan)
    factor = compactors_of(model, resrep.sites)["1.depthwise.conv"].weight
    rows = resrep.forgotten(plan)["1.depthwise.conv"]
    assert len(rows) and relative_error(model(X), narrow(X)) < 1e-9
    with torch.no_grad():
        factor[rows] = 1
    assert relative_error(model(X), narrow(X)) > 1e-3


def test_merged_norm_begins_fine_tuning_near_what_was_trained():
    """Its variance is that of its input where channels are not correlated: batch statistics hardly change the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)).double()
    x = torch.randn(16, 6, 16, 16, dtype=torch.float64)
    nn.init.dirac_(model[0].weight)
    calibrate_random_bn_(model, x)
    sites = find_sites(model, trace_channels(model, (1, 6, 16, 16)))
    insert_compactors_(model, sites)
    with torch.no_grad():
        model[1].compactor.weight.add_(0.3 * torch.randn(6, 6, 1, 1))
    expected, in_training = model(x), copy.deepcopy(model).train()(x)
    merge_compactors_(model, sites)
    assert relative_error(expected, model(x)) < 1e-12
    model.train()
    assert relative_error(in_training, model(x)) < 0.05


def test_scores_are_norms_over_all_pairs_of_a_group():
    model = NETS["residual"]().double()
    resrep = learnt(model, min_channels=2)
    plan = resrep.choose(model)
    compactors = compactors_of(model, resrep.sites)
    group = ["0.conv", "1.second.conv", "2.second.conv"]
    rows = torch.stack([compactors[name].weight.flatten(1).square().sum(1) for name in group])
    by_hand = rows.mean(0).sqrt()
    for name in group:
        assert torch.allclose(torch.tensor(plan.scores[name], dtype=torch.float64), by_hand)
    assert torch.allclose(
        torch.tensor(plan.scores["1.first.conv"]).double(), compactors["1.first.conv"].weight.flatten(1).norm(dim=1)
    )
    lost = [score for name in plan.widths if name in plan.kept for score in lost_scores(plan, name)]
    stay = [plan.scores[name][i] for name in plan.kept for i in plan.kept[name] if plan.widths[name][1] > 2]
    assert lost and max(lost) <= min(stay)


def lost_scores(plan, name: str) -> list[float]:
    return [score for i, score in enumerate(plan.scores[name]) if i not in plan.kept[name]]


def test_depthwise_factors_are_in_no_score():
    model = NETS["inverted residual"]().double()
    resrep = learnt(model)
    before = resrep.choose(model).scores
    with torch.no_grad():
        compactors_of(model, resrep.sites)["1.depthwise.conv"].weight.mul_(100)
    assert resrep.choose(model).scores == before
    kinds = {site.conv: (site.scored, site.groups) for site in resrep.sites}
    assert kinds["1.depthwise.conv"] == (False, 16) and kinds["1.expand.conv"] == (True, 1)


def test_what_remains_falls_to_the_target_and_options_hold():
    model = NETS["inverted residual"]().double()
    resrep = learnt(model, min_channels=4, round_to=4, ignore=["0.conv"])
    steps = [
        resrep.choose(model, resrep.macs_before - (resrep.macs_before - resrep.target) * k // 4) for k in (1, 2, 3, 4)
    ]
    macs = [plan.macs_after for plan in steps]
    assert macs == sorted(macs, reverse=True) and macs[-1] <= resrep.target == int(0.6 * resrep.macs_before)
    narrower = {name: after for name, (before, after) in steps[-1].widths.items() if after < before}
    assert narrower and all(after >= 4 and after % 4 == 0 for after in narrower.values())
    assert steps[-1].frozen["0.conv"] == "'0.conv' is ignored by '0.conv'" and "0.conv" not in resrep.forgotten(
        steps[-1]
    )
    whole = ResRep(NETS["chain"](), SHAPE, Budget(macs=30_000))
    assert whole.target == 30_000


def test_largest_rows_tell_what_is_lost():
    model = NETS["residual"]().double()
    resrep = learnt(model)
    plan = resrep.choose(model)
    forget_(resrep, model, plan)
    name, rows = next((name, rows) for name, rows in resrep.forgotten(plan).items() if len(rows))
    with torch.no_grad():
        compactors_of(model, resrep.sites)[name].weight[rows[0], :2, 0, 0] = torch.tensor([3e-3, -4e-3]).double()
    found, norms = resrep.rows_left(model, plan), compactors_of(model, resrep.sites)[name].row_norms()
    beside = [norm for i, norm in enumerate(norms.tolist()) if i not in rows]
    assert found["largest_dropped_row"] == pytest.approx(5e-3) and found["smallest_kept_row"] > 0.1
    assert found["largest_dropped_share"] == pytest.approx(5e-3 * len(beside) / sum(beside))


def test_rows_that_are_not_finite_are_refused():
    model = NETS["chain"]()
    resrep = learnt(model)
    model[1].bn.compactor.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the compactor behind '1.bn' holds NaN or infinity: training has diverged"):
        resrep.choose(model)


def test_where_compactors_stand():
    """A convolution that two layers read has none; nor has one whose norm does not tell its output."""
    net = ready(ConvBN(3, 8), Call(nn.Identity()), ConvBN(8, 6), Pooled(6))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.net = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), net

        def forward(self, x):
            y = self.conv(x)
            return self.net(self.bn(y) + y)

    names = [site.conv for site in find_sites(Twice(), trace_channels(Twice(), SHAPE))]
    assert names == ["net.0.conv", "net.2.conv"]
    shared = ConvBN(3, 3)
    twice = nn.Sequential(shared, shared)
    assert [site.conv for site in find_sites(twice, trace_channels(twice, SHAPE))] == ["0.conv"]
    bns = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bns = nn.Conv2d(3, 3, 1), bns

        def forward(self, x):
            return self.bns[1](self.conv(self.bns[0](self.conv(x))))

    assert not find_sites(Heads(), trace_channels(Heads(), SHAPE))


def test_copies_run_their_own_compactors_and_the_networks_initialisation_leaves_them():
    model = NETS["chain"]().double()
    resrep = learnt(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        resrep.parameters(twin)[0].zero_()
    assert relative_error(model(X), twin(X)) > 1e-3 and not isinstance(model[0].bn.compactor, nn.Conv2d)
    keys = set(model.state_dict())
    assert "0.bn.compactor.weight" in keys and {k for k in keys if "compactor" not in k} == set(
        NETS["chain"]().state_dict()
    )


# Forgetting against plain SGD written out.
STRENGTH, MARKED, LR, MOMENTUM = 0.02, 2.0, 0.1, 0.99  # strong enough to get past zero in a few steps


def training_net(amp: bool) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), Compactor(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), Compactor(4, 2),
                        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))  # fmt: skip
    return net if amp else net.double()


ROWS = {"a": torch.tensor([1, 4]), "b": torch.tensor([2])}


def by_hand(dtype, accumulate: int, clip: float | None, scale: float) -> nn.Module:
    model = training_net(dtype is not None)
    marked = {model[1].weight: [1, 4], model[4].weight: [2]}
    momentum = {p: torch.zeros_like(p) for p in model.parameters()}
    for grads in gradients_by_hand(model, dtype, accumulate, clip, scale):
        for p, grad in grads.items():
            for j, row in enumerate(p) if p in marked else ():
                if j in marked[p]:
                    grad[j] = MARKED * row / row.square().sum().sqrt() if row.any() else 0
                else:
                    grad[j] += STRENGTH * row / row.square().sum().sqrt()
            momentum[p] = (MOMENTUM if p in marked else 0.9) * momentum[p] + grad
            before = p.clone()
            p -= LR * momentum[p]
            for j in marked.get(p, ()):
                if (p[j] * before[j]).sum() <= 0:
                    p[j], momentum[p][j] = 0, 0
    return model


CASES = {
    "fp32": (None, 1, None, None, False),
    "bf16": (torch.bfloat16, 1, None, None, False),
    "fp16, scaled": (torch.float16, 1, None, new_scaler, False),
    "accumulated": (None, 4, None, None, False),
    "clipped": (None, 1, 0.05, None, False),
    "fused, scaled, clipped, accumulated": (None, 4, 0.05, new_scaler, True),
}


@pytest.mark.parametrize("case", list(CASES))
def test_forgetting_equals_training_written_by_hand(case):
    dtype, accumulate, clip, make_scaler, fused = CASES[case]
    expected = by_hand(dtype, accumulate, clip, 256.0 if make_scaler else 1.0)
    model = training_net(dtype is not None)
    compactors = {"a": model[1].weight, "b": model[4].weight}
    rest = [p for p in model.parameters() if all(p is not weight for weight in compactors.values())]
    groups = [dict(params=rest), dict(params=list(compactors.values()), momentum=MOMENTUM)]
    optimizer = torch.optim.SGD(groups, LR, momentum=0.9, fused=fused)
    forgetting = Forgetting(compactors, STRENGTH, MARKED)
    forgetting.mark(ROWS)
    forgetting.attach([optimizer])
    run_training(model, optimizer, dtype, accumulate, clip, make_scaler and make_scaler())
    for (name, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert relative_error(a, b) < (1e-9 if dtype is None else 1e-6), name
    settled = model[1].weight[[1, 4]].abs().sum(1) == 0
    assert settled.all() == (case in ("fp32", "clipped"))
    assert relative_error(model[1].weight[[0, 2]], training_net(dtype is not None)[1].weight[[0, 2]]) > 1e-3


def test_marked_rows_shrink_to_nothing_and_others_do_not():
    """Whatever the objective wants; detached, nothing is done any more."""
    compactor = Compactor(4).double()
    optimizer = torch.optim.SGD(compactor.parameters(), 0.1, momentum=0.9)
    forgetting = Forgetting({"a": compactor.weight}, 1e-2)
    forgetting.attach([optimizer])
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        if step == 20:  # until here, the objective gives momentum in all directions
            forgetting.mark({"a": torch.tensor([0, 3])})
        optimizer.zero_grad()
        noise = 0.3 * torch.randn(4, 4, generator=generator)
        (compactor.weight.flatten(1) - torch.eye(4) - noise).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        optimizer.step()
    norms = compactor.row_norms()
    assert norms[[0, 3]].max() == 0 and norms[[1, 2]].min() > 0.5
    forgetting.detach()
    before = compactor.weight.clone()
    compactor.weight.grad = torch.zeros_like(compactor.weight)
    optimizer.state.clear()
    optimizer.step()
    assert torch.equal(compactor.weight, before)


class Blind(nn.Module):
    """Calls its norm's forward, and runs no hooks of it."""

    def __init__(self):
        super().__init__()
        self.layer, self.net = ConvBN(3, 8), Pooled(8)

    def forward(self, x):
        return self.net(self.layer.bn.forward(self.layer.conv(x)))


REFUSED = {
    "budget": (
        NETS["chain"],
        dict(macs=1.5),
        r"macs must be a share \(a float <= 1.0\) or a whole number > 1, got 1.5",
    ),
    "no budget": (NETS["chain"], dict(macs=None), "give exactly one of .*, got none"),
    "out of reach": (NETS["chain"], dict(macs=100), r"macs \(=100\) cannot be met: the least that remains is"),
    "pattern": (NETS["chain"], dict(ignore=["*.nothing"]), r"no layer is named like '\*.nothing'"),
    "patterns": (NETS["chain"], dict(ignore="0.conv"), "ignore must be a list of strings, got '0.conv'"),
    "min_channels": (NETS["chain"], dict(min_channels=0), "min_channels must be a whole number >= 1 or None, got 0"),
    "no place": (lambda: ready(Last(3, 8), Pooled(3)), {}, "nothing in Sequential can be pruned by compactors"),
    "blocks": (lambda: ready(RepVGGBlock(3, 8), Pooled(8)), {}, "has 1 blocks of several branches .*take another way"),
    "not run": (Blind, {}, "a compactor behind 'layer.bn' is not run: the model does not call it as a module"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused(case):
    make, changes, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message) as caught:
        options = dict(macs=0.5) | changes
        ResRep(model, SHAPE, Budget(macs=options.pop("macs")), PruneOptions(**options)).insert_(model)
    assert "\n" not in str(caught.value)


def test_a_group_that_would_keep_traces_is_frozen():
    """A convolution without a norm, added to others, still makes its channel where all compactors make zeros."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = ConvBN(3, 8, act=nn.Identity()), nn.Conv2d(3, 8, 1), ConvBN(8, 6)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    model = ready(Mixed(), Pooled(6))
    resrep = ResRep(model, SHAPE, Budget(macs=0.8))
    assert [site.conv for site in resrep.sites] == ["0.c.conv"]
    resrep.insert_(model)
    assert "0.c.conv.weight would still see something" in resrep.choose(model).frozen["0.a.conv"]


def test_a_second_insertion_and_a_failing_proof_leave_the_model(monkeypatch):
    model = NETS["chain"]().double()
    resrep = learnt(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'0.bn' has a 'compactor' already, expected a model without"):
        resrep.insert_(model)
    plan = resrep.choose(model)
    monkeypatch.setattr("rep_plugin.pruning.methods.resrep.merge_compactors_", lambda twin, sites: spoilt(twin, sites))
    with pytest.raises(EquivalenceError):
        resrep.compact_(model, plan)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def spoilt(model: nn.Module, sites) -> None:
    merge_compactors_(model, sites)
    model[0].bn.bias.data += 1e-3
