import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.blocks.families import DiverseBranchBlock, MobileOneBlock, RepVGGBlock
from rep_plugin.measure.costs import count_macs
from rep_plugin.pruning import TraceError, apply_plan, plan_pruning, trace_channels
from rep_plugin.pruning.tracing.groups import find_groups
from tests.test_pruning.nets import (
    Call,
    Concat,
    ConvBN,
    Flat,
    Gate,
    Ghost,
    Halves,
    Last,
    Normed,
    Pooled,
    Residual,
    ready,
)

SHAPE = (2, 3, 13, 13)


def groups_of(*layers, **options):
    trace = trace_channels(nn.Sequential(*layers), SHAPE, **options)
    return trace, find_groups(trace)


def sizes(groups):
    return {group.layers: len(group.units) for group in groups}


def test_a_residual_ties_its_ends():
    _, groups = groups_of(ConvBN(3, 8), Residual(8, 6), Residual(8, 4), Pooled(8))
    assert sizes(groups) == {
        ("0.conv", "1.second.conv", "2.second.conv"): 8,
        ("1.first.conv",): 6,
        ("2.first.conv",): 4,
        ("3.fc",): 0,
    }
    assert groups[-1].reason.endswith("makes the model output, which keeps its width")


def test_concat_keeps_its_parts_apart():
    trace, groups = groups_of(ConvBN(3, 4), Concat(4, 5, 7), ConvBN(12, 6), Pooled(6))
    assert sizes(groups)[("1.left.conv",)] == 5 and sizes(groups)[("1.right.conv",)] == 7
    right = trace.layers["1.right.conv"].labels
    assert trace.slices["2.conv.weight"][1][5:].tolist() == right.tolist()


def test_flatten_gives_every_channel_its_columns():
    trace, _ = groups_of(ConvBN(3, 4), Flat(4, side=3))
    columns, channels = trace.slices["1.fc.weight"][1], trace.layers["0.conv"].labels
    assert columns.tolist() == channels.repeat_interleave(9).tolist()


def test_depthwise_follows_its_input_and_a_multiplier_goes_in_whole():
    trace, groups = groups_of(ConvBN(3, 4), ConvBN(4, 12, groups=4), ConvBN(12, 5, 1), Pooled(5))
    assert sizes(groups)[("0.conv", "1.conv")] == 4
    assert trace.layers["1.conv"].labels.tolist() == trace.layers["0.conv"].labels.repeat_interleave(3).tolist()


def test_a_grouped_layer_on_channels_that_stay_can_still_lose_outputs():
    _, groups = groups_of(ConvBN(3, 8), nn.GroupNorm(2, 8, affine=False), ConvBN(8, 12, groups=2), Pooled(12))
    assert sizes(groups)[("0.conv",)] == 0 and sizes(groups)[("2.conv",)] == 12
    net = ready(
        ConvBN(3, 8), nn.GroupNorm(2, 8, affine=False), ConvBN(8, 12, groups=2), ConvBN(12, 12, groups=12), Pooled(12)
    )
    plan = plan_pruning(net, SHAPE, "random", 0.5)
    assert plan.widths["2.conv"] == (12, 6) and apply_plan(net, plan).max_rel_error < 1e-9


def test_gates_and_ghosts():
    for linear in (False, True):
        _, groups = groups_of(ConvBN(3, 8), Gate(8, 3, linear), Pooled(8))
        assert sizes(groups)[("0.conv", "1.up")] == 8 and sizes(groups)[("1.down",)] == 3
    _, groups = groups_of(Ghost(3, 8), Pooled(8))
    assert sizes(groups)[("0.first.conv", "0.cheap.conv")] == 4


def test_a_real_slice_of_channels_freezes():
    _, groups = groups_of(ConvBN(3, 8), Call(lambda x: x[:, :5]), Pooled(5))
    assert sizes(groups)[("0.conv",)] == 0 and groups[0].reason.startswith(
        "'0.conv' goes through indexing in '1' (test_tracer.py:"
    )


