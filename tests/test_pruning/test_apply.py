import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin import EquivalenceError, PrunePlan, apply_plan, plan_pruning, reparameterize
from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.blocks.families import DiverseBranchBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.measure.costs import count_params
from rep_plugin.pruning.surgery import mask as masking
from rep_plugin.pruning.surgery import remove as surgery
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_pruning.nets import (
    Call,
    Concat,
    ConvBN,
    Flat,
    Gate,
    Ghost,
    Halves,
    Last,
    Pooled,
    Residual,
    mask_outputs,
    ready,
)

X = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(0))


def net_of():
    return ready(ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32), Gate(32, 8), Flat(32))


def pruned_equals_hooked(net, plan):
    """Compare with a copy whose layers' outputs are set to zero by hooks: an oracle that knows nothing of labels."""
    masked = copy.deepcopy(net).double().eval()
    mask_outputs(masked, plan)
    report = apply_plan(net, plan)
    with torch.no_grad():
        expected, got = masked(X.double()), copy.deepcopy(net).double().eval()(X.double())
    assert relative_error(expected, got) < 1e-9 and report.max_rel_error < 1e-9
    return report


NETS = {
    "residual": lambda: (ConvBN(3, 16), Residual(16, 24), Residual(16, 8), Pooled(16)),
    "concat": lambda: (ConvBN(3, 8), Concat(8, 6, 10), Concat(16, 4, 4), Flat(8)),
    "depthwise": lambda: (ConvBN(3, 8), ConvBN(8, 16, groups=8), ConvBN(16, 16, groups=16), Pooled(16)),
    "grouped": lambda: (ConvBN(3, 12), ConvBN(12, 18, groups=3), ConvBN(18, 12, groups=6), Pooled(12)),
    "gate": lambda: (ConvBN(3, 8, act=nn.Hardswish()), Gate(8, 4), Gate(8, 4, linear=True), Flat(8)),
    "ghost": lambda: (Ghost(3, 12), Ghost(12, 16), Pooled(16)),
    "halves": lambda: (ConvBN(3, 16), Halves(16), ConvBN(16, 16), Halves(16, shuffle=False), Pooled(16)),
    "last": lambda: (ConvBN(3, 8), Last(8, 12), Pooled(8)),
    "transposed": lambda: (ConvBN(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), ConvBN(6, 4), Pooled(4)),
    "prelu": lambda: (ConvBN(3, 8, act=nn.PReLU(8)), ConvBN(8, 4), Pooled(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_removed_equals_masked(name):
    net = ready(*NETS[name]())
    plan = plan_pruning(net, X, "random", 0.4)
    assert plan.units[1] >= 0.3 * plan.units[0] > 1
    report = pruned_equals_hooked(net, plan)
    assert report.params_after == count_params(net) == plan.params_after < report.params_before


def test_attributes_follow():
    net = ready(ConvBN(3, 8), ConvBN(8, 16, groups=8), ConvBN(16, 8, groups=2), nn.PReLU(8), Flat(8, side=2))
    plan = PrunePlan.from_widths(net, X, {"0.conv": 6, "2.conv": 4})
    apply_plan(net, plan)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == len(module.running_var) == module.num_features
    assert net[1].conv.groups == net[1].conv.in_channels == 6 and net[1].conv.out_channels == 12
    assert net[2].conv.groups == 2 and net[3].num_parameters == 4 and net[4].fc.in_features == 16


def test_a_sigmoid_that_is_no_gate_is_masked_at_its_readers():
    """Half a map of a removed channel would go on: what counts is that nothing of it is read."""
    net = ready(ConvBN(3, 8, act=nn.Sigmoid()), ConvBN(8, 6), Call(lambda x: x + 1), Flat(6))
    plan = plan_pruning(net, X, "random", 0.4)
    assert apply_plan(net, plan).max_rel_error < 1e-9 and net[0].conv.out_channels < 8


def test_output_maps_can_be_pruned_on_request():
    net = ready(ConvBN(3, 8), ConvBN(8, 10))
    plan = plan_pruning(net, X, "random", 0.5, prune_outputs=True)
    before = copy.deepcopy(net)(X)[:, list(plan.kept["1.conv"])]
    apply_plan(net, plan)
    assert net(X).shape == before.shape and net[1].conv.out_channels < 10


BLOCKS = {
    "repvgg": lambda: (RepVGGBlock(3, 8, stride=2, act=nn.ReLU()), RepVGGBlock(8, 8), RepVGGBlock(8, 12, groups=2)),
    "post_bn": lambda: (RepVGGBlock(3, 8, post_bn=True), nn.ReLU(), RepVGGBlock(8, 8, post_bn=True)),
    "dbb": lambda: (DiverseBranchBlock(3, 8, act=nn.ReLU()), DiverseBranchBlock(8, 8, groups=8), DiverseBranchBlock(8, 12)),
    "mobileone": lambda: (MobileOneBlock(3, 8, copies=2), MobileOneBlock(8, 8, groups=8), MobileOneBlock(8, 12, 1)),
    "inverted": lambda: (
        RepInvertedResidual(3, 8, 2),
        RepInvertedResidual(8, 8, branches=("avgpool", "bottleneck", "identity")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_lose_outer_channels_and_still_merge(name, deployed):
    blocks = BLOCKS[name]()
    net = ready(*blocks, nn.ReLU(), Pooled(blocks[-1].out_channels))
    if deployed:
        net, _ = reparameterize(net, X)
    inner = {n: m.weight.shape for n, m in net.named_modules() if n.endswith(("expand", "depthwise"))}
    plan = plan_pruning(net, X, "l1", 0.3)
    report = apply_plan(net, plan)
    assert report.max_rel_error < 1e-9 and report.params_after < report.params_before
    for n, shape in inner.items():
        assert net.get_submodule(n).weight.shape[0] == shape[0]  # the expanded widths stay
    last = next(
        m
        for m in reversed(list(net))
        if isinstance(m, (RepVGGBlock, DiverseBranchBlock, MobileOneBlock, RepInvertedResidual))
    )
    assert last.out_channels == plan.widths[str(list(net).index(last))][1]
    if not deployed:
        merged, proof = reparameterize(net, X)
        assert proof.max_rel_error < 1e-9
        assert count_params(merged) == count_params(net) - sum(
            sum(p.numel() for p in b.parameters()) for b in net if hasattr(b, "branches")
        ) + sum(sum(p.numel() for p in b.parameters()) for b in merged if hasattr(b, "reparam_conv"))
        assert plan.params_after == count_params(merged)


@pytest.mark.parametrize("method", ["full", "triu", "tensor_sketch", "random_maclaurin", "low_rank", "isqrt_cov"])
@pytest.mark.parametrize("projection", [None, 6])
def test_bilinear_heads(method, projection):
    head = BilinearHead(8, 5, method, dim=32, projection=projection)
    net = ready(ConvBN(3, 8), Call(lambda x: (x,)), head)
    plan = plan_pruning(net, X, "random", 0.4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer)
    report = apply_plan(net, plan, optimizer)
    assert report.max_rel_error < 1e-9
    assert (report.macs_after, report.params_after) == (plan.macs_after, plan.params_after)
    kept = plan.widths["0.conv"][1] if projection is None else plan.widths["2.pool.projection.conv"][1]
    columns = {"full": kept**2, "triu": kept * (kept + 1) // 2, "isqrt_cov": kept * (kept + 1) // 2}
    assert head.fc.in_features == head.in_features == columns.get(method, head.pool.out_channels)
    assert head.pool.in_channels == plan.widths["0.conv"][1]
    train(net, optimizer)


def test_a_pair_of_streams():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = ConvBN(3, 8), ConvBN(3, 6)
            self.head = BilinearHead((8, 6), 5)

        def forward(self, x):
            return self.head((self.first(x), self.second(x)))

    net = calibrate_random_bn_(Two(), torch.randn(4, 3, 13, 13, generator=torch.Generator().manual_seed(1)))
    plan = PrunePlan.from_widths(net, X, {"first.conv": 5, "second.conv": 4})
    assert apply_plan(net, plan).max_rel_error < 1e-9
    assert net.head.pool.in_channels == (5, 4) and net.head.fc.in_features == 20


def train(net, optimizer, steps=2):
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), torch.tensor([0, 1])).backward()
        optimizer.step()
    net.eval()


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, 0.01),
        lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    ],
)
def test_the_optimizer_goes_on_with_the_same_parameters(build):
    net = net_of()
    optimizer = build(net.parameters())
    train(net, optimizer)
    objects = {name: id(p) for name, p in net.named_parameters()}
    old = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in net.named_parameters()}
    plan = plan_pruning(net, X, "random", 0.4)
    gradient = net[2].conv.weight.grad.clone()
    apply_plan(net, plan, optimizer)
    assert objects == {name: id(p) for name, p in net.named_parameters()}
    rows = list(plan.kept["2.conv"])
    columns = list(plan.kept["0.conv"])
    assert torch.equal(net[2].conv.weight.grad, gradient[rows][:, columns])
    for key, value in optimizer.state[net[2].conv.weight].items():
        if value.dim():
            assert torch.equal(value, old["2.conv.weight"][key][rows][:, columns])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, optimizer)
    assert all((p != before[name]).any() for name, p in net.named_parameters())


