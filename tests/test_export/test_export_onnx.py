"""Exporting to ONNX: the same function in other runtimes, what the file says of itself, and all that is refused."""

import copy
import json
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.ops import FeaturePyramidNetwork

import rep_plugin
from rep_plugin.bilinear.head import BilinearHead
from rep_plugin.bilinear.methods import METHODS
from rep_plugin.blocks.families import DiverseBranchBlock, RepVGGBlock
from rep_plugin.errors import EquivalenceError, ExportError, InconclusiveWarning
from rep_plugin.export import runtimes
from rep_plugin.export.export_onnx import export_images
from rep_plugin.export.graph import read_metadata
from rep_plugin.measure.differences import flatten_outputs
from rep_plugin.measure.verify import rounding_error
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm.artefacts import save_timm
from rep_plugin.timm.export import export_timm, read_images

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(nn.Module):
    """Two blocks and a bilinear or a plain head; ``maps``: what it returns instead of logits."""

    def __init__(self, method="", maps=None):
        super().__init__()
        self.stem = RepVGGBlock(3, 8, stride=2)
        self.block = DiverseBranchBlock(8, 12, 3)
        self.head = BilinearHead(12, 5, method, dim=20, rank=6) if method else nn.Linear(12, 5)
        self.maps = maps

    def forward(self, x):
        first = self.stem(x).relu()
        second = self.block(first).relu()
        if self.maps is not None:
            return self.maps(first, second)
        return self.head((second,) if isinstance(self.head, BilinearHead) else second.mean((2, 3)))


def trained(*args, **kwargs):
    net = calibrate_random_bn_(Net(*args, **kwargs), torch.randn(8, 3, 16, 16))
    if isinstance(net.head, BilinearHead):
        nn.init.normal_(net.head.fc.weight)
    return net


def export(model, path, x=None, **options):
    x = torch.randn(2, 3, 16, 16) if x is None else x
    return rep_plugin.export_onnx(model, path, x, **({"rounds": 0} | options))


def in_onnxruntime(path, x):
    session = onnxruntime.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    return session.run(None, {entry.name: x.numpy()})


