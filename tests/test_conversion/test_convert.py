"""Checkpoints of the authors', timm's and mmpretrain's networks, into ours and back: same output, same tensors."""

import copy
import subprocess
import sys

import mmpretrain.models.backbones as stock
import pytest
import timm
import torch
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS, DefaultScope
from safetensors.torch import load_file, save_file
from timm.models.byobnet import ByobNet, ByoModelCfg, _mobileone_bcfg, _rep_vgg_bcfg
from timm.utils.model import reparameterize_model
from torch import nn

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.backbones.replknet import RepLKNet
from rep_plugin.conversion.convert import convert_file, convert_state_dict, read_tensors
from rep_plugin.conversion.key_maps import FORMATS, from_own, to_own
from rep_plugin.errors import KeyMapError
from rep_plugin.testing import calibrate_random_bn_
from tests.authors_networks import OfficialRepLKNet, fold_bns_, merge_blocks_, official_mobileone, official_repvgg
from tests.helpers import relative_error

QUARTER = (0.25, 0.25, 0.25, 0.25)  # 16, 32, 64, 128 channels
SHORT = (2, 2, 2, 1)
LARGE = dict(channels=(8, 8, 16, 16), kernels=(13, 9, 7, 7), depths=(1, 1, 2, 1))
# Ours with the same structure as the small networks below.
REPVGG = ("rep_repvgg_a0", dict(arch=dict(depths=SHORT, widths=QUARTER, groups=2, se=True)))
MOBILEONE = ("rep_mobileone_s0", dict(arch=dict(depths=SHORT, widths=QUARTER, copies=2, se_blocks=(0, 1, 0, 1))))
REPLKNET = ("rep_replknet_31b", dict(arch=LARGE))


class StockClassifier(nn.Module):
    """What mmpretrain's ImageClassifier holds under the same names: backbone, average, ``head.fc``."""

    def __init__(self, backbone, channels):
        super().__init__()
        self.backbone, self.head = backbone, nn.Module()
        self.head.fc = nn.Linear(channels, 7)

    def forward(self, x):
        return self.head.fc(self.backbone(x)[-1].mean((2, 3)))


def timm_net(blocks, **options):
    return ByobNet(ByoModelCfg(blocks=blocks, stem_chs=16, **options), num_classes=7)


def timm_repvgg():
    attention = dict(attn_layer="se", attn_kwargs=dict(rd_ratio=1 / 16, rd_divisor=1))
    return timm_net(_rep_vgg_bcfg(SHORT, QUARTER, groups=2), stem_type="rep", **attention)


def timm_mobileone():
    blocks = _mobileone_bcfg(SHORT, QUARTER, (0, 1, 0, 1), num_conv_branches=2)
    return timm_net(blocks, stem_type="one", attn_kwargs=dict(rd_ratio=1 / 16, rd_divisor=1))


def stock_repvgg():
    groups = {layer: 2 for layer in range(2, 8, 2)}
    arch = dict(num_blocks=SHORT, width_factor=QUARTER, group_layer_map=groups, se_cfg=dict(ratio=16, divisor=1))
    return StockClassifier(stock.RepVGG(arch), 128)


def stock_mobileone():
    arch = dict(
        num_blocks=list(SHORT), width_factor=list(QUARTER), num_conv_branches=[2] * 4, num_se_blocks=[0, 1, 0, 1]
    )
    return StockClassifier(stock.MobileOne(arch, se_cfg=dict(ratio=16, divisor=1)), 128)


STOCK_LARGE = dict(
    large_kernel_sizes=LARGE["kernels"],
    layers=LARGE["depths"],
    channels=LARGE["channels"],
    small_kernel=5,
    dw_ratio=1,
)


def stock_replknet():
    return StockClassifier(stock.RepLKNet(STOCK_LARGE), 16)


