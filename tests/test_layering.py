"""Imports point one way, and only the rooms of a framework import it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rep_plugin

ROOT = Path(rep_plugin.__file__).parent
OPENMMLAB = {"mmengine", "mmcv", "mmpretrain", "mmdet", "mmseg"}
# Rooms from the bottom to the top: each may import those in rows above its own.
ROWS = (
    ("errors", "version"),
    ("arguments", "attached"),
    ("functional", "checkpoints", "optional", "shipped"),
    ("history", "blocks", "measure"),
    ("registry", "testing", "backbones", "bilinear"),
    ("reparam",),
    ("conversion", "pruning", "export"),
    ("depth",),
    ("saving", "summary"),
    ("timm", "openmmlab"),
    ("face",),
    ("__init__",),
    ("commands",),
    ("__main__",),
)
PRUNING_ROWS = (("tracing",), ("surgery",), ("planning",), ("apply",), ("methods",), ("__init__",))
TORCH_ONLY = {
    "functional",
    "blocks",
    "backbones",
    "bilinear",
    "measure",
    "checkpoints",
    "conversion",
    "reparam",
    "depth",
}
TORCH_ONLY |= {"arguments", "attached", "pruning", "export", "history", "testing", "shipped", "saving", "summary"}
# matplotlib draws plots and safetensors reads files where they are installed; scipy is a requirement.
LIBRARIES = {"torch", "rich", "scipy", "matplotlib", "safetensors", "numpy", "PIL", "onnx", "onnxruntime", "openvino"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


PATHS = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Full names of all that a file imports anywhere, under TYPE_CHECKING and in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in PATHS else node.module for name in names}
    return found


IMPORTS = {name: imports_of(path) for name, path in PATHS.items()}
OURS = {name: found & PATHS.keys() - {name} for name, found in IMPORTS.items()}


def room_of(name: str, under: str = "rep_plugin") -> str:
    """The room of a module inside a package; the package's own face is __init__."""
    return name[len(under) + 1 :].split(".")[0] or "__init__"


def levels_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """Raises graphlib.CycleError, with the names, where the arrows run in a circle."""
    levels: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        levels[node] = 1 + max((levels[other] for other in graph.get(node, ())), default=0)
    return levels


def test_no_two_files_import_each_other():
    levels_of(OURS)


@pytest.mark.parametrize(("under", "rows"), [("rep_plugin", ROWS), ("rep_plugin.pruning", PRUNING_ROWS)])
def test_rooms_import_downwards(under, rows):
    place = {room: row for row, rooms in enumerate(rows) for room in rooms}
    members = {name: room_of(name, under) for name in PATHS if name == under or name.startswith(f"{under}.")}
    assert set(members.values()) == set(place), "a room without a row, or a row without a room"
    for name, room in members.items():
        for other in OURS[name] & members.keys():
            if members[other] != room:
                assert place[members[other]] < place[room], f"{name} imports {other}"


def test_sub_rooms_do_not_import_the_face_of_their_room():
    for name, found in OURS.items():
        faces = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
        assert not found & (faces | {"rep_plugin"}), f"{name} imports a face that imports it"


@pytest.mark.parametrize("name", PATHS)
def test_frameworks_have_their_rooms(name):
    room = room_of(name)
    outside = {found.split(".")[0] for found in IMPORTS[name]} - {"rep_plugin"} - set(sys.stdlib_module_names)
    if room in TORCH_ONLY:
        assert outside <= LIBRARIES
    assert not outside & OPENMMLAB or room in {"openmmlab", "registry"}
    assert "timm" not in outside or room == "timm"
    assert not outside & {"tools", "tests"}


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
names = ["rep_plugin.openmmlab.backbones", "rep_plugin.openmmlab.hooks.prune_hook", "rep_plugin.registry"]
"""
    how = "which is not installed: pip install 'rep-plugin[openmmlab]'"
    assert without(OPENMMLAB, code + ASK) == [
        "True",
        "True",
        f"rep_plugin.openmmlab needs mmengine, {how}",
        f"rep_plugin.openmmlab needs mmengine, {how}",
        f"rep_plugin.registry needs mmengine, {how}",
    ]


def test_tools_say_that_they_need_openmmlab(tmp_path):
    (tmp_path / "epoch_1.pth").touch()  # a missing file is said first
    commands = {name: ["config.py", "epoch_1.pth"] for name in ("compare", "reparameterize", "test")}
    commands |= {name: ["config.py", "epoch_1.pth", "--macs", "0.5"] for name in ("depth", "prune")}
    commands |= {"sweep": ["config.py"], "train": ["config.py"]}
    code = f"""
import os
from rep_plugin.__main__ import main
os.chdir({str(tmp_path)!r})
for command, words in {commands}.items():
    try: main([command, *words])
    except SystemExit as end: print(end)
"""
    end = "needs mmengine, which is not installed: pip install 'rep-plugin[openmmlab]'"
    assert without(OPENMMLAB, code) == [f"error: rep-plugin {command} {end}" for command in commands]


def test_tools_need_mmpretrain_for_its_configs_alone(tmp_path):
    scopes = {"mmpretrain": "mmpretrain", "plain": "mmengine"}
    for name, scope in scopes.items():
        (tmp_path / f"{name}.py").write_text(
            f"default_scope = {scope!r}\nwork_dir = {str(tmp_path)!r}\nmodel = dict(type='Nothing')\n"
        )
    code = f"""
import runpy
for name in {list(scopes)}:
    sys.argv = ["train.py", f"{tmp_path}/{{name}}.py"]
    try: runpy.run_path("{ROOT.parent}/tools/train.py", run_name="__main__")
    except SystemExit as end: print(end)
"""
    needs, *_, builds = without({"mmpretrain"}, code)
    assert (
        needs
        == f"error: {tmp_path}/mmpretrain.py needs mmpretrain, which is not installed: pip install 'rep-plugin[openmmlab]'"
    )
    assert "the config cannot be built" in builds


def test_import_needs_no_timm():
    code = "import rep_plugin\nprint(rep_plugin.reparameterize.__name__)\nnames = ['rep_plugin.timm.models']\n"
    assert without({"timm"}, code + ASK) == [
        "reparameterize",
        "rep_plugin.timm needs timm, which is not installed: pip install 'rep-plugin[timm]'",
    ]


def test_backbones_and_pooling_need_no_mmpretrain():
    """As mmdet and mmseg use them; what is a subclass of mmpretrain's says what it needs."""
    code = """
from mmengine.registry import MODELS
for part in (dict(type="rep_plugin.RepVGG", out_indices=(1, 3)), dict(type="rep_plugin.BilinearPooling", in_channels=8)):
    print(type(MODELS.build(part)).__module__)
try: MODELS.build(dict(type="rep_plugin.BilinearClsHead", in_channels=8, num_classes=2))
except ImportError as error: print(error)
"""
    assert without({"mmpretrain"}, code)[-3:] == [
        "rep_plugin.openmmlab.backbones",
        "rep_plugin.openmmlab.bilinear_pooling",
        "rep_plugin.BilinearClsHead needs mmpretrain, which is not installed: pip install 'rep-plugin[openmmlab]'",
    ]
