"""Checkpoint files: read without unpickling code, written whole, loaded strictly."""

from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.checkpoints.safe_load import load_checkpoint_file

__all__ = ["load_checkpoint_file", "save_checkpoint_file"]