def differs(path, model, x):
    """Largest relative difference of the file in ONNX Runtime from the model, over all outputs."""
    with torch.no_grad():
        wanted = model(x)
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    found = in_onnxruntime(path, x)
    assert [tuple(one.shape) for one in wanted] == [one.shape for one in found]
    return max((np.abs(a - b.numpy()).max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def test_the_file_computes_what_the_trained_model_does(tmp_path):
    model, path = trained(), tmp_path / "deeper" / "net.onnx"
    before = copy.deepcopy(model.state_dict())
    report = export(model, path, dynamic_size=True, rounds=2)
    for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 7, 31)):
        assert differs(path, model, torch.randn(shape)) < 1e-5
    assert report.compared == [(2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 16, 16), (2, 3, 15, 15), (2, 3, 21, 19)]
    assert {one.name: one.max_rel_error < 1e-5 for one in report.runtimes} == {"onnxruntime": True, "openvino": True}
    assert 0 < report.max_rel_error == max(one.max_rel_error for one in report.runtimes)
    assert report.max_abs_error > 0 and report.merge_rel_error < 1e-12 and report.sensitivity > 0.1
    assert report.inputs == {"input": ["batch", 3, "height", "width"]} and report.outputs == {"logits": ["batch", 5]}
    assert report.params_after < report.params_before and report.macs_after < report.macs_before
    assert report.params_after == rep_plugin.measure.costs.count_params(rep_plugin.reparameterize(model)[0])
    assert report.input_shape == (1, 3, 16, 16) and report.pytorch_milliseconds > 0
    assert all(one.milliseconds > 0 for one in report.runtimes) and report.size_bytes == path.stat().st_size
    # The model is as it was, in training form, and nothing else lies beside the file.
    assert hasattr(model.stem, "branches") and [p.name for p in path.parent.iterdir()] == ["net.onnx"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Conv") == 2 and "BatchNormalization" not in operators
    told = json.loads(report.to_json())
    assert told["runtimes"][1]["name"] == "openvino" and told["outputs"] == report.outputs
    assert "batch x 3 x height x width" in str(report) and "max relative" in str(report)


@pytest.mark.parametrize("method", METHODS)
def test_bilinear_heads(method, tmp_path):
    model, path = trained(method), tmp_path / "net.onnx"
    report = export(model, path, dynamic_size=True)
    assert report.max_rel_error < 1e-4 and report.sensitivity > 1e-2
    # 3 x 1 positions are fewer than the channels, 81 are more.
    assert max(differs(path, model, torch.randn(shape)) for shape in ((3, 3, 6, 2), (1, 3, 18, 18))) < 1e-4


def test_a_fixed_batch_takes_pictures_in_turns(tmp_path):
    model, path, pictures = trained(), tmp_path / "net.onnx", torch.randn(5, 3, 16, 16)
    report = export_images(model, path, pictures, (3, 16, 16), batch=2, rounds=0)
    assert report.inputs == {"input": [2, 3, 16, 16]} and report.outputs == {"logits": [2, 5]}
    assert report.compared == [(2, 3, 16, 16)] and report.input_shape == (2, 3, 16, 16) and not report.notes
    assert differs(path, model, pictures[:2]) < 1e-5
    with pytest.raises(Exception, match="invalid dimensions"):
        in_onnxruntime(path, pictures[:3])
    report = export_images(model, path, None, (3, 16, 16), size=(12, 20), rounds=0)
    assert report.inputs == {"input": ["batch", 3, 12, 20]} and "random" in report.notes[0]
    for wrong in ({"batch": 0}, {"size": (0, 5)}, {"size": (5,)}):
        with pytest.raises(ValueError, match="must be"):
            export_images(model, path, None, (3, 16, 16), **wrong)


def test_backbones_have_an_output_a_map(tmp_path):
    x, path = torch.randn(2, 3, 64, 64), tmp_path / "net.onnx"
    model = calibrate_random_bn_(timm.create_model("test_efficientnet", features_only=True, out_indices=(1, 2, 4)), x)
    report = export(model, path, x)
    assert report.outputs["stride32"] == ["batch", model.feature_info.channels()[-1], 2, 2]
    assert list(report.outputs) == ["stride4", "stride8", "stride32"] and differs(path, model, x) < 1e-4
    assert report.border_rel_error is None  # of float64 comparisons alone

    report = export(trained(maps=lambda a, b: {"low": a, "count": a.argmax(), "high": b}), path, dynamic_size=True)
    assert report.outputs["high"] == ["batch", 12, "high_dim2", "high_dim3"] and list(report.outputs) == ["low", "high"]
    report = export(trained(maps=lambda a, b: (a, [b])), path)
    assert list(report.outputs) == ["map0", "map1"]
    report = export(trained(maps=lambda a, b: [a, b]), path, output_names=["a", "b"])
    assert list(report.outputs) == ["a", "b"]
    for names in (["a"], ["a", "a"], ["a", "1"]):
        with pytest.raises(ValueError, match="output_names must be 2 different names"):
            export(trained(maps=lambda a, b: [a, b]), path, output_names=names)


@dataclass
class Maps:
    """What a model may return: torch knows no way to flatten it."""

    low: torch.Tensor
    rest: list


Pair = namedtuple("Pair", "low high")


@pytest.mark.parametrize(
    ("maps", "names", "keys"),
    [
        (lambda a, b: {"0": a, "pool": b}, ["output_0", "pool"], {"output_0": "0"}),
        (lambda a, b: OrderedDict(out=a, aux=b), ["out", "aux"], {}),
        (lambda a, b: {"maps": {"0": a, "1": b}}, ["maps_0", "maps_1"], {"maps_0": "maps.0", "maps_1": "maps.1"}),
        (lambda a, b: {"input": a, "": b}, ["input_2", "output"], {"input_2": "input", "output": ""}),
        (lambda a, b: {"a.b": a, "a b": b}, ["a_b", "a_b_2"], {"a_b": "a.b", "a_b_2": "a b"}),
        (lambda a, b: {0: a, 1: b}, ["map0", "map1"], {}),
        (lambda a, b: (a, {"aux": b}), ["output_0", "output_1_aux"], {"output_0": "0", "output_1_aux": "1.aux"}),
        (lambda a, b: Pair(a, b), ["low", "high"], {}),
        (lambda a, b: Maps(a, [b, a.argmax()]), ["low", "rest_0"], {"rest_0": "rest.0"}),
        (lambda a, b: ((a,), [b]), ["map0", "map1"], {}),
    ],
)
def test_every_output_has_a_valid_name_of_its_own(maps, names, keys, tmp_path):
    model, x, path = trained(maps=maps), torch.randn(2, 3, 16, 16), tmp_path / "net.onnx"
    report = export(model, path, x, runtimes=["onnxruntime"])
    assert list(report.outputs) == names == [entry.name for entry in onnx.load(path).graph.output]
    assert read_metadata(path) == ({"output_keys": keys} if keys else {})
    with torch.no_grad():
        wanted = flatten_outputs(model(x))
    for one, tensor in zip(in_onnxruntime(path, x), wanted, strict=True):
        np.testing.assert_allclose(one, tensor.numpy(), atol=1e-4 * tensor.abs().max().item())


class Resized(nn.Module):
    """A map of a size that has nothing to do with the number of images; and the input's own size."""

    def __init__(self, side):
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 4, 1), side

    def forward(self, x):
        y = self.conv(x)
        small = nn.functional.interpolate(y, size=(self.side, 16), mode="bilinear")
        return {"small": small, "same": nn.functional.interpolate(small, size=x.shape[-2:], mode="bilinear")}


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("images", [2, 3])
def test_a_size_that_is_the_number_of_images_by_chance_is_not_declared_open(images, dynamo, tmp_path):
    """Two images and maps two pixels high: the exporter itself calls both the batch."""
    path = tmp_path / "net.onnx"
    report = export(Resized(images).eval(), path, torch.randn(images, 3, 16, 16), dynamo=dynamo)
    assert report.outputs == {"small": ["batch", 4, images, 16], "same": ["batch", 4, 16, 16]}
    report = export(Resized(images).eval(), path, torch.randn(images, 3, 16, 16), dynamo=dynamo, dynamic_batch=False)
    assert report.outputs["small"] == [images, 4, images, 16] and report.inputs == {"input": [images, 3, 16, 16]}
    if not dynamo:
        report = export(Resized(images).eval(), path, torch.randn(images, 3, 16, 16), dynamic_size=True)
        assert report.outputs == {"small": ["batch", 4, images, 16], "same": ["batch", 4, "height", "width"]}


