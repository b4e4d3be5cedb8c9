"""What each torch function, and each module that is one unit, does to channels; importing this room registers the rules."""

from rep_plugin.pruning.tracing.rules import (
    concat_split_reshape,
    convolution_linear_norm,
    elementwise_pooling_reduction,
    products,
)
from rep_plugin.pruning.tracing.rules.blocks_and_bilinear import find_module_rule
from rep_plugin.pruning.tracing.rules.registry import OPEN, RULES

__all__ = [
    "OPEN",
    "RULES",
    "concat_split_reshape",
    "convolution_linear_norm",
    "elementwise_pooling_reduction",
    "find_module_rule",
    "products",
]
