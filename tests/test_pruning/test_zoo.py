"""Known networks of timm and mmpretrain: group counts, known sizes, and deployment after pruning."""

import copy
import warnings

import pytest
import timm
import torch
import torch_pruning
from mmpretrain.models import build_classifier
from mmpretrain.models.backbones.mobileone import MobileOneBlock
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from timm.models import byobnet
from torch import nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning, reparameterize
from rep_plugin.measure.costs import count_params
from rep_plugin.pruning import trace_channels
from rep_plugin.pruning.tracing.groups import find_groups
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_pruning.nets import ConvBN

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def free_groups(model, x=X):
    return [group for group in find_groups(trace_channels(model, x)) if len(group.units)]


@pytest.mark.parametrize(
    ("name", "number"),
    [("mobilenetv3_small_100", 27), ("mobilenetv2_100", 25), ("repvgg_a0", 5), ("resnet18", 12), ("ghostnet_050", 31)],
)
def test_group_counts(name, number):
    assert len(free_groups(timm.create_model(name))) == number


def test_merged_blocks_are_free():
    """Identity branches tie a whole stage; once merged, every convolution is its own."""
    model = timm.create_model("repvgg_a0").eval()
    assert len(free_groups(timm.utils.model.reparameterize_model(model))) == 22


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "mobilenetv2_035", "resnet18", "efficientnet_lite0", "mobileone_s0"]
)
def test_group_counts_are_torch_prunings(name):
    model = timm.create_model(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=X[:1])
    kinds = [nn.Conv2d, nn.Linear]
    theirs = list(graph.get_all_groups(ignored_layers=[model.get_classifier()], root_module_types=kinds))
    assert len(free_groups(model)) == len(theirs)


WIDTHS = {
    100: ([17, 39, 61, 87, 93, 103, 180, 215, 237, 220, 180, 148, 109], 3_612_260),
    196: ([9, 23, 15, 27, 14, 16, 64, 101, 20, 209, 88, 201, 57], 1_204_831),
}


@pytest.mark.parametrize("classes", WIDTHS)
def test_published_widths_of_bilinear_vgg(classes):
    widths, params = WIDTHS[classes]
    with torch.device("meta"):  # 18 or 51 million weights of the head need no start values
        model = timm.create_model("bcnn_vgg16_bn", num_classes=classes)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.5) if tensor.is_floating_point() else tensor.data.fill_(0)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    plan = PrunePlan.from_widths(model, X, dict(zip(convs, widths, strict=True)))
    report = apply_plan(model, plan, verify=False)
    assert plan.params_after == report.params_after == count_params(model) == params
    assert model.head.fc.in_features == widths[-1] ** 2 and model.num_features == widths[-1]
    assert model(X).shape == (2, classes)


def test_timms_classifier_on_shapes_traces():
    """Its head branches on the size of the map."""
    model = timm.create_model("vgg11_bn", num_classes=4)
    groups = find_groups(trace_channels(model, X))
    assert [len(group.units) for group in groups][-3:] == [4096, 4096, 0]


def pruned(model, fraction=0.3, x=X):
    calibrate_random_bn_(model, torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(1)))
    plan = plan_pruning(model, x, "random", fraction)
    report = apply_plan(model, plan, example_input=x)
    assert report.max_rel_error <= 1e-9 and report.sensitivity > 1e-3
    return plan


TRAIN_FORMS = {
    "timm RepVGG": (byobnet.RepVggBlock, dict(in_chs=8, out_chs=8), dict(in_chs=8, out_chs=8, group_size=4)),
    "timm MobileOne": (
        byobnet.MobileOneBlock,
        dict(in_chs=8, out_chs=8, num_conv_branches=2),
        dict(in_chs=8, out_chs=8, group_size=1),
    ),
    "mmpretrain RepVGG": (
        RepVGGBlock,
        dict(in_channels=8, out_channels=8),
        dict(in_channels=8, out_channels=8, groups=2),
    ),
    "mmpretrain MobileOne": (
        MobileOneBlock,
        dict(in_channels=8, out_channels=8, num_convs=2, kernel_size=3, padding=1),
        dict(in_channels=8, out_channels=8, num_convs=2, kernel_size=3, padding=1, groups=8),
    ),
}


@pytest.mark.parametrize("name", TRAIN_FORMS)
def test_foreign_blocks_merge_after_pruning(name):
    """They build their merged convolution from numbers they keep."""
    kind, first, second = TRAIN_FORMS[name]
    model = nn.Sequential(ConvBN(3, 8), kind(**first), kind(**second), nn.Conv2d(8, 5, 1))
    pruned(model)
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = twin(X.double())
        for block in twin[1:3]:
            block.switch_to_deploy() if hasattr(block, "switch_to_deploy") else block.reparameterize()
        assert relative_error(expected, twin(X.double())) < 1e-9
    assert not any(isinstance(m, nn.BatchNorm2d) for m in twin[1:].modules())


def test_our_backbone_merges_after_pruning():
    model = timm.create_model("rep_mobilenetv2_035", num_classes=7)
    plan = pruned(model)
    merged, report = reparameterize(model, X)
    assert report.max_rel_error < 1e-9
    inner = [m.weight.shape for n, m in model.named_modules() if n.endswith("bottleneck.depthwise")]
    assert inner[1][0] == 16 * 6 or inner[1][0] % 6 == 0
    assert merged.num_classes == 7 and plan.params_after < plan.params_before


def test_a_whole_classifier_of_mmpretrain():
    model = build_classifier(
        dict(
            type="ImageClassifier",
            backbone=dict(type="ShuffleNetV1"),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=4, in_channels=960),
        )
    )
    plan = pruned(model)
    assert plan.units[1] > 100
    assert (
        model.head.fc.in_features
        == model.head.in_channels
        == plan.widths["backbone.layers.2.3.g_conv_1x1_expand.conv"][1]
    )
