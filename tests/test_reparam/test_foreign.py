"""Blocks that are not ours: each layout against the block's own training-time forward, in float64."""

import copy
import re

import pytest
import timm
import torch
from timm.models import byobnet, nextvit
from timm.models.repghost import RepGhostModule
from torch import nn

import rep_plugin
from rep_plugin.history import rebuild_
from rep_plugin.reparam.adapters import find_adapter
from rep_plugin.testing import calibrate_random_bn_
from tests import official_layouts as official
from tests.helpers import randomise_bn_, relative_error

BLOCKS = {
    "repvgg": lambda: official.RepVGGBlock(8, 8),
    "repvgg_stride_groups": lambda: official.RepVGGBlock(8, 12, 2, groups=4),
    "repvgg_se": lambda: official.RepVGGBlock(8, 8, se=True),
    "repvgg_plus": lambda: official.RepVGGBlock(8, 8, post_se=True),
    "qarepvgg": lambda: official.RepVGGBlock(8, 8, qa=True),
    "qarepvgg_se": lambda: official.RepVGGBlock(8, 8, qa=True, se=True),
    "mobileone": lambda: official.MobileOneBlock(8, 8, groups=8),
    "mobileone_se": lambda: official.MobileOneBlock(8, 16, stride=2, se=True),
    "mobileone_1x1": lambda: official.MobileOneBlock(8, 8, 1),
    "dbb": lambda: official.DiverseBranchBlock(8, 8),
    "dbb_5_stride_groups": lambda: official.DiverseBranchBlock(8, 12, 5, 2, groups=2),
    "dbb_depthwise": lambda: official.DiverseBranchBlock(8, 8, groups=8),
    "acb": lambda: official.ACBlock(8, 8),
    "acb_more_padding": lambda: official.ACBlock(8, 6, 3, 2, padding=2, groups=2),
    "acb_cropped": lambda: official.ACBlock(8, 8, 5, padding=1),
    "replk": lambda: official.ReparamLargeKernelConv(8, 13, 5),
    "unireplk": lambda: official.DilatedReparamBlock(8),
    "token_mixer": lambda: official.RepMixer(8),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_official_layouts(name):
    """As a block inside a model, at an even and an odd size."""
    model = calibrate_random_bn_(nn.Sequential(nn.Conv2d(3, 8, 1), BLOCKS[name]()), torch.randn(8, 3, 15, 16)).double()
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 16, 15))
    assert [block.name for block in report.blocks] == ["1"] and report.blocks[0].max_rel_error < 1e-12
    assert report.max_rel_error < 1e-12 and report.sensitivity > 0.05 and not report.notes
    x = torch.randn(2, 3, 11, 14).double()
    assert relative_error(model(x), merged(x)) < 1e-12
    convs = [m for m in merged[1].modules() if isinstance(m, nn.Conv2d) and m not in set(model.modules())]
    assert all(p.requires_grad and p.is_leaf for p in convs[0].parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged[1].modules()) or name == "qarepvgg_se"
    assert all(find_adapter(module) is None for module in merged.modules())  # deployed blocks are left alone


def test_the_root_may_be_a_foreign_block():
    block = randomise_bn_(official.RepVGGBlock(8, 8)).double().eval()
    x = torch.randn(2, 8, 9, 9).double()
    merged, report = rep_plugin.reparameterize(block, x)
    assert relative_error(block(x), merged(x)) < 1e-12 and isinstance(merged.rbr_reparam, nn.Conv2d)
    assert report.blocks[0].name == "" and merged.rbr_reparam.kernel_size == (3, 3)


def test_sync_bn_is_bn():
    model = calibrate_random_bn_(nn.Sequential(official.RepVGGBlock(3, 3)), torch.randn(8, 3, 15, 15)).double()
    x = torch.randn(2, 3, 9, 9).double()
    expected = model(x)
    merged, _ = rep_plugin.reparameterize(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval(), x)
    assert relative_error(expected, merged(x)) < 1e-12


def _keep(module: nn.Module, out: torch.Tensor, dim: int) -> None:
    if isinstance(module, nn.Conv2d) and (dim == 0 or module.groups == 1):
        module.weight = nn.Parameter(module.weight.detach().index_select(dim, out))
    elif isinstance(module, nn.BatchNorm2d):
        for name in ("weight", "bias"):
            setattr(module, name, nn.Parameter(getattr(module, name).detach()[out]))
        module.running_mean, module.running_var = module.running_mean[out], module.running_var[out]


