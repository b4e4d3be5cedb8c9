"""Checkpoints of other projects, brought to our keys and back."""

from rep_plugin.conversion.convert import convert_file, convert_state_dict

__all__ = ["convert_file", "convert_state_dict"]
