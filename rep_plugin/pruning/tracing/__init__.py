"""Which channels belong together, found by running a model once without numbers."""

from rep_plugin.pruning.tracing.kept_channels import KeptChannels, count_costs
from rep_plugin.pruning.tracing.tracer import trace_channels

__all__ = ["KeptChannels", "count_costs", "trace_channels"]
