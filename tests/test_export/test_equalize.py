"""Equalised networks compute the same, with channels of a more even size."""

import onnxruntime
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rep_plugin
from rep_plugin.blocks.families import DiverseBranchBlock, RepVGGBlock
from rep_plugin.errors import NothingToMergeError, TrainModeError
from rep_plugin.export import equalize
from rep_plugin.export.equalize import BoundedReLU
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import examples, relative_error

X = torch.randn(4, 3, 33, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spread(conv: nn.Conv2d) -> float:
    each = conv.weight.flatten(1).abs().amax(1)
    return (each.max() / each.min()).item()


def uneven(model: nn.Module) -> nn.Module:
    """Give the filters of all convolutions widths from 1 to 1000."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                factors = 10 ** (3 * torch.rand(module.out_channels, generator=generator, dtype=torch.float64))
                module.weight *= factors.view(-1, 1, 1, 1).to(module.weight.dtype)
    return model


@settings(max_examples=examples(15), deadline=None)
@given(
    st.lists(st.sampled_from(["dense", "depthwise", "groups", "point"]), min_size=2, max_size=4),
    st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Identity, nn.ReLU6]),
    st.booleans(),
)
def test_random_stacks_stay_the_same_function_and_get_even(kinds, act, bias):
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1), nn.Tanh()]
    for kind in kinds:
        groups, side = {"dense": (1, 3), "depthwise": (8, 3), "groups": (2, 5), "point": (1, 1)}[kind]
        layers += [nn.Conv2d(8, 8, side, padding=side // 2, groups=groups, bias=bias), act()]
    model = uneven(nn.Sequential(*layers[:-1]).double().eval())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    even, report = equalize(model, X, bounds=act is nn.ReLU6)
    assert report.max_rel_error < 1e-12 and relative_error(model(X), even(X)) < 1e-12
    assert len(report.blocks) == len(kinds) - 1
    bounded = [layer for layer in even if isinstance(layer, BoundedReLU)]
    assert len(bounded) == (len(kinds) - 1) * (act is nn.ReLU6) and not any(layer.training for layer in bounded)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    scaled = even[2].weight / model[2].weight
    assert torch.equal(torch.log2(scaled).round(), torch.log2(scaled))  # powers of two: nothing is rounded
    assert spread(even[2]) < spread(model[2])


def test_a_merged_network_is_equalised_in_place():
    model = uneven(timm.create_model("resnet18", num_classes=3).eval())
    merged, _ = rep_plugin.reparameterize(calibrate_random_bn_(model, X.float()), X.float())
    wanted = merged(X.float())
    even, report = equalize(merged, X.float(), inplace=True)
    assert even is merged and len(report.blocks) == 8 and report.max_rel_error < 1e-9
    assert relative_error(wanted, even(X.float())) < 1e-5


def test_deployed_blocks_of_ours_are_looked_into():
    blocks = [RepVGGBlock(3, 8, act=nn.ReLU()), DiverseBranchBlock(8, 8, act=nn.ReLU()), RepVGGBlock(8, 4)]
    model = calibrate_random_bn_(nn.Sequential(*blocks).double(), X)
    merged, _ = rep_plugin.reparameterize(uneven(model), X)
    even, report = equalize(merged, X)
    names = [f"{i}.reparam_conv, {i + 1}.reparam_conv" for i in (0, 1)]
    assert [block.name for block in report.blocks] == names and report.max_rel_error < 1e-12
    assert spread(even[1].reparam_conv) < spread(merged[1].reparam_conv)
    assert type(even[0]) is RepVGGBlock and even[0].deployed


def test_what_cannot_be_scaled_is_left_and_named():
    bounded = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    _, report = equalize(bounded)
    assert [block.name for block in report.blocks] == ["2, 4"]
    reason = "needs a bound a channel, with which int8 is slower and less exact: bounds=True"
    assert report.notes == [f"left as it is, 1 pair: ReLU6 between them {reason}"]
    with pytest.raises(NothingToMergeError) as caught:
        equalize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval())
    assert caught.value.notes == ["left as it is, 1 pair: a BatchNorm2d stands between them"]
    with pytest.raises(TrainModeError):
        equalize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    shared = nn.Conv2d(8, 8, 1)
    with pytest.raises(NothingToMergeError):
        equalize(nn.Sequential(nn.Conv2d(3, 8, 1), shared, shared).eval())
    hooked = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    hooked[0].register_forward_hook(lambda module, args, output: output.clamp(max=1))
    with pytest.raises(NothingToMergeError):
        equalize(hooked)


def test_bounds_are_scaled_in_deployed_blocks_and_written_as_onnx(tmp_path):
    model = timm.create_model("rep_mobilenetv2_035", num_classes=3).eval()
    merged, _ = rep_plugin.reparameterize(calibrate_random_bn_(uneven(model), X.float()), X.float())
    with pytest.raises(NothingToMergeError, match=r"ReLU6 between them .*bounds=True"):
        equalize(merged, X.float())
    even, report = equalize(merged, X.float(), bounds=True)
    acts = [module for module in even.modules() if isinstance(module, BoundedReLU)]
    assert len(report.blocks) == len(acts) == 18 and report.max_rel_error < 1e-9
    bounds = torch.cat([act.bound for act in acts])
    assert torch.equal(torch.log2(bounds / 6).round(), torch.log2(bounds / 6)) and bounds.unique().numel() > 3
    x = X.float()[:, :, :32, :32].contiguous()
    written = rep_plugin.export_onnx(even, tmp_path / "even.onnx", x, rounds=0)  # compared in both runtimes
    assert written.max_rel_error < 1e-4
    found = onnxruntime.InferenceSession(str(tmp_path / "even.onnx")).run(None, {"input": x.numpy()})[0]
    assert relative_error(merged(x).detach(), torch.from_numpy(found)) < 1e-4
    shared = nn.ReLU6()  # scaled for two places, it would be right in none
    twice = nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.Conv2d(8, 8, 1), shared, nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(NothingToMergeError):
        equalize(twice, X.float(), bounds=True)


def test_dead_channels_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).double().eval()
    with torch.no_grad():
        model[0].weight[2], model[2].weight[:, 5] = 0.0, 0.0
    even, _ = equalize(model, X)
    assert torch.equal(even[0].weight[[2, 5]], model[0].weight[[2, 5]]) and torch.isfinite(even[2].weight).all()
