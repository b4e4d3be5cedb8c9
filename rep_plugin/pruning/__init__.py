"""Channel pruning: which channels belong together, which are removed (a plan), and their removal, proven equal to masking."""

from rep_plugin.errors import TraceError
from rep_plugin.pruning.apply import PruneReport, apply_plan
from rep_plugin.pruning.planning.latency_table import EagerTimer
from rep_plugin.pruning.planning.plan import PrunePlan
from rep_plugin.pruning.planning.planner import plan_pruning
from rep_plugin.pruning.tracing.tracer import trace_channels

__all__ = ["EagerTimer", "PrunePlan", "PruneReport", "TraceError", "apply_plan", "plan_pruning", "trace_channels"]
