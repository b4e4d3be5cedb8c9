"""Small networks of which each has segments of another kind, and what is asked of all of them."""

import copy

import timm
import torch
import torchvision
from timm.models import efficientnet
from torch import Tensor, nn

import rep_plugin
from rep_plugin.depth.segments import Segment, find_segments
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error

VGG11 = (8, "M", 8, "M", 12, 12, "M", 16, 16, "M", 16, 16, "M")
# name -> a narrow network
ZOO = {
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=3),
    "efficientnet_lite0": lambda: efficientnet._gen_efficientnet_lite("efficientnet_lite0", 0.25, num_classes=3),
    "mnasnet": lambda: efficientnet._gen_mnasnet_b1("mnasnet_100", 0.25, num_classes=3),
    "resnet50": lambda: timm.create_model("resnet50", num_classes=3, channels=(4, 4, 6, 8), stem_width=4),
    "vgg11_bn": lambda: torchvision.models.vgg.VGG(
        torchvision.models.vgg.make_layers(list(VGG11), batch_norm=True), num_classes=3
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name]()
    if name == "vgg11_bn":  # its classifier has 119 million weights
        model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16 * 49, 3))
    return model


def disjoint(segments: list[Segment], largest: int = 5) -> list[Segment]:
    """Segments that share no layer: first those with a sum, then of three convolutions, then others."""
    taken: list[Segment] = []
    for one in sorted(segments, key=lambda s: (-s.shortcut, abs(len(s.shapes) - 3), s.span)):
        if max(one.merged[2:]) <= largest and not any(one.overlaps(other) for other in taken):
            taken.append(one)
    return sorted(taken, key=lambda s: s.span)


def plan_of(model: nn.Module, segments: list[Segment], **fields) -> rep_plugin.DepthPlan:
    """A plan that merges given segments."""
    from rep_plugin.depth.plan import Candidate

    data = [{name: getattr(one, name) for name in Segment.__dataclass_fields__} for one in segments]
    candidates = tuple(Candidate(**one) for one in data)
    return rep_plugin.DepthPlan(
        type(model).__name__, (1, 3, 33, 33), candidates, tuple(s.name for s in segments), **fields
    )


def require_exact(model: nn.Module, segments: list[Segment], batch: Tensor, *odd: Tensor, act_after: str | None = None):
    """Linearize, merge, and compare in float64 at both ends, on each input. Returns (linearized, merged)."""
    batch, odd = batch.double(), [x.double() for x in odd]
    model = calibrate_random_bn_(model.double(), batch)
    annealed, report = rep_plugin.linearize(model, plan_of(model, segments), act_after=act_after, example_input=batch)
    assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
    with torch.no_grad():
        for x in (batch, *odd):
            assert relative_error(model(x), annealed(x)) < 1e-12
        rep_plugin.set_alpha_(annealed, 1.0)
        calibrate_random_bn_(annealed, batch)
        assert relative_error(model(batch), annealed(batch)) > 1e-3
        merged, report = rep_plugin.reparameterize(annealed, batch)
        assert report.max_rel_error < 1e-9 and report.sensitivity > 1e-3
        for x in (batch, *odd):
            expected, found = annealed(x), merged(x)
            assert relative_error(expected, found) < 1e-9
            assert relative_error(expected[:1], annealed(x.flip(-1))[:1]) > 1e-3  # not blind
    assert not any(type(module).__name__ == "BorderConv2d" for module in merged.modules())
    return annealed, merged


def convs(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def segments_of(model: nn.Module, x: Tensor | None = None) -> list[Segment]:
    return find_segments(copy.deepcopy(model).eval() or model, x)[0]