def test_segmentation_networks(tmp_path):
    x, path = torch.randn(2, 3, 64, 64), tmp_path / "net.onnx"
    unet = smp.Unet("tu-rep_mobilenetv2_035", encoder_weights=None, classes=3)
    report = export(calibrate_random_bn_(unet, x), path, x, rounds=1)
    assert report.outputs == {"map0": ["batch", 3, 64, 64]} and report.blocks and differs(path, unet, x) < 1e-4
    assert report.pytorch_milliseconds > 0 and all(one.milliseconds > 0 for one in report.runtimes)
    lraspp = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    report = export(calibrate_random_bn_(lraspp, x), path, x, dynamic_size=True)
    assert report.outputs == {"out": ["batch", 3, "height", "width"]} and report.max_rel_error < 1e-4


class Backbone(nn.Module):
    """As torchvision's detectors take it: maps of a timm network, by number, through a pyramid."""

    def __init__(self, out_channels=32):
        super().__init__()
        self.body = timm.create_model("rep_mobilenetv2_035", features_only=True, out_indices=(-3, -2, -1))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn({str(index): value for index, value in enumerate(self.body(x))})


def test_detectors_say_what_can_be_exported_instead(tmp_path):
    anchors = AnchorGenerator(((32,), (64,), (128,)), ((1.0,),) * 3)
    detector = FCOS(Backbone(), 4, anchor_generator=anchors, min_size=64, score_thresh=0)
    x, path = torch.rand(2, 3, 64, 64), tmp_path / "net.onnx"
    calibrate_random_bn_(detector.backbone, x)
    for images, options in ((x, {}), (x[:1], {}), (x, {"dynamic_batch": False})):
        with pytest.raises(
            ExportError, match="^FCOS gives one dict for each image: .* maps, model.backbone, or"
        ) as caught:
            export(detector.eval(), path, images, **options)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    report = export(detector.backbone, path, x)
    assert report.outputs == {f"output_{i}": ["batch", 32, 8 >> i, 8 >> i] for i in range(3)} and report.blocks
    assert read_metadata(path)["output_keys"] == {"output_0": "0", "output_1": "1", "output_2": "2"}


