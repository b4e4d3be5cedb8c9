"""The head that owns pooling and classifier: the lossless fold, pruned channels, parameter counts."""

import copy

import pytest
import torch
from torch import nn

from rep_plugin.bilinear.head import BilinearHead, fold_bilinear_head
from rep_plugin.bilinear.methods import METHODS
from rep_plugin.bilinear.pooling import BilinearPooling

C, CLASSES = 9, 5


def trained_head(**options):
    """A head whose weights have no symmetry, with logits of size 1."""
    head = BilinearHead(C, CLASSES, **{"dim": 12, "rank": 3, **options}).double().eval()
    nn.init.normal_(head.fc.weight)
    nn.init.normal_(head.fc.bias)
    return head


def maps(batch=4):
    return (torch.randn(batch, C, 6, 5, dtype=torch.float64).relu(),)


class Model(nn.Module):
    def __init__(self, neck, head):
        super().__init__()
        self.neck, self.head = neck, head


class LinearHead(nn.Module):
    """What mmpretrain's LinearClsHead is to the fold."""

    def __init__(self, in_channels):
        super().__init__()
        self.in_channels = in_channels
        self.fc = nn.Linear(in_channels, CLASSES)

    def forward(self, feats):
        return self.fc(feats[-1])


@pytest.mark.parametrize("options", [{}, {"projection": 6}, {"normalize": False}, {"layout": "NCHW", "drop_rate": 0.5}])
def test_fold_is_lossless_and_halves_the_head(options):
    head, x = trained_head(**options), maps()
    expected, before = head(x), head.fc.weight.numel()
    head.switch_to_deploy()
    found = head(x)
    assert expected.std() > 1e-2
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    width = options.get("projection", C)
    assert head.fc.weight.shape == (CLASSES, width * (width + 1) // 2)
    assert head.in_features == head.fc.in_features == head.pool.out_channels
    assert before - head.fc.weight.numel() == CLASSES * width * (width - 1) // 2
    weight = head.fc.weight
    head.switch_to_deploy()
    assert head.fc.weight is weight and not head.foldable
    head(x).sum().backward()
    assert head.fc.weight.grad.abs().max() > 0


def test_fold_of_a_symmetrised_weight_alone_would_be_seen():
    """The weight is not symmetric, so that taking one half of it in place of the sum changes the logits."""
    head, x = trained_head(), maps()
    expected, weight = head(x), head.fc.weight.detach().clone()
    head.switch_to_deploy()
    with torch.no_grad():
        head.fc.weight.copy_(weight[:, head.pool.pool.index])
    assert (head(x) - expected).abs().max() > 1e-2


def test_deployed_form_is_built_directly_and_loads_strictly():
    head, x = trained_head(projection=6), maps()
    head.switch_to_deploy()
    fresh = BilinearHead(C, CLASSES, projection=6, deploy=True).double().eval()
    fresh.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(fresh(x), head(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        BilinearHead(C, CLASSES, projection=6).load_state_dict(head.state_dict())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_other_heads_have_nothing_to_fold(method):
    head, x = trained_head(method=method), maps()
    expected = head(x)
    head.switch_to_deploy()
    assert torch.equal(head(x), expected)
    rebuilt = BilinearHead(C, CLASSES, method, deploy=True, dim=12, rank=3)
    rebuilt.load_state_dict(head.state_dict(), strict=True)


def test_two_stream_head_is_left_full():
    head = BilinearHead((C, 4), CLASSES)
    head.switch_to_deploy()
    assert head.fc.weight.shape == (CLASSES, C * 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fold_first", [False, True])
def test_masked_equals_removed_through_the_classifier(method, fold_first):
    head, (x,), keep = trained_head(method=method), maps(), [0, 2, 3, 7]
    masked = torch.zeros_like(x)
    masked[:, keep] = x[:, keep]
    expected = head((masked,))
    assert (head((x,)) - expected).abs().max() > 1e-3
    if fold_first:
        head.switch_to_deploy()
    weight = head.fc.weight
    head.keep_channels_(keep)
    assert head.fc.weight is weight and head.fc.in_features == head.in_features == weight.shape[1]
    assert (head((x[:, keep],)) - expected).abs().max() < 1e-12 * expected.abs().max()
    head.switch_to_deploy()  # prune, then fold
    assert (head((x[:, keep],)) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_one_removed_channel_takes_2c_minus_1_columns():
    head = trained_head()
    before = head.fc.weight.numel()
    head.keep_channels_(range(C - 1))
    assert before - head.fc.weight.numel() == (2 * C - 1) * CLASSES


def test_neck_and_linear_head_fold_together():
    x = maps()
    model = Model(BilinearPooling(C), LinearHead(C * C)).double()
    expected = model.head(model.neck(x))
    fold_bilinear_head(model)
    found = model.head(model.neck(x))
    assert model.head.in_channels == model.neck.out_channels == C * (C + 1) // 2
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    state = model.state_dict()
    fold_bilinear_head(model)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    fresh = Model(BilinearPooling(C, deploy=True), LinearHead(C * (C + 1) // 2)).double()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.head(fresh.neck(x)), found)


def test_head_on_pooled_features_folds_with_its_neck():
    x = maps()
    model = Model(BilinearPooling(C), BilinearHead(C * C, CLASSES, method=None)).double()
    expected = model.head(model.neck(x))
    model.head.switch_to_deploy()  # owns no pooling: changes nothing
    assert torch.equal(model.head(model.neck(x)), expected)
    fold_bilinear_head(model)
    assert model.head.in_features == C * (C + 1) // 2
    assert (model.head(model.neck(x)) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_fold_bilinear_head_folds_a_head_that_pools():
    model, x = Model(None, trained_head()), maps()
    expected = model.head(x)
    fold_bilinear_head(model)
    fold_bilinear_head(model)
    assert model.head.pool.method == "triu"
    assert (model.head(x) - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize(
    ("neck", "head", "message"),
    [
        (None, LinearHead(4), "no bilinear classifier"),
        (BilinearPooling(C, "low_rank"), LinearHead(C), "got 'low_rank'"),
        (BilinearPooling((C, 2)), LinearHead(18), "two-stream full"),
        (None, BilinearHead(C, CLASSES, "isqrt_cov"), "isqrt_cov"),
        (BilinearPooling(C), LinearHead(80), r"81 columns, got weight \(5, 80\)"),
    ],
)
def test_what_cannot_fold_is_refused_and_left_alone(neck, head, message):
    model = Model(neck, head)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fold_bilinear_head(model)
    assert before.keys() == model.state_dict().keys()


def test_pre_logits_and_classifier_make_the_logits():
    head, x = trained_head(), maps()
    features = head.pre_logits(x)
    assert features.shape == (4, C * C)
    assert torch.equal(head.fc(features), head(x))


def test_dropout_acts_in_training_alone():
    head, x = trained_head(drop_rate=0.5), maps()
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


@pytest.mark.parametrize(("classes", "count"), [(100, 26_214_500), (196, 51_380_420), (200, 52_429_000)])
def test_parameter_counts_of_the_published_heads(classes, count):
    with torch.device("meta"):
        head = BilinearHead(512, classes)
    assert sum(p.numel() for p in head.parameters()) == count


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="got -1"):
        BilinearHead(C, -1)
    with pytest.raises(ValueError, match="layout"):
        BilinearHead(C, 3, method=None, layout="NLC")
    with pytest.raises(TypeError, match="metod"):
        BilinearHead(C, 3, metod="full")
    with pytest.raises(ValueError, match="method=None"):
        BilinearHead(C, 3, method=None).keep_channels_([0])
