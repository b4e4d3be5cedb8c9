"""The largest parts of a model that can be traced, and who reads what in them."""

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rep_plugin.blocks.base import RepBlock
from rep_plugin.blocks.layers import is_idle
from rep_plugin.errors import TraceError
from rep_plugin.reparam.tracer import trace


@dataclass
class TracedPart:
    """One traced module: its name in the model and its graph."""

    name: str
    module: nn.Module
    graph: fx.Graph

    def holds(self, name: str) -> bool:
        """Return whether a module of the model is this one or inside it."""
        return not self.name or name == self.name or name.startswith(f"{self.name}.")

    def full_name(self, target: str) -> str:
        return f"{self.name}.{target}" if self.name else target


def trace_parts(model: nn.Module, holding: type[nn.Module] = _BatchNorm) -> tuple[list[TracedPart], list[str]]:
    """Return the model as one part or, where it cannot be traced, the largest of its modules that can be.

    Args:
        model: the model.
        holding: modules without a layer of this class are left out.

    Returns:
        The parts; and one line for each class and reason of modules that cannot be traced although all their children can.
    """
    parts: list[TracedPart] = []
    failures: dict[str, list[str]] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> bool:
        """Return whether the module, or any inside it, could not be traced."""
        leaf = isinstance(module, (RepBlock, nn.Conv2d, _BatchNorm))
        if leaf or module in seen or not any(isinstance(m, holding) for m in module.modules()):
            return False
        seen.add(module)
        reason = None
        # Lists have none; timm's FeatureListNet is a ModuleDict with one.
        if type(module).forward is not nn.Module.forward:
            try:
                parts.append(TracedPart(name, module, trace(module)))
                return False
            except TraceError as error:
                reason = str(error)
        inside = [visit(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        if reason is not None and not any(inside):
            failures.setdefault(reason, []).append(name or "the model")
        return reason is not None or any(inside)

    visit("", model)
    lines = [f"{len(names)} module(s), first {names[0]!r}: {reason}" for reason, names in failures.items()]
    return parts, lines


class Readers:
    """Which modules of a traced part read which, past those that compute nothing in eval mode.

    Args:
        model: the whole model. A module that stands in several places of it, or is called more than once, has no single
            reader and is left out.
        part: the traced part.
    """

    def __init__(self, model: nn.Module, part: TracedPart):
        self.modules = dict(part.module.named_modules())
        calls = [node for node in part.graph.nodes if node.op == "call_module"]
        times_called = Counter(self.modules[node.target] for node in calls)
        places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._once = {module for module, times in times_called.items() if times == 1 and places[module] <= 1}
        self.calls = [node for node in calls if not is_idle(self.modules[node.target])]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, where the model calls it here alone; None otherwise."""
        module = self.modules.get(node.target) if node.op == "call_module" else None
        return module if module in self._once else None

    def _is_passed(self, node: fx.Node) -> bool:
        return node.op == "call_module" and is_idle(self.modules[node.target])

    def source(self, node: fx.Node) -> fx.Node | None:
        """The node whose output this module reads, provided that nothing else reads it."""
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        source = node.args[0]
        while len(source.users) == 1 and self._is_passed(source) and len(source.args) == 1:
            source = source.args[0]
        return source if len(source.users) == 1 else None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that read this one's output."""
        found = []
        for user in node.users:
            found += self.readers(user) if self._is_passed(user) else [user]
        return found
