"""Training methods that make channels removable."""
