"""Merging trained branches into single convolutions, with proof."""

from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.reparam.reparameterize import reparameterize

__all__ = ["Adapter", "register_adapter", "reparameterize"]