@pytest.mark.parametrize("depthwise", [False, True])
def test_stale_attributes_of_a_pruned_block(depthwise):
    """Channels are gone from the weights; in_channels, num_features and the block's own attributes say nothing of it."""
    block = randomise_bn_(official.RepVGGBlock(8, 8, groups=8 if depthwise else 1)).double().eval()
    kept = torch.tensor([0, 2, 3, 5, 7])
    for module in block.modules():
        _keep(module, kept, 0)
        if isinstance(module, nn.Conv2d) and not depthwise:
            _keep(module, kept, 1)
        elif isinstance(module, nn.Conv2d):
            module.groups = 5
    x = torch.randn(2, 5, 9, 9).double()
    merged, _ = rep_plugin.reparameterize(block, x)
    assert relative_error(block(x), merged(x)) < 1e-12 and merged.rbr_reparam.in_channels == 5


def test_what_would_be_wrong_is_refused_by_name():
    model = nn.Sequential(official.RepVGGBlock(8, 8, 2)).eval()
    model[0].rbr_dense.conv = nn.Conv2d(8, 8, 4, 2, 1)  # an even window: its centre is no pixel
    with pytest.raises(ValueError, match=r"block '0' \(RepVGG block\): .*is not centred"):
        rep_plugin.reparameterize(model, torch.randn(1, 8, 12, 12), verify=False)
    model = nn.Sequential(official.RepVGGBlock(8, 8)).eval()
    model[0].rbr_dense.conv.padding_mode = "reflect"
    with pytest.raises(TypeError, match="block '0'.*padding_mode must be 'zeros', got 'reflect'"):
        rep_plugin.reparameterize(model, torch.randn(1, 8, 12, 12))
    model = nn.Sequential(official.RepVGGBlock(8, 8)).eval()
    model[0].rbr_1x1.add_module("act", nn.ReLU())
    with pytest.raises(TypeError, match="block '0'.*ReLU is not linear"):
        rep_plugin.reparameterize(model, torch.randn(1, 8, 12, 12))


class Doubling(official.RepVGGBlock):
    def forward(self, x):
        return self.rbr_dense(x) * 2 + self.rbr_1x1(x)


class Clamped(official.RepVGGBlock):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class Swapped(official.RepVGGBlock):
    def forward(self, x):
        return self.rbr_1x1(x) - self.se(self.rbr_dense(x))


@pytest.mark.parametrize("kind", [Doubling, Clamped, Swapped])
def test_another_forward_behind_known_names_is_merged_as_it_computes(kind):
    model = calibrate_random_bn_(nn.Sequential(kind(8, 8)), torch.randn(4, 8, 9, 9)).double()
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 33, 34).double())
    assert [block.kind for block in report.blocks] == ["RepVGG block"] and report.max_rel_error < 1e-12
    assert merged[0].rbr_reparam.kernel_size == (3, 3) and len(list(merged.parameters())) == 2
    x = 100 * torch.randn(1, 8, 9, 9).double()
    assert relative_error(model(x), merged(x)) < 1e-12


class Squashed(official.MobileOneBlock):
    def forward(self, x):
        return super().forward(x) * torch.tanh(10 * x.abs().mean())


def test_a_known_block_whose_input_is_read_elsewhere_loses_its_known_form():
    model = calibrate_random_bn_(nn.Sequential(Squashed(8, 8)), torch.randn(4, 8, 9, 9)).double()
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 33, 34).double())
    assert [block.kind for block in report.blocks] == ["Squashed, branches read from the forward"]
    assert report.max_rel_error < 1e-12 and len(list(merged.parameters())) == 2


class SmallOnly(official.RepVGGBlock):
    def forward(self, x):
        return super().forward(x) if x.shape[-1] < 100 else self.rbr_1x1(x).relu()


class ManyOnly(official.RepVGGBlock):
    def forward(self, x):
        return super().forward(x) if len(x) < 8 else self.rbr_dense(x).relu()


class Loud(official.RepVGGBlock):
    def forward(self, x):
        return super().forward(x) if x.abs().max() < 30 else self.rbr_1x1(x).relu()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (SmallOnly, "takes another path for an input .2, 3, 112, 112., in '1.*' .test_foreign.py"),
        (ManyOnly, "takes another path for an input .8, 3, .*, in '1.*' .test_foreign.py"),
        (Loud, "decides by a value in '1.*' .test_foreign.py"),
    ],
)
def test_a_wrong_forward_behind_known_names_is_left_as_it_is(kind, why, verify):
    """The children say RepVGG, the forward does something else: the block is named, the others are merged."""
    torch.manual_seed(0)
    blocks = [official.RepVGGBlock(8, 8), kind(8, 8), official.RepVGGBlock(8, 8)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 8), *blocks[::2])
    model = calibrate_random_bn_(model, torch.randn(4, 3, 9, 9)).double()
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 33, 34).double(), verify=verify)
    assert [block.name for block in report.blocks if not block.kind.startswith("Conv-BN")] == ["2", "3"]
    assert type(merged[1]) is kind and any(re.match(f"block '1' is left as it is: .*{why}", n) for n in report.notes)
    for shape, scale in [((1, 3, 120, 101), 1.0), ((2, 3, 9, 9), 1e-3), ((2, 3, 9, 9), 1e3), ((9, 3, 9, 9), 1.0)]:
        x = scale * torch.randn(shape).double()
        assert relative_error(model(x), merged(x)) < 1e-12


