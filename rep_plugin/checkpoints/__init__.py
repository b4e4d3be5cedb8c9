"""Checkpoint files: read without unpickling code, written whole, loaded strictly."""
