"""Costs are those of one image, however many the example has and however the model is called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rep_plugin import apply_plan, expand, plan_pruning, reparameterize
from rep_plugin.errors import ArgumentError
from rep_plugin.measure import count_macs
from rep_plugin.measure.forward import first_image
from tests.test_pruning.nets import ConvBN, Pooled, Residual, ready

MACS = 25 * 8 * 3 * 9  # of the convolution below, at 5 x 5


class Called(nn.Module):
    """Takes its images in one of several ways."""

    def __init__(self, take):
        super().__init__()
        self.conv, self.take = nn.Conv2d(3, 8, 3, padding=1), take

    def forward(self, *args, **kwargs):
        return self.conv(self.take(*args, **kwargs))


@pytest.mark.parametrize("images", [1, 2, 8])
def test_however_a_model_is_called(images):
    x = torch.zeros(images, 3, 5, 5)
    calls = {
        "tensor": (lambda x: x, x),
        "tuple": (lambda x, scale: x * scale, (x, torch.ones(images, 1, 1, 1))),
        "dict": (lambda image, size: image + size, {"image": x, "size": torch.tensor(5.0)}),
        "list of images": (torch.stack, list(x)),
        "list of images and more": (lambda xs, more: torch.stack(xs) + more, (list(x), torch.tensor(1.0))),
        "list of maps": (lambda maps: maps[-1], [torch.zeros(images, 6, 9, 9), x]),
    }
    assert {name: count_macs(Called(take), example) for name, (take, example) in calls.items()} == dict.fromkeys(
        calls, MACS
    )


def test_a_model_that_reads_values_or_takes_batches_of_one_size():
    def by_value(x):
        return x if x.sum() > 0 else F.interpolate(x, scale_factor=2)

    def of_frames(x):  # four frames make one sample
        return x.view(-1, 4, *x.shape[1:]).flatten(0, 1)

    assert count_macs(Called(by_value), torch.ones(4, 3, 5, 5)) == MACS
    assert count_macs(Called(of_frames), torch.ones(8, 3, 5, 5)) == MACS
    plan = plan_pruning(nn.Sequential(Called(of_frames), nn.Conv2d(8, 2, 1)), (8, 3, 5, 5), "l1", 0.5)
    assert plan.macs_before == MACS + 25 * 8 * 2 and plan.input_shape == (8, 3, 5, 5)
    with pytest.raises(ArgumentError, match="^example_input.*does not go through Called.*invalid for input of size"):
        count_macs(Called(of_frames), torch.ones(6, 3, 5, 5))


def test_what_is_no_batch_stays():
    one, images = first_image(((torch.zeros(4, 3, 5, 5), 7), {"size": torch.zeros(2), "name": ["a"] * 4}))
    assert images == 4 and one[0][0].shape == (1, 3, 5, 5) and one[0][1] == 7
    assert one[1]["size"].shape == (2,) and one[1]["name"] == ["a"] * 4
    assert first_image(torch.tensor(3.0))[1] == first_image("text")[1] == 1


@pytest.mark.parametrize("budget", [dict(macs=0.5), dict(macs=100_000), dict(prune_fraction=0.3), dict(params=0.5)])
def test_the_same_call_gives_the_same_plan(budget):
    net = ready(ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32), Pooled(32))
    plans = [plan_pruning(net, torch.zeros(n, 3, 13, 13), "l1", **budget) for n in (1, 2, 8)]
    assert plans[0].units[1] and plans[0] == plans[1] == plans[2]
    assert plans[0].macs_before == count_macs(net, torch.zeros(5, 3, 13, 13))


def test_reports_count_one_image():
    numbers = []
    for images in (1, 8):
        torch.manual_seed(0)
        net = ready(ConvBN(3, 16), Residual(16, 24), ConvBN(16, 32), Pooled(32))
        x = torch.randn(images, 3, 13, 13)
        net, expanded = expand(net, block="acb")
        pruned = apply_plan(net, plan_pruning(net, x, "l1", 0.3), example_input=x)
        merged = reparameterize(net, x)[1]
        numbers.append([(r.macs_before, r.macs_after) for r in (expanded, pruned, merged)])
        assert "multiply-adds, one image of 3x13x13" in str(merged)
    assert numbers[0] == numbers[1]
