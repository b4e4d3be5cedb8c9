"""Putting branches in, and merging them into single convolutions again, with proof."""

from rep_plugin.reparam import foreign as foreign
from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.reparam.expand import expand
from rep_plugin.reparam.merge_sequence import merge_sequence
from rep_plugin.reparam.reparameterize import reparameterize

__all__ = ["Adapter", "expand", "merge_sequence", "register_adapter", "reparameterize"]
