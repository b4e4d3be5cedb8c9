"""What is built again from written files is the given model, bit by bit, or is refused by module and attribute."""

import json
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin.errors import ArgumentError, CheckpointMismatchError, EquivalenceError
from rep_plugin.measure.rebuilt import check_fingerprint, fingerprint_of, require_identical
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers of torch, a function and tensors that no state dict holds."""

    def __init__(self, gamma=1.0):
        super().__init__()
        self.conv, self.bn, self.act = (
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.pool, self.out = nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.last, self.slope, self.function = nn.BatchNorm2d(4), 0.1, F.leaky_relu
        self.register_buffer("grid", torch.linspace(0, 1, 4).view(1, 4, 1, 1), persistent=False)
        self.shift = torch.full((1, 4, 1, 1), 0.5)
        nn.init.constant_(self.last.weight, gamma)

    def forward(self, x):
        x = self.out(self.pool(self.act(self.bn(self.conv(x)))))
        return self.function(self.last(x) * self.grid + self.shift.to(x), self.slope)


def made() -> nn.Module:
    torch.manual_seed(0)
    return calibrate_random_bn_(Net(), X)


def again(model: nn.Module) -> nn.Module:
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    return fresh


def clamp(module, args, output):
    return output.clamp(max=100)


CHANGES = {
    "'bn' .BatchNorm2d.*: eps is 0.001, in its place 1e-05": lambda net: setattr(net.bn, "eps", 1e-3),
    "'act' .SiLU.*: it is a SiLU, in its place a ReLU": lambda net: setattr(net, "act", nn.SiLU()),
    "'out' .*: dilation is .2, 2., in its place .1, 1.": lambda net: setattr(net.out, "dilation", (2, 2)),
    "'conv' .*: stride is .2, 2., in its place .1, 1.": lambda net: setattr(net.conv, "stride", (2, 2)),
    "'conv' .*: padding_mode is zeros, in its place reflect": lambda net: setattr(net.conv, "padding_mode", "zeros"),
    "'pool' .*: kernel_size is 2, in its place 3": lambda net: setattr(net.pool, "kernel_size", 2),
    "'bn' .*: it has a forward hook .clamp.": lambda net: net.bn.register_forward_hook(clamp),
    "'out' .*: it has a forward pre-hook": lambda net: net.out.register_forward_pre_hook(lambda m, x: (x[0].tanh(),)),
    "'act' .*: it has a forward of its own": lambda net: setattr(
        net.act, "forward", MethodType(lambda self, x: x.clamp(0, 1e9), net.act)
    ),
    "the model .Net.*: slope is 0.2, in its place 0.1": lambda net: setattr(net, "slope", 0.2),
    "the model .Net.*: function is elu, in its place leaky_relu": lambda net: setattr(net, "function", F.elu),
    "the model .Net.*: 'grid', which is not among the weights": lambda net: net.grid.mul_(1.01),
    "the model .Net.*: 'shift', which is not among the weights": lambda net: net.shift.add_(1e-3),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_was_changed_is_named(message):
    model = made()
    require_identical(model, again(model), [X])
    fingerprint = json.loads(json.dumps(fingerprint_of(model, [X])))
    check_fingerprint(again(model), fingerprint)
    CHANGES[message](model)
    with pytest.raises(EquivalenceError, match=f"^{message}"):
        require_identical(model, again(model), [X])
    with pytest.raises(CheckpointMismatchError):  # a fresh one is not the one that was saved
        check_fingerprint(again(model), fingerprint_of(model, [X]))


def test_a_batch_norm_of_zeros_hides_nothing():
    """Its channels say nothing of what lies before it, nor of its own eps."""
    for change in (lambda net: setattr(net, "act", nn.ReLU6()), lambda net: setattr(net.last, "eps", 1.0)):
        model = made()
        nn.init.zeros_(model.last.weight), nn.init.zeros_(model.last.bias)
        change(model)
        with pytest.raises(EquivalenceError, match="'act'|eps is 1.0"):
            require_identical(model, again(model), [X])
        with pytest.raises(CheckpointMismatchError, match="'act'|eps is 1e-05, in the saved one 1.0"):
            check_fingerprint(again(model), fingerprint_of(model, [X]))


def test_what_only_observes_stays():
    model, seen = made(), []
    model.out.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.train()
    require_identical(model, again(model), [X])
    check_fingerprint(again(model), fingerprint_of(model, [X]))
    assert seen and model.training and len(model.out._forward_hooks) == 1


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.double, lambda net: net.to(memory_format=torch.channels_last)]
)
def test_types_and_layouts_are_no_difference(change):
    model = change(made())
    fresh = Net().to(next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    require_identical(model, fresh, [X])
    check_fingerprint(fresh, fingerprint_of(model, [X]))


def test_models_that_draw_random_numbers():
    class Noisy(nn.Conv2d):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    model = Noisy(3, 4, 3)
    fresh = Noisy(3, 4, 3)
    fresh.load_state_dict(model.state_dict())
    require_identical(model, fresh, [X])
    assert fingerprint_of(model, [X])["outputs"] == []


def test_inputs_that_the_model_does_not_take():
    model = made()
    require_identical(model, again(model), [torch.zeros(1, 5, 8, 8), X])
    with pytest.raises(EquivalenceError, match="takes none of the inputs .* give an example_input"):
        require_identical(model, again(model), [torch.zeros(1, 5, 8, 8)])


@pytest.mark.parametrize(
    "change",
    [
        dict(shape=[1, 3, 2**20, 2**20]),
        dict(shape=[]),
        dict(layers=[]),
        dict(outputs=[["conv", 1e-6]]),
        dict(outputs=[["conv", 1e-6, ["a"]]]),
        dict(more=1),
    ],
)
def test_a_broken_fingerprint_is_refused(change):
    model = made()
    with pytest.raises(ArgumentError, match="the fingerprint"):
        check_fingerprint(model, fingerprint_of(model, [X]) | change)


class Watches(Net):
    """Has hooks of its own, methods of it, as every network that the builder gives."""

    def __init__(self):
        super().__init__()
        self.bn.register_forward_hook(self.limit)

    def limit(self, module, args, output):
        return output.clamp(max=2)


def test_hooks_that_the_builder_registers_are_no_difference():
    model, fresh = calibrate_random_bn_(Watches(), X), Watches()
    fresh.load_state_dict(model.state_dict())
    require_identical(model, fresh, [X])
    fingerprint = fingerprint_of(model, [X])
    assert fingerprint["outputs"] and fingerprint["attached"] == {"bn": "has a forward hook (limit)"}
    check_fingerprint(fresh, fingerprint)
    with pytest.raises(CheckpointMismatchError, match="'bn' .*: in the saved one it has a forward hook .limit."):
        check_fingerprint(again(model), fingerprint)