class Changing(nn.Module):
    """``kind`` of output that depends on the number of images."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 1), kind

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return list(y) if self.kind == "number" else y.squeeze(0)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("number", r"\(1, 3, 16, 16\), 1 of ranks \[1\], than for \(2, 3, 16, 16\), 2 of"),
        ("rank", r"1 of ranks \[1\], than"),
    ],
)
def test_outputs_that_change_with_the_number_of_images_are_refused(kind, told, tmp_path):
    with pytest.raises(ExportError, match=f"^Changing gives other outputs for an input of shape .*{told}"):
        export(Changing(kind).eval(), tmp_path / "net.onnx")
    export(Changing(kind).eval(), tmp_path / "net.onnx", dynamic_batch=False)


def test_class_names_of_a_folder_are_in_the_file(tmp_path):
    model = timm.create_model(
        "rep_mobilenetv2_035", num_classes=3, pretrained_cfg_overlay={"label_names": ["a", "b", "c"]}
    )
    save_timm(rep_plugin.reparameterize(model.eval())[0], tmp_path / "ours")
    stock = timm.create_model("test_resnet", num_classes=3)
    (tmp_path / "stock").mkdir()
    timm.models.save_for_hf(stock, tmp_path / "stock", {"label_names": {"0": "x", "2": "z", "1": "y"}})
    for folder, names in (("ours", ["a", "b", "c"]), ("stock", ["x", "y", "z"])):
        path = tmp_path / f"{folder}.onnx"
        export_timm(f"local-dir:{tmp_path / folder}", path, size=(32, 32), rounds=0, runtimes=["onnxruntime"])
        assert read_metadata(path)["class_names"] == names


def test_pruned_models(tmp_path):
    model, x, path = trained(), torch.randn(2, 3, 16, 16), tmp_path / "net.onnx"
    rep_plugin.apply_plan(model, rep_plugin.PrunePlan.from_widths(model, x, {"block": 7}))
    export(model, path, x)
    assert differs(path, model, x) < 1e-5
    shapes = [tuple(entry.dims) for entry in onnx.load(path).graph.initializer]
    assert (7, 8, 3, 3) in shapes and (5, 7) in shapes


def test_as_it_stands(tmp_path):
    model, path = trained(), tmp_path / "net.onnx"
    report = export(model, path, reparameterize=False)
    assert "2 modules could be merged, first 'stem'" in report.notes[0] and report.merge_rel_error is None
    assert report.params_after == report.params_before and differs(path, model, torch.randn(3, 3, 16, 16)) < 1e-5
    merged, _ = rep_plugin.reparameterize(model)
    report = export(merged, path)
    assert not report.notes and not report.blocks  # merged already: nothing that a user should know


@pytest.mark.parametrize("dynamo", [False, True])
def test_mish_is_written_with_one_exponential(dynamo, tmp_path):
    model, x = nn.Sequential(nn.Identity(), nn.Mish()).eval(), torch.linspace(-80, 100, 2 * 3 * 5 * 7).view(2, 3, 5, 7)
    rep_plugin.export_onnx(model, tmp_path / "net.onnx", x, dynamo=dynamo, rounds=0)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("Exp") == 1 and not {"Softplus", "Tanh", "Mish"} & set(kinds)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(None, {"input": x.numpy()})
    wanted = model(x.double())
    assert ((torch.from_numpy(found) - wanted).abs() <= 2e-6 * wanted.abs()).all()  # value by value


@pytest.mark.parametrize("dynamo", [False, True])
def test_activations_stay_finite_far_below_zero(dynamo, tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LogSigmoid()).eval(), torch.randn(2, 3, 5, 5)
    rep_plugin.export_onnx(model, tmp_path / "net.onnx", x, dynamo=dynamo, runtimes=["onnxruntime"], rounds=0)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (got,) = session.run(None, {"input": (300 * x).numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(300 * x).detach())


def test_the_newer_exporter(tmp_path):
    model, path = trained(), tmp_path / "net.onnx"
    report = export(model, path, torch.randn(1, 3, 16, 16), dynamo=True)
    assert differs(path, model, torch.randn(3, 3, 16, 16)) < 1e-4 and report.opset == 18
    assert list(report.inputs) == ["input"] and list(report.outputs) == ["logits"]


def pixels(picture, told):
    """Do to a picture what the metadata say, with Pillow and numpy alone."""
    side = told["resize"]["size"][0]
    scale = side / min(picture.size)
    size = [side if edge == min(picture.size) else int(scale * edge) for edge in picture.size]
    picture = picture.resize(size, getattr(Image.Resampling, told["interpolation"].upper()))
    height, width = told["crop"]
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    values = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 255 * told["white"]
    return ((values - np.float32(told["mean"])) / np.float32(told["std"])).transpose(2, 0, 1)


def test_a_picture_prepared_by_the_metadata_is_what_timm_feeds(tmp_path):
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (9, 13, 3), np.uint8)).resize(
        (130, 90), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "a.png")
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"label_names": ["a", "b", "c"]})
    cfg = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    x = read_images(tmp_path, cfg)
    assert x.shape == (1, 3, 64, 64)
    export(calibrate_random_bn_(model, torch.randn(4, 3, 64, 64)), tmp_path / "net.onnx", x)
    told = read_metadata(tmp_path / "net.onnx")
    assert told["class_names"] == ["a", "b", "c"] and told["preprocessing"]["input_size"] == [3, 64, 64]
    assert told["preprocessing"]["channel_order"] == "RGB" and told["preprocessing"]["resize"]["edge"] == "short"
    assert np.abs(pixels(smooth, told["preprocessing"]) - x[0].numpy()).max() < 1e-5


def test_given_metadata_come_first(tmp_path):
    path, names = tmp_path / "net.onnx", ["Gänsegeier", "b", "c", "d", "e"]
    export(trained(), path, class_names=names, preprocessing={"white": 1.0})
    assert read_metadata(path) == {"class_names": names, "preprocessing": {"white": 1.0}}
    with pytest.raises(ValueError, match="class_names holds 2 names, expected one for each of the 5 logits"):
        export(trained(), path, class_names=["a", "b"])
    export(trained(), path)
    assert read_metadata(path) == {}


def wrong(session):
    return lambda x: [out * 1.001 for out in session(x)]


def non_finite(session):
    return lambda x: [out / 0 for out in session(x)]


def transposed(session):
    return lambda x: [out.T for out in session(x)]


def broken(session):
    def run(x):
        raise KeyError("no such\nthing")

    return run


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (wrong, EquivalenceError, r"\(2, 3, 16, 16\) differs from PyTorch by 1.00e-03 relative \(tolerance 1e-04\)"),
        (non_finite, EquivalenceError, "differs from PyTorch by inf relative"),
        (transposed, EquivalenceError, r"output shapes differ: expected \[\(2, 5\)\], got \[\(5, 2\)\]"),
        (broken, ExportError, "no such"),
    ],
)
def test_a_runtime_that_says_otherwise_leaves_no_file(runtime, fault, error, message, tmp_path, monkeypatch):
    opener, path = runtimes.OPENERS[runtime], tmp_path / "net.onnx"
    monkeypatch.setitem(runtimes.OPENERS, runtime, lambda *args: fault(opener(*args)))
    with pytest.raises(error, match=f"^{runtime} on an input of shape .*{message}"):
        export(trained(), path)
    assert not list(tmp_path.iterdir())
    path.write_text("older")
    with pytest.raises(error):
        export(trained(), path)
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1
    other = next(name for name in runtimes.RUNTIMES if name != runtime)
    assert [one.name for one in export(trained(), path, runtimes=[other]).runtimes] == [other]


def spread(kind, sizes=(1e6, 1.0, 1e6, 1e-4, 1e6)):
    """Outputs whose channels are spread over many magnitudes."""
    scale = torch.tensor(sizes)
    if kind == "maps":
        return trained(maps=lambda first, second: (second[:, :5] * scale.view(1, -1, 1, 1), first))
    net = trained()
    with torch.no_grad():
        net.head.weight.mul_(scale.view(-1, 1))
        net.head.bias.mul_(scale)
    return net


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", ["logits", "maps"])
@pytest.mark.parametrize("column", [1, 3])
def test_a_fault_in_a_small_column_beside_large_ones_is_found(column, kind, images, tmp_path, monkeypatch):
    opener, path, x = runtimes.OPENERS["onnxruntime"], tmp_path / "net.onnx", torch.randn(images, 3, 16, 16)
    report = export(spread(kind), path, x, runtimes=["onnxruntime"])
    assert report.max_rel_error <= 1e-4 and not report.notes
    path.unlink()

    def fault(session):
        def run(x):
            first, *rest = session(x)
            first = first.clone()
            first[:, column] *= 1.33
            return [first, *rest]

        return run

    monkeypatch.setitem(runtimes.OPENERS, "onnxruntime", lambda *args: fault(opener(*args)))
    with pytest.raises(EquivalenceError, match=rf"differs from PyTorch by 3.*e-01 relative .* in channel {column} of"):
        export(spread(kind), path, x, runtimes=["onnxruntime"])
    assert not path.exists()


class FrozenSize(nn.Module):
    """Pools by a number that tracing takes for a constant; ``dim``: of which dimension."""

    def __init__(self, dim):
        super().__init__()
        self.conv, self.dim = nn.Conv2d(3, 4, 1), dim

    def forward(self, x):
        return self.conv(x).sum((2, 3)) / int(x.shape[self.dim])


def test_what_is_constant_in_the_graph_but_not_in_the_model_is_found(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(EquivalenceError, match=r"onnxruntime on an input of shape \(1, 3, 16, 16\) differs"):
        export(FrozenSize(0).eval(), path)
    with pytest.raises(EquivalenceError, match=r"onnxruntime on an input of shape \(2, 3, 15, 15\) differs"):
        export(FrozenSize(3).eval(), path, dynamic_size=True)
    assert not path.exists()
    export(FrozenSize(0).eval(), path, dynamic_batch=False)
    export(FrozenSize(3).eval(), path)


class Even(nn.Module):
    """Goes down by 16 and up again, as U-shaped networks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 16, 1)

    def forward(self, x):
        if x.shape[2] % 16 or x.shape[3] % 16:
            raise RuntimeError("height and width must be multiples of 16")
        return nn.functional.interpolate(self.conv(x), x.shape[2:])


