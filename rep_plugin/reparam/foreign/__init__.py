"""Adapters for multi-branch blocks of other projects; importing this room registers them."""

from rep_plugin.reparam.foreign import composite, linear, mixers, sums

__all__ = ["composite", "linear", "mixers", "sums"]
