"""Terms and layers that make channels removable: sparsity, soft pruning, ResRep and centripetal SGD.

They act within one step of training. The hooks of ``rep_plugin.openmmlab.hooks`` decide when, and when channels are removed.
"""

from rep_plugin.pruning.methods.centripetal import Centripetal, cluster_distances, merge_clusters_, snap_clusters_
from rep_plugin.pruning.methods.clusters import Clusters, plan_clusters
from rep_plugin.pruning.methods.resrep import Forgetting, ResRep
from rep_plugin.pruning.methods.soft_pruning import count_returned, zero_channels_
from rep_plugin.pruning.methods.sparsity import Sparsity, prunable_parts

__all__ = [
    "Centripetal",
    "Clusters",
    "Forgetting",
    "ResRep",
    "Sparsity",
    "cluster_distances",
    "count_returned",
    "merge_clusters_",
    "plan_clusters",
    "prunable_parts",
    "snap_clusters_",
    "zero_channels_",
]