def test_without_the_optimizer_its_momentum_no_longer_fits():
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer)
    apply_plan(net, plan_pruning(net, X, "random", 0.4))
    with pytest.raises(RuntimeError):
        train(net, optimizer)


def test_an_ema_copy_is_pruned_alike():
    net = net_of()
    ema = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        ema.module[0].conv.weight *= 2
    plan = plan_pruning(net, X, "random", 0.4)
    expected = ema.module[0].conv.weight[list(plan.kept["0.conv"])]
    apply_plan(net, plan, ema=ema)
    assert torch.equal(ema.module[0].conv.weight, expected)
    ema.update_parameters(net)
    with pytest.raises(ValueError, match=r"ema \(Linear\) does not hold the parameters of Sequential"):
        apply_plan(net_of(), plan, ema=nn.Linear(2, 2))


def test_memory_format_mode_and_frozen_parameters_stay():
    net = net_of().to(memory_format=torch.channels_last).train()
    net[0].eval()
    net[2].conv.weight.requires_grad_(False)
    apply_plan(net, plan_pruning(net, X, "random", 0.4))
    assert net[2].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.training and not net[0].bn.training and not net[2].conv.weight.requires_grad


def test_pruning_goes_on_where_it_left_off():
    net = net_of()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    widths = [net[2].conv.out_channels]
    for _ in range(3):
        train(net, optimizer)
        apply_plan(net, plan_pruning(net, X, "l1", 0.3), optimizer)
        widths.append(net[2].conv.out_channels)
    assert widths == sorted(set(widths), reverse=True)
    before = copy.deepcopy(net.state_dict())
    apply_plan(net, plan_pruning(net, X, "l1", 0.0))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_plans_for_other_models_are_refused():
    plan = plan_pruning(net_of(), X, "random", 0.4)
    stem, gate = (ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32)), Gate(32, 8)
    for layers, message in (
        (
            (ConvBN(3, 16), Residual(16, 20), ConvBN(16, 32), gate, Flat(32)),
            "'1.first.conv' has 20 channels, the plan says 24",
        ),
        ((*stem, Flat(32)), "Sequential has no layer '3.down'"),
        ((*stem, gate, Flat(32), nn.Linear(5, 5)), "does not know layer '5'"),
    ):
        net = ready(*layers)
        state = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=message):
            apply_plan(net, plan)
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_plans_that_break_a_coupling_are_refused():
    net = net_of()
    plan = PrunePlan.from_widths(net, X, {"0.conv": 8})
    data = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    for kept, message in (
        ({"0.conv": plan.kept["0.conv"]}, "go with removed ones of a coupled layer"),
        ({"4.fc": (0, 1)}, "'4.fc', which cannot be removed"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_plan(net, PrunePlan(**{**data, "kept": kept}))
    again = net_of()
    apply_plan(again, plan)
    with pytest.raises(ValueError, match="'0.conv' has 8 channels, the plan says 16"):
        apply_plan(again, plan)


def test_wrapped_models_and_strange_optimizers_are_refused():
    net = net_of()
    plan = plan_pruning(net, X, "random", 0.4)
    with pytest.raises(ValueError, match="pass its .module, and wrap the model again"):
        apply_plan(nn.DataParallel(net), plan)
    with pytest.raises(
        ValueError, match="optimizer must be a torch.optim.Optimizer or a list of them or None, got a l"
    ):
        apply_plan(net, plan, iter([1]))
    assert net[0].conv.out_channels == 16


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (torch.randn(2, 5, 8, 8), "does not go through Sequential"),
        ((torch.randn(2, 3, 8, 8), torch.ones(2)), "does not fit Sequential.forward: too many positional arguments"),
        (torch.full((2, 3, 8, 8), float("nan")), "must hold finite values, got 384 of 384"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "must be a float tensor .* on meta"),
    ],
)
def test_an_example_that_does_not_fit_is_named_as_the_user_does(example, told):
    net = net_of()
    plan = plan_pruning(net, X, "random", 0.4)
    with pytest.raises(ValueError, match=f"^example_input,? .*{told}"):
        apply_plan(net, plan, example_input=example)
    assert net[0].conv.out_channels == 16


