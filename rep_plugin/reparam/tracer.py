"""Tracing with torch.fx's proxies and graph, without what its own tracer does to the process.

``torch.fx.Tracer.trace`` patches ``nn.Module.__call__`` and ``__getattr__``, the ``math`` module and the globals of traced
code: another thread that runs any model meanwhile fails. Here a throwaway copy is traced. The *copy's* modules get classes
that route calls and parameters to the tracer, and methods that see other globals. What the forward keeps on ``self``
stays on the copy.
"""

import builtins
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import wraps
from itertools import takewhile
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.base import RepBlock
from rep_plugin.errors import TraceError, first_line
from rep_plugin.measure.copies import copy_model

CALLS = "calls"  # of nodes: the modules in whose forward they are computed, outer ones first, a number for each call
_MATH = {name: value for name, value in vars(math).items() if callable(value) and not name.startswith("_")}


class Called(NamedTuple):
    """A module with a forward of its own that is called with one value and gives one.

    Args:
        target: its name.
        given, result: the values.
        nodes: all that its forward computes.
    """

    target: str
    given: fx.Node
    result: fx.Node
    nodes: frozenset[fx.Node]

    def is_closed(self) -> bool:
        """Whether it reads and gives nothing else, and all that reads its value is in it."""
        inside = self.nodes | {self.given}
        return all(user in self.nodes for node in inside - {self.result} for user in node.users) and all(
            node in inside for one in self.nodes for node in one.all_input_nodes
        )


class _Routed:
    """Stands in front of the class of a traced module; torch's classes know nothing of it."""

    fx_tracer: "_Tracer"

    def __init_subclass__(cls) -> None:
        """A class of a user's that registers its subclasses must not see this one."""

    def __call__(self, *args, **kwargs):
        return self.fx_tracer.call_module(self, super().__call__, args, kwargs)

    def __getattr__(self, name: str):
        return self.fx_tracer.proxy_of(super().__getattr__(name))


def _as_node(function: Callable) -> Callable:
    """The function, to which a call with a proxy is one node, as ``torch.fx.wrap`` asks for."""

    @wraps(function)
    def call(*args, **kwargs):
        proxies: list[fx.Proxy] = []
        fx.node.map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
        return (
            proxies[0].tracer.create_proxy("call_function", function, args, kwargs)
            if proxies
            else function(*args, **kwargs)
        )

    return call


class _Globals:
    """Functions as they are to be traced: with copies of their globals, where something there is a node as a whole."""

    def __init__(self) -> None:
        self.wrapped: dict[int, list[str]] = defaultdict(list)  # what users gave to torch.fx.wrap
        for owner, name in list(_symbolic_trace._wrapped_fns_to_patch):
            self.wrapped[owner].append(name)
        self.nodes = {id(function): _as_node(function) for function in _MATH.values()}
        self.math = SimpleNamespace(**{**vars(math), **{name: self.nodes[id(value)] for name, value in _MATH.items()}})
        self._replaced: dict[int, dict[str, Any]] = {}
        self._copies: dict[int, dict[str, Any]] = {}

    def replaced_in(self, space: dict[str, Any]) -> dict[str, Any]:
        """What stands in some globals and is a node as a whole, by name."""
        found = self._replaced.get(id(space))
        if found is None:
            here = space | {
                name: getattr(builtins, name) for name in self.wrapped.get(id(space), ()) if name not in space
            }
            found = {name: _as_node(here[name]) for name in self.wrapped.get(id(space), ())}
            if not str(space.get("__name__")).startswith("torch."):  # whose functions are nodes themselves
                found |= {name: self.math for name, value in here.items() if value is math}
                found |= {name: self.nodes[id(value)] for name, value in here.items() if id(value) in self.nodes}
            self._replaced[id(space)] = found
        return found

    def rebind(self, function: FunctionType) -> FunctionType:
        """The function with its globals as they are to be traced; itself where nothing there is replaced."""
        space = function.__globals__
        known = self._copies.get(id(space))
        if known is None:
            functions = {name: value for name, value in list(space.items()) if type(value) is FunctionType}
            theirs = {name: f for name, f in functions.items() if self.replaced_in(f.__globals__)}
            replaced = self.replaced_in(space)
            known = self._copies[id(space)] = dict(space) if replaced or theirs else space
            if known is not space:
                known.update({name: self.rebind(f) for name, f in theirs.items()} | replaced)
        if known is space:
            return function
        made = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        return made


