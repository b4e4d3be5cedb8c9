"""Annealed blocks: stock's inverted residual at alpha 0, the mergeable chain at alpha 1, nothing mergeable between."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rep_plugin
from rep_plugin.blocks.activations import FUNCTIONS
from rep_plugin.blocks.annealed import AnnealedBottleneck, set_alpha_
from rep_plugin.blocks.inverted_residual import RepInvertedResidual
from rep_plugin.errors import AnnealError
from tests.helpers import block_by_hand, randomise_bn_, relative_error

SHAPES = [(8, 8, 1, 6), (6, 10, 1, 2), (6, 10, 2, 6), (8, 8, 1, 1), (6, 4, 2, 1)]  # in, out, stride, expand ratio


def stock_block(block: RepInvertedResidual) -> nn.Module:
    """Stock's layers, with the weights of an annealed block, and the skip by hand."""
    chain, layers = block.branches["bottleneck"], []
    for role in ("expand", "depthwise", "project"):
        if hasattr(chain, role):
            conv = copy.deepcopy(getattr(chain, role))
            conv.padding = (1, 1) if role == "depthwise" else (0, 0)
            act = nn.Identity() if role == "project" else nn.ReLU6()
            layers += [conv, copy.deepcopy(getattr(chain, f"{role}_bn")), act]
    return nn.Sequential(*layers)


def annealed(shape, branches=("bottleneck",), **options) -> RepInvertedResidual:
    inputs, outputs, stride, ratio = shape
    return RepInvertedResidual(inputs, outputs, stride, ratio, branches, anneal=True, **options)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_alpha_0_is_stock_borders_included(shape, dtype, tolerance, train):
    block = randomise_bn_(annealed(shape)).to(dtype).train(train)
    stock = stock_block(block).train(train)
    for size in ((7, 10), (1, 2), (12, 5)):
        x = torch.randn(3, shape[0], *size, dtype=dtype)
        assert relative_error(stock(x), block(x)) < tolerance
    ours = block.branches["bottleneck"].state_dict()
    theirs = [v for v in stock.state_dict().values() if v.dim() == 1]
    mine = [v for k, v in ours.items() if "bn" in k and v.dim() == 1]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(theirs, mine, strict=True)), "running stats"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_alpha_computes_its_definition(shape):
    block = randomise_bn_(annealed(shape)).double().eval()
    chain, x = block.branches["bottleneck"], torch.randn(2, shape[0], 9, 6, dtype=torch.float64)
    for alpha in (0.25, 0.5, 0.9):
        set_alpha_(block, alpha)

        def inner(v, alpha=alpha):
            return (1 - alpha) * F.relu6(v) + alpha * v

        if hasattr(chain, "expand"):
            middle = inner(chain.expand_bn(chain.expand(x)))
            shift = alpha * chain.expand_bn(torch.zeros(1, middle.shape[1], 1, 1, dtype=x.dtype))
            padded = shift.expand(2, -1, 11, 8).clone()
            padded[:, :, 1:-1, 1:-1] = middle
        else:
            padded = F.pad(x, (1, 1, 1, 1))
        conv = chain.depthwise
        y = F.conv2d(padded, conv.weight, None, conv.stride, 0, groups=conv.groups)
        y = chain.project_bn(chain.project(inner(chain.depthwise_bn(y))))
        assert relative_error((1 - alpha) * y + alpha * F.relu6(y), block(x)) < 1e-12


def test_alpha_1_is_the_plain_block_to_the_bit_and_merges():
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
    block = randomise_bn_(annealed((8, 8, 1, 6), ("bottleneck", "identity", "avgpool"))).double().eval()
    set_alpha_(block, 1)
    plain = RepInvertedResidual(8, 8, 1, 6, ("bottleneck", "identity", "avgpool")).double().eval()
    state = {k: v for k, v in block.state_dict().items() if "anneal_alpha" not in k}
    plain.load_state_dict(state)
    expected = block(x)
    assert torch.equal(expected, plain(x)) and relative_error(block_by_hand(plain, x), expected) < 1e-12
    merged, report = rep_plugin.reparameterize(nn.Sequential(block), x)
    assert report.max_rel_error < 1e-9 and relative_error(expected, merged(x)) < 1e-9
    block.switch_to_deploy()
    assert isinstance(block.act, nn.ReLU6) and relative_error(expected, block(x)) < 1e-9
    assert sorted(block.state_dict()) == ["reparam_conv.bias", "reparam_conv.weight"]


