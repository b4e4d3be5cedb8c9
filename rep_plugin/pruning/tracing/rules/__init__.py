"""What each torch function does to the channels of its maps; importing this room registers the rules."""

from rep_plugin.pruning.tracing.rules import arithmetic, layers, layout
from rep_plugin.pruning.tracing.rules.registry import find_rule

__all__ = ["arithmetic", "find_rule", "layers", "layout"]
