"""Tracing patches nothing: not torch, not math, not a user's module; and it traces what torch.fx does."""

import math
import sys
import threading

import pytest
import torch
from torch import fx, nn

from rep_plugin.blocks import RepVGGBlock
from rep_plugin.errors import ArgumentError, TraceError
from rep_plugin.reparam.tracer import trace

REGISTERED = []


class Registering(nn.Module):
    """A class that notes its subclasses, as registries do."""

    def __init_subclass__(cls):
        REGISTERED.append(cls)


@fx.wrap
def rescale(x, factor):
    return x * factor if x.mean() > 0 else x


def helper(x):
    return rescale(x, 2.0)


class Net(Registering):
    def __init__(self):
        super().__init__()
        self.block, self.conv, self.bn = RepVGGBlock(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, flag=True):
        self.count += 1
        self.kept = self.bn(self.conv(self.block(x)))
        size = math.sqrt(x.shape[2]) + math.ceil(x.shape[3] / 2)
        return helper(self.kept) * size * self.scale if flag else x


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_it_traces_what_torch_fx_does():
    net = Net().eval()
    assert targets(trace(net)) == ["block", "conv", "bn"]
    functions = [node.target for node in trace(net).nodes if node.op == "call_function"]
    assert {rescale, math.sqrt, math.ceil} <= set(functions)
    assert [node.target for node in trace(net).nodes if node.op == "get_attr"] == ["scale"]


def test_nothing_outside_the_copy_changes_while_a_model_is_traced():
    net, seen = Net().eval(), []

    def state():
        here, maths = sys.modules[__name__], sys.modules["math"]  # the traced functions' own globals are copies
        return nn.Module.__call__, nn.Module.__getattr__, maths.sqrt, here.rescale, here.helper, type(net)

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(state())
            return x

    own = state()

    whole, registered = nn.Sequential(Spy(), net), len(REGISTERED)
    trace(whole)
    assert seen == [own] and len(REGISTERED) == registered
    assert not hasattr(net, "kept") and net.count == 0 and whole[1] is net


def test_users_go_on_tracing_with_torch_fx():
    net = Net().eval()
    trace(net)
    own = fx.symbolic_trace(nn.Sequential(net.conv, nn.ReLU()))
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(own(x), net.conv(x).relu())
    assert isinstance(fx.symbolic_trace(nn.Sequential(net.block)), fx.GraphModule)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Reaches(nn.Module):
    """Runs a module past the copy: a function that holds the original."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.run = lambda x: self.conv(x)

    def forward(self, x):
        return self.bn(self.run(x) + self.conv(x))


class Metaclass(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.made_by_metaclass = True
        return made


class Odd(nn.Module, metaclass=Metaclass):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(("kind", "reason"), [(Branches, "control flow"), (Reaches, "not a member")])
def test_what_cannot_be_traced_is_an_error_in_one_line(kind, reason):
    with pytest.raises(TraceError, match=f"cannot trace {kind.__name__}: .*{reason}"):
        trace(kind().eval())


def test_classes_of_any_metaclass_and_forwards_of_instances():
    assert targets(trace(Odd())) == ["conv"]
    net = Odd()
    net.forward = lambda x: net.conv(x)
    with pytest.raises(ArgumentError, match="has a forward of its own that refers to"):
        trace(net)  # it is bound to the original, whose convolution is not the copy's
    compiled = nn.Sequential(torch.compile(Odd(), backend="eager"))
    with pytest.raises(ArgumentError, match="'0' has a forward of its own that refers to '0._orig_mod'"):
        trace(compiled)


def test_threads_trace_at_once():
    nets, faults = [Net().eval() for _ in range(4)], []

    def work(net):
        for _ in range(10):
            if targets(trace(net)) != ["block", "conv", "bn"]:
                faults.append(net)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