WIDTHS = (16, 32, 64, 128)
# (format, what builds their network, ours)
NETWORKS = {
    "repvgg-official": ("official", lambda: official_repvgg(SHORT, WIDTHS, groups=2, se=True), REPVGG),
    "repvgg-timm": ("timm", timm_repvgg, REPVGG),
    "repvgg-mmpretrain": ("mmpretrain", stock_repvgg, REPVGG),
    "mobileone-official": ("official", lambda: official_mobileone(SHORT, WIDTHS, 2, (0, 1, 0, 1)), MOBILEONE),
    "mobileone-timm": ("timm", timm_mobileone, MOBILEONE),
    "mobileone-mmpretrain": ("mmpretrain", stock_mobileone, MOBILEONE),
    "replknet-official": ("official", lambda: OfficialRepLKNet(**LARGE), REPLKNET),
    "replknet-mmpretrain": ("mmpretrain", stock_replknet, REPLKNET),
}


def calibrated(build) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    return calibrate_random_bn_(model, x), torch.randn(2, 3, 63, 65, dtype=torch.float64)


def ours_with(tensors, ours, **options) -> nn.Module:
    name, arguments = ours
    model = timm.create_model(name, num_classes=7, **arguments, **options).double()
    model.load_state_dict(tensors)
    model.eval()
    return model


def assert_same_tensors(expected, got):
    assert list(expected) == list(got)
    assert all(torch.equal(expected[key], got[key]) and expected[key].dtype == got[key].dtype for key in expected)


@pytest.mark.parametrize("case", NETWORKS)
def test_training_form_gives_the_same_output_and_comes_back(case):
    format, build, ours = NETWORKS[case]
    theirs, x = calibrated(build)
    own, found = convert_state_dict(theirs.state_dict(), arch="any")
    assert (found.family, found.source, found.deployed, found.classifier) == (case.split("-")[0], format, False, True)
    with torch.no_grad():
        expected = theirs(x)
        assert relative_error(expected, ours_with(own, ours)(x)) < 1e-9
    assert relative_error(expected[:1], expected[1:]) > 1e-3
    assert_same_tensors(theirs.state_dict(), convert_state_dict(own, format, "any")[0])


@pytest.mark.parametrize("case", [case for case in NETWORKS if "mmpretrain" in case])
def test_a_training_step_is_the_same(case):
    _, build, ours = NETWORKS[case]
    theirs, x = calibrated(build)
    for module in theirs.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    extra = {"drop_path_rate": 0.0} if "replknet" in case else {}
    model = ours_with(convert_state_dict(theirs.state_dict(), arch="any")[0], ours, **extra)
    for net in (theirs, model):
        net.train()
        net(x).square().mean().backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    own = convert_state_dict({**theirs.state_dict(), **gradients}, arch="any")[0]
    statistics = dict(model.named_buffers())
    for key, value in [*((key, p.grad) for key, p in model.named_parameters()), *statistics.items()]:
        gap = (own[key].double() - value.double()).abs().max()
        assert gap <= 1e-8 * max(1.0, own[key].abs().max()), key
    assert sum(g.abs().max() > 1e-4 for g in gradients.values()) > 0.5 * len(gradients)


def merged(model: nn.Module, format: str) -> nn.Module:
    """Merged by the code of the project itself, or for ``official`` by an oracle under the authors' names."""
    model = copy.deepcopy(model)
    if format == "official":
        return merge_blocks_(model)
    if format == "mmpretrain":
        model.backbone.switch_to_deploy()
        return model
    return reparameterize_model(model)


@pytest.mark.parametrize("case", NETWORKS)
def test_merged_form_gives_the_same_output_and_comes_back(case):
    format, build, ours = NETWORKS[case]
    theirs, x = calibrated(build)
    state = merged(theirs, format).state_dict()
    own, found = convert_state_dict(state, arch="any")
    assert found.family == case.split("-")[0] and found.deployed
    extra = {"keep_bn": True} if "replknet" in case else {}
    with torch.no_grad():  # against the training form: mmpretrain's merged RepVGG leaves its attention out
        assert relative_error(theirs(x), ours_with(own, ours, deploy=True, **extra)(x)) < 1e-9
    assert_same_tensors(state, convert_state_dict(own, format, "any")[0])


