"""Stock MobileNetV2 checkpoints in Rep-MobileNetV2: the same network at the start, and a line where they do not fit."""

import copy

import pytest
import timm
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmpretrain.models.backbones import MobileNetV2 as MMMobileNetV2
from torch import nn

import rep_plugin
from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
from rep_plugin.backbones.warm_start import from_stock, measure_identities_, stock_format
from rep_plugin.blocks.annealed import annealed_modules, set_alpha_
from rep_plugin.checkpoints.strict import describe_mismatch
from rep_plugin.errors import CheckpointMismatchError
from rep_plugin.measure.verify import FastDepthwise
from rep_plugin.openmmlab.backbones import RepMobileNetV2 as MMRepMobileNetV2
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error


def build_stock(kind: str, width: float = 0.35) -> nn.Module:
    """A stock network with 6 classes (mmpretrain's: none), calibrated random BN, in eval mode."""
    torch.manual_seed(0)
    if kind == "timm":
        model = timm.create_model(f"mobilenetv2_{round(100 * width):03d}", num_classes=6)
    elif kind == "mmpretrain":
        model = MMMobileNetV2(width)
    else:
        model = torchvision.models.mobilenet_v2(num_classes=6, width_mult=width)
    calibrate_random_bn_(model, torch.randn(4, 3, 65, 65))
    return model


def build_ours(kind: str, width: float = 0.35, **options) -> nn.Module:
    if kind == "mmpretrain":
        return MMRepMobileNetV2(width, anneal=True, **options)
    return timm.create_model(f"rep_mobilenetv2_{round(100 * width):03d}", num_classes=6, anneal=True, **options)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), FastDepthwise():
        out = model(x)
    return out[-1] if isinstance(out, tuple) else out