def test_path_has_no_jump_at_its_end():
    """Just below 1 the slow path runs, at 1 the chain: both compute the same."""
    block = randomise_bn_(annealed((8, 8, 1, 6))).double().eval()
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
    set_alpha_(block, 1)
    at_end = block(x)
    for module in (block.branches["bottleneck"], block.act):
        module.linear = False
    assert relative_error(at_end, block(x)) < 1e-12


@pytest.mark.parametrize("alpha", [0, 0.5, 1 - 1e-6])
def test_merging_too_early_is_refused_and_changes_nothing(alpha):
    model = nn.Sequential(annealed((8, 8, 1, 6), ("bottleneck", "identity"))).eval()
    set_alpha_(model, alpha)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        AnnealError, match=r"^block '0' .*alpha is .*, expected 1: activations that are not annealed away"
    ):
        rep_plugin.reparameterize(model, torch.randn(1, 8, 8, 8))
    with pytest.raises(AnnealError, match="expected 1"):
        model[0].switch_to_deploy()
    with pytest.raises(RuntimeError, match="expected 1"):
        model[0].merged_kernel()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model[0].deployed


@pytest.mark.parametrize("act", sorted(FUNCTIONS))
@pytest.mark.parametrize("alpha", [0.3, 1])
def test_gradients_reach_everything_for_every_activation(act, alpha):
    block = annealed((8, 8, 1, 6), ("bottleneck", "identity"), act=act).double().train()
    set_alpha_(block, alpha)
    x = torch.randn(4, 8, 7, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: block.eval()(v), (x[:1, :, :3, :3].detach().requires_grad_(),))
    block.train()(x).square().mean().backward()
    # In a linear chain the next BN takes away what an inner shift adds.
    reached = {n for n, p in (*block.named_parameters(), ("x", x)) if p.grad.abs().sum() > 1e-9}
    shifts = {f"branches.bottleneck.{role}_bn.bias" for role in ("expand", "depthwise")}
    assert reached == {"x", *dict(block.named_parameters())} - (shifts if alpha == 1 else set())
    assert all(torch.isfinite(p.grad).all() for p in (*block.parameters(), x))


def test_bfloat16_autocast_stays_near_float32():
    block = randomise_bn_(annealed((8, 8, 1, 6), ("bottleneck", "identity"))).eval()
    x = torch.randn(2, 8, 9, 9)
    set_alpha_(block, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert relative_error(block(x), y.float()) < 0.05


def test_alpha_is_kept_by_checkpoints_copies_and_casts():
    block = annealed((8, 8, 1, 6))
    set_alpha_(block, 1)
    other = annealed((8, 8, 1, 6))
    other.load_state_dict(block.state_dict())
    chain = other.branches["bottleneck"]
    assert isinstance(chain, AnnealedBottleneck) and chain.linear and other.act.linear and chain.alpha == 1
    set_alpha_(block, 0.25)
    other.load_state_dict(block.state_dict())
    assert not chain.linear and copy.deepcopy(other).double().act.alpha == 0.25
    assert "alpha=0.25" in repr(other)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"activation 'prelu' cannot be annealed, expected one of \['gelu'"):
        annealed((8, 8, 1, 6), act="prelu")
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\], got"):
            set_alpha_(annealed((8, 8, 1, 6)), alpha)
    with pytest.raises(ValueError, match="stock's BNs inside the branches, which online=True does not have"):
        annealed((8, 8, 1, 6), online=True)
    assert RepInvertedResidual(8, 8, anneal=True, deploy=True).deployed
