"""Terms and layers that make channels removable: sparsity, soft pruning, ResRep and centripetal SGD.

They act within one step of training. The hooks of ``rep_plugin.openmmlab.hooks`` decide when, and when channels are removed.
"""

from rep_plugin.pruning.methods.centripetal import Centripetal, merge_clusters_, snap_clusters_
from rep_plugin.pruning.methods.clusters import plan_clusters
from rep_plugin.pruning.methods.resrep import ResRep
from rep_plugin.pruning.methods.soft_pruning import zero_channels_
from rep_plugin.pruning.methods.sparsity import Sparsity

__all__ = ["Centripetal", "ResRep", "Sparsity", "merge_clusters_", "plan_clusters", "snap_clusters_", "zero_channels_"]
