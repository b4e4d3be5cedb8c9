"""Public callables say what they take, return and raise, and their examples run."""

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import rep_plugin

ROOT = Path(rep_plugin.__file__).parent
PATHS = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Example", "Attributes")
ROOMS = [name for name, path in PATHS.items() if path.name == "__init__.py"]


def parameters_of(node: ast.FunctionDef, bound: bool) -> list[str]:
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][bound:]
    return [name for name in (*named, *(a.arg for a in arguments.kwonlyargs)) if not name.startswith("_")]


def sections_of(docstring: str) -> dict[str, str]:
    """The text below each heading of a Google style docstring."""
    found, current = {}, None
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            current = found.setdefault(line.rstrip(":"), [])
        elif line and not line.startswith(" "):
            current = None
        elif current is not None:
            current.append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def faults_of(label: str, docstring: str | None, parameters: list[str], returns: ast.expr | None) -> list[str]:
    if not docstring:
        return [f"{label}: no docstring"]
    if len(parameters) < 2:
        return []
    sections = sections_of(docstring)
    described = sections.get("Args", "")
    faults = [
        f"{label}: {name} is not under Args"
        for name in parameters
        if not any(name in line.partition(":")[0].replace(",", " ").split() for line in described.splitlines())
    ]
    nothing = returns is None or (isinstance(returns, ast.Constant) and returns.value is None)
    if not nothing and not {"Returns", "Yields"} & sections.keys():
        faults.append(f"{label}: no Returns")
    return faults


def public(body: list[ast.stmt], kind: type) -> list:
    return [node for node in body if isinstance(node, kind) and not node.name.startswith("_")]


@pytest.mark.parametrize("name", PATHS)
def test_public_functions_and_classes_describe_every_argument(name):
    tree = ast.parse(PATHS[name].read_text())
    faults = []
    for node in public(tree.body, ast.FunctionDef):
        faults += faults_of(f"{name}.{node.name}", ast.get_docstring(node), parameters_of(node, False), node.returns)
    for node in public(tree.body, ast.ClassDef):
        start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        parameters = [] if start is None else parameters_of(start, True)
        faults += faults_of(f"{name}.{node.name}", ast.get_docstring(node), parameters, None)
    assert not faults, "\n".join(faults)


def documented(room: str) -> list[tuple[str, object]]:
    """What a room exports and this package defines: functions and classes with more than one argument."""
    module = importlib.import_module(room)
    found = []
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if not callable(value) or (isinstance(value, type) and issubclass(value, BaseException)):
            continue
        if len(inspect.signature(value).parameters) > 1:
            found.append((f"{room}.{name}", value))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_exports_has_an_example(room):
    lacking = [label for label, value in documented(room) if ">>>" not in (value.__doc__ or "")]
    assert not lacking, "\n".join(lacking)


@pytest.mark.parametrize("name", [name for name, path in PATHS.items() if ">>>" in path.read_text()])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
