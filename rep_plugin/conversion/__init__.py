"""Checkpoints of other projects, brought to our keys and back."""