def test_a_shuffle_pairs_its_rows():
    _, groups = groups_of(ConvBN(3, 8), Halves(8), ConvBN(8, 4), Pooled(4))
    found = sizes(groups)
    assert found[("0.conv", "1.right.conv")] == 4  # halves stay halves, and rows of the shuffle pair up
    _, plain = groups_of(ConvBN(3, 8), Halves(8, shuffle=False), ConvBN(8, 4), Pooled(4))
    assert sizes(plain)[("0.conv",)] == 4 and sizes(plain)[("1.right.conv",)] == 4


def test_native_channel_shuffle_equals_the_written_one():
    trace, _ = groups_of(ConvBN(3, 6), nn.ChannelShuffle(2), ConvBN(6, 4), Pooled(4))
    roots = trace.channels.roots()
    rows = roots[trace.layers["0.conv"].labels].view(2, 3)
    assert torch.equal(rows[0], rows[1])
    assert roots[trace.slices["2.conv.weight"][1]].tolist() == rows.T.flatten().tolist()


def test_a_group_norm_without_weights_freezes_its_channels_but_not_the_inner_ones_and_layer_norm_none():
    _, groups = groups_of(ConvBN(3, 8), nn.GroupNorm(2, 8, affine=False), Last(8, 16), Pooled(8))
    assert sizes(groups)[("2.up",)] == 16
    norm = groups[0]
    assert len(norm.units) == 0 and "a group norm over channels" in norm.reason
    _, groups = groups_of(ConvBN(3, 8), Normed(8), Last(8, 16), Pooled(8))
    assert sizes(groups)[("2.up",)] == 16 and sizes(groups)[("0.conv", "2.down")] == 8


def test_unknown_operations_freeze_with_place_and_name():
    _, groups = groups_of(ConvBN(3, 4), Call(lambda x: torch.cumsum(x, 1)), ConvBN(4, 5), Pooled(5))
    assert (
        groups[0].reason.startswith("'0.conv' goes through cumsum in '1' (test_tracer.py:")
        and len(groups[1].units) == 5
    )


def test_constants_of_the_forward_keep_their_values():
    def forward(x):
        index = torch.arange(4, device=x.device)
        offset = torch.tensor([1.0]).to(x.device)
        assert index.tolist() == [0, 1, 2, 3]
        return x * offset + torch.zeros_like(x)

    _, groups = groups_of(ConvBN(3, 4), Call(forward), ConvBN(4, 5), Pooled(5))
    assert len(groups[1].units) == 5


def test_operations_without_a_rule_still_cost():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = F.conv2d(x, self.conv.weight * 2, self.conv.bias).flatten(2)
            return (y @ y.transpose(1, 2)).mean(2)

    net = nn.Sequential(ConvBN(3, 6), ConvBN(6, 4), Attention(), nn.Linear(4, 5))
    plan = plan_pruning(net, SHAPE, "l1", 0.5)
    assert plan.macs_before == count_macs(net, torch.zeros(SHAPE))
    assert "feeds '2.conv', whose kernel is computed" in plan.frozen["1.conv"] and plan.widths["0.conv"] == (6, 3)


def test_spatial_attention_keeps_its_one_channel():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return x * self.conv(x).sigmoid()

    _, groups = groups_of(ConvBN(3, 4), Attention(), Pooled(4))
    assert sizes(groups) == {("0.conv",): 4, ("1.conv",): 0, ("2.fc",): 0}


def test_an_outer_product_keeps_both_of_its_maps():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.fc = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(6, 5)

        def forward(self, x):
            x = x.mean((2, 3))
            return self.fc((self.first(x)[:, :, None] * self.second(x)[:, None]).flatten(1))

    _, groups = groups_of(ConvBN(3, 4), Outer())
    assert [len(group.units) for group in groups] == [4, 0, 0, 0]
    assert "meets all channels of another map at once, by mul in '1' (test_tracer.py:" in groups[1].reason


def test_a_block_called_twice_ties_both_calls():
    block = RepVGGBlock(4, 4)
    _, groups = groups_of(ConvBN(3, 4), block, nn.ReLU(), block, Pooled(4))
    assert sizes(groups)[("0.conv", "1")] == 4


