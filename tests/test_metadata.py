"""What the package says of itself: requirements, versions, the files that a host of repositories reads."""

import ast
import configparser
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from rep_plugin.version import __version__
from tests.helpers import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# Names of imports, where they are not those of the distributions: on the official stack, and on the fork's.
OFFICIAL = {"PIL": "pillow", "cv2": "opencv-python", "google": "protobuf", "mmcv": "mmcv-lite"}
FORK = OFFICIAL | {name: f"onedl-{name}" for name in ("mmcv", "mmengine", "mmpretrain")}


def names_in(requirements: str) -> set[str]:
    return {re.match(r"[\w-]+", line).group().lower() for line in requirements.split("\n") if line[:1].isalpha()}


CORE = names_in(SETUP["options"]["install_requires"])
EXTRAS = {name: names_in(text) for name, text in SETUP["options.extras_require"].items()}
FILES = sorted(path for folder in ("rep_plugin", "tools") for path in (ROOT / folder).rglob("*.py"))


def extras_of(path: Path) -> list[str]:
    """What a user of a file has installed: each alone must be enough."""
    match path.relative_to(ROOT).parts:
        case ("rep_plugin", "export", "nncf.py"):
            return ["nncf"]
        case ("rep_plugin", "timm" | "export" as room, *_):
            return [room]
        case ("rep_plugin", "measure", "plots.py"):
            return ["plots"]
        case ("rep_plugin", "openmmlab" | "registry.py" | "commands", *_) | ("tools", *_):
            return ["openmmlab", "onedl"]
    return [""]


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere, by statement or by a name in ``import_module``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    neighbours = {other.stem for other in path.parent.glob("_*.py")}
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - neighbours - {"rep_plugin", "tools"}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_import_is_a_declared_requirement(path):
    for extra in extras_of(path):
        table = FORK if extra == "onedl" else OFFICIAL
        needed = {table.get(name, name).lower() for name in imports_of(path)}
        assert needed <= CORE | EXTRAS.get(extra, set()), f"in [{extra}] of setup.cfg"


def test_every_requirement_is_imported_or_has_a_reason():
    """timm and mmpretrain import torchvision, and do not all require it; mmengine's need of setuptools is told beside it."""
    imported = {name for path in FILES for name in imports_of(path)}
    known = {table.get(name, name).lower() for name in imported for table in (OFFICIAL, FORK)}
    known |= {"setuptools", "torchvision", "onnxscript"}
    for extra in ("", "timm", "plots", "openmmlab", "onedl", "export"):
        assert EXTRAS.get(extra, CORE) <= known, extra


def test_a_missing_package_names_an_extra_that_installs_it():
    asked = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
                words = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
                asked |= {tuple(words)} if len(words) == 2 else set()
    assert {("mmengine", "openmmlab"), ("timm", "timm"), ("onnx", "export"), ("matplotlib", "plots")} <= asked
    for package, extra in asked:
        assert package in EXTRAS[extra], (package, extra)


def test_one_version_everywhere():
    assert SETUP["metadata"]["version"] == "attr: rep_plugin.version.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1) == __version__


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == SETUP["metadata"]["license"] and citation["type"] == "software"
    assert [author["name"] for author in citation["authors"]] == [SETUP["metadata"]["author"]]


def test_the_workflow_runs_what_a_checkout_must_pass():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps and os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.stem)
def test_issue_forms_are_complete(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    ids = [part["id"] for part in content["body"]]
    assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in content["body"])


def test_the_security_page_names_errors_and_files_that_exist():
    text = (ROOT / "SECURITY.md").read_text()
    import rep_plugin.errors

    for name in re.findall(r"`(\w+Error)`", text):
        assert hasattr(rep_plugin.errors, name)
    assert not re.search(r"\S+@\S+\.\w+|https?://", text), "an address that nobody gave us"
