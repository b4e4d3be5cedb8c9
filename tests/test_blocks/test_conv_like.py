"""Look-alikes in the place of nn.Conv2d: shapes, attributes, the merge, and initialisation."""

import inspect

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import rep_plugin
from rep_plugin.blocks.conv_like import CONV_LIKES, ACBConv2d, DBBConv2d, RepConv2d, like_conv, why_not_replaceable
from tests.helpers import block_by_hand, examples, randomise_bn_, relative_error

SIDES = st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5]))
STEPS = st.tuples(st.integers(1, 2), st.integers(1, 2))
WIDTHS = st.sampled_from([(4, 4, 1), (4, 6, 2), (6, 6, 6), (3, 5, 1), (4, 8, 4)])  # in, out, groups


@settings(max_examples=examples(50), deadline=None)
@given(
    st.sampled_from(sorted(CONV_LIKES)), WIDTHS, SIDES, STEPS, STEPS, st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_merged_it_is_the_convolution_it_stands_for(name, widths, size, stride, dilation, padding, bias, seed):
    assume(size != (1, 1))
    torch.manual_seed(seed)
    into, out, groups = widths
    conv = nn.Conv2d(into, out, size, stride, padding, dilation, groups, bias)
    block = randomise_bn_(CONV_LIKES[name](into, out, size, stride, padding, dilation, groups, bias))
    model = randomise_bn_(nn.Sequential(block, nn.BatchNorm2d(out), nn.ReLU())).double().eval()
    x = torch.randn(2, into, 12, 13, dtype=torch.float64)
    assert block(x).shape == conv.double()(x).shape
    expected = model[2](model[1](block_by_hand(block, x)))
    assert relative_error(expected, model(x)) < 1e-9
    stock, report = rep_plugin.reparameterize(model, x, fold_bn=False)
    assert relative_error(expected, stock(x)) < 1e-9 and report.max_rel_error < 1e-9
    assert repr(stock[0]) == repr(conv)
    nn.Sequential(conv, nn.BatchNorm2d(out)).load_state_dict(stock.state_dict())  # keys and shapes
    folded, _ = rep_plugin.reparameterize(model, x)
    assert relative_error(expected, folded(x)) < 1e-9 and type(folded[1]) is nn.Identity and folded[0].bias is not None


@pytest.mark.parametrize("cls", dict.fromkeys(CONV_LIKES.values()), ids=lambda cls: cls.__name__)
def test_arguments_and_attributes_are_those_of_conv2d(cls):
    assert list(inspect.signature(cls).parameters)[:9] == list(inspect.signature(nn.Conv2d).parameters)[:9]
    args = (4, 8, (3, 5), 2, (1, 2), 1, 2)
    block, conv = cls(*args), nn.Conv2d(*args)
    names = "in_channels out_channels kernel_size stride padding dilation groups transposed output_padding padding_mode"
    for name in names.split():
        assert getattr(block, name) == getattr(conv, name), name
    assert cls(4, 4, 3, padding="same").padding == (1, 1) and cls(4, 4, 3, padding="valid").padding == (0, 0)
    deployed = cls(4, 4, 3, padding=1, deploy=True)
    assert deployed.deployed and deployed(torch.randn(1, 4, 5, 5)).shape == (1, 4, 5, 5)


def test_what_it_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'reflect'"):
        DBBConv2d(4, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"needs odd kernel sides, got \(2, 3\)"):
        ACBConv2d(4, 4, (2, 3))
    with pytest.raises(
        ValueError, match="padding must be numbers, 'valid', or 'same' at stride 1, got 'same', stride 2"
    ):
        RepConv2d(4, 4, 3, 2, padding="same")
    with pytest.raises(ValueError, match="unknown block 'dbp', expected one of"):
        like_conv(nn.Conv2d(4, 4, 3), "dbp")
    assert why_not_replaceable(nn.Conv2d(4, 4, 3, padding_mode="circular")) == "padding_mode 'circular'"
    assert why_not_replaceable(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))).startswith("Parametrized")
    assert why_not_replaceable(nn.Conv2d(4, 4, 3).requires_grad_(False)) == "frozen"


def test_without_a_bn_behind_it_the_bias_stays_and_the_report_says_so():
    model = randomise_bn_(nn.Sequential(DBBConv2d(3, 4, 3, bias=False), nn.ReLU())).eval()
    merged, report = rep_plugin.reparameterize(model, fold_bn=False)
    assert merged[0].bias is not None and report.notes == ["1 convolutions keep a bias, as no BN alone reads them: 0"]


def test_a_shared_block_stays_shared():
    block = DBBConv2d(4, 4, 3, padding=1)
    merged, _ = rep_plugin.reparameterize(randomise_bn_(nn.Sequential(block, nn.ReLU(), block)).eval())
    assert merged[0] is merged[2] and type(merged[2]) is nn.Conv2d


def test_init_weights_is_fresh_and_keeps_silence():
    block = randomise_bn_(DBBConv2d(4, 8, 3)).silence_()
    before = block.branches["conv"].conv.weight.clone()
    for _ in range(2):
        block.init_weights()
        gammas = {name: chain.last_bn().weight for name, chain in block.branches.items()}
        assert {name for name, gamma in gammas.items() if gamma.any()} == {"conv"} and (gammas["conv"] == 1).all()
        assert block.branches["sequence"].reduce_bn.running_var.eq(1).all()
    assert not torch.equal(before, block.branches["conv"].conv.weight)
    x = torch.randn(2, 4, 7, 7)
    assert torch.allclose(block(x), block.branches["conv"](x), atol=1e-6)
