"""Structural re-parameterization and channel pruning for mmpretrain, mmengine and timm, every step proven equal."""

from rep_plugin.reparam import reparameterize
from rep_plugin.report import Report
from rep_plugin.verify import EquivalenceError, InconclusiveWarning

__version__ = "0.1.0"
__all__ = ["EquivalenceError", "InconclusiveWarning", "Report", "reparameterize"]
