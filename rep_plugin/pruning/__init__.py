"""Channel pruning: which channels belong together, which go (a plan), and their removal, proven equal to masking."""

from rep_plugin.pruning.apply import PruneReport, apply_plan
from rep_plugin.pruning.graph import TraceError
from rep_plugin.pruning.latency import EagerTimer
from rep_plugin.pruning.plan import PrunePlan, plan_pruning
from rep_plugin.pruning.trace import trace_channels

__all__ = ["EagerTimer", "PrunePlan", "PruneReport", "TraceError", "apply_plan", "plan_pruning", "trace_channels"]