def test_sizes_that_a_network_does_not_take_are_told(tmp_path):
    model, path = Even().eval(), tmp_path / "net.onnx"
    report = export(model, path, torch.randn(2, 3, 48, 32), dynamic_size=True)
    assert report.compared[-2:] == [(2, 3, 64, 64), (2, 3, 96, 64)]
    told = "compared at multiples of 32 alone: the model does not take an input of shape (2, 3, 47, 31): height and"
    assert told in report.notes[0] and "decides by sizes in test_export_onnx.py:" in report.notes[1]
    assert differs(path, model, torch.randn(1, 3, 48, 80)) < 1e-5


@pytest.mark.filterwarnings("error::rep_plugin.InconclusiveWarning")
def test_one_picture_is_enough_to_tell_what_the_output_depends_on(tmp_path):
    report = export(trained(), tmp_path / "net.onnx", torch.randn(1, 3, 16, 16))
    assert report.sensitivity > 0.1 and (2, 3, 16, 16) in report.compared and not report.notes


def test_what_is_not_compared_is_not_written(tmp_path):
    class Voting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained()

        def forward(self, x):
            logits = self.net(x.relu_())
            return logits, logits.argmax(1)

    x = torch.randn(2, 3, 16, 16)
    before = x.clone()
    report = export(Voting().eval(), tmp_path / "net.onnx", x)
    assert list(report.outputs) == ["logits"] and torch.equal(x, before)
    assert [entry.name for entry in onnx.load(tmp_path / "net.onnx").graph.output] == ["logits"]