def maps(kind: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last feature map: logits have no border."""
    with torch.no_grad(), FastDepthwise():
        if kind == "mmpretrain":
            return model(x)[-1]
        if kind == "torchvision" and hasattr(model, "features"):
            return model.features(x)
        return model.forward_features(x)


@pytest.mark.parametrize(("kind", "width"), [("timm", 0.35), ("timm", 0.5), ("mmpretrain", 0.35), ("torchvision", 0.5)])
def test_whole_network_starts_as_stock(kind, width):
    stock, ours = build_stock(kind, width), build_ours(kind, width)
    ours.double().load_state_dict(stock.state_dict())  # float64: identity gammas keep all their digits
    ours.eval()
    reference = copy.deepcopy(stock).double()
    for size in ((65, 49), (32, 64)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert relative_error(maps(kind, reference, x), maps(kind, ours, x)) < 1e-12
        assert relative_error(outputs(reference, x), outputs(ours, x)) < 1e-12
    # In float32 ours is as near to the truth as stock is itself.
    single = build_ours(kind, width)
    single.load_state_dict(stock.state_dict())
    single.eval()
    expected = outputs(reference, x)
    noise = relative_error(expected, outputs(stock, x.float()).double())
    assert relative_error(expected, outputs(single, x.float()).double()) < 1e-6 + 2 * noise < 5e-5
    assert {m.alpha for m in annealed_modules(single)} == {0.0} and len(list(annealed_modules(single))) == 34


def test_extra_branches_and_a_3x3_last_convolution_start_as_stock_too():
    stock = build_stock("timm")
    options = dict(
        branches=("bottleneck", "identity", "avgpool", "conv1x1", "conv3x3"), avg_shortcut=True, last_kernel=3
    )
    ours = build_ours("timm", **options).double()
    calibrate_random_bn_(ours, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 49, 64, dtype=torch.float64)
    assert relative_error(outputs(stock.double(), x), outputs(ours, x)) < 1e-12


def train_mode_error(stock: nn.Module, ours: nn.Module, x: torch.Tensor, stage: slice) -> float:
    """Relative RMS difference of what stages give in train mode."""
    stock, ours = copy.deepcopy(stock).train(), copy.deepcopy(ours).train()
    with torch.no_grad():
        expected = stock.blocks[stage](stock.bn1(stock.conv_stem(x)))
        got = ours.stages[stage](ours.stem(x))
    return ((expected - got).norm() / expected.norm()).item()


def test_train_mode_starts_near_stock_and_with_measured_statistics_as_stock():
    stock, x = build_stock("timm"), torch.randn(16, 3, 64, 64)
    ours = build_ours("timm")
    ours.load_state_dict(stock.state_dict())
    assert train_mode_error(stock, ours, x, slice(0, 2)) < 1e-5, "a stage's second block needs no images"
    untold = copy.deepcopy(ours)
    for bn in (
        block.branches["identity"].bn for stage in untold.stages for block in stage if "identity" in block.branches
    ):
        bn.reset_running_stats()
        bn.reset_parameters()
    whole = slice(0, 7)
    free, naive = train_mode_error(stock, ours, x, whole), train_mode_error(stock, untold, x, whole)
    assert free < 0.5 < 0.8 < naive
    measured = copy.deepcopy(ours)
    state = copy.deepcopy(measured.state_dict())
    measured.train()
    measured.stages[2].eval()
    assert measure_identities_(measured, [x]) == 10
    assert train_mode_error(stock, measured, x, whole) < 1e-4
    assert measured.training and not measured.stages[2].training
    changed = {k for k, v in measured.state_dict().items() if not torch.equal(v, state[k])}
    assert changed and all(".identity.bn." in k and "tracked" not in k for k in changed)
    y = torch.randn(2, 3, 49, 64)
    assert relative_error(outputs(stock, y), outputs(measured.eval(), y)) < 5e-5, "eval mode stays stock's"
    assert all(bn.track_running_stats for bn in measured.modules() if isinstance(bn, nn.BatchNorm2d))
    ours.stages[1][1].branches["identity"].bn.weight.data.mul_(2)  # it has learned
    assert measure_identities_(ours, [x]) == 9
    assert measure_identities_(RepMobileNetV2(0.35, online=True), [x]) == 0, "no BN inside the branches"
    with pytest.raises(ValueError, match="at least one batch"):
        measure_identities_(ours, [])


def test_two_processes_measure_what_one_would(monkeypatch):
    """The other process is played: its sums are recorded, then added where the sums of all are asked for."""
    from rep_plugin.backbones import warm_start

    ours = build_ours("timm")
    ours.load_state_dict(build_stock("timm").state_dict())
    one, other = torch.randn(8, 3, 64, 64), torch.randn(8, 3, 64, 64) + 1
    alone, together = copy.deepcopy(ours), copy.deepcopy(ours)
    measure_identities_(alone, [one, other])
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(warm_start.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(warm_start.dist, "all_reduce", lambda total: sums.append(total.clone()))
    measure_identities_(copy.deepcopy(ours), [other])
    monkeypatch.setattr(warm_start.dist, "all_reduce", lambda total: total.add_(sums.pop(0)) if sums else None)
    measure_identities_(together, [one])
    assert not sums
    assert all(torch.allclose(v, together.state_dict()[k], rtol=1e-5) for k, v in alone.state_dict().items())
    measure_identities_(ours, [one])  # its all_reduce adds nothing
    third = [model.stages[3][2].branches["identity"].bn.running_var for model in (ours, together)]
    assert relative_error(*third) > 1e-3, "one process alone measures something else"


def test_train_mode_of_a_weak_layer_starts_near_stock():
    """Where the variance is no more than eps, a BN's output has less than gamma^2."""
    stock, ours = build_stock("timm"), build_ours("timm")
    with torch.no_grad():  # a weak layer: its variance is no more than eps
        stock.blocks[1][0].conv_pwl.weight.mul_(3e-3)
        stock.blocks[1][0].bn3.running_mean.mul_(3e-3)
        stock.blocks[1][0].bn3.running_var.mul_(9e-6)
    ours.load_state_dict(stock.state_dict())
    assert train_mode_error(stock, ours, torch.randn(16, 3, 64, 64), slice(0, 2)) < 0.01


def test_annealed_network_merges_at_1_and_plain_networks_take_its_checkpoint():
    ours = build_ours("timm")
    ours.load_state_dict(build_stock("timm").state_dict())
    set_alpha_(ours, 0.4)
    plain = timm.create_model("rep_mobilenetv2_035", num_classes=6)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"'stages.0.0.*anneal_alpha' is 0.4, its anneal is not over"):
        plain.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    set_alpha_(ours, 1)
    calibrate_random_bn_(ours, torch.randn(4, 3, 65, 65))
    plain.load_state_dict(ours.state_dict())
    merged, report = rep_plugin.reparameterize(ours, torch.randn(2, 3, 33, 32))
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    x = torch.randn(2, 3, 40, 32)
    assert (
        torch.equal(outputs(plain.eval(), x), outputs(ours, x))
        and relative_error(outputs(ours, x), outputs(merged, x)) < 1e-4
    )
    again = build_ours("timm")
    again.load_state_dict(plain.state_dict())
    assert {m.alpha for m in annealed_modules(again)} == {1.0} and torch.equal(
        outputs(again.eval(), x), outputs(ours, x)
    )
    assert describe_mismatch(plain, ours.state_dict()) == ""
    assert describe_mismatch(ours, plain.state_dict()) == ""
    set_alpha_(ours, 0.4)
    assert describe_mismatch(plain, ours.state_dict()).startswith("34 unexpected (first: stages.0.0.")
    half = build_ours("timm")
    half.load_state_dict({k: v for k, v in plain.state_dict().items() if k.startswith("stem.")}, strict=False)
    assert {m.alpha for m in annealed_modules(half)} == {0.0}, "a part of a checkpoint says nothing of the blocks"


