"""expand: nothing changes at the start, and after training the stock network comes back."""

import copy

import pytest
import timm
import torch
from torch import nn

import rep_plugin
from rep_plugin.blocks.conv_like import ConvLike, SilentBatchNorm2d, like_conv
from rep_plugin.blocks.online import gain_of
from rep_plugin.errors import EquivalenceError, RepPluginError
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

X = torch.randn(8, 3, 48, 40, generator=torch.Generator().manual_seed(1))


def resnet18() -> nn.Module:
    return calibrate_random_bn_(timm.create_model("resnet18", num_classes=10), X)


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03), nn.ReLU(),
        nn.Conv2d(8, 8, (1, 5), padding=(0, 2), groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    return calibrate_random_bn_(model, torch.randn(16, 3, 16, 16))


def train(model: nn.Module, steps: int, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x + 0.1 * torch.randn_like(x))
        nn.functional.cross_entropy(y, torch.arange(len(x)) % y.shape[1]).backward()
        optimizer.step()
    model.eval()


def test_resnet18_through_training_and_back():
    stock = resnet18()
    state = copy.deepcopy(stock.state_dict())
    # The wide stages would take the longest, and tell the same.
    model, report = rep_plugin.expand(stock, where=["conv1", "layer[12].*"], example_input=X[:2])
    with torch.no_grad():
        assert relative_error(stock(X), model(X)) < 1e-5
        a, b = copy.deepcopy(stock).train()(X), copy.deepcopy(model).train()(X)
        assert relative_error(a, b) < 1e-4  # the eps of two BNs in a row
    assert report.max_rel_error < 1e-9 and len(report.blocks) == 9 and report.sensitivity > 1e-3
    assert report.notes == ["1 left as they are, kernel side 1: layer2.0.downsample.0"]
    assert all(torch.equal(v, state[k]) for k, v in stock.state_dict().items()) and not model.training

    train(model, 5, X[:4])
    assert all(m.last_bn().weight.abs().max() > 1e-3 for b in blocks_of(model).values() for m in b.branches.values())
    merged, report = rep_plugin.reparameterize(model, X[:2], fold_bn=False)
    folded, folded_report = rep_plugin.reparameterize(model, X[:2])
    assert report.max_rel_error < 1e-9 and folded_report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    rebuilt = timm.create_model("resnet18", num_classes=10).eval()
    shapes = {k: v.shape for k, v in rebuilt.state_dict().items()}
    assert {k: v.shape for k, v in merged.state_dict().items()} == shapes
    rebuilt.load_state_dict(merged.state_dict(), strict=True)
    assert relative_error(model(X), rebuilt(X)) < 1e-4 and relative_error(model(X), folded(X)) < 1e-4
    assert relative_error(stock(X), rebuilt(X)) > 1e-2


def blocks_of(model: nn.Module) -> dict[str, ConvLike]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ConvLike)}


@pytest.mark.parametrize(
    "name, block, count",
    [
        ("mobilenetv2_100", "dbb", 18),
        ("mobilenetv2_050", "mobileone", 18),
        ("resnet10t", "acb", 11),
        ("resnet10t", "rep", 11),
    ],
)
def test_other_networks_and_blocks(name, block, count):
    """Depthwise convolutions, BatchNormAct2d, a deep stem; both merges."""
    stock = calibrate_random_bn_(timm.create_model(name, num_classes=5), X)
    model, report = rep_plugin.expand(stock, block, example_input=X[:2])
    assert report.max_rel_error < 1e-9 and len(blocks_of(model)) == count
    calibrate_random_bn_(model, X)
    for fold_bn in (True, False):
        merged, report = rep_plugin.reparameterize(model, X[:2], fold_bn=fold_bn)
        assert report.max_rel_error < 1e-9 and not blocks_of(merged) and not report.notes
    stock.load_state_dict(merged.state_dict())


