"""Bilinear pooling: its methods, and the head that ends a bilinear CNN."""

from rep_plugin.bilinear.head import BilinearHead, fold_bilinear_head
from rep_plugin.bilinear.pooling import BilinearPooling

__all__ = ["BilinearHead", "BilinearPooling", "fold_bilinear_head"]
