"""Putting branches in, and merging them into single convolutions again, with proof."""

from rep_plugin.reparam.adapters import Adapter, register_adapter
from rep_plugin.reparam.expand import expand
from rep_plugin.reparam.reparameterize import reparameterize

__all__ = ["Adapter", "expand", "register_adapter", "reparameterize"]
