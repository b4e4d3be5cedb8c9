"""Models as ONNX files, compared in real runtimes before they are written."""

from rep_plugin.export.equalize import equalize
from rep_plugin.export.export_onnx import export_onnx
from rep_plugin.export.fake_quantize import FakeQuantization
from rep_plugin.export.graph import read_metadata
from rep_plugin.export.int8 import export_int8

__all__ = ["FakeQuantization", "equalize", "export_int8", "export_onnx", "read_metadata"]
