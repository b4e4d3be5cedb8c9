"""Masking and removing channels."""