class Fixed(nn.Module):
    """Takes one size alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 2)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Gives(nn.Module):
    """Gives the same, whatever it gets."""

    def __init__(self, output):
        super().__init__()
        self.output, self.conv = output, nn.Conv2d(3, 3, 1)
        self.eval()

    def forward(self, x):
        return self.output


class Cumulative(nn.Conv2d):
    """An operator that torch's tracing exporter does not know."""

    def __init__(self):
        super().__init__(3, 4, 1)

    def forward(self, x):
        return super().forward(x).cumprod(1)


@pytest.mark.parametrize("several", [False, True])
def test_where_torch_fails_its_graph_is_not_printed(several, tmp_path, capfd):
    model, x = Cumulative().eval(), torch.randn(2, 3, 16, 16)
    logs = torch._C._jit_is_onnx_log_enabled()
    with pytest.raises(
        ExportError, match="^Cumulative cannot be written as ONNX of opset 18: .*aten::cumprod.*not supported"
    ):
        export(model, tmp_path / "net.onnx", (x,) if several else x)
    assert capfd.readouterr() == ("", "") and torch._C._jit_is_onnx_log_enabled() == logs


def test_refusals_come_before_any_file(tmp_path):
    model, path, x = trained(), tmp_path / "net.onnx", torch.randn(2, 3, 16, 16)
    half_trained = trained()
    half_trained.head.train()
    for refused, error, message in (
        (lambda: export(trained().train(), path), RuntimeError, "'Net' is in train mode: call model.eval"),
        (lambda: export(half_trained, path), RuntimeError, "'head' is in train mode"),
        (lambda: export(trained().double(), path), ValueError, "must be float32, but .* is torch.float64"),
        (lambda: export(model, tmp_path / "net.pt"), ValueError, "a file ending in .onnx, got"),
        (
            lambda: export(model, path, x.double()),
            ValueError,
            "example_input must be a float32 tensor .* torch.float64",
        ),
        (lambda: export(model, path, (3, 16, 16)), ValueError, r"example_input must be .*got \(3, 16, 16\)"),
        (lambda: export(model, path, x[:0]), ValueError, "N >= 1"),
        (lambda: export(model, path, images=x[:, :2]), ValueError, r"images are \(2, 16, 16\), but example_input"),
        (lambda: export(model, path, opset=99), ValueError, r"opset must be in \[9, \d+\], got 99"),
        (lambda: export(model, path, opset=7), ValueError, r"opset must be in \[9, \d+\], got 7"),
        (lambda: export(model, path, opset=8, dynamo=True), ValueError, r"in \[9, \d+\] with dynamo, got 8"),
        (
            lambda: export(Cumulative().eval(), path, opset=17),
            ExportError,
            "^Cumulative .* opset 17: .*cumprod.*; 9 to",
        ),
        (
            lambda: export(model, path, x.where(x > 0, float("nan"))),
            ValueError,
            "^example_input must hold finite values",
        ),
        (lambda: export(model, path, x.to("meta")), ValueError, "^example_input has no data: a Tensor of .* on meta"),
        (
            lambda: export(model, path, images=x / 0),
            ValueError,
            "^images must hold finite values, got 1536 of 1536 that",
        ),
        (lambda: export(model, path, tolerance=float("nan")), ValueError, "tolerance must be a number > 0, got nan"),
        (lambda: export(model, path, tolerance=1e-12), EquivalenceError, "float32 differs from its float64 by"),
        (
            lambda: export(model, path, runtimes=["tvm"]),
            ValueError,
            r"runtimes\[0\] must be one of onnxruntime, openvino",
        ),
        (lambda: export(model, path, runtimes=[]), ValueError, "runtimes must be some of"),
        (lambda: export(model, path, x[:, :2]), Exception, "2 channels"),
        (lambda: export(model, path, dinamic_batch=True), TypeError, "dinamic_batch"),
        (lambda: export(model, path, output_names=["input"]), ValueError, "1 different names .*not 'input'., got"),
        (
            lambda: export(Gives(None), path),
            ValueError,
            r"must give floating-point tensors \(N, ...\), got shapes \[\]",
        ),
        (lambda: export(Gives(torch.ones(())), path), ValueError, r"got shapes \[\(\)\]"),
        (lambda: export(Fixed().eval(), path, dynamic_size=True), ValueError, r"not take .* \(2, 3, 15, 15\): mat1"),
        (lambda: export(nn.Flatten().eval(), path, x[:, 0, 0], dynamic_size=True), ValueError, "dynamic_size needs"),
    ):
        with pytest.raises(error, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value) or error is Exception
        assert not list(tmp_path.iterdir())
    overflowing = trained()
    overflowing.head.weight.data.fill_(3e38)
    with pytest.raises(EquivalenceError, match="not finite"):
        export(overflowing, path, reparameterize=False)


