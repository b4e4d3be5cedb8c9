"""Models as ONNX files, compared in real runtimes before they are written."""

from rep_plugin.export.export_onnx import export_onnx
from rep_plugin.export.graph import read_metadata

__all__ = ["export_onnx", "read_metadata"]
