"""Imports point one way, and the light packages import torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rep_plugin

ROOT = Path(rep_plugin.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
OPENMMLAB = {"mmengine", "mmcv", "mmpretrain", "mmdet", "mmseg"}
# What each layer may import of our own; None: anything.
LAYERS = {
    "functional": {"functional"},
    "blocks": {"functional", "blocks"},
    "backbones": {"functional", "blocks", "backbones"},
    "necks": {"functional", "blocks", "backbones", "necks"},
    "heads": {"functional", "blocks", "backbones", "necks", "heads"},
    "verify": set(),
    "report": set(),
    "reparam": {"functional", "blocks", "heads", "reparam", "verify", "report", "history"},
    "convert": {"backbones", "reparam", "checkpoint"},
    "history": set(),
    "rebuild": {"history", "pruning", "reparam"},
    "latency": set(),
    "runtimes": {"verify"},
    "onnx_graph": {"runtimes", "verify"},
    "preprocessing": set(),
    "export_report": {"report"},
    "export": {
        "checkpoint",
        "export_report",
        "latency",
        "onnx_graph",
        "preprocessing",
        "reparam",
        "report",
        "runtimes",
        "verify",
    },
    "pruning": {"functional", "blocks", "necks", "pruning", "verify", "report", "history", "latency"},
}
TORCH_ONLY = {
    "functional",
    "blocks",
    "backbones",
    "pruning",
    "verify",
    "report",
    "reparam",
    "necks",
    "heads",
    "latency",
    "runtimes",
    "onnx_graph",
    "preprocessing",
    "export_report",
    "export",
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    layer, imports = layer_of(path), imports_of(path)
    outside = {name.split(".")[0] for name in imports} - {"rep_plugin"} - set(sys.stdlib_module_names)
    ours = {name.split(".")[1] for name in imports if name.startswith("rep_plugin.")}
    if layer in TORCH_ONLY:
        assert outside <= {"torch", "rich", "scipy"}, f"{layer} imports {outside}"
    if layer in LAYERS:
        assert ours <= LAYERS[layer], f"{layer} imports {ours - LAYERS[layer]}"
    if outside & OPENMMLAB:
        assert layer.startswith("mm_") or layer in {"hooks", "registry"}, f"{layer} imports {outside & OPENMMLAB}"
    if "timm" in outside:
        assert layer.startswith("timm_"), f"{layer} imports timm"
    assert not {"tools", "tests"} & {name.split(".")[0] for name in imports}


def test_every_layer_is_seen():
    assert {"functional", "blocks", "backbones", "reparam", "hooks", "timm_models", "mm_models"} <= set(
        map(layer_of, MODULES)
    )


def test_import_needs_no_openmmlab():
    """In a real process in which mmengine, mmcv and mmpretrain cannot be imported."""
    code = f"""
import sys
for name in {sorted(OPENMMLAB)}: sys.modules[name] = None
import rep_plugin, timm
timm.create_model("rep_mobilenetv2_035")
try:
    import rep_plugin.mm_models
except ImportError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("refused:"), done.stderr
