"""One way to copy models: nothing shared, kept maps detached, what cannot be copied refused by name in every verb."""

import copy
import threading

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.errors import ArgumentError
from rep_plugin.measure.copies import copy_inputs, copy_model
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Conv, BN, ReLU, conv: something to do for every verb."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu())


class KeepsMap(Net):
    def forward(self, x):
        self.feat = self.bn(self.conv(x)).relu()
        self.all = [*getattr(self, "all", []), {"map": self.feat}]
        return self.head(self.feat)


class WeightNormed(Net):
    """The old form sets ``weight`` before each call: a tensor with a graph."""

    def __init__(self):
        super().__init__()
        self.last = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.last(super().forward(x))


class CopiesAsItself(Net):
    def __deepcopy__(self, memo):
        return self


class RaisesWhenCopied(Net):
    def __deepcopy__(self, memo):
        raise KeyError("nobody may copy this")


class HoldsLock(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class SharesWeight(Net):
    def __deepcopy__(self, memo):
        made = type(self)()
        made.conv.weight = self.conv.weight
        return made


class CopiesAsText(Net):
    def __deepcopy__(self, memo):
        return "text"


class LosesPart(Net):
    def __deepcopy__(self, memo):
        made = type(self)()
        del made.bn
        return made


def built(kind):
    net = kind().eval()
    calibrate_random_bn_(net, X)
    return net


VERBS = {
    "reparameterize": lambda net, path: rep_plugin.reparameterize(net, X),
    "inplace": lambda net, path: rep_plugin.reparameterize(net, X, inplace=True, verify=False),
    "expand": lambda net, path: rep_plugin.expand(net, "acb", example_input=X),
    "plan": lambda net, path: rep_plugin.plan_pruning(net, X, "l1", 0.3),
    "export": lambda net, path: rep_plugin.export_onnx(net, path / "net.onnx", X, rounds=0, runtimes=["onnxruntime"]),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", [KeepsMap, WeightNormed])
def test_every_verb_takes_a_model_that_holds_tensors_with_a_graph(kind, verb, tmp_path):
    net = built(kind)
    net(X).sum().backward()
    VERBS[verb](net, tmp_path)


def test_a_model_that_holds_tensors_with_a_graph_is_pruned(tmp_path):
    net = built(KeepsMap)
    net(X).sum().backward()
    report = rep_plugin.apply_plan(net, rep_plugin.plan_pruning(net, X, "l1", 0.3))
    assert report.max_rel_error < 1e-9 and net(X).requires_grad


def test_kept_tensors_are_detached_and_stay_one_tensor():
    net = built(KeepsMap)
    net(X)
    copied = copy_model(net)
    assert torch.equal(copied.feat, net.feat) and copied.feat is not net.feat
    assert not copied.feat.requires_grad and net.feat.requires_grad
    assert copied.all[-1]["map"] is copied.feat


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (CopiesAsItself, "'1' (CopiesAsItself) copies as itself"),
        (RaisesWhenCopied, "'1' (RaisesWhenCopied) cannot be copied"),
        (HoldsLock, "'1' (HoldsLock) cannot be copied"),
        (SharesWeight, "the copy of '1.conv' (Conv2d) shares memory with it"),
        (LosesPart, "'1.bn' (BatchNorm2d) is not in the model's copy"),
    ],
)
def test_every_verb_refuses_what_has_no_copy_and_leaves_it(kind, named, verb, tmp_path):
    net = nn.Sequential(nn.Identity(), built(kind)).eval()
    state, dtype = copy.deepcopy(net.state_dict()), net[1].conv.weight.dtype
    if kind is SharesWeight and verb == "plan":
        VERBS[verb](net, tmp_path)  # reads alone
    else:
        with pytest.raises(ArgumentError) as error:
            VERBS[verb](net, tmp_path)
        merged_then_copied = kind is SharesWeight and verb == "inplace"  # which is undone
        assert (merged_then_copied or named in str(error.value)) and "\n" not in str(error.value)
    assert net[1].conv.weight.dtype == dtype
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_what_copies_as_no_module_is_refused():
    with pytest.raises(ArgumentError, match="copies as a str"):
        copy_model(built(CopiesAsText))


def test_modes_hooks_formats_and_tied_weights_are_kept():
    net = built(Net).to(memory_format=torch.channels_last)
    net.twin = nn.Conv2d(3, 16, 3)
    net.twin.weight = net.conv.weight
    net.bn.train()
    net.conv.register_forward_hook(lambda module, args, output: output * 2)
    copied = copy_model(net)
    assert [m.training for m in copied.modules()] == [m.training for m in net.modules()]
    assert copied.twin.weight is copied.conv.weight and copied.conv.weight is not net.conv.weight
    assert copied.conv.weight.stride() == net.conv.weight.stride() and len(copied.conv._forward_hooks) == 1
    assert not any(m.training for m in copy_model(net, training=False).modules()) and net.bn.training


def test_inputs_are_copied_whole():
    given = (X.clone().requires_grad_(), {"size": torch.zeros(2)}, "text")
    made = copy_inputs(given)
    assert torch.equal(made[0], given[0]) and not made[0].requires_grad and made[0] is not given[0]
    assert made[1]["size"] is not given[1]["size"] and made[2] == "text"
