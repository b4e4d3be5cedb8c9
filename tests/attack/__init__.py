"""Attacks on the whole package, by seed: see ``python -m tests.attack --help``."""
