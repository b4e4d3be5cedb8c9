"""Adapters for blocks of other projects that are no convolution, or only in part; importing this room registers them."""

from rep_plugin.reparam.foreign import composite, linear

__all__ = ["composite", "linear"]