def test_channel_padding_ties_to_channels_that_stay():
    class Pad(nn.Module):
        """The shortcut of a ResNet of type A: zeros for the new channels."""

        def __init__(self):
            super().__init__()
            self.conv = ConvBN(4, 6, act=nn.Identity())

        def forward(self, x):
            return F.pad(x, (0, 0, 0, 0, 1, 1)) + self.conv(x)

    trace, groups = groups_of(ConvBN(3, 4), Pad(), Pooled(6))
    assert len(groups[0].units) == 4
    inner, outer = trace.layers["0.conv"].labels, trace.layers["1.conv.conv"].labels
    assert torch.equal(trace.channels.roots()[inner], trace.channels.roots()[outer[1:-1]])


def test_shared_layers_and_broadcast_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4, 1, 1))
            self.shared = ConvBN(4, 4)

        def forward(self, x):
            return self.shared(self.shared(x)) * self.gamma

    trace, groups = groups_of(ConvBN(3, 4), Scaled(), Pooled(4))
    assert sizes(groups)[("0.conv", "1.shared.conv")] == 4
    roots = trace.channels.roots()
    assert torch.equal(roots[trace.slices["1.gamma"][0]], roots[trace.layers["1.shared.conv"].labels])


@pytest.mark.parametrize("kind", [RepVGGBlock, DiverseBranchBlock, MobileOneBlock])
def test_blocks_are_one_unit(kind):
    trace, groups = groups_of(kind(3, 8, stride=2), kind(8, 8), kind(8, 8, groups=8), ConvBN(8, 4), Pooled(4))
    tied = {RepVGGBlock: [("0", "1", "2")], MobileOneBlock: [("0", "1", "2")], DiverseBranchBlock: [("0",), ("1", "2")]}
    assert [g.layers for g in groups if len(g.units) == 8] == tied[kind]
    assert not any("reduce" in name or "sequence" in name for name in trace.layers)
    assert not any(name.endswith("reduce_bn") for name in trace.norms)


def test_a_bilinear_head_multiplies_channels():
    net = nn.Sequential(ConvBN(3, 4), Call(lambda x: (x,)), BilinearHead(4, 5))
    trace = trace_channels(net, SHAPE)
    start, first, _ = trace.channels.products[0]
    assert len(first) == 16 and torch.equal(trace.slices["2.fc.weight"][1], torch.arange(start, start + 16))
    assert [len(g.units) for g in find_groups(trace)] == [4, 0]


def test_outputs_are_frozen_unless_asked():
    for prune_outputs, units in ((False, 0), (True, 4)):
        _, groups = groups_of(ConvBN(3, 4), prune_outputs=prune_outputs)
        assert len(groups[0].units) == units
    _, groups = groups_of(ConvBN(3, 4), Pooled(4), prune_outputs=True)
    assert len(groups[-1].units) == 0  # logits are no map


def test_control_flow_on_shapes_resolves():
    def forward(x):
        if x.shape[-1] < 20 and len(x) == 2 and x.size(1) == 4:
            return F.interpolate(x, size=x.shape[-1] * 2)
        raise AssertionError("not this way")

    _, groups = groups_of(ConvBN(3, 4), Call(forward), ConvBN(4, 4), Pooled(4))
    assert len(groups[0].units) == 4


@pytest.mark.parametrize(
    "function", [lambda x: x if x.sum() > 0 else -x, lambda x: x * x.max().item(), lambda x: torch.tensor(x.tolist())]
)
def test_control_flow_on_values_is_an_error_with_its_place(function):
    with pytest.raises(
        TraceError, match=r"cannot trace Sequential on an input \(.*\) at \S*test_tracer.py:\d+: "
    ) as caught:
        trace_channels(nn.Sequential(ConvBN(3, 4), Call(function), Pooled(4)), SHAPE)
    assert "\n" not in str(caught.value)


