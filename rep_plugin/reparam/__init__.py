"""Putting branches in, and merging them into single convolutions again, with proof."""

from rep_plugin.reparam import foreign as foreign  # registers the adapters of blocks that are not ours
from rep_plugin.reparam import foreign_composite as foreign_composite
from rep_plugin.reparam import foreign_linear as foreign_linear
from rep_plugin.reparam import foreign_mixers as foreign_mixers
from rep_plugin.reparam.adapters import Adapter, find_adapter, register_adapter
from rep_plugin.reparam.expand import expand
from rep_plugin.reparam.reparameterize import NothingToMergeError, reparameterize
from rep_plugin.reparam.sequences import merge_sequence

__all__ = [
    "Adapter",
    "NothingToMergeError",
    "expand",
    "find_adapter",
    "merge_sequence",
    "register_adapter",
    "reparameterize",
]