class Untraceable(nn.Module):
    """A sum that torch.fx cannot trace, of names that nobody knows, without a merge method."""

    def __init__(self):
        super().__init__()
        self.one, self.two = official.conv_bn(8, 8, 3, 1, 1), official.conv_bn(8, 8, 1)

    def forward(self, x):
        return self.one(x) + self.two(x) if len([*x]) else x


class Nested(nn.Module):
    """What it holds is named, not it."""

    def __init__(self):
        super().__init__()
        self.inner, self.pool = Untraceable(), nn.AdaptiveAvgPool2d(3)

    def forward(self, x):
        return self.pool(self.inner(x)) if len([*x]) else x


@pytest.mark.parametrize("kind", [Untraceable, Nested])
@pytest.mark.parametrize("fold_bn", [True, False])
def test_a_block_that_cannot_be_traced_is_named(kind, fold_bn):
    model = nn.Sequential(official.RepVGGBlock(8, 8), kind(), kind())
    calibrate_random_bn_(model, torch.randn(4, 8, 9, 9))
    _, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 9, 9), fold_bn=fold_bn)
    assert report.max_rel_error < 1e-10 and [b.name for b in report.blocks if "Conv-BN" not in b.kind] == ["0"]
    names = ["1", "2"] if kind is Untraceable else ["1.inner", "2.inner"]
    notes = [note for note in report.notes if note.startswith("block")]
    assert len(notes) == 1 and all(repr(name) in notes[0] for name in names)
    assert "torch.fx cannot trace Untraceable" in notes[0]


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = official.conv_bn(8, 8, 3, 1, 1), official.conv_bn(8, 8, 1)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.left(x) * torch.sigmoid(self.right(x) * self.temperature)

    def switch_to_deploy(self):
        raise AssertionError("never called")


def test_a_module_that_could_merge_itself_but_is_not_known_is_named():
    model = nn.Sequential(official.RepVGGBlock(8, 8), Unknown(), Unknown())
    calibrate_random_bn_(model, torch.randn(4, 8, 9, 9))
    _, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 9, 9), fold_bn=False)
    assert len(report.notes) == 1 and "not merged: 2 of" in report.notes[0] and "Unknown, first '1'" in report.notes[0]
    _, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 9, 9))
    assert not report.notes  # nothing is left of it: its BNs were folded


def test_a_foreign_block_in_two_places_stays_shared():
    block = official.RepVGGBlock(4, 4)
    model = calibrate_random_bn_(nn.Sequential(block, nn.ReLU(), block), torch.randn(4, 4, 8, 8))
    merged, report = rep_plugin.reparameterize(model)
    assert merged[0] is merged[2] and len(report.blocks) == 1 and report.max_rel_error < 1e-12


def test_steps_that_older_versions_wrote_are_repeated_with_the_same_names():
    """They name the blocks that were read from the forward, and none of those that adapters merged."""

    def build():
        return nn.Sequential(official.RepVGGBlock(4, 4), official.RepMixer(4), official.ACBlock(4, 4)).eval()

    merged, _ = rep_plugin.reparameterize(build(), verify=False, fold_bn=False)
    step = {"step": "reparameterize", "fold_bn": False, "merge_linear": False}
    assert rebuild_(build(), [step]).state_dict().keys() == merged.state_dict().keys()
    assert {key.rpartition(".")[0] for key in merged.state_dict()} == {
        "0.rbr_reparam",
        "1.reparam_conv",
        "2.fused_conv",
    }
    keys = rebuild_(build(), [step | {"left": ["1"], "parts": ["0"]}]).state_dict().keys()
    assert {"0.reparam_conv.weight", "1.layer_scale", "2.fused_conv.bias"} <= keys


