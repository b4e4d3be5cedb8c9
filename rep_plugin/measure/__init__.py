"""The measurements of every verb: the proof of equality, costs, latency and reports (plots need matplotlib)."""

from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import Forward, register_forward
from rep_plugin.measure.report import Report
from rep_plugin.measure.verify import verify_equivalence

__all__ = ["Forward", "Report", "count_macs", "count_params", "register_forward", "verify_equivalence"]
