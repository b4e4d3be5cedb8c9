"""mmengine hooks: they decide when; library functions do the work."""

from rep_plugin.openmmlab.hooks.accuracy_lr_hook import AccuracyLrHook
from rep_plugin.openmmlab.hooks.centripetal_hook import CentripetalHook
from rep_plugin.openmmlab.hooks.distill_hook import DistillHook
from rep_plugin.openmmlab.hooks.linearize_hook import LinearizeHook
from rep_plugin.openmmlab.hooks.prune_hook import PruneHook
from rep_plugin.openmmlab.hooks.qat_hook import QATHook
from rep_plugin.openmmlab.hooks.reparam_hook import ReparamHook
from rep_plugin.openmmlab.hooks.resrep_hook import ResRepHook
from rep_plugin.openmmlab.hooks.schedule import Schedule
from rep_plugin.openmmlab.hooks.soft_prune_hook import SoftPruneHook
from rep_plugin.openmmlab.hooks.sparsity_hook import SparsityHook

__all__ = [
    "AccuracyLrHook",
    "CentripetalHook",
    "DistillHook",
    "LinearizeHook",
    "PruneHook",
    "QATHook",
    "ReparamHook",
    "ResRepHook",
    "Schedule",
    "SoftPruneHook",
    "SparsityHook",
]