@pytest.mark.parametrize("block", ["dbb", "acb", "rep", "mobileone"])
def test_train_mode_starts_unchanged_where_the_batch_is_the_running_statistics(block):
    """Then even the eps of the two BNs in a row cancel: gamma = sqrt(var + eps)."""
    stock, x = net().double(), torch.randn(16, 3, 16, 16).double()
    for bn in (stock[1], stock[4]):
        bn.momentum = 1.0
    stock.train()(x)
    for bn in (stock[1], stock[4]):
        bn.running_var *= (n := 16 * 64) / (n - 1) * ((n - 1) / n) ** 2  # torch keeps the unbiased variance
    model, _ = rep_plugin.expand(stock, block)
    assert model.training and relative_error(stock(x), model(x)) < 1e-10
    model.zero_grad()
    model(x)[0].square().sum().backward()
    silent = [m for m in model.modules() if isinstance(m, SilentBatchNorm2d)]
    assert silent and all(bn.weight.grad.abs().max() > 0 for bn in silent)  # silent, not dead


def test_inplace_keeps_parameters_modes_and_settings():
    stock = net()
    stock[4].eval(), stock[1].train()
    weight, x = stock[0].weight, torch.randn(4, 3, 17, 16)
    model, _ = rep_plugin.expand(stock, "mobileone", inplace=True)
    assert model is stock and model[0].branches["conv0"].conv.weight is weight and x is not None
    inner = [m for m in model[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bn.training and bn.eps == 1e-3 and bn.momentum == 0.03 for bn in inner)
    assert not any(m.training for m in model[3].modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    "where, names",
    [
        ("layer1.*", ["layer1.0.conv1", "layer1.0.conv2"]),
        (["conv1.0", "layer4.0.conv?"], ["conv1.0", "layer4.0.conv1", "layer4.0.conv2"]),
        (lambda name, conv: conv.stride == (1, 1) and name.startswith("layer3"), ["layer3.0.conv2"]),
    ],
)
def test_where_selects(where, names):
    model, report = rep_plugin.expand(timm.create_model("resnet10t"), "acb", where=where, example_input=X[:2])
    assert list(blocks_of(model)) == names == [block.name for block in report.blocks]


def test_nothing_to_expand_is_one_line():
    model = net()
    state = copy.deepcopy(model.state_dict())
    for where, message in {
        "layer9.*": r"where='layer9.\*' fits none of 3 convolutions \(first: 0, 3, 5\)",
        "5": "where='5' selects nothing of 3 convolutions to expand; 1 left as they are, kernel side 1: 5",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            rep_plugin.expand(model, where=where, inplace=True)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="block must be one of .*got 'ddb', did you mean 'dbb'"):
        rep_plugin.expand(model, "ddb")
    with pytest.raises(TypeError, match=r"where\[0\] must be a string, got 3"):
        rep_plugin.expand(model, where=[3])
    with pytest.raises(ValueError, match="Linear has no convolution, expected convolutions outside of such blocks"):
        rep_plugin.expand(nn.Linear(3, 3))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
        self.loose, self.loose_bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.loose_bn(self.loose(self.body(x))) if x.sum() < 1e9 else x


def test_an_untraceable_model_is_traced_part_by_part():
    stock = calibrate_random_bn_(Untraceable(), X)
    model, report = rep_plugin.expand(stock)
    assert list(blocks_of(model)) == ["body.0", "body.3"] and relative_error(stock(X), model(X)) < 1e-5
    assert report.notes == [
        "1 left as they are, kernel side 1: body.5",
        "1 left as they are, no BN with running statistics was seen to be its only reader: loose",
        "not traced, only the parts inside: 1 module(s), first 'the model': torch.fx cannot trace Untraceable: "
        "symbolically traced variables cannot be used as inputs to control flow",
        "the forward decides by a value in Untraceable (test_expand.py:161): only the path of the given inputs is proven",
    ]
    merged, _ = rep_plugin.reparameterize(model, fold_bn=False)
    stock.load_state_dict(merged.state_dict())


def test_stochastic_depth_in_train_mode():
    model, _ = rep_plugin.expand(timm.create_model("resnet10t", drop_path_rate=0.2).train(), "rep", example_input=X[:2])
    assert len(blocks_of(model)) == 11 and model.training


def test_a_wrong_expansion_is_refused_and_nothing_is_lost(monkeypatch):
    model = net()
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(ConvLike, "silence_", lambda self: self)
    with pytest.raises(EquivalenceError, match="block '0' differs"):
        rep_plugin.expand(model, inplace=True)
    assert list(model.state_dict()) == list(state) and not blocks_of(model)


@pytest.mark.parametrize("block", ["dbb", "acb", "repvgg", "mobileone"])
def test_online_form_through_training_and_back(block):
    """The first convolution has a bias, and so a BN in its block; the other has the network's own behind."""
    stock, x = nn.Sequential(*net(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), torch.randn(16, 3, 16, 16)
    model, report = rep_plugin.expand(stock, block, online=True)
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3 and len(report.blocks) == 2
    first, second = blocks_of(model).values()
    assert hasattr(first, "post_bn") and not hasattr(second, "post_bn") and first.online and second.online
    assert not any(isinstance(m, nn.BatchNorm2d) for b in (first, second) for m in b.branches.modules())
    a, b = copy.deepcopy(stock).train()(x), copy.deepcopy(model).train()(x)
    assert relative_error(a, b) < 1e-3  # the eps of two BNs in a row
    train(model, 5, x)
    silent = [g for b in (first, second) for n, g in b.named_parameters() if "gain" in n or "scale" in n]
    assert all(gain.detach().abs().max() > 0 for gain in silent)  # every branch has learned something
    merged, report = rep_plugin.reparameterize(model, x[:2], fold_bn=False)
    assert report.max_rel_error < 1e-9 and merged.state_dict().keys() == stock.state_dict().keys()
    with torch.no_grad():
        assert relative_error(model(x), merged(x)) < 1e-5
    plan = rep_plugin.plan_pruning(model, x[:2], "l1", 0.3, min_channels=1)
    assert rep_plugin.apply_plan(model, plan).max_rel_error < 1e-9
    loss = nn.functional.cross_entropy
    batches = [(x, torch.arange(16) % 4)]
    scored = rep_plugin.plan_pruning(model, x[:2], "taylor", 0.3, loader=batches, loss=loss, min_channels=1)
    assert scored.scores.keys() >= {"0", "3"}


def test_online_blocks_stay_silent_when_a_parent_initialises_them():
    block = like_conv(nn.Conv2d(4, 8, 3, padding=1, bias=False), "dbb", online=True).silence_()
    conv = block.branches["conv"].conv
    block.init_weights()
    last = {name: gain_of(list(chain.children())[-1]) for name, chain in block.branches.items()}
    assert {name for name, gain in last.items() if gain.any()} == {"conv"}
    x = torch.randn(2, 4, 9, 9)
    assert torch.allclose(block(x), conv(nn.functional.pad(x, (1, 1, 1, 1))), atol=1e-6)


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_a_block_that_was_expanded_inside_merges_whole(name, fold_bn):
    """The look-alikes inside of a block come first: the block itself reads plain convolutions."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = calibrate_random_bn_(timm.create_model(name, num_classes=4), x)
    known = rep_plugin.reparameterize(model, x)[1]
    expanded, _ = rep_plugin.expand(model, "acb", where="*stages.0*" if name == "repvgg_a0" else "*stages.0.0*")
    merged, report = rep_plugin.reparameterize(expanded.eval(), x, fold_bn=fold_bn)
    assert report.max_rel_error < 1e-9 and not any(isinstance(m, ConvLike) for m in merged.modules())
    if fold_bn:
        assert [block.name for block in report.blocks] == [block.name for block in known.blocks]


@pytest.mark.parametrize("wrap", ["compile", "DataParallel"])
def test_wrapped_models_are_refused_by_every_verb(wrap, tmp_path):
    model = timm.create_model("rep_mobilenetv2_035", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    wrapped = torch.compile(model, backend="eager") if wrap == "compile" else nn.DataParallel(model)
    verbs = (
        lambda: rep_plugin.expand(wrapped),
        lambda: rep_plugin.reparameterize(wrapped, x),
        lambda: rep_plugin.plan_pruning(wrapped, x, "l1", 0.5),
        lambda: rep_plugin.export_onnx(wrapped, tmp_path / "a.onnx", x),
        lambda: rep_plugin.save(wrapped, tmp_path / "folder"),
    )
    for verb in verbs:
        with pytest.raises(RepPluginError, match=r"got a .*(_orig_mod|\.module)"):
            verb()
    assert not list(tmp_path.iterdir())
