"""Bilinear pooling: its methods, and the head that ends a bilinear CNN."""