class _Tracer(fx.Tracer):
    """Convolutions, BNs and blocks are leaves, beside those that torch.fx knows."""

    def __init__(self, called: list[Called] | None, leaves: Collection[str], kept: Collection[str]) -> None:
        super().__init__()
        self.leaves, self.kept = leaves, kept
        self._qualname_counter = defaultdict(int)  # torch's is one for the process
        self._globals = _Globals()
        self._proxies: dict[int, fx.Proxy] = {}
        self.called = called
        self._calls: list[int] = []  # that are running, each with a number of its own
        self._count = 0

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        known = isinstance(module, (RepBlock, nn.Conv2d, _BatchNorm)) or type(module).__name__ in self.leaves
        return known or qualified_name in self.kept or super().is_leaf_module(module, qualified_name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(module)
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise TraceError(f"{name!r} is compiled")
        if self.is_leaf_module(module, name):
            return self.create_proxy("call_module", name, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        self._count += 1
        self._calls.append(self._count)
        out = forward(*args, **kwargs)
        self._calls.pop()
        one = len(args) == 1 and not kwargs and isinstance(args[0], fx.Proxy) and isinstance(out, fx.Proxy)
        if self.called is not None and one:
            made = takewhile(lambda node: node is not last, reversed(self.graph.nodes))
            self.called.append(Called(name, args[0].node, out.node, frozenset(made)))
        return out

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None) -> fx.Node:
        # torch's would note for each node in which modules it stands, which takes as long as all else
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        node.meta[CALLS] = tuple(self._calls)
        return node

    def proxy_of(self, value: Any) -> Any:
        """The proxy of a parameter that the forward reads; anything else as it is."""
        name = self._names.get(id(value))
        if name is None:
            return value
        if id(value) not in self._proxies:
            self._proxies[id(value)] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[id(value)]

    def _routed(self, kind: type) -> type:
        """A class that computes what ``kind`` does, module by module; its metaclass is not asked."""
        space = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "fx_tracer": self}
        seen = {"__call__", "__getattr__"}
        for base in kind.__mro__:
            own = {} if base.__module__.startswith("torch.") else vars(base)
            for name in own.keys() - seen:
                value = own[name]
                static = type(value) is staticmethod
                function = value.__func__ if static else value
                if type(function) is FunctionType and (made := self._globals.rebind(function)) is not function:
                    space[name] = staticmethod(made) if static else made
            seen |= vars(base).keys()
        return type.__new__(type(kind), kind.__name__, (_Routed, kind), space)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module that is thrown away afterwards."""
        self.root = root
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self._names = {
            id(p): f"{name}.{key}" if name else key
            for module, name in reversed(self.submodule_paths.items())
            for key, p in module._parameters.items()
            if p is not None
        }
        self.tensor_attrs = {
            value: f"{name}.{key}" if name else key
            for module, name in self.submodule_paths.items()
            for key, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        kinds = {kind: self._routed(kind) for kind in {type(module) for module in self.submodule_paths}}
        for module in self.submodule_paths:
            object.__setattr__(module, "__class__", kinds[type(module)])
        self.graph = fx.Graph(tracer_cls=type(self))
        forward: Any = root.forward  # an instance may have its own
        bound = getattr(forward, "__self__", None) is root
        function, args = self.create_args_for_root(forward.__func__ if bound else forward, bound, concrete_args)
        self.create_node("output", "output", (self.create_arg(function(*args)),), {})
        return self.graph


def _stand_ins(model: nn.Module, tracer: _Tracer) -> dict[int, object]:
    """What stands for tensors and leaves in a copy that is traced: a leaf is named alone, never run.

    Parameters are others on the same memory: where a forward reaches a module past the copy, theirs are unknown to it.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]
    made: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in plain}
    made |= {id(b): b.detach().clone() for b in model.buffers()}
    for name, module in model.named_modules():
        if not module._modules and not hasattr(module, "__deepcopy__") and tracer.is_leaf_module(module, name):
            leaf = made[id(module)] = object.__new__(type(module))
            own = {kind: vars(module)[kind] for kind in ("_parameters", "_buffers")}
            held = {kind: {key: made.get(id(t), t) for key, t in tensors.items()} for kind, tensors in own.items()}
            vars(leaf).update(vars(module) | held)
    return made


def trace(
    model: nn.Module,
    constants: dict[str, Tensor] | None = None,
    called: list[Called] | None = None,
    leaves: Collection[str] = (),
    kept: Collection[str] = (),
) -> fx.Graph:
    """Return the graph of a model, convolutions and BNs being leaves; arguments that have a default keep it.

    Nothing outside of the traced copy is changed, not even while it is traced.

    Args:
        model: the model.
        constants: is given {target: tensor} of what the forward computes from buffers alone, which no module holds.
        called: is given the modules inside that have a forward of their own, inner ones first.
        leaves: names of classes that are leaves too.
        kept: names of modules that are.

    Returns:
        The graph.

    Raises:
        TraceError: it cannot be traced; the message has the reason.
    """
    arguments = inspect.signature(model.forward).parameters.values()
    defaults = {
        a.name: a.default for a in arguments if a.default is None or isinstance(a.default, (bool, int, float, str))
    }
    tracer = _Tracer(called, leaves, kept)
    copied = copy_model(model, _stand_ins(model, tracer))
    try:
        graph = tracer.trace(copied, defaults or None)
        for node in graph.nodes:
            if constants is not None and node.op == "get_attr" and node.target.startswith("_tensor_constant"):
                constants[node.target] = getattr(copied, node.target)
        return graph
    except Exception as error:  # the traced code raises anything on a proxy
        raise TraceError(f"torch.fx cannot trace {type(model).__name__}: {first_line(error)}") from error
