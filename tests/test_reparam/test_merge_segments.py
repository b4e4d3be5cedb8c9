"""Segments are merged whole, whatever they cost, and only as they were linearized."""

import pytest
import torch
from torch import nn

import rep_plugin
from rep_plugin.errors import AnnealError, NotMergeableError
from rep_plugin.reparam.fx_parts import trace_parts
from rep_plugin.reparam.merge_segments import find_block, merge_segments_
from rep_plugin.reparam.runs import SUM, common_block, compose_elements, find_runs, names_of
from tests.helpers import randomise_bn_, relative_error


class Block(nn.Module):
    """A residual block with an activation behind its sum; its layers stand in a Sequential."""

    def __init__(self, strided: bool = False):
        super().__init__()
        stride = 2 if strided else 1
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 3, 1, 1),
        )
        self.side = nn.Sequential(nn.Conv2d(4, 4, 1, 2), nn.BatchNorm2d(4)) if strided else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.side(x) + self.body(x))


def linear(strided: bool = False) -> nn.Module:
    model = (
        randomise_bn_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), Block(strided), nn.Conv2d(4, 2, 1))).double().eval()
    )
    annealed, _ = rep_plugin.linearize(model, ["2.body.2"])
    return annealed


def runs_of(model: nn.Module):
    return [run for part in trace_parts(model, nn.Conv2d)[0] for run in find_runs(model, part)]


@pytest.mark.parametrize("strided", [False, True])
def test_a_block_becomes_a_convolution_and_what_follows(strided):
    model = linear(strided)
    rep_plugin.set_alpha_(model, 1.0)
    x = torch.randn(2, 3, 15, 14, dtype=torch.float64)
    expected = model(x)
    ((name, layers),) = merge_segments_(model)
    assert name == "2" and len(layers) == (5 if strided else 3)
    assert [type(layer) for layer in model[2]] == [nn.Conv2d, nn.ReLU]
    assert model[2][0].kernel_size == ((7, 7) if strided else (5, 5))
    assert relative_error(expected, model(x)) < 1e-12
    assert merge_segments_(model) == []


def test_alphas_below_1_are_not_merged():
    model = linear()
    with pytest.raises(AnnealError, match="alpha is 0, expected 1"):
        merge_segments_(model)


def test_a_layer_that_something_else_reads_is_refused():
    model = linear()
    rep_plugin.set_alpha_(model, 1.0)
    model[2].body[3] = nn.Sequential(model[2].body[3], nn.Softmax(1))
    with pytest.raises(NotMergeableError, match="the segment of '2.body.0', '2.body.3.0' does not run as it did"):
        merge_segments_(model)


def test_the_block_that_adds_is_found_above_its_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), Block())
    model.eval()
    run = next(
        run for run in runs_of(model) if run.elements[-1].kind != SUM and any(e.kind == SUM for e in run.elements)
    )
    end = next(index for index, e in enumerate(run.elements) if e.kind == SUM)
    inside = run.elements[: end + 1]
    assert common_block(names_of(inside)) == "2.body" and find_block(model, inside)[0] == "2"


def test_runs_compose_to_what_they_compute():
    model = (
        randomise_bn_(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 5, 2)))
        .double()
        .eval()
    )
    (run,) = runs_of(model)
    assert [element.kind for element in run.elements] == ["conv", "bn", "conv"]
    params = compose_elements(run.elements).params
    x = torch.randn(2, 3, 13, 12, dtype=torch.float64)
    found = torch.conv2d(x, params.kernel, params.bias, params.stride, 0, params.dilation, params.groups)
    assert relative_error(model(x), found) < 1e-12
