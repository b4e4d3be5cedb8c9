"""Checkpoint files: read without unpickling code, written whole, loaded strictly."""

from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.checkpoints.strict import describe_mismatch, require_fit

__all__ = ["describe_mismatch", "load_checkpoint_file", "require_fit", "save_checkpoint_file"]