def test_round_trip_of_keys():
    ours = build_ours("timm")
    own = from_stock(ours, build_stock("timm").state_dict())
    assert own.keys() == ours.state_dict().keys() and stock_format(own) is None
    ours.load_state_dict(own)
    other = build_ours("timm")
    other.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, own[k]) for k, v in other.state_dict().items())


def whole_classifier(kind: str, width: float, **backbone) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(
            dict(
                type="ImageClassifier",
                backbone=dict(type=kind, widen_factor=width, **backbone),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=6, in_channels=1280),
            )
        )


def test_load_from_and_init_cfg_take_stock_checkpoints(tmp_path):
    from mmengine.runner import load_checkpoint

    stock = whole_classifier("MobileNetV2", 0.35)
    calibrate_random_bn_(stock, torch.randn(4, 3, 65, 65))
    torch.save({"state_dict": stock.state_dict()}, tmp_path / "stock.pth")
    torch.save(build_stock("timm").state_dict(), tmp_path / "timm.pth")
    x = torch.randn(2, 3, 49, 64)
    ours = whole_classifier("rep_plugin.RepMobileNetV2", 0.35, anneal=True)
    load_checkpoint(ours, str(tmp_path / "stock.pth"))
    ours.eval()
    assert relative_error(outputs(stock, x), outputs(ours, x)) < 5e-5
    for checkpoint, prefix in (("stock.pth", "backbone"), ("stock.pth", None), ("timm.pth", None)):
        init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / checkpoint), prefix=prefix)
        ours = whole_classifier("rep_plugin.RepMobileNetV2", 0.35, anneal=True, init_cfg=init_cfg)
        ours.init_weights()
        stem = ours.backbone.stem.branches["conv"].conv.weight
        expected = torch.load(tmp_path / checkpoint)
        expected = expected.get("state_dict", {}).get("backbone.conv1.conv.weight", expected.get("conv_stem.weight"))
        assert torch.equal(stem, expected), checkpoint
    # timm-side: a whole mmpretrain classifier, head included.
    on_timm = build_ours("timm")
    on_timm.load_state_dict(stock.state_dict())
    assert relative_error(outputs(stock, x), outputs(on_timm.eval(), x)) < 5e-5


