"""Exporting models of several, named, nested and integer inputs: all are in the file, which runs in ONNX Runtime alone."""

import json
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import rep_plugin
from rep_plugin.blocks.families import RepVGGBlock
from rep_plugin.errors import ArgumentError, EquivalenceError
from rep_plugin.export.graph import read_metadata, to_onnx
from rep_plugin.export.inputs import feed_of
from rep_plugin.measure.differences import flatten_outputs
from rep_plugin.measure.forward import run_model
from rep_plugin.testing import calibrate_random_bn_

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Base(nn.Module):
    """A block, an embedding and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = RepVGGBlock(3, 8, stride=1)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 5)
        calibrate_random_bn_(self.block, torch.randn(4, 3, 16, 16))

    def logits(self, y):
        return self.head(y.relu().mean((2, 3)))


class Images(Base):
    def forward(self, left, right):
        return self.logits(self.block(left) - 0.5 * self.block(right))


class Indexed(Base):
    def forward(self, image, kind):
        return self.logits(self.block(image) * self.embedding(kind)[:, :, None, None])


class Optional(Base):
    def forward(self, image, kind=None, *, scale=None, power=1):
        y = self.block(image) if kind is None else self.block(image) + self.embedding(kind)[:, :, None, None]
        return {"map": y if scale is None else y * scale**power, "logits": self.logits(y)}


class Nested(Base):
    def forward(self, pyramid, extra):
        (large, small), shift = pyramid, extra["shift"]
        small = nn.functional.interpolate(self.block(small), large.shape[2:], mode="bilinear")
        return self.logits(self.block(large) + small + shift[:, :, None, None])


class Masked(Base):
    def forward(self, image, mask):
        y = self.block(image).masked_fill(~mask[:, None], 0)
        return self.head(y.sum((2, 3)) / mask.sum((1, 2))[:, None].clamp(min=1))


class Many(Base):
    def forward(self, image, *others):
        return self.logits(self.block(image) + sum(self.block(one) * (n + 2) for n, one in enumerate(others)))


def images(number=2, side=16):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(number + side))


MASK = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.3
SIZED = ["batch", 3, "height", "width"]
CASES = {
    "two images": (Images, (images(), images(2, 18)[..., 1:17, 1:17]), {"left": SIZED, "right": SIZED}),
    "the same image twice": (Images, (IMAGE := images(), IMAGE), {"left": SIZED, "right": SIZED}),
    "index": (Indexed, (images(), torch.tensor([1, 7])), {"image": SIZED, "kind": ["batch"]}),
    "one image": (Indexed, (images(1), torch.tensor([4])), {"image": SIZED, "kind": ["batch"]}),
    "int32": (Indexed, {"kind": torch.tensor([1, 7]).int(), "image": images()}, {"kind": ["batch"], "image": SIZED}),
    "dict": (Optional, {"image": images(), "scale": torch.tensor(0.7)}, {"image": SIZED, "scale": []}),
    "keyword": (
        Optional,
        {"image": images(), "kind": torch.tensor([0, 8]), "scale": torch.rand(2, 8, 1, 1), "power": 2},
        {"image": SIZED, "kind": ["batch"], "scale": ["batch", 8, 1, 1]},
    ),
    "None": (Optional, (images(), None), {"image": SIZED}),
    "nested": (
        Nested,
        ((images(), images(2, 8)), {"shift": torch.randn(2, 8)}),
        {
            "pyramid_0": SIZED,
            "pyramid_1": ["batch", 3, "pyramid_1_dim2", "pyramid_1_dim3"],
            "extra_shift": ["batch", 8],
        },
    ),
    "mask": (Masked, (images(), MASK), {"image": SIZED, "mask": ["batch", "height", "width"]}),
    "several": (
        Many,
        (images(), images(), images(2, 20)[..., :16, :16]),
        {"image": SIZED, "others_0": SIZED, "others_1": SIZED},
    ),
}  # fmt: skip


def export(model, path, example, **options):
    return rep_plugin.export_onnx(model.eval(), path, example, **({"rounds": 0} | options))


def differs(path, model, example):
    """Largest relative difference of the file in ONNX Runtime from the model, over all outputs."""
    session = onnxruntime.InferenceSession(str(path))
    leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    given = {entry.name: leaf.numpy() for entry, leaf in zip(session.get_inputs(), leaves, strict=True)}
    with torch.no_grad():
        wanted = flatten_outputs(run_model(model, example))
    found = session.run(None, given)
    assert [tuple(one.shape) for one in wanted] == [one.shape for one in found]
    return max((np.abs(a - b.numpy()).max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def changed(example, number, height, width):
    """Other values of other sizes."""
    generator = torch.Generator().manual_seed(1)

    def change(leaf):
        if not isinstance(leaf, torch.Tensor) or not leaf.dim():
            return leaf
        shape = [number, *leaf.shape[1:]]
        if leaf.dim() > 2 and leaf.shape[-1] > 1:
            shape[-2:] = height * leaf.shape[-2] // 16, width * leaf.shape[-1] // 16
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator)
        return torch.randint(0, 9, shape, generator=generator).to(leaf.dtype)

    return tree_map(change, example)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_an_input_of_the_file(case, tmp_path):
    kind, example, inputs = CASES[case]
    model, path = kind().eval(), tmp_path / "net.onnx"
    report = export(model, path, example, dynamic_size=True, rounds=1)
    assert report.inputs == inputs and report.merge_rel_error < 1e-12 and report.blocks
    assert {one.name: one.max_rel_error < 1e-4 and one.milliseconds > 0 for one in report.runtimes} == {
        "onnxruntime": True,
        "openvino": True,
    }
    for shape in ((1, 16, 16), (3, 16, 16), (2, 32, 48)):
        assert differs(path, model, changed(example, *shape)) < 1e-4
    session = onnxruntime.InferenceSession(str(path))
    types = {"float": "float32", "bool": "bool", "int64": "int64", "int32": "int32"}
    found = {one.name: types[one.type.removeprefix("tensor(").removesuffix(")")] for one in session.get_inputs()}
    assert found == report.input_types and list(found) == list(inputs)
    assert json.loads(report.to_json())["inputs"] == inputs and all(name in str(report) for name in inputs)


def test_the_newer_exporter_takes_them_too(tmp_path):
    kind, example, _ = CASES["keyword"]
    model, path = kind().eval(), tmp_path / "net.onnx"
    report = export(model, path, example, dynamo=True, runtimes=["onnxruntime"])
    assert all(shape[0] == "batch" and "height" not in shape for shape in report.inputs.values())
    assert differs(path, model, changed(example, 3, 16, 16)) < 1e-4


def test_all_is_fixed_that_is_not_open(tmp_path):
    model, path, example = Indexed().eval(), tmp_path / "net.onnx", (images(), torch.tensor([3, 3]))
    report = export(model, path, example, dynamic_batch=False)
    assert report.inputs == {"image": [2, 3, 16, 16], "kind": [2]} and report.compared == [(2, 3, 16, 16)]
    assert differs(path, model, (images(), torch.tensor([3, 0]))) < 1e-4


def test_one_tensor_keeps_its_name(tmp_path):
    model, x = nn.Sequential(RepVGGBlock(3, 8, stride=1)).eval(), images()
    names = [list(export(model, tmp_path / "net.onnx", one).inputs) for one in (x, (x,), {"input": x})]
    assert names == [["input"]] * 3


class Odd(Base):
    """An input that nothing reads, and one that has the name of the output."""

    def forward(self, image, logits, unread):
        return self.logits(self.block(image) * logits[:, :, None, None])


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_no_output_depends_on_is_an_input_and_noted(dynamo, tmp_path):
    model, path = Odd().eval(), tmp_path / "net.onnx"
    example = (images(), torch.rand(2, 8), torch.zeros(2, dtype=torch.int64))
    report = export(model, path, example, dynamo=dynamo)
    assert report.notes == ["no output depends on the input 'unread'"] and list(report.outputs) == ["logits_2"]
    assert report.inputs["unread"] == ["batch"] and differs(path, model, example) < 1e-4
    with pytest.raises(ArgumentError, match="output_names must be 1 different names .*not 'image', 'logits', 'unread'"):
        export(model, path, example, output_names=["unread"])


def test_what_is_no_tensor_is_a_constant_and_noted(tmp_path):
    example = {"image": images(), "scale": torch.tensor(2.0), "power": 3}
    report = export(Optional(), tmp_path / "net.onnx", example)
    assert report.notes == ["constants of the file, as given: power = 3"]


class Frozen(Base):
    """Tracing takes the index, or the scale, for a number."""

    def forward(self, image, kind, scale):
        return self.logits(self.block(image) * self.embedding.weight[int(kind)][:, None, None] * float(scale))


@pytest.mark.parametrize("example", [(torch.tensor([2]), torch.tensor(1.5)), (torch.tensor(2), torch.tensor([0.0]))])
def test_an_input_that_the_file_does_not_read_but_the_forward_does_is_found(example, tmp_path):
    with pytest.raises(
        EquivalenceError, match="^with other values of the inputs onnxruntime on inputs image .*give it as"
    ) as error:
        export(Frozen(), tmp_path / "net.onnx", (images(), *example), dynamic_batch=False)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


class Deciding(Base):
    def forward(self, image, flag):
        return self.logits(self.block(image) * (2 if flag.any() else 3))


def test_decisions_by_any_input_are_named(tmp_path):
    report = export(Deciding(), tmp_path / "net.onnx", (images(), torch.ones(4, dtype=torch.bool)))
    assert report.notes[0].startswith("the forward decides by a value in Deciding (test_inputs.py:")
    assert "no output depends on the input 'flag'" in report.notes
    _, merged = rep_plugin.reparameterize(Deciding().eval(), (images(), torch.ones(4, dtype=torch.bool)))
    assert any("decides by a value in Deciding" in note for note in merged.notes)


def test_masks_may_be_infinite(tmp_path):
    class Attention(Base):
        def forward(self, image, mask):
            y = self.block(image).flatten(2).transpose(1, 2)
            return self.head((y @ y.transpose(1, 2) + mask).softmax(-1) @ y).mean(1)

    mask = torch.full((16, 16), float("-inf")).triu(1)
    report = export(Attention(), tmp_path / "net.onnx", (images(2, 4), mask))
    assert report.inputs == {"image": ["batch", 3, 4, 4], "mask": [16, 16]}


class Normed(Base):
    """A BN that no one folds: in train mode it would compute something else, and change."""

    def __init__(self):
        super().__init__()
        self.bn = calibrate_random_bn_(nn.BatchNorm2d(3), torch.randn(4, 3, 16, 16))

    def forward(self, image, scale=None):
        y = self.bn(image)
        return {"map": y if scale is None else y * scale}


@pytest.mark.parametrize("example", [images(), (images(), torch.tensor(0.5))], ids=["alone", "several"])
def test_writing_leaves_the_mode_of_every_module(example, tmp_path):
    model, path = Normed().eval(), tmp_path / "net.onnx"
    export(model, path, example, reparameterize=False, runtimes=["onnxruntime"])
    assert differs(path, model, example) < 1e-5
    feed = feed_of(model, images())
    dims = {name: {} for name in ("input", "map")}
    to_onnx(model, feed, {"map": (2, 3, 16, 16)}, dims, 18, False)
    assert not any(module.training for module in model.modules())


class Limited(Base):
    """Takes one amount alone."""

    def forward(self, image, amount):
        if not torch.jit.is_tracing() and not image.is_meta and amount < 1:
            raise RuntimeError("amount must be at least 1")
        return self.logits(self.block(image) * amount)


def test_values_that_a_forward_does_not_take_are_noted(tmp_path):
    report = export(Limited(), tmp_path / "net.onnx", (images(), torch.tensor(1.0)))
    told = (
        "other values of the inputs are not compared: the model does not take inputs image (2, 3, 16, 16), amount (): "
    )
    assert f"{told}amount must be at least 1" in report.notes


def test_preprocessing_is_that_of_the_images(tmp_path):
    model, path = Images().eval(), tmp_path / "net.onnx"
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    example = {"right": images(), "left": images(2, 18)[..., 1:17, 1:17]}
    export(model, path, example, class_names=list("abcde"))
    told = read_metadata(path)
    assert told["class_names"] == list("abcde") and told["preprocessing_input"] == "right"
    assert told["preprocessing"]["input_size"] == [3, 16, 16]
    export(nn.Sequential(model.block), path, images(), preprocessing={"white": 1.0})
    assert read_metadata(path) == {"preprocessing": {"white": 1.0}}


def test_more_images_are_compared(tmp_path):
    report = export(Indexed(), tmp_path / "net.onnx", (images(), torch.tensor([1, 7])), images=images(9))
    assert (8, 3, 16, 16) in report.compared


@dataclass
class Batch:
    image: torch.Tensor


def test_tensors_that_nothing_can_look_into_are_refused(tmp_path):
    with pytest.raises(
        ArgumentError, match="^example_input holds a Batch: give its tensors in tuples, lists and dicts$"
    ):
        export(Indexed(), tmp_path / "net.onnx", (images(), Batch(images())))


@pytest.mark.parametrize(
    ("example", "told"),
    [
        ((images(),), "example_input does not fit Indexed.forward: missing a required argument: 'kind'"),
        (
            {"image": images(), "sort": torch.tensor([1, 2])},
            "does not fit Indexed.forward: missing a required argument",
        ),
        ((images(), torch.tensor([1, 2]), 3), "does not fit Indexed.forward: too many positional arguments"),
        (
            (images(), torch.tensor([1, 99])),
            r"example_input, \(.* torch.float64, .* does not go through Indexed: index",
        ),
        ((images(), torch.tensor([1.0, 2.0])), "does not take inputs image .*: "),
        ((torch.tensor([1, 2]), torch.tensor([1, 2])), "example_input, .*, holds no float tensor"),
        ((1, 2), "example_input must be .*, got .1, 2."),
        ({}, "example_input must be .*, got {}"),
        ((images().double(), torch.tensor([1, 2])), "example_input must be a float32 tensor .*got torch.float64"),
        ((images() * float("nan"), torch.tensor([1, 2])), "example_input must hold finite values, got 1536 of 1536"),
        (
            (images(), torch.tensor([1.0, float("nan")])),
            "example_input, kind, must hold numbers, got 1 of 2 that are NaN",
        ),
        ((images(), torch.tensor([1, 2], device="meta")), "example_input, .* on the meta device, which has no data"),
        ((images().to("meta"), torch.tensor([1, 2])), "example_input, .* on the meta device, which has no data"),
    ],
)
def test_wrong_examples_are_refused_in_one_line(example, told, tmp_path):
    with pytest.raises(ArgumentError, match=told) as error:
        export(Indexed(), tmp_path / "net.onnx", example)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
