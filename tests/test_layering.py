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
    "running": set(),
    "verify": {"running"},
    "report": {"running"},
    "reparam": {"functional", "blocks", "heads", "reparam", "verify", "report", "history"},
    "convert": {"backbones", "reparam", "checkpoint"},
    "history": set(),
    "rebuild": {"history", "pruning", "reparam"},
    "latency": {"running"},
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
    "pruning": {"functional", "blocks", "necks", "pruning", "verify", "report", "history", "latency", "running"},
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
    "running",
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


def without(names: set[str], code: str) -> list[str]:
    """The lines that ``code`` prints in a real process in which these packages cannot be imported."""
    blocked = f"import sys\nfor name in {sorted(names)}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocked + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ASK = """
import importlib
for name in names:
    try: importlib.import_module(name)
    except ImportError as error: print(error)
"""


def test_import_needs_no_openmmlab():
    code = """
import rep_plugin, timm, torch
model = timm.create_model("rep_mobilenetv2_035", num_classes=3).eval()
x = torch.randn(2, 3, 32, 32)
print(rep_plugin.reparameterize(model, x)[1].max_rel_error < 1e-9)
print(rep_plugin.apply_plan(model, rep_plugin.plan_pruning(model, x, "l1", 0.3)).params_after < 1e6)
names = ["rep_plugin.mm_models", "rep_plugin.mm_bilinear", "rep_plugin.hooks.prune_hook", "rep_plugin.registry"]
"""
    how = "which is not installed: pip install 'rep-plugin[openmmlab]'"
    assert without(OPENMMLAB, code + ASK) == [
        "True",
        "True",
        f"rep_plugin.mm_models needs mmengine, {how}",
        f"rep_plugin.mm_bilinear needs mmpretrain, {how}",
        f"rep_plugin.hooks needs mmengine, {how}",
        f"rep_plugin.registry needs mmengine, {how}",
    ]


def test_tools_say_that_they_need_openmmlab():
    tools = ["compare_deployed", "prune", "reparameterize", "sweep", "test", "train"]
    code = f"""
import runpy
sys.path.insert(0, "{ROOT.parent}/tools")
for tool in {tools}:
    sys.modules.pop("_needs", None)
    sys.argv = [tool, "config.py", "epoch_1.pth"]
    try: runpy.run_path(f"{ROOT.parent}/tools/{{tool}}.py", run_name="__main__")
    except SystemExit as end: print(end)
"""
    end = "needs mmengine, which is not installed: pip install 'rep-plugin[openmmlab]'"
    assert without(OPENMMLAB, code) == [f"error: {tool}.py {end}" for tool in tools]


def test_import_needs_no_timm():
    code = "import rep_plugin\nprint(rep_plugin.reparameterize.__name__)\nnames = ['rep_plugin.timm_models']\n"
    assert without({"timm"}, code + ASK) == [
        "reparameterize",
        "rep_plugin.timm_models needs timm, which is not installed: pip install 'rep-plugin[timm]'",
    ]


def test_backbones_need_no_mmpretrain():
    """As mmdet and mmseg use them; what is a subclass of mmpretrain's says what it needs."""
    code = """
from mmengine.registry import MODELS
print(type(MODELS.build(dict(type="rep_plugin.RepVGG", out_indices=(1, 3)))).__module__)
try: MODELS.build(dict(type="rep_plugin.BilinearClsHead", in_channels=8, num_classes=2))
except ImportError as error: print(error)
"""
    assert without({"mmpretrain"}, code)[-2:] == [
        "rep_plugin.mm_backbones",
        "rep_plugin.BilinearClsHead needs mmpretrain, which is not installed: pip install 'rep-plugin[openmmlab]'",
    ]