def test_shipped_config_starts_as_stock(tmp_path):
    """With the address of the checkpoint replaced by a file of the same kind: 1000 classes, another head."""
    cfg = Config.fromfile("configs/rep_mbv2_cub_warm_start.py")
    stock = whole_classifier("MobileNetV2", 1.0)
    calibrate_random_bn_(stock, torch.randn(2, 3, 64, 64))
    torch.save({"state_dict": stock.state_dict()}, tmp_path / "stock.pth")
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / "stock.pth")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        ours = MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})
        anneal, deploy = [HOOKS.build(hook) for hook in cfg.custom_hooks]
    ours.init_weights()
    ours.eval()
    x = torch.randn(2, 3, 64, 49)
    assert relative_error(outputs(stock.backbone, x), outputs(ours.backbone, x)) < 5e-5 and ours(x).shape == (2, 200)
    assert anneal.schedule.end < cfg.train_cfg.max_epochs and type(deploy).__name__ == "ReparamHook"


def test_timm_pretrained_route(tmp_path):
    stock = build_stock("timm")
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    ours = timm.create_model(
        "rep_mobilenetv2_035", anneal=True, num_classes=6, checkpoint_path=str(tmp_path / "stock.pth")
    )
    x = torch.randn(2, 3, 49, 64)
    assert relative_error(outputs(stock, x), outputs(ours.eval(), x)) < 5e-5
    overlay = dict(file=str(tmp_path / "stock.pth"), num_classes=6)
    other = timm.create_model(
        "rep_mobilenetv2_035", anneal=True, pretrained=True, num_classes=9, pretrained_cfg_overlay=overlay
    )
    assert other(x).shape == (2, 9) and torch.equal(
        other.last_conv.branches["conv"].conv.weight, stock.conv_head.weight
    )


def ours_on_timm(classes: int = 6, anneal: bool = True) -> nn.Module:
    return timm.create_model("rep_mobilenetv2_035", num_classes=classes, anneal=anneal)


CASES = {
    "no anneal": (lambda: ours_on_timm(anneal=False), r"only RepMobileNetV2Classifier\(anneal=True, deploy=False\)"),
    "deployed": (lambda: RepMobileNetV2(0.35, deploy=True, anneal=True), r"only RepMobileNetV2\(anneal=True"),
    "width": (
        lambda: build_ours("timm", 0.75),
        r"'conv_stem.weight' .* \(16, 3, 3, 3\), .*\(24, 3, 3, 3\): widen_factor",
    ),
    "channels": (lambda: RepMobileNetV2(0.35, in_channels=1, anneal=True), r"'conv_stem.weight' .* in_channels"),
    "classes": (lambda: ours_on_timm(classes=5), r"'classifier.weight' .* num_classes"),
    "branch": (lambda: RepMobileNetV2(0.35, branches=("bottleneck",), anneal=True), "expected 'identity' too"),
    "bottleneck": (lambda: RepMobileNetV2(0.35, branches=("conv3x3",), anneal=True), "expected 'bottleneck' too"),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_what_does_not_fit_is_told_in_one_line_and_nothing_is_loaded(case):
    build, message = CASES[case]
    state, model = build_stock("timm").state_dict(), build()
    before = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        with pytest.raises(CheckpointMismatchError, match=message) as caught:
            model.load_state_dict(state, strict=strict)
        assert "\n" not in str(caught.value) and "nothing was loaded" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_networks_are_refused():
    ours, state = RepMobileNetV2(0.35, anneal=True), build_stock("timm").state_dict()
    with pytest.raises(CheckpointMismatchError, match="no stock MobileNetV2 checkpoint"):
        from_stock(ours, nn.Linear(2, 2).state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"lacks 'blocks.3.1.conv_pw.weight', expected a MobileNetV2"):
        from_stock(ours, {k: v for k, v in state.items() if not k.startswith("blocks.3.1.")})
    with pytest.raises(
        CheckpointMismatchError, match=r"has 1 tensors .*no place for \(first: blocks.3.9.conv_pw.weight\)"
    ):
        from_stock(ours, state | {"blocks.3.9.conv_pw.weight": torch.zeros(1)})
