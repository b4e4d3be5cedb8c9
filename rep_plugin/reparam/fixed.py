"""Which modules of a model must stay as they are, and why: what is attached to them, and who reads them from outside."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from rep_plugin.attached import bound_weights, own_forwards
from rep_plugin.measure.branches import short_path

ADVICE = "hooks that only observe cannot be told from others; take it off to merge"

UNSELECTED = "it is not selected"  # by the user, who needs no note


class Read(NamedTuple):
    """A forward that reaches past a child into what is inside it: ``self.block.conv(x)``, ``self.conv.weight``.

    Args:
        reader: name of the module whose forward it is.
        target: name of the module that is read.
        weights: a tensor or a method of ``target`` is read, where the module would be called.
        line: file and line.
    """

    reader: str
    target: str
    weights: bool
    line: str

    def __str__(self) -> str:
        return f"is read by the forward of {repr(self.reader) if self.reader else 'the model'} ({self.line})"


@dataclass
class Fixed:
    """What of a model must stay as it is.

    Args:
        forwards: {name: what is attached}.
        weights: {name: why its tensors cannot be set}.
        reads: forwards that reach into modules.
        blocks: {name of a block: why it is left}.
        unlisted: names of blocks of no known layout that are merged by what their forward computes.
        borders: whether these may get a bias that depends on the position.
        only: names of the modules that are to be worked on; None: all.
    """

    forwards: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    blocks: dict[str, str] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)
    borders: bool = False
    only: set[str] | None = None

    def selects(self, name: str) -> bool:
        """Return whether a module is to be worked on."""
        return self.only is None or name in self.only

    def why_not_folded(self, name: str, traced: Callable[[str], bool], removed: bool) -> str | None:
        """Return why a convolution or BN cannot be folded, None where it can.

        Args:
            name: name of the layer.
            traced: whether the forward of a module, by its name, was traced, so that what it calls is known.
            removed: the layer goes, where otherwise its weights are set.
        """
        if not self.selects(name):
            return UNSELECTED
        if (what := self.forwards.get(name)) is not None:
            return f"{name!r} {what}: {ADVICE}"
        if not removed and (what := self.weights.get(name)) is not None:
            return f"{name!r} {what}"
        for read in self.reads:
            if read.target == name and (read.weights or not traced(read.reader)):
                return f"{name!r} {read}"
        return None

    def why_not_merged(self, name: str) -> str | None:
        """Return who reads a block's inside, None where nobody does."""
        inside = f"{name}." if name else ""
        for read in self.reads:
            outer = not read.reader.startswith(inside) and read.reader != name
            if outer and (read.target.startswith(inside) or (read.weights and read.target == name)):
                return f"{read.target!r} {read}"
        return None


def find_fixed(model: nn.Module) -> Fixed:
    """Return what of a model must stay as it is; of its blocks nothing is known yet."""
    return Fixed(own_forwards(model), bound_weights(model), list(_reads(model)))


def _reads(model: nn.Module) -> Iterator[Read]:
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.", "rep_plugin.")) or not module._modules:
            continue
        for base, parts, line in _chains_of(type(module)):
            if base == "self":
                yield from _resolve(module, name, parts, line, names)
            elif isinstance(parts[-1], str):  # of something else, a local name: any module inside that is called so
                for inner, part in module.named_modules():
                    if "." in inner and inner.rpartition(".")[2] == parts[-1]:
                        yield Read(name, names[id(part)], False, line)
                    elif inner and not hasattr(Tensor, parts[-1]) and _is_own_method(part, parts[-1]):
                        yield Read(name, names[id(part)], True, line)


def _resolve(module: nn.Module, name: str, parts: tuple, line: str, names: dict[int, str]) -> Iterator[Read]:
    value: Any = module
    for depth, part in enumerate(parts):
        try:
            inner = value[part] if isinstance(part, int) else getattr(value, part)
        except Exception:  # a property may raise anything
            return
        if isinstance(inner, Tensor) and isinstance(value, nn.Module) and value is not module and id(value) in names:
            yield Read(name, names[id(value)], True, line)
        if isinstance(part, str) and value is not module and id(value) in names and _is_own_method(value, part):
            yield Read(name, names[id(value)], True, line)
        if isinstance(inner, nn.Module) and depth == len(parts) - 1 and depth and id(inner) in names:
            yield Read(name, names[id(inner)], False, line)
        value = inner


def _is_own_method(module: nn.Module, name: str) -> bool:
    method = getattr(type(module), name, None)
    return inspect.isfunction(method) and not method.__module__.startswith("torch.") and not hasattr(nn.Module, name)


@lru_cache(maxsize=1000)
def _chains_of(kind: type) -> tuple[tuple[str, tuple, str], ...]:
    """(base, attributes and indices, line) of what a class's forward, and the methods that it calls, read."""
    chains: dict[tuple[str, tuple, str], None] = {}
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        function = inspect.unwrap(found) if inspect.isfunction(found := getattr(kind, name, None)) else None
        if name in done or function is None or (function.__module__ or "").startswith("torch."):
            continue
        done.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # made at run time: there is no source
            continue
        first, path = function.__code__.co_firstlineno, short_path(function.__code__.co_filename)
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
                continue
            base, parts = _chain(node)
            if base == "self" and len(parts) == 1 and isinstance(parts[0], str):
                todo.append(parts[0])
            library = isinstance(function.__globals__.get(base or ""), (ModuleType, type))
            if base is not None and parts and not library:
                chains.setdefault((base, parts, f"{path}:{first + node.lineno - 1}"))
    return tuple(chains)


def _chain(node: ast.AST) -> tuple[str | None, tuple]:
    """``self.a.b[0]`` as ("self", ("a", "b", 0)); the base is None where it is no name."""
    if isinstance(node, ast.Name):
        return node.id, ()
    if isinstance(node, ast.Attribute):
        base, parts = _chain(node.value)
        return base, (*parts, node.attr)
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, (int, str))
    ):
        base, parts = _chain(node.value)
        return base, (*parts, node.slice.value)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
        (base, parts), key = _chain(node.args[0]), node.args[1]
        return (base, (*parts, key.value)) if isinstance(key, ast.Constant) else (None, ())
    return None, ()
