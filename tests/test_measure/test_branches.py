"""Branches on values, sizes and the number of images: found without computing, named, and proven where they can be."""

import pytest
import timm
import torch
from torch import nn

from rep_plugin import EquivalenceError, apply_plan, plan_pruning, reparameterize
from rep_plugin.measure.branches import find_branches
from rep_plugin.measure.verify import verify_equivalence
from rep_plugin.testing import calibrate_random_bn_


class Deciding(nn.Module):
    def __init__(self, decide):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.other, self.decide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)), decide

    def forward(self, x):
        return self.one(x) if self.decide(x) else self.other(x)


VALUES = {
    "bool": lambda x: x.abs().max() > 10,
    "item": lambda x: x.mean().item() > 0.5,
    "float": lambda x: float(x[0, 0, 0, 0]) > 0.5,
    "int": lambda x: int(x.sum()) % 2 == 1,
    "tolist": lambda x: x.flatten(1).amax(1).tolist()[0] > 10,
    "equal": lambda x: torch.equal(x, x.flip(-1)),
    "index": lambda x: [False, False, True][(x.mean() > 0).long()],
    "any": lambda x: (x > 10).any(),
}
SIZES = {
    "width": (lambda x: x.shape[-1] > 64, (2, 3, 96, 96)),
    "height by a method": (lambda x: x.size(2) > 100, (2, 3, 112, 112)),
    "small": (lambda x: min(x.shape[2:]) >= 40, (2, 3, 48, 48)),
    "aspect": (lambda x: x.shape[2] > x.shape[3], (2, 3, 160, 96)),
    "pixels": (lambda x: x.numel() > 3 * 2 * 400 * 400, (2, 3, 512, 512)),
    "images": (lambda x: len(x) > 4, (5, 3, 32, 32)),
    "one image": (lambda x: x.shape[0] == 1, (1, 3, 32, 32)),
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net_of(decide):
    torch.manual_seed(0)
    net = nn.Sequential(Deciding(decide), nn.ReLU(), nn.Conv2d(8, 4, 1))
    net[0].one(X), net[0].other(X)
    return calibrate_random_bn_(net, X).double()


@pytest.mark.parametrize("name", VALUES)
def test_a_decision_by_a_value_is_named(name):
    found = find_branches(net_of(VALUES[name]), X)
    assert [place.module for place in found.values] == ["0"] and not found.sizes
    assert found.notes == [
        f"the forward decides by a value in '0' ({found.values[0].line}): only the path of the given inputs is proven"
    ]
    assert found.values[0].line.startswith("test_branches.py:")


@pytest.mark.parametrize("name", SIZES)
def test_another_path_for_another_shape_is_found(name):
    decide, shape = SIZES[name]
    found = find_branches(net_of(decide), X)
    assert list(found.sizes) == [shape] and not found.values and not found.notes
    assert str(found.sizes[shape]).startswith("'0.o") and "test_branches.py:" in str(found.sizes[shape])


def test_what_does_not_run_on_the_meta_device_is_watched_on_values():
    net = net_of(lambda x: x.numpy(force=True).max() > 10 and x.data_ptr() != 0 and x.mean() > 0)
    assert [place.module for place in find_branches(net, X).values] == ["0"]


def test_values_of_parameters_are_no_decision():
    scale = nn.Parameter(torch.tensor(3.0))
    net = net_of(lambda x: True)
    net[0].scale, net[0].decide = scale, None

    class Constant(Deciding):
        def forward(self, x):
            return self.one(x) if self.scale.item() > 2 else self.other(x)

    net[0].__class__ = Constant
    found = find_branches(net, X)
    assert not found.values and not found.sizes


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "repvgg_a0", "efficientnet_lite0", "regnetx_002", "hrnet_w18_small"]
)
def test_plain_networks_have_none(name):
    found = find_branches(timm.create_model(name).eval(), torch.zeros(2, 3, 64, 64))
    assert not found.values and not found.sizes


@pytest.mark.parametrize("name", ["width", "height by a method", "aspect", "images"])
def test_the_proof_runs_the_other_path(name):
    decide, shape = SIZES[name]
    net = net_of(decide)
    wrong = net_of(decide)
    path = wrong[0].one if decide(torch.zeros(shape)) and not decide(X) else wrong[0].other
    path[1].running_mean.add_(0.1)
    with pytest.raises(EquivalenceError, match="whole model differs"):
        verify_equivalence(net, wrong, [X])
    assert not verify_equivalence(net, net, [X]).notes


def test_reports_name_decisions():
    net = net_of(VALUES["bool"])
    _, report = reparameterize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), net).double().eval(), X)
    assert any("decides by a value in '2.0' (test_branches.py:" in note for note in report.notes)
    net = net_of(SIZES["pixels"][0])
    report = apply_plan(net, plan_pruning(net, X, "l1", 0.3, prune_outputs=True), example_input=X)
    assert not any("path" in note for note in report.notes)


class Crossed(nn.Module):
    """For large images the maps meet another way: what may go is no longer what the trace has seen."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        if x.shape[-1] > 64:
            return self.c(self.a(x).sigmoid().flip(1) + self.b(x).relu())
        return self.c(self.a(x).relu() + self.b(x).relu())


def test_pruning_is_proven_on_both_sides_of_a_size():
    torch.manual_seed(0)
    net = Crossed().eval()
    plan = plan_pruning(net, X, "l1", 0.4)
    assert plan.widths["a"][1] < 8
    with pytest.raises(EquivalenceError, match="does not equal setting them to zero"):
        apply_plan(net, plan)
    assert net.a.out_channels == 8
