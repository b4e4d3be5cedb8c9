"""Linearized networks are stock at alpha 0, and one convolution for each segment at alpha 1."""

import copy
import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rep_plugin
from rep_plugin.blocks.annealed import annealed_modules
from rep_plugin.blocks.annealed_layers import InnerActivation
from rep_plugin.checkpoints.strict import require_fit
from rep_plugin.depth.segments import find_segments
from rep_plugin.errors import AnnealError, ArgumentError, NotMergeableError
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import examples, relative_error
from tests.test_depth.nets import ZOO, build, convs, disjoint, plan_of, require_exact, segments_of

X = torch.randn(6, 3, 33, 33, generator=torch.Generator().manual_seed(0))
BLOCK = ["blocks.1.1.bn1.act", "blocks.1.1.bn2.act"]


@pytest.mark.parametrize("name", ZOO)
def test_networks_are_exact_at_both_ends(name):
    model = build(name)
    segments = disjoint(segments_of(model))
    before = convs(model)
    annealed, merged = require_exact(model, segments, X, torch.randn(1, 3, 41, 38))
    others = sum(len(s.shapes) - 1 + len(s.shortcut_layers) // 2 * s.shortcut for s in segments)
    assert len(segments) > 1 and convs(annealed) == before and convs(merged) == before - others


@pytest.mark.parametrize("name", ["mobilenetv2", "mnasnet", "resnet50"])
def test_residual_blocks_are_skipped_whole(name, tmp_path):
    model = build(name)
    skipped = [s for s in find_segments(model, skip=True)[0] if s.skip]
    assert skipped and all(s.macs_after == 0 and s.name.endswith(" skipped") for s in skipped)
    annealed, merged = require_exact(model, skipped, X, torch.randn(1, 3, 41, 38))
    assert convs(merged) == convs(model) - sum(len(s.shapes) for s in skipped)
    assert annealed.state_dict().keys() - model.state_dict().keys() == {f"{s.layers[-1]}.anneal_alpha" for s in skipped}
    rep_plugin.save(merged, tmp_path)
    assert torch.equal(rep_plugin.load(tmp_path, build(name)).eval()(X.double()), merged(X.double()))


def test_a_skipped_branch_fades_and_beside_it_others_become_one_convolution():
    model = calibrate_random_bn_(build("mobilenetv2").eval(), X)
    found = find_segments(model, skip=True)[0]
    skipped = next(s for s in found if s.skip)
    other = next(s for s in found if not s.skip and s.block and not s.overlaps(skipped))
    annealed, _ = rep_plugin.linearize(model.double(), plan_of(model, [skipped, other]))
    block = annealed.get_submodule(skipped.block)
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    branch = block(x) - x
    rep_plugin.set_alpha_(annealed, 0.25)
    assert relative_error(block(x) - x, 0.75 * branch) < 1e-12
    with pytest.raises(AnnealError):
        rep_plugin.reparameterize(annealed)
    rep_plugin.set_alpha_(annealed, 1.0)
    merged, report = rep_plugin.reparameterize(annealed, X)
    assert type(merged.get_submodule(skipped.block)) is nn.Identity and report.max_rel_error < 1e-9
    assert isinstance(merged.get_submodule(other.layers[0]), nn.Conv2d) or other.shortcut


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet50"])
def test_an_activation_after_the_sum_is_annealed_in(name):
    model = build(name)
    segments = [s for s in disjoint(segments_of(model)) if s.block]
    assert any(s.shortcut for s in segments) or name == "resnet50"
    if name == "resnet50":  # an activation follows its sums already: no block's output
        assert not segments
        return
    _, merged = require_exact(model, segments, X, act_after="relu6")
    after = [m for n, m in merged.named_modules() if n.endswith("act_after")]
    assert len(after) == len(segments) and all(type(m) is nn.ReLU6 for m in after)


CONV = st.fixed_dictionaries(
    {
        "out": st.sampled_from([2, 4, 6]),
        "kernel": st.sampled_from([1, 1, 2, 3, (3, 1), 5]),
        "stride": st.sampled_from([1, 1, 2]),
        "padding": st.sampled_from([0, 1, 2, (0, 1)]),
        "dilation": st.sampled_from([1, 1, 2]),
        "depthwise": st.booleans(),
        "bias": st.booleans(),
        "bn": st.booleans(),
        "act": st.sampled_from(["ReLU", "ReLU6", "Hardswish", "GELU", None]),
    }
)


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(CONV, min_size=2, max_size=4), st.booleans())
def test_random_stacks_are_exact_at_both_ends(specs, inplace):
    layers, channels = [nn.Conv2d(3, 4, 1), nn.Tanh()], 4
    for spec in specs:
        groups = channels if spec["depthwise"] else 1
        out = channels if spec["depthwise"] else spec["out"]
        layers.append(
            nn.Conv2d(
                channels, out, spec["kernel"], spec["stride"], spec["padding"], spec["dilation"], groups, spec["bias"]
            )
        )
        layers += [nn.BatchNorm2d(out)] if spec["bn"] else []
        layers += (
            [getattr(nn, spec["act"])(*([True] if inplace and spec["act"] in ("ReLU", "ReLU6") else []))]
            if spec["act"]
            else []
        )
        channels = out
    model = nn.Sequential(*layers, nn.Tanh()).double()
    x = torch.randn(4, 3, 37, 34, dtype=torch.float64)
    try:
        model(x)
    except RuntimeError:
        return  # nothing is left of the map
    segments = [s for s in disjoint(segments_of(model), largest=11)]
    if not segments:
        return
    model = calibrate_random_bn_(model, x)
    annealed, report = rep_plugin.linearize(model, plan_of(model, segments), example_input=x)
    assert report.max_rel_error < 1e-9
    rep_plugin.set_alpha_(annealed, 1.0)
    calibrate_random_bn_(annealed, x)
    merged, report = rep_plugin.reparameterize(annealed, x)
    assert report.max_rel_error < 1e-9 and convs(merged) == convs(model) - sum(len(s.shapes) - 1 for s in segments)
    assert all(type(m) is nn.Conv2d for m in merged.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        assert relative_error(annealed(x), merged(x)) < 1e-9


def test_train_mode_takes_the_statistics_of_stock():
    model = build("mobilenetv2").double()
    segments = disjoint(segments_of(model))
    annealed, _ = rep_plugin.linearize(model, plan_of(model, segments), example_input=X)
    x = X.double()
    model.train(), annealed.train()
    expected, found = model(x), annealed(x)
    assert relative_error(expected, found) < 1e-9
    expected.square().sum().backward(), found.square().sum().backward()
    own = dict(annealed.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - own[name].grad).abs().max() < 1e-9 * largest, name
    state = annealed.state_dict()
    for key, value in model.state_dict().items():  # means of zero differ by rounding
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


def test_parameters_and_keys_stay_and_stock_checkpoints_load():
    model = build("mobilenetv2")
    plan = plan_of(model, disjoint(segments_of(model)))
    own = {id(p) for p in model.parameters()}
    stock = {key: value.clone() for key, value in model.state_dict().items()}
    same, _ = rep_plugin.linearize(model, plan, inplace=True, example_input=X)
    assert same is model and {id(p) for p in same.parameters()} == own
    assert {key for key in same.state_dict() if not key.endswith("anneal_alpha")} == stock.keys()
    rep_plugin.set_alpha_(same, 0.25)
    require_fit(same, stock)
    same.load_state_dict(stock)  # strictly
    assert {module.alpha for module in annealed_modules(same)} == {0.25}
    state = {key: value.clone() for key, value in same.state_dict().items()}
    rep_plugin.set_alpha_(same, 1.0)
    same.load_state_dict(state)
    assert all(module.alpha == 0.25 and not module.linear for module in annealed_modules(same))
    copied = copy.deepcopy(same)
    rep_plugin.set_alpha_(copied, 0.5)
    assert {module.alpha for module in annealed_modules(same)} == {0.25}


def test_every_step_of_alpha_moves_the_output_a_little():
    model = calibrate_random_bn_(build("mobilenetv2").double(), X.double())
    annealed, _ = rep_plugin.linearize(model, plan_of(model, disjoint(segments_of(model))[:2]), example_input=X)
    outputs = []
    for alpha in (0, 1e-6, 0.5, 1 - 1e-6, 1):
        rep_plugin.set_alpha_(annealed, alpha)
        with torch.no_grad():
            outputs.append(annealed(X.double()))
    assert 0 < relative_error(outputs[0], outputs[1]) < 1e-2 and 0 < relative_error(outputs[4], outputs[3]) < 1e-2
    assert relative_error(outputs[1], outputs[3]) > 1e-2


@pytest.mark.parametrize("act_after", [None, "relu"])
def test_both_forms_are_saved_and_load_in_timm(tmp_path, act_after):
    model = calibrate_random_bn_(build("mobilenetv2"), X)
    plan = plan_of(model, disjoint(segments_of(model))[:4], act_after=act_after)
    annealed, _ = rep_plugin.linearize(model, plan, example_input=X)
    rep_plugin.set_alpha_(annealed, 0.5)
    rep_plugin.save(annealed, tmp_path / "annealed", X)
    again = timm.create_model(f"local-dir:{tmp_path / 'annealed'}").eval()
    assert torch.equal(again(X), annealed(X)) and {m.alpha for m in annealed_modules(again)} == {0.5}
    rep_plugin.set_alpha_(annealed, 1.0)
    merged, _ = rep_plugin.reparameterize(annealed, X)
    rep_plugin.save(merged, tmp_path / "merged", X)
    again = timm.create_model(f"local-dir:{tmp_path / 'merged'}").eval()
    assert torch.equal(again(X), merged(X)) and not list(annealed_modules(again))


def test_any_model_is_saved_and_merged_with_its_bns_kept(tmp_path):
    model = calibrate_random_bn_(build("vgg11_bn"), X)
    annealed, _ = rep_plugin.linearize(model, ["features.10"], example_input=X)
    rep_plugin.set_alpha_(annealed, 1.0)
    merged, report = rep_plugin.reparameterize(annealed, X, fold_bn=False)
    assert [b.name for b in report.blocks] == ["features.8"] and report.max_rel_error < 1e-9
    rep_plugin.save(merged, tmp_path, X)
    again = rep_plugin.load(tmp_path, model=build("vgg11_bn")).eval()
    assert torch.equal(again(X), merged(X)) and merged.features[8].kernel_size == (5, 5)


def test_names_of_activations_choose_the_fewest_layers():
    model = build("mobilenetv2").eval()
    annealed, report = rep_plugin.linearize(model, [*BLOCK, "blocks.2.0.bn2.act"], example_input=X)
    names = [block.name for block in report.blocks]
    assert names == ["blocks.1.1.conv_pw..blocks.1.1.conv_pwl", "blocks.2.0.conv_dw..blocks.2.0.conv_pwl"]
    assert sum(isinstance(m, InnerActivation) for m in annealed.modules()) == 3


def test_an_unfinished_anneal_is_not_merged():
    annealed, _ = rep_plugin.linearize(build("mobilenetv2").eval(), BLOCK, example_input=X)
    for alpha in (0, 0.999):
        rep_plugin.set_alpha_(annealed, alpha)
        with pytest.raises(AnnealError, match=f"alpha is {alpha}, expected 1") as caught:
            rep_plugin.reparameterize(annealed)
        assert "\n" not in str(caught.value)
    with pytest.raises(AnnealError, match="linearized already"):
        rep_plugin.linearize(annealed, ["blocks.2.1.bn1.act"])


def test_layers_that_were_changed_since_are_not_merged():
    annealed, _ = rep_plugin.linearize(build("mobilenetv2").eval(), BLOCK, example_input=X)
    rep_plugin.set_alpha_(annealed, 1.0)
    annealed.blocks[1][1].bn2 = nn.Softmax(1)
    with pytest.raises(NotMergeableError, match="the segment of 'blocks.1.1.conv_pw', .* does not run as it did"):
        rep_plugin.reparameterize(annealed)


class Prelu(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.PReLU(), nn.Conv2d(4, 4, 3), nn.Softmax(1))


REFUSED = {
    "unknown": (["blocks.1.1.bn1.akt"], "no activation 'blocks.1.1.bn1.akt', did you mean 'blocks.1.1.bn1.act'"),
    "none": ([], "names no activation"),
    "in no run": (["blocks.0.0.bn1.act", "bn2.act"], "nothing merges where 'bn2.act' goes"),
    "nothing chosen": (None, "chooses nothing to linearize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case):
    names, message = REFUSED[case]
    model = build("mobilenetv2").eval()
    with pytest.raises(ArgumentError, match=message) as caught:
        rep_plugin.linearize(model, plan_of(model, []) if names is None else names)
    assert "\n" not in str(caught.value) and not list(annealed_modules(model))


def test_activations_with_parameters_are_refused():
    with pytest.raises(ArgumentError, match="'1' is a PReLU, whose parameters would be lost"):
        rep_plugin.linearize(Prelu().eval(), ["1"])
    with pytest.raises(ArgumentError, match="'3' is a Softmax, no activation that is known"):
        rep_plugin.linearize(Prelu().eval(), ["3"])


def test_a_plan_of_another_model_is_refused(tmp_path):
    model = build("mobilenetv2").eval()
    plan = plan_of(model, disjoint(segments_of(model))[:3])
    plan.to_json(tmp_path / "plan.json")
    wider = timm.create_model("mobilenetv2_050").eval()
    for form in (plan, json.loads(plan.to_json()), plan.to_json(), str(tmp_path / "plan.json")):
        with pytest.raises(
            ArgumentError, match="the plan is of another model, a EfficientNet: .* has other layers there"
        ):
            rep_plugin.linearize(wider, form)
    with pytest.raises(ArgumentError, match="this ResNet has no such layers"):
        rep_plugin.linearize(build("resnet50").eval(), plan)
    assert rep_plugin.linearize(model, str(tmp_path / "plan.json"), example_input=X)[1].max_rel_error < 1e-9


def test_a_part_of_a_model_can_be_linearized(tmp_path):
    model = calibrate_random_bn_(build("mobilenetv2"), X)
    found, _ = find_segments(model.blocks)
    rep_plugin.linearize(
        model.blocks, plan_of(model.blocks, found[-1:]), inplace=True, example_input=torch.randn(1, 16, 17, 17)
    )
    rep_plugin.set_alpha_(model, 1.0)
    merged, report = rep_plugin.reparameterize(model, X)
    assert report.max_rel_error < 1e-9 and convs(merged) < convs(model)
    rep_plugin.save(merged, tmp_path, X)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}").eval()(X), merged(X))