def test_a_custom_autograd_function_is_seen_inside():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.cumsum(x.clone(), 1)

    _, groups = groups_of(ConvBN(3, 4), Call(Double.apply), ConvBN(4, 4), Pooled(4))
    assert (
        groups[0].reason.startswith("'0.conv' goes through cumsum in '1' (test_tracer.py:")
        and len(groups[1].units) == 4
    )


def test_a_map_that_no_torch_function_made_is_refused():
    def forward(x):
        with torch._C.DisableTorchFunction():
            return x * 2

    with pytest.raises(TraceError, match=r"in '2.conv' \(nets.py:\d+\) a map appears that no torch function made"):
        groups_of(ConvBN(3, 4), Call(forward), ConvBN(4, 4), Pooled(4))


def test_auxiliary_heads_are_seen():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.aux = ConvBN(3, 4), Pooled(4), Flat(4)

        def forward(self, x):
            x = self.conv(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    trace = trace_channels(Auxiliary(), SHAPE)
    assert trace.slices["aux.fc.weight"][1].tolist() == trace.layers["conv.conv"].labels.repeat_interleave(16).tolist()
    assert [len(g.units) for g in find_groups(trace)] == [4, 0, 0]


class Described(nn.Module):
    """Outputs in a dataclass, a BN that averages all batches and is not run, a fixed kernel."""

    @dataclass
    class Outputs:
        logits: torch.Tensor
        map: torch.Tensor

    def __init__(self):
        super().__init__()
        self.conv, self.idle, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.Conv2d(8, 4, 1)
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, x):
        y = F.conv2d(F.relu(self.conv(x)), self.blur, groups=len(self.blur))
        if self.training:
            self.idle(y)
        head = self.head(y)
        return self.Outputs(head.mean((2, 3)), head)


@pytest.mark.parametrize("scores", ["l1", "fpgm", "taylor"])
def test_outputs_in_dataclasses_and_fixed_kernels(scores):
    net, x = Described().eval(), torch.randn(2, 3, 9, 9)
    how = dict(loader=[(x, None)], loss=lambda out, target: out.map.square().mean()) if scores == "taylor" else {}
    report = apply_plan(net, plan_pruning(net, x, scores, 0.5, **how))
    assert report.max_rel_error <= 1e-9 and net.blur.shape[0] == net.conv.out_channels == 4
    assert net(x).map.shape == (2, 4, 5, 5)


def test_tracing_changes_nothing():
    net = nn.Sequential(ConvBN(3, 4), nn.Dropout(0.5), ConvBN(4, 4, groups=2), Pooled(4)).train()
    net[0].eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(3)
    random_state, python_state = torch.get_rng_state(), random.getstate()
    trace_channels(net, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random_state) and random.getstate() == python_state
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert "forward" not in net[0].__dict__


def test_wrapped_models_are_refused():
    with pytest.raises(ValueError, match="got a DataParallel: pass its .module"):
        trace_channels(nn.DataParallel(ConvBN(3, 4)), SHAPE)


class Pointwise(nn.Module):
    """A function of each value by itself."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [nn.LogSigmoid(), torch.sinh, torch.erfc, torch.floor, torch.cosh, nn.Softplus()])
def test_pointwise_functions_are_followed(function):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Pointwise(function), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    report = apply_plan(net, plan_pruning(net, x, "l1", 0.5))
    assert net[0].out_channels == 8 and report.max_rel_error < 1e-9


class TrainsElsewhere(nn.Module):
    """In eval mode nothing reads what ``extra`` makes; in train mode it is the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.extra, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.stem(x).relu()
        other = self.extra(y)
        return self.norm(other if self.training else self.last(y))


def test_maps_that_train_mode_alone_reads_keep_what_it_needs():
    net, x = TrainsElsewhere().eval(), torch.randn(2, 3, 8, 8)
    apply_plan(net, plan_pruning(net, x, "l1", 0.5))
    assert (net.stem.out_channels, net.extra.out_channels, net.last.out_channels) == (4, 6, 6)
    assert net.train()(x).shape == (2, 6, 6, 6)
