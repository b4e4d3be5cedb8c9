"""Masking and removing channels."""

from rep_plugin.pruning.surgery.mask import mask_channels_
from rep_plugin.pruning.surgery.remove import remove_channels_

__all__ = ["mask_channels_", "remove_channels_"]