def test_official_replknet_with_folded_bns_is_our_deployed_form():
    theirs, x = calibrated(NETWORKS["replknet-official"][1])
    state = fold_bns_(merged(theirs, "official")).state_dict()
    own, found = convert_state_dict(state, arch="any")
    with torch.no_grad():
        assert relative_error(theirs(x), ours_with(own, REPLKNET, deploy=True)(x)) < 1e-9
    assert found.source == "official" and found.deployed
    assert_same_tensors(state, convert_state_dict(own, "official", "any")[0])
    with pytest.raises(KeyMapError, match=r"'stem.0.reparam_conv.weight' has no counterpart in the mmpretrain layout"):
        convert_state_dict(own, "mmpretrain", "any")


@pytest.mark.parametrize("case", [case for case in NETWORKS if "official" in case])
def test_what_reparameterize_merges_is_what_the_authors_code_merges(case):
    _, build, ours = NETWORKS[case]
    theirs, x = calibrated(build)
    own, _ = convert_state_dict(theirs.state_dict(), arch="any")
    deployed, _ = rep_plugin.reparameterize(ours_with(own, ours), x)
    published, found = convert_state_dict(deployed.state_dict(), "official", "any")
    expected = merged(theirs, "official")
    expected = (fold_bns_(expected) if "replknet" in case else expected).state_dict()
    assert found.deployed and set(published) == set(expected)
    assert all(relative_error(expected[key].double(), published[key].double()) < 1e-9 for key in expected)


@pytest.mark.parametrize(("name", "arch"), [("repvgg_a0", "A0"), ("mobileone_s0", "s0")])
def test_whole_published_networks_of_timm(name, arch):
    theirs, x = calibrated(lambda: timm.create_model(name, num_classes=7))
    for model, deploy in ((theirs, False), (reparameterize_model(theirs), True)):
        own, found = convert_state_dict(model.state_dict())
        assert (found.arch, found.deployed) == (arch, deploy) and f"{arch} in" in str(found)
        with torch.no_grad():
            assert relative_error(theirs(x), ours_with(own, (f"rep_{name}", {}), deploy=deploy)(x)) < 1e-9
        assert_same_tensors(model.state_dict(), convert_state_dict(own, "timm", arch)[0])


def test_stock_image_classifier_takes_what_is_written_for_it():
    theirs, x = calibrated(NETWORKS["repvgg-timm"][1])
    tensors, _ = convert_state_dict(theirs.state_dict(), "rep_plugin_mm", "any")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(
            dict(
                type="ImageClassifier",
                backbone=dict(type="rep_plugin.RepVGG", **REPVGG[1]),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=7, in_channels=128),
            )
        ).double()
    model.load_state_dict(tensors)
    model.eval()
    with torch.no_grad():
        assert relative_error(theirs(x), model(x)) < 1e-9
    assert_same_tensors(theirs.state_dict(), convert_state_dict(tensors, "timm", "any")[0])


@pytest.mark.parametrize("case", NETWORKS)
def test_bare_backbones_between_all_formats(case):
    format, build, _ = NETWORKS[case]
    heads = ("linear.", "head.")
    state = {k.removeprefix("backbone."): v for k, v in build().state_dict().items() if not k.startswith(heads)}
    own, found = convert_state_dict(state, arch="any")
    assert not found.classifier and not any(key.startswith("classifier") for key in own)
    for to in FORMATS:
        if (found.family, to) == ("replknet", "timm"):
            with pytest.raises(KeyMapError, match="timm has no replknet"):
                from_own(own, found.family, to)
            continue
        there = from_own(own, found.family, to)
        assert not any(key.startswith("backbone.") for key in there)
        back, layout = to_own(there)
        assert layout.family == found.family
        assert_same_tensors(own, back)
    assert_same_tensors(state, from_own(own, found.family, format))


def test_downstream_norms_of_replknet():
    theirs, x = calibrated(lambda: stock.RepLKNet(STOCK_LARGE, out_indices=(1, 3)))
    own, _ = convert_state_dict(theirs.state_dict(), arch="any")
    model = RepLKNet(LARGE, out_indices=(1, 3)).double()
    model.load_state_dict(own)
    model.eval()
    for expected, got in zip(theirs(x), model(x)):
        assert relative_error(expected, got) < 1e-9
    assert_same_tensors(theirs.state_dict(), from_own(own, "replknet", "official"))


