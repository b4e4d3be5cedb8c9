"""What each torch function does to the channels of its maps."""

from rep_plugin.pruning.rules import arithmetic, layers, layout
from rep_plugin.pruning.rules.registry import find_rule

__all__ = ["arithmetic", "find_rule", "layers", "layout"]