def test_what_hardly_depends_on_its_input_is_inconclusive(tmp_path):
    blind = trained()
    blind.head.weight.data.mul_(1e-7)
    with pytest.warns(InconclusiveWarning) as told:
        report = export(blind, tmp_path / "net.onnx", reparameterize=False)
    assert [one.filename for one in told] == [__file__]
    assert report.sensitivity < 1e-3 and any("inconclusive" in note for note in report.notes)


def test_rounding_error_is_that_of_float32():
    model = trained()
    assert 1e-9 < rounding_error(model, torch.randn(2, 3, 16, 16)) < 1e-5
    assert next(model.parameters()).dtype == torch.float32


def test_without_the_extra_the_package_works_and_names_it(tmp_path):
    code = """
import sys
for name in ("onnx", "onnxruntime", "openvino", "onnxscript"): sys.modules[name] = None
import rep_plugin, torch
try:
    rep_plugin.export_onnx(torch.nn.Conv2d(3, 4, 1).eval(), "net.onnx", torch.randn(1, 3, 4, 4))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "exporting needs onnx, which is not installed: pip install 'rep-plugin[export]'\n", (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", runtimes.RUNTIMES)
def test_a_missing_runtime_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"exporting needs {missing}, which is not installed: pip install"):
        export(trained(), tmp_path / "net.onnx")
    others = [name for name in runtimes.RUNTIMES if name != missing]
    assert export(trained(), tmp_path / "net.onnx", runtimes=others)
