"""A small network with clusters made by hand, for tests of the training that draws them together."""

import torch
from torch import nn

from rep_plugin import PrunePlan
from rep_plugin.pruning.methods.clusters import Clusters, plan_clusters

LR, STRENGTH, DECAY = 0.1, 0.2, 0.01


def net(amp: bool = False) -> nn.Sequential:
    """A convolution, a depthwise one with a bias, BNs, a PReLU, and a reader."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    for index in (1, 2, 4):
        nn.init.uniform_(model[index].weight, -1, 1)
    return model if amp else model.double()


CLUSTERS = [[0, 2, 5], [1, 4], [3]]  # by hand, for all six channels of `net`


def clusters_of_net(model: nn.Module) -> Clusters:
    first = {member: cluster[0] for cluster in CLUSTERS for member in cluster}
    places = tuple(first[i] for i in range(6))
    plan = plan_clusters(model, (1, 3, 8, 8), {"0": 3}, clusters="even").plan
    kept = dict.fromkeys(("0", "3"), tuple(sorted(set(places))))
    return Clusters(PrunePlan(**{**vars(plan), "kept": kept}), dict.fromkeys(kept, places))
