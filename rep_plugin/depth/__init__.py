"""Fewer layers: runs of convolutions become one where their activations are annealed away, chosen under a budget."""

from rep_plugin.depth.importance import reestimate_bn_
from rep_plugin.depth.linearize import linearize
from rep_plugin.depth.plan import DepthPlan
from rep_plugin.depth.planner import plan_depth
from rep_plugin.depth.timing import LatencyTable, read_latency_table, write_latency_table

__all__ = [
    "DepthPlan",
    "LatencyTable",
    "linearize",
    "plan_depth",
    "read_latency_table",
    "reestimate_bn_",
    "write_latency_table",
]