class Conditioned(nn.Module):
    """Two maps and an index: the outputs are maps."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.shift = ConvBN(3, 8), ConvBN(8, 6), nn.Embedding(4, 8)

    def forward(self, image, guide, kind):
        return self.two(self.one(image + guide) * self.shift(kind).mean(1)[:, None, None, None])


@pytest.mark.parametrize("prune_outputs", [False, True])
def test_models_of_several_inputs_are_proven(prune_outputs):
    net = Conditioned().eval()
    example = {"image": X, "guide": X.flip(3), "kind": torch.arange(len(X))}
    plan = plan_pruning(net, example, "random", 0.4, prune_outputs=prune_outputs)
    report = apply_plan(net, plan, example_input=example)
    assert report.max_rel_error < 1e-9 and net.one.conv.out_channels < 8
    assert (net.two.conv.out_channels < 6) == prune_outputs


def test_a_failed_proof_leaves_everything_whole(monkeypatch):
    net = net_of()
    plan = plan_pruning(net, X, "random", 0.4)
    state = copy.deepcopy(net.state_dict())
    right = surgery.slice_tensor

    def wrong(tensor, dims, kept):
        out = right(tensor, dims, kept)
        return out.roll(1, 1) if tensor.dim() == 4 and 1 in dims and kept.changes(dims[1]) else out

    monkeypatch.setattr(surgery, "slice_tensor", wrong)
    with pytest.raises(EquivalenceError, match="does not equal setting them to zero"):
        apply_plan(net, plan)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and net[0].conv.out_channels == 16


@pytest.mark.parametrize("spared", ["bias", "weight"])
def test_the_proof_sees_a_wrong_mask(monkeypatch, spared):
    """Gammas alone, or betas alone, are no mask."""
    right = masking.mask_channels_

    def wrong(model, trace, kept):
        other = copy.copy(trace)
        other.makers = {(name, dim) for name, dim in trace.makers if not name.endswith(f"bn.{spared}")}
        if spared == "weight":
            other.makers = {(name, dim) for name, dim in other.makers if not name.endswith("conv.weight")}
        return right(model, other, kept)

    monkeypatch.setattr("rep_plugin.pruning.apply.mask_channels_", wrong)
    net = net_of()
    with pytest.raises(EquivalenceError):
        apply_plan(net, plan_pruning(net, X, "random", 0.4))


def test_fixed_numbers_in_a_forward_are_found_when_planning_and_by_the_proof(monkeypatch):
    """What shapes alone do not show stays; a plan without that is refused before anything is changed."""
    net = ready(
        ConvBN(3, 8), Call(lambda x: x.reshape(x.shape[0], 2, 4, *x.shape[2:]).mean(1)), ConvBN(4, 4), Pooled(4)
    )
    plan = plan_pruning(net, X, "random", 0.5)
    assert "test_apply.py:" in plan.frozen["0.conv"] and apply_plan(copy.deepcopy(net), plan).max_rel_error < 1e-9
    monkeypatch.setattr("rep_plugin.pruning.planning.planner.bound_groups", lambda *_: {})
    plan = plan_pruning(net, X, "random", 0.5)
    assert plan.widths["0.conv"][1] < 8
    with pytest.raises(EquivalenceError, match="the changed model does not run where"):
        apply_plan(net, plan)
    assert net[0].conv.out_channels == 8


def test_the_report():
    net = ready(ConvBN(3, 8), nn.GroupNorm(2, 8, affine=False), Last(8, 16), Pooled(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = apply_plan(net, plan_pruning(net, X, "l1", 0.5))
    assert report.widths["2.up"] == (16, 8) and "group norm over channels" in report.frozen["0.conv"]
    assert [(b.name, b.kind) for b in report.blocks] == [("2.up", "linear 16 -> 8")]
    text = str(report)
    assert "1 of 4 layers narrower, 3 frozen" in text and "stay as they are: 0.conv, 2.down" in text
    assert '"widths"' in report.to_json() and report.seconds > 0