def test_unknown_ambiguous_and_incomplete_ones_are_refused():
    state = timm.create_model("rep_mobileone_s0", num_classes=0).state_dict()
    deployed = timm.create_model("rep_mobileone_s0", num_classes=0, deploy=True).state_dict()
    no_kernels = {key: tensor for key, tensor in deployed.items() if "bias" in key}
    cases = [
        ({}, None, "is empty"),
        (timm.create_model("resnet18").state_dict(), None, r"unknown checkpoint layout: key 'conv1.weight'.*no layout"),
        (
            {**state, "neck.weight": torch.zeros(1)},
            None,
            r"key 'neck.weight' of 1322; mobileone of rep_plugin has no such",
        ),
        ({**state, "linear.weight": torch.zeros(1)}, None, "key 'linear.weight'"),
        (timm.create_model("rep_mobilenetv2_035").state_dict(), None, "unknown checkpoint layout"),
        (
            {k: v for k, v in state.items() if "stages.2.3" not in k},
            None,
            r"no whole mobileone s0: .*missing .*stages.2.3",
        ),
        (state, "s1", "no whole mobileone s1"),
        (state, "A0", "unknown checkpoint layout"),
        (state, "A7", "unknown arch 'A7', expected one of A0, "),
        (
            {"classifier.weight": torch.zeros(5, 9)},
            None,
            "ambiguous: its keys are those of repvgg of rep_plugin and mobile",
        ),
        (no_kernels, "B0", "no whole repvgg B0: 28 missing"),
    ]
    for tensors, arch, message in cases:
        with pytest.raises(KeyMapError, match=message) as refused:
            convert_state_dict(tensors, "timm", arch)
        assert "\n" not in str(refused.value)
    with pytest.raises(KeyMapError, match="unknown format 'keras'"):
        convert_state_dict(state, "keras")
    post_bn = timm.create_model("rep_repvgg_a0", post_bn=True).state_dict()
    assert convert_state_dict(post_bn)[1].arch == "A0"
    with pytest.raises(KeyMapError, match=r"'stem.post_bn.weight' has no counterpart in the official layout of repvgg"):
        convert_state_dict(post_bn, "official")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_and_the_command(tmp_path, ending):
    state = timm.create_model("repvgg_a0", num_classes=3).state_dict()
    source, target = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    if ending == "pth":
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 3}, source)
    else:
        save_file(state, source)
    if ending == "pth":
        command = [sys.executable, "-W", "ignore", "-m", "rep_plugin", "convert", source, target, "--to", "official"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "repvgg A0 in training form with its classifier: 351 tensors, timm -> official" in done.stdout
    else:
        assert convert_file(source, target, "official", "A0").tensors == 351
    written = load_file(target) if ending == "safetensors" else torch.load(target, weights_only=True)
    assert "stage0.rbr_dense.conv.weight" in written and written["linear.weight"].shape == (3, 1280)
    back = tmp_path / "back.pth"
    assert convert_file(target, back, "timm").source == "official"
    assert sorted(read_tensors(back)) == sorted(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in read_tensors(back).items())


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path):
    torn, other, good = tmp_path / "torn.safetensors", tmp_path / "other.pth", tmp_path / "good.pth"
    torn.write_bytes(b"12345678 no")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, other)
    torch.save(timm.create_model("rep_repvgg_a0").state_dict(), good)
    kept = good.read_bytes()
    target = tmp_path / "new" / "out.pth"
    for source, to, message in (
        (tmp_path / "none.pth", target, "none.pth is missing"),
        (tmp_path / "none.safetensors", target, "none.safetensors"),
        (torn, target, "torn.safetensors is not readable"),
        (other, target, "unknown checkpoint layout: key 'weight'"),
        (good, good, "good.pth is the checkpoint to convert"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as refused:
            main(["convert", str(source), str(to)])
        assert "\n" not in str(refused.value)
    assert good.read_bytes() == kept and not target.parent.exists()