FAMILIES = {  # name: (size, what cuts it short, kinds of block that must be found)
    "repvgg_a0": (33, {}, {"timm RepVGG block"}),
    "fastvit_sa12": (
        64,
        {"layers": (1, 1, 1, 1)},
        {
            "timm MobileOne block",
            "FastViT token mixer",
            "conditional position encoding",
            "timm large-kernel convolution",
        },
    ),
    "repvit_m0_9": (32, {"depth": (1, 1, 1, 1)}, {"RepViT depthwise block", "RepViT classifier"}),
    "repvit_m1": (32, {"depth": (1, 1, 1, 1)}, {"RepViT depthwise block", "RepViT classifier"}),
    "levit_128s": (224, {"depth": (1, 1, 1)}, {"Linear-BN", "BN-Linear"}),
    "efficientvit_m0": (224, {"depth": (1, 1, 1)}, {"depthwise residual", "BN-Linear"}),
    "shvit_s1": (64, {"depth": (1, 1, 1)}, {"depthwise residual", "BN-Linear"}),
    "iformer_t": (64, {}, {"depthwise residual", "RepViT classifier"}),
    "efficientvim_m1": (64, {"depths": (1, 1, 1)}, {"EfficientViM residuals"}),
    "lcnetv2_small": (33, {}, {"PP-LCNetV2 block"}),
    "swiftformer_xs": (64, {"layers": (1, 1, 1, 1)}, {"BN-Conv"}),
}
ATTENTION_BN = {"fastvit_sa12": 1, "swiftformer_xs": 1}  # a BN that a reshape follows


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_families(name):
    size, arguments, kinds = FAMILIES[name]
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    with torch.no_grad():  # layer scales of 1e-5 would hide a wrong merge
        for key, parameter in model.named_parameters():
            if key.rsplit(".", 1)[-1] in {"gamma", "alpha"}:
                parameter.uniform_(0.3, 1.0)
    calibrate_random_bn_(model, torch.randn(4, 3, size, size))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, size, size))
    assert report.max_rel_error < 1e-10 and report.sensitivity > 0.05
    assert kinds <= {block.kind.split(" (")[0] for block in report.blocks}
    assert all(b.max_rel_error < 1e-11 for b in report.blocks if b.kind in kinds and b.max_rel_error is not None)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in merged.modules()) == ATTENTION_BN.get(name, 0)
    assert not any("not merged" in note for note in report.notes)
    assert all(p.requires_grad for p in merged.parameters())


def test_ghostnetv3_blocks_merge_in_part_and_inside():
    from timm.models.ghostnet import GhostBottleneckV3

    blocks = [GhostBottleneckV3(8, 16, 12, 5, 2, se_ratio=0.25), GhostBottleneckV3(12, 20, 12, mode="shortcut")]
    model = calibrate_random_bn_(nn.Sequential(*blocks), torch.randn(8, 8, 16, 16))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 8, 16, 16))
    kinds = [(block.name, block.kind) for block in report.blocks if block.kind.startswith("Ghost")]
    assert kinds[:2] == [("0", "GhostNetV3 bottleneck"), ("0.ghost1", "GhostNetV3 module")] and len(kinds) == 5
    assert report.max_rel_error < 1e-12 and not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert all(p.requires_grad for p in merged.parameters())


TIMM_BLOCKS = {
    "repvgg_se": lambda: byobnet.RepVggBlock(16, 16, layers=byobnet.LayerFn(attn=timm.layers.SqueezeExcite)),
    "repvgg_grouped": lambda: byobnet.RepVggBlock(16, 32, stride=2, group_size=4),
    "mobileone": lambda: byobnet.MobileOneBlock(16, 16, group_size=1, num_conv_branches=4),
    "mobileone_1x1": lambda: byobnet.MobileOneBlock(16, 16, 1, num_conv_branches=2),
    "repghost": lambda: RepGhostModule(16, 12),
    "nextvit_conv": lambda: nextvit.NextConvBlock(16, 32),
    "nextvit_transformer": lambda: nextvit.NextTransformerBlock(16, 128, 0.1, sr_ratio=2, head_dim=16),
    "nextvit_transformer_no_pool": lambda: nextvit.NextTransformerBlock(16, 128, 0.1, head_dim=16),
}


@pytest.mark.parametrize("name", TIMM_BLOCKS)
def test_timm_blocks(name):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), TIMM_BLOCKS[name]())
    calibrate_random_bn_(model, torch.randn(8, 3, 16, 16))
    merged, report = rep_plugin.reparameterize(model, torch.randn(2, 3, 16, 16))
    assert report.blocks[0].name == "1" and report.max_rel_error < 1e-12 and report.sensitivity > 0.05
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in merged.modules())
    if name == "repvgg_se":
        assert [name for name, _ in merged[1].named_children()] == ["reparam_conv", "attn", "act"]


def test_merged_keys_are_those_of_timms_own_deployed_form():
    merged, _ = rep_plugin.reparameterize(
        timm.create_model("fastvit_t8", num_classes=5).eval(), verify=False, fold_bn=False
    )
    own = timm.create_model("fastvit_t8", num_classes=5, inference_mode=True).eval()
    own.load_state_dict(merged.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert relative_error(merged(x), own(x)) < 1e-5
