"""mmengine hooks: they decide when; library functions do the work."""

from rep_plugin.hooks.accuracy_lr_hook import AccuracyLrHook
from rep_plugin.hooks.centripetal_hook import CentripetalHook
from rep_plugin.hooks.distill_hook import DistillHook
from rep_plugin.hooks.linearize_hook import LinearizeHook
from rep_plugin.hooks.prune_hook import PruneHook
from rep_plugin.hooks.reparam_hook import ReparamHook
from rep_plugin.hooks.resrep_hook import ResRepHook
from rep_plugin.hooks.soft_prune_hook import SoftPruneHook
from rep_plugin.hooks.sparsity_hook import SparsityHook

__all__ = [
    "AccuracyLrHook",
    "CentripetalHook",
    "DistillHook",
    "LinearizeHook",
    "PruneHook",
    "ReparamHook",
    "ResRepHook",
    "SoftPruneHook",
    "SparsityHook",
]
