import pytest
import torch
from torch import nn

from rep_plugin.pruning.planning.balance import bundle_units
from rep_plugin.pruning.tracing.groups import find_groups
from rep_plugin.pruning.tracing.tracer import trace_channels
from tests.test_pruning.nets import ConvBN, Pooled, Residual

NETS = {
    "one layer": (ConvBN(3, 12), ConvBN(12, 6, groups=3)),
    "two layers, groups nested": (ConvBN(3, 12), ConvBN(12, 18, groups=3), ConvBN(18, 6, groups=6)),
    "two layers, groups across": (ConvBN(3, 12), ConvBN(12, 12, groups=3), ConvBN(12, 4, groups=2)),
    "shuffled": (ConvBN(3, 24), ConvBN(24, 24, groups=3), nn.ChannelShuffle(3), ConvBN(24, 6, groups=3)),
    "tied": (ConvBN(3, 12), Residual(12, 6), ConvBN(12, 12, groups=4), Residual(12, 6)),
}


@pytest.mark.parametrize("name", NETS)
def test_every_bundle_keeps_all_groups_equal(name):
    layers = NETS[name]
    width = next(
        m for m in reversed(list(nn.Sequential(*layers).modules())) if isinstance(m, nn.BatchNorm2d)
    ).num_features
    trace = trace_channels(nn.Sequential(*layers, Pooled(width)), (2, 3, 9, 9))
    roots, bundled = trace.channels.roots(), 0
    for group in find_groups(trace):
        if not len(group.units):
            continue
        scores = torch.rand(len(group.units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        bundles, left = bundle_units(trace, group.units, scores)
        assert sorted([unit for bundle in bundles for unit in bundle] + left) == group.units.tolist()
        for bundle in bundles:
            bundled += len(bundle) > 1
            for rows in trace.channels.balanced:
                assert len(set(torch.isin(roots[rows], torch.tensor(bundle)).sum(1).tolist())) == 1
    assert bundled >= 3


def test_the_lowest_of_each_group_go_first():
    trace = trace_channels(nn.Sequential(ConvBN(3, 12), ConvBN(12, 6, groups=3), Pooled(6)), (2, 3, 9, 9))
    units = find_groups(trace)[0].units
    scores = torch.tensor([3.0, 1, 2, 4, 5, 8, 7, 6, 9, 10, 11, 12])
    bundles, left = bundle_units(trace, units, scores)
    first = int(units[0])
    assert [[unit - first for unit in bundle] for bundle in bundles] == [[1, 4, 8], [2, 7, 9], [0, 6, 10], [3, 5, 11]]
    assert left == []
