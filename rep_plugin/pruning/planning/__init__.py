"""Which channels are removed: scores, budgets, plans."""

from rep_plugin.pruning.planning.options import Budget, PruneOptions
from rep_plugin.pruning.planning.plan import PrunePlan
from rep_plugin.pruning.planning.planner import plan_pruning, plan_to_budget

__all__ = ["Budget", "PruneOptions", "PrunePlan", "plan_pruning", "plan_to_budget"]
