"""The measurements of every verb: the proof of equality, costs, latency and reports (plots need matplotlib)."""

from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import Forward, register_forward, run_model
from rep_plugin.measure.latency import interleaved_medians
from rep_plugin.measure.report import Report
from rep_plugin.measure.verify import Equivalence, compare_outputs, default_inputs, verify_equivalence

__all__ = [
    "Equivalence",
    "Forward",
    "Report",
    "compare_outputs",
    "count_macs",
    "count_params",
    "default_inputs",
    "interleaved_medians",
    "register_forward",
    "run_model",
    "verify_equivalence",
]
