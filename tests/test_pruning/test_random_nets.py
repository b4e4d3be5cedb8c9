"""Removed equals masked on random small networks, against hooks that know nothing of labels."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning
from rep_plugin.measure.costs import count_macs, count_params
from tests.helpers import relative_error
from tests.test_pruning.nets import (
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

KINDS = (
    "conv",
    "residual",
    "concat",
    "halves",
    "plain_halves",
    "depthwise",
    "grouped",
    "gate",
    "ghost",
    "last",
    "pool",
)
ACTS = (nn.ReLU, nn.Hardswish, nn.SiLU, nn.GELU, nn.Identity)


@st.composite
def networks(draw):
    """Up to six random units on a stem, a 1x1 convolution, and a head."""
    width = draw(st.sampled_from([4, 6, 8, 12]))
    layers = [ConvBN(3, width, draw(st.sampled_from([1, 3])), act=draw(st.sampled_from(ACTS))())]
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(KINDS))
        other = draw(st.sampled_from([4, 6, 8, 12]))
        if kind == "conv":
            layers.append(ConvBN(width, other, stride=draw(st.sampled_from([1, 2])), act=draw(st.sampled_from(ACTS))()))
            width = other
        elif kind == "residual":
            layers.append(Residual(width, other))
        elif kind == "concat":
            layers.append(Concat(width, other, 5))
            width = other + 5
            layers.append(ConvBN(width, width - width % 2, 1))
            width -= width % 2
        elif kind in ("halves", "plain_halves"):
            layers.append(Halves(width, kind == "halves"))
        elif kind == "depthwise":
            times = draw(st.sampled_from([1, 2]))
            layers.append(ConvBN(width, times * width, groups=width))
            width *= times
        elif kind == "grouped":
            layers.append(ConvBN(width, 2 * other, groups=2))
            width = 2 * other
        elif kind == "gate":
            layers.append(Gate(width, 3, draw(st.booleans())))
        elif kind == "ghost":
            layers.append(Ghost(width, other))
            width = other
        elif kind == "last":
            layers.append(Last(width, other))
        else:
            layers.append(draw(st.sampled_from([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Dropout(0.1)])))
    layers += [ConvBN(width, 6, 1), draw(st.sampled_from([Flat, Pooled]))(6)]  # something can always go
    return ready(*layers, seed=draw(st.integers(0, 100)), side=9)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    networks(),
    st.sampled_from([0.2, 0.5, 0.8]),
    st.sampled_from(["random", "l1"]),
    st.sampled_from(["global", "layer"]),
)
def test_removed_equals_masked(net, fraction, scores, scope):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))
    plan = plan_pruning(net, x, scores, fraction, scope=scope)
    assert PrunePlan.from_json(plan.to_json()) == plan
    assert (plan.params_before, plan.macs_before) == (count_params(net), count_macs(net, x))
    masked = copy.deepcopy(net).double()
    mask_outputs(masked, plan)
    report = apply_plan(net, plan)
    with torch.no_grad():
        expected, got = masked(x.double()), copy.deepcopy(net).double()(x.double())
    assert relative_error(expected, got) <= 1e-9 and report.max_rel_error <= 1e-9
    assert (plan.params_after, plan.macs_after) == (count_params(net), count_macs(net, x))
    net.train()
    net(x).sum().backward()
