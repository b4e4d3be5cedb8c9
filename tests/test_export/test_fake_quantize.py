"""Networks that are trained with rounding compute what int8 will, keep their keys, and are left as they were."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rep_plugin
from rep_plugin.errors import ArgumentError
from rep_plugin.export import FakeQuantization
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "dense": (nn.Conv2d(3, 6, 3), 0, (4, 3, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), 0, (4, 6, 9, 9)),
    "strided, reflected": (nn.Conv2d(3, 6, 3, 2, padding=1, padding_mode="reflect"), 0, (4, 3, 9, 9)),
    "one axis": (nn.Conv1d(3, 6, 3), 0, (4, 3, 9)),
    "three axes": (nn.Conv3d(3, 6, 2, bias=False), 0, (4, 3, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 6, 2, 2), 1, (4, 3, 5, 5)),
    "linear": (nn.Linear(5, 7), 0, (4, 5)),
}


def by_hand(x: Tensor, weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The two rounded tensors, written out in float64."""
    x, weight = x.double(), weight.double()
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    steps = torch.clamp(torch.round(x / step) + zero, 0, 255) - zero
    others = [dim for dim in range(weight.dim()) if dim != axis]
    scale = weight.abs().amax(others, keepdim=True) / 64 if axis is not None else weight.abs().max() / 127
    return steps * step, torch.round(weight / scale) * scale


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_reads_what_is_written_by_hand(kind, per_channel):
    layer, axis, shape = LAYERS[kind]
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    model = nn.Sequential(layer)
    quantization = FakeQuantization(model, per_channel)
    quantization.attach(model)
    got = model(x)
    pair = by_hand(x, layer.weight.detach(), axis if per_channel else None)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        exact.weight.copy_(pair[1])
    assert relative_error(exact(pair[0]).float(), got) < 1e-5 < relative_error(layer(x), got)
    assert quantization.layers == ["0"] and quantization.ranges["0"] == (x.min().item(), x.max().item())
    quantization.detach()
    assert torch.equal(model(x), layer(x)) and list(model.state_dict()) == list(nn.Sequential(layer).state_dict())


def test_gradients_pass_where_nothing_is_clipped():
    model, x = nn.Sequential(nn.Linear(5, 3, bias=False)), torch.randn(6, 5)
    quantization = FakeQuantization(model)
    quantization.ranges = {"0": (-0.4, 0.6)}
    quantization.observing = False
    quantization.attach(model)
    x.requires_grad_()
    model(x).square().sum().backward()
    steps = (x.detach() * 255).round()
    inside = ((steps >= -102) & (steps <= 153)).double()
    rounded, weight = steps.clamp(-102, 153).double() / 255, by_hand(x.detach(), model[0].weight.detach(), 0)[1]
    upper = 2 * rounded @ weight.T
    assert relative_error((upper.T @ rounded).float(), model[0].weight.grad) < 1e-4
    assert relative_error((upper @ weight * inside).float(), x.grad) < 1e-4
    assert 0 < inside.sum() < inside.numel()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu6(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


@pytest.fixture
def net():
    return calibrate_random_bn_(Net(), X)


def observed(model: nn.Module, x: Tensor, per_channel: bool = True) -> FakeQuantization:
    """Ranges of one forward, with the running statistics of its norms."""
    quantization = FakeQuantization(model, per_channel)
    quantization.attach(model)
    model.training = True  # the outermost module alone: its children stay in eval mode
    model(x)
    model.training = False
    return quantization


def test_a_norm_behind_a_layer_may_be_folded_or_not(net):
    """A scale for each channel is as much larger as the channel: what is trained before the fold is what is exported."""
    merged, _ = rep_plugin.reparameterize(net, X)
    whole, folded = observed(net, X), observed(merged, X)
    folded.ranges = whole.ranges
    assert relative_error(net(X), merged(X)) < 1e-5
    whole.detach()
    assert relative_error(net(X), merged(X)) > 1e-4


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_it_computes_what_the_file_does(act, tmp_path):
    """With the ranges that the calibration found, what differs is the rounding of the outputs."""
    layers = [layer for width in (3, 8, 8, 8) for layer in (nn.Conv2d(width, 8, 3, padding=1), act())]
    model = nn.Sequential(*layers).eval()
    report = rep_plugin.export_int8(model, tmp_path / "net.onnx", X, methods=["MinMax"], rounds=0, layers=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    found = torch.from_numpy(session.run(None, {"input": X.numpy()})[0])
    quantization = FakeQuantization(model, report.per_channel)
    x = X[torch.arange(12) % 5 != 4]  # those that calibrate
    for index, layer in enumerate(model):
        if index % 2 == 0:
            quantization.ranges = quantization.ranges | {str(index): (x.min(), x.max())}
        x = layer(x)
    exact = model(X).detach()
    quantization.attach(model)
    errors = [np.square((a - found).numpy()).sum() for a in (exact, model(X).detach())]
    assert not report.equalised and errors[1] < errors[0] / 5


def test_only_the_model_itself_is_rounded_and_observed(net):
    quantization = FakeQuantization(net)
    average, stranger = copy.deepcopy(net), copy.deepcopy(net)
    quantization.attach(net, average)
    taken_along = copy.deepcopy(net)  # hooks are copied too
    exact = stranger(X)
    assert torch.equal(net.eval()(X), net(X)) and not quantization.ranges  # in eval mode nothing is observed
    net.train()
    net(X)
    ranges = quantization.ranges
    assert set(ranges) == {"conv1", "conv2", "fc"}
    average.training = True
    average(2 * X), net.eval()(2 * X)
    average.training = False
    assert quantization.ranges == ranges
    assert not torch.equal(average(X), exact) and torch.equal(taken_along.eval()(X), exact)
    quantization.observing = False
    net.train()(2 * X)
    assert quantization.ranges == ranges
    quantization.observing = True
    net(2 * X)
    low, high = (0.99 * old + 0.01 * new for old, new in zip(ranges["conv1"], (2 * X.min(), 2 * X.max())))
    assert quantization.ranges["conv1"] == pytest.approx((float(low), float(high)), rel=1e-6)
    quantization.detach()
    assert torch.equal(average(X), exact) and not net._forward_hooks and not net._forward_pre_hooks


def test_a_forward_that_raises_leaves_no_mode(net):
    quantization = FakeQuantization(net)
    quantization.attach(net)
    with pytest.raises(RuntimeError, match="channels"):
        net(X[:, :2])
    free = nn.Conv2d(3, 3, 1)
    assert (
        torch.equal(free(X), F.conv2d(X, free.weight, free.bias)) and not torch.overrides._get_current_function_mode()
    )


def test_mixed_precision_rounds_as_well(net):
    observed(net, X)
    exact = net(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(exact, net(X).float()) < 0.1


def test_wrong_arguments_are_refused(net):
    with pytest.raises(ArgumentError, match=r"averaging must be .* in \(0, 1\], got 0"):
        FakeQuantization(net, averaging=0)
    with pytest.raises(ArgumentError, match="pass its .module"):
        FakeQuantization(nn.DataParallel(net))
