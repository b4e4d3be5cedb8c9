"""Every public argument with wrong values: refused in one line that names it, before anything changes, or it works.

A unit is one callable, or one command line (its seed is its place in UNITS). Each of its arguments is replaced by each wrong
value, the others stay valid. What is accepted must also run: a block its forward, a hook a training of one epoch.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import io
import math
import os
import pkgutil
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

import rep_plugin
from rep_plugin import depth, functional
from rep_plugin import registry as registries
from rep_plugin.backbones import MobileOne, RepLKNet, RepMobileNetV2, RepVGG
from rep_plugin.bilinear import BilinearHead, BilinearPooling, fold_bilinear_head
from rep_plugin.blocks import Chain, DilatedAvgPool2d, RepBlock, RepInvertedResidual, Scale
from rep_plugin.checkpoints import load_checkpoint_file, save_checkpoint_file
from rep_plugin.conversion import convert_file, convert_state_dict
from rep_plugin.errors import EquivalenceError, RepPluginError
from rep_plugin.export import read_metadata
from rep_plugin.functional import ConvParams, PaddedConv
from rep_plugin.measure import Forward, Report, count_macs, count_params, register_forward, verify_equivalence
from rep_plugin.measure import forward as forwards
from rep_plugin.openmmlab import build_model, load_model, write_deployed, write_pruned
from rep_plugin.openmmlab.hooks import Schedule
from rep_plugin.pruning import EagerTimer, PruneReport, trace_channels
from rep_plugin.pruning.methods import (
    Centripetal,
    ResRep,
    Sparsity,
    merge_clusters_,
    plan_clusters,
    snap_clusters_,
    zero_channels_,
)
from rep_plugin.pruning.planning import Budget, PruneOptions, plan_to_budget
from rep_plugin.pruning.surgery import mask_channels_, remove_channels_
from rep_plugin.pruning.tracing import KeptChannels, count_costs
from rep_plugin.pruning.tracing.rules import find_module_rule
from rep_plugin.reparam import Adapter, adapters, register_adapter
from rep_plugin.timm import load_timm, save_timm
from tests.attack import _commands
from tests.test_openmmlab.test_hooks import tiny

WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "7": 7,
    "huge": 2**40,
    "1.5": 1.5,
    "2.0": 2.0,
    "nan": math.nan,
    "inf": math.inf,
    "empty text": "",
    "misspelt": "glbal",
    "NUL": "a\0b",
    "bytes": b"x",
    "empty list": [],
    "list": ["x"],
    "numbers": [1, 2, 3],
    "pair": (-1, 0),
    "empty dict": {},
    "dict": {"x": 1},
    "object": object(),
    "class": nn.ReLU,
    "module": nn.ReLU(),
    "tensor": torch.ones(2),
    "whole tensor": torch.ones(1, 3, 8, 8, dtype=torch.int64),
    "scalar": torch.tensor(0.5),
    "image": torch.ones(1, 3, 8, 8),
    "meta": torch.ones(2, device="meta"),
    "function": len,
    "path": Path("/dev/null/x"),
    "nested": [[1], [None]],
}


def near(value: Any) -> Iterator[tuple[str, Any]]:
    """Wrong values that are nearly the valid one: misspelt, one more or less, other axes, another type, no numbers."""
    if isinstance(value, str) and value:
        yield "one letter less", value[:-1]
        yield "upper case", value.swapcase()
    elif isinstance(value, Tensor):
        kinds = (torch.int64, torch.float16, torch.float64, torch.complex64, torch.bool)
        yield from ((f"{kind}", value.to(kind)) for kind in kinds if kind != value.dtype)
        yield from ((f"axis {i} longer", torch.cat([value, value], i)) for i in range(value.ndim))
        yield from ((f"axis {i} empty", value.narrow(i, 0, 0)) for i in range(value.ndim))
        yield from (
            ("an axis more", value[None]),
            ("an axis less", value.flatten(0, 1) if value.ndim > 1 else value[0]),
        )
        yield "negative", -value if value.dtype != torch.bool else ~value
        yield "large", value + 1000
        yield "NaN", value * math.nan if value.is_floating_point() else value.float() * math.nan
        yield "without data", value.to("meta")
        yield "requires_grad", value.clone().float().requires_grad_()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from (
            ("one more", value + 1),
            ("negated", -value),
            ("sixty more", value + 60),
            ("text", str(value)),
        )
    elif hasattr(value, "_fields"):
        for field, inner in value._asdict().items():
            for name, wrong in (*WRONG.items(), *near(inner)):
                yield f".{field} {name}", value._replace(**{field: wrong})
    elif isinstance(value, (list, tuple)) and value:
        kind = type(value) if type(value) in (list, tuple) else list
        yield from (("one less", kind(value[:-1])), ("one twice", kind([*value, value[-1]])))
        yield from ((f"the last {name}", kind([*value[:-1], wrong])) for name, wrong in WRONG.items())
    elif isinstance(value, Mapping) and value:
        key = next(iter(value))
        yield from (
            ("an unknown key", {**value, "unknown": value[key]}),
            ("a key less", {k: value[k] for k in value if k is not key}),
        )
        yield from ((f"{key!r} {name}", {**value, key: wrong}) for name, wrong in WRONG.items())
    elif isinstance(value, nn.Module):
        yield from (("another module", nn.Conv2d(5, 7, 3)), ("in training", copy.deepcopy(value).train()))
        yield "on meta", copy.deepcopy(value).to("meta")
        yield "half", copy.deepcopy(value).half()
        yield "empty", nn.Sequential()


class Call(NamedTuple):
    """A valid call, and what is done with its result."""

    function: Callable
    arguments: dict[str, Any]
    after: Callable[[Any], Any] = lambda result: None


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.BatchNorm2d(4),
    )
    made = nn.Sequential(*layers).eval()
    for parameter in made.parameters():
        parameter.data.add_(torch.rand_like(parameter))
    return made


def x() -> Tensor:
    return torch.ones(2, 3, 8, 8)


def conv(outputs: int = 4, inputs: int = 4) -> ConvParams:
    return ConvParams(torch.ones(outputs, inputs, 1, 1), torch.ones(outputs))


def use_conv(given: ConvParams) -> None:
    """A record of tensors is checked where it is used."""
    params = functional.compose_all([given])
    identity = functional.identity_kernel(params.in_channels, dtype=params.kernel.dtype, device=params.kernel.device)
    functional.compose(ConvParams(identity, None), given)


def plan() -> rep_plugin.PrunePlan:
    return rep_plugin.plan_pruning(net(), (1, 3, 8, 8), "l1", 0.5, min_channels=1)


def depth_plan() -> rep_plugin.DepthPlan:
    return rep_plugin.plan_depth(net(), x(), macs=1.0)


def table(folder: Path) -> Path:
    depth.write_latency_table(net(), x(), folder / "given.json")
    return folder / "given.json"


def trace():
    return trace_channels(net(), (1, 3, 8, 8))


def clusters():
    return plan_clusters(net(), (1, 3, 8, 8), {"0": 4}, clusters="even")


def built(cls: type, arguments: dict, *shape: int, pack: Callable = lambda image: image) -> Call:
    """A module that must run once it is built; its channels may be others than those of the valid call."""

    def run(module: nn.Module) -> None:
        first = next((one for one in module.modules() if isinstance(one, nn.Conv2d)), None)
        sides = [1]
        for one in module.modules():  # an image that fills every window, with its padding
            if hasattr(one, "kernel_size") and hasattr(one, "dilation"):
                padding = getattr(one, "padding", 0)
                padding = padding if isinstance(padding, (int, tuple)) else 0
                parts = map(functional.pair, (one.kernel_size, one.dilation, padding))
                sides += [step * (side - 1) + 1 - 2 * pad for side, step, pad in zip(*parts)]
        size = [max(side, *sides) for side in shape[2:]]
        module.eval()
        with torch.no_grad():
            module(pack(torch.ones(shape[0], first.in_channels if first else shape[1], *size)))

    return Call(cls, arguments, run)


def saved(folder: Path) -> Path:
    rep_plugin.save(rep_plugin.reparameterize(net(), x())[0], folder / "saved")
    return folder / "saved"


def exported(folder: Path) -> Path:
    rep_plugin.export_onnx(net(), folder / "net.onnx", x(), runtimes=["onnxruntime"], rounds=0)
    return folder / "net.onnx"


def checkpoint(folder: Path) -> Path:
    torch.save({"weight": torch.ones(2)}, folder / "weights.pth")
    return folder / "weights.pth"


def repvgg(folder: Path) -> Path:
    torch.save(RepVGG("A0").state_dict(), folder / "repvgg.pth")
    return folder / "repvgg.pth"


def mm_config() -> Config:
    cfg = tiny.config("/nowhere")
    cfg.model.backbone = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(0,))
    cfg.model.head.in_channels = 8
    return cfg


def logits_file(folder: Path) -> Path:
    rep_plugin.export_onnx(
        mm_model(), folder / "net.onnx", torch.ones(2, 3, 16, 16), runtimes=["onnxruntime"], rounds=0
    )
    return folder / "net.onnx"


@functools.cache
def mm_model() -> nn.Module:
    model = build_model(mm_config())
    model.eval()
    return model


def mm_plan() -> rep_plugin.PrunePlan:
    return rep_plugin.plan_pruning(mm_model(), (1, 3, 16, 16), "l1", 0.2, min_channels=1)


def mm_checkpoint(folder: Path) -> str:
    torch.save({"meta": {}, "state_dict": mm_model().state_dict()}, folder / "mm.pth")
    return str(folder / "mm.pth")


def block(cls: str) -> Callable[[Path], Call]:
    arguments = dict(in_channels=4, out_channels=4, kernel_size=3)
    options = {"DiverseBranchBlock": "mid_channels", "MobileOneBlock": "copies", "LargeKernelBlock": "small_kernel"}
    if option := options.get(
        cls.replace("DBBConv2d", "DiverseBranchBlock").replace("MobileOneConv2d", "MobileOneBlock")
    ):
        arguments[option] = 1 if option == "small_kernel" else 2
    return lambda folder: built(getattr(rep_plugin.blocks, cls), arguments, 2, 4, 9, 9)


def on_tensors(name: str, **arguments: Any) -> Callable[[Path], Call]:
    return lambda folder: Call(getattr(functional, name), arguments)


def training(name: str, **arguments: Any) -> Callable[[Path], Call]:
    """A hook: what is accepted when it is built is refused before the first step, or an epoch ends well."""

    def make(folder: Path) -> Call:
        if name == "DistillHook":
            torch.save(
                {"meta": {}, "state_dict": build_model(tiny.config("/nowhere")).state_dict()}, folder / "teacher.pth"
            )

        def hook(**options: Any) -> dict:
            HOOKS.build(dict(type=f"rep_plugin.{name}", **options))
            return options

        def train(options: dict) -> None:
            numbers = iter(range(1000))
            cfg = tiny.config(folder / f"work{len(list(folder.iterdir()))}_{next(numbers)}")
            if name == "LinearizeHook":
                cfg.model.backbone = dict(
                    type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(0,), anneal=True
                )
                cfg.model.head.in_channels = 8
            if name == "ReparamHook":
                cfg.model = mm_config().model
            cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
            cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=5)
            cfg.custom_hooks = [dict(type=f"rep_plugin.{name}", **options), dict(type="CountSteps")]
            CountSteps.steps = 0
            try:
                tiny.run(cfg)
            except (RepPluginError, OSError) as error:
                assert CountSteps.steps == 0, f"found out after {CountSteps.steps} steps: {error}"
                raise

        hook.__signature__ = inspect.signature(HOOKS.get(f"rep_plugin.{name}"))
        return Call(hook, arguments, train)

    return make


@HOOKS.register_module(force=True)
class CountSteps(Hook):
    """Counts the steps of all trainings."""

    steps = 0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        CountSteps.steps += 1


def registered(
    name: str, shape: tuple[int, ...] | None = (2, 3, 32, 32), pack: Callable = lambda image: image, **arguments
):
    """A type of mmpretrain's configs."""

    def make(folder: Path) -> Call:
        kind = MMPRETRAIN_MODELS.get(f"rep_plugin.{name}")

        def build(**options: Any) -> nn.Module:
            with DefaultScope.overwrite_default_scope("mmpretrain"):
                return MODELS.build(dict(type=f"rep_plugin.{name}", **options))

        build.__signature__ = inspect.signature(kind)
        return built(build, arguments, *shape, pack=pack) if shape else Call(build, arguments)

    return make


def timm_name(name: str, size: int, **arguments: Any) -> Callable[[Path], Call]:
    def make(folder: Path) -> Call:
        def create(**options: Any) -> nn.Module:
            return timm.create_model(name, **options)

        def run(model: nn.Module) -> None:
            model.eval()
            with torch.no_grad():
                model(torch.ones(1, getattr(model, "in_chans", 3), size, size))

        return Call(create, arguments, run)

    return make


def rebuilt(folder: Path, architecture: str = "rep_plugin_rebuilt") -> Call:
    """A folder that timm loads, of this version or of an older one."""
    made = folder / "rebuilt"
    if not made.exists():
        model = timm.create_model("rep_mobilenetv2_035", num_classes=2).eval()
        save_timm(rep_plugin.reparameterize(model, torch.ones(1, 3, 32, 32))[0], made)
    config = made / "config.json"
    config.write_text(config.read_text().replace("rep_plugin_rebuilt", architecture))
    arguments = dict(num_classes=2, in_chans=3, global_pool="avg", features_only=False, weights=True)
    return timm_name(f"local-dir:{made}", 32, **arguments)(folder)


def method(make: Callable[[Path], Any], name: str, **arguments: Any) -> Callable[[Path], Call]:
    def call(folder: Path) -> Call:
        return Call(getattr(make(folder), name), {k: v(folder) if callable(v) else v for k, v in arguments.items()})

    return call


BN, MAPS = nn.BatchNorm2d(4).eval(), torch.ones(2, 3, 5)
INDEX, SMALL = (
    functional.triangle_index(3),
    dict(arch=dict(depths=(1, 1), widths=(0.1, 0.1)), out_indices=(1,), strides=(2, 2, 2)),
)
STOCK = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet_CIFAR", depth=18, base_channels=8, stem_channels=8),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=64),
)

# What is public, by name: its place in an __all__, or in a registry.
CALLS: dict[str, Callable[[Path], Call]] = {
    # the verbs
    "rep_plugin.PrunePlan": lambda f: Call(
        rep_plugin.PrunePlan, vars(plan()), lambda p: rep_plugin.PrunePlan.from_json(p.to_json())
    ),
    "rep_plugin.PrunePlan.from_widths": lambda f: Call(
        rep_plugin.PrunePlan.from_widths,
        dict(model=net(), example_input=x(), widths={"0": 4}, scores="l1", prune_outputs=False, seed=0),
    ),
    "rep_plugin.PrunePlan.to_json": method(lambda f: plan(), "to_json", path=lambda f: f / "plan.json"),
    "rep_plugin.PrunePlan.plot": method(lambda f: plan(), "plot", path=lambda f: f / "plan.png"),
    "rep_plugin.PrunePlan.from_json": method(lambda f: plan(), "from_json", source=lambda f: plan().to_json()),
    "rep_plugin.Report": lambda f: Call(
        Report, dict(action="merge", params_before=3, params_after=2), lambda r: (str(r), r.to_json())
    ),
    "rep_plugin.Report.to_json": method(lambda f: Report("merge", 3, 2), "to_json", path=lambda f: f / "report.json"),
    "rep_plugin.pruning.PruneReport": lambda f: Call(
        PruneReport, dict(action="prune", params_before=3, params_after=2), lambda r: (str(r), r.to_json())
    ),
    "rep_plugin.DepthPlan": lambda f: Call(
        rep_plugin.DepthPlan, vars(depth_plan()), lambda p: rep_plugin.DepthPlan.from_json(p.to_json())
    ),
    "rep_plugin.DepthPlan.to_json": method(lambda f: depth_plan(), "to_json", path=lambda f: f / "plan.json"),
    "rep_plugin.DepthPlan.plot": method(lambda f: depth_plan(), "plot", path=lambda f: f / "plan.png"),
    "rep_plugin.DepthPlan.from_json": method(
        lambda f: depth_plan(), "from_json", source=lambda f: depth_plan().to_json()
    ),
    "rep_plugin.plan_depth": lambda f: Call(
        rep_plugin.plan_depth, dict(model=net(), example_input=x(), evaluate=lambda net: 1.0, macs=1.0, calibration=x())
    ),
    "rep_plugin.linearize": lambda f: Call(
        rep_plugin.linearize, dict(model=net(), plan=["2"], act_after="relu", example_input=x())
    ),
    "rep_plugin.set_alpha_": lambda f: Call(
        rep_plugin.set_alpha_, dict(model=rep_plugin.linearize(net(), ["2"], example_input=x())[0], alpha=0.5)
    ),
    "rep_plugin.depth.LatencyTable": lambda f: Call(
        depth.LatencyTable,
        dict(runtime="eager", threads=1, input_shape=(1, 3, 8, 8), whole=2.0, segments={"a": (1.0, 0.5)}, scale=1.0),
    ),
    "rep_plugin.depth.read_latency_table": lambda f: Call(depth.read_latency_table, dict(path=table(f))),
    "rep_plugin.depth.write_latency_table": lambda f: Call(
        depth.write_latency_table, dict(model=net(), example_input=x(), path=f / "table.json")
    ),
    "rep_plugin.depth.reestimate_bn_": lambda f: Call(depth.reestimate_bn_, dict(model=net(), batches=[x()])),
    "rep_plugin.apply_plan": lambda f: Call(
        rep_plugin.apply_plan, dict(model=net(), plan=plan(), optimizer=None, ema=None)
    ),
    "rep_plugin.expand": lambda f: Call(rep_plugin.expand, dict(model=net(), where="0", example_input=x())),
    "rep_plugin.export_onnx": lambda f: Call(
        rep_plugin.export_onnx,
        dict(model=net(), path=f / "net.onnx", example_input=x(), runtimes=["onnxruntime"], rounds=0),
    ),
    "rep_plugin.export.FakeQuantization": lambda f: Call(
        rep_plugin.export.FakeQuantization, dict(model=net()), lambda rounding: rounding.attach(net())
    ),
    "rep_plugin.export.equalize": lambda f: Call(
        rep_plugin.export.equalize,
        dict(model=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), example_input=x()),
    ),
    "rep_plugin.export_int8": lambda f: Call(
        rep_plugin.export_int8,
        dict(
            model=net(),
            path=f / "net.onnx",
            calibration=torch.cat([x()] * 5),
            methods=["MinMax"],
            layers=False,
            rounds=0,
            min_agreement=0.0,
        ),
    ),
    "rep_plugin.get_config": lambda f: Call(rep_plugin.get_config, dict(name="rep_mbv2_mini_cub")),
    "rep_plugin.list_configs": lambda f: Call(rep_plugin.list_configs, dict(filter="rep_mbv2*")),
    "rep_plugin.load": lambda f: Call(rep_plugin.load, dict(folder=saved(f), model=net())),
    "rep_plugin.merge_sequence": lambda f: Call(rep_plugin.merge_sequence, dict(layers=[nn.Conv2d(3, 4, 3), BN])),
    "rep_plugin.plan_pruning": lambda f: Call(
        rep_plugin.plan_pruning,
        dict(model=net(), example_input=x(), scores="l1", prune_fraction=0.5, overrides={"0": 0.5}, ignore=["3"]),
    ),
    "rep_plugin.reparameterize": lambda f: Call(rep_plugin.reparameterize, dict(model=net(), example_input=x())),
    "rep_plugin.save": lambda f: Call(
        rep_plugin.save, dict(model=rep_plugin.reparameterize(net(), x())[0], folder=f / "new")
    ),
    # networks and blocks
    "rep_plugin.backbones.MobileOne": lambda f: built(
        MobileOne,
        dict(arch=dict(widths=(0.1, 0.1), depths=(1, 1), se_blocks=(0, 0)), out_indices=(1,), strides=(2, 2, 2)),
        1,
        3,
        32,
        32,
    ),
    "rep_plugin.backbones.RepLKNet": lambda f: built(
        RepLKNet,
        dict(arch=dict(channels=(8, 8), kernels=(5, 5), depths=(1, 1), small_kernel=3), out_indices=(1,)),
        1,
        3,
        32,
        32,
    ),
    "rep_plugin.backbones.RepMobileNetV2": lambda f: built(RepMobileNetV2, dict(widen_factor=0.1), 1, 3, 32, 32),
    "rep_plugin.backbones.RepVGG": lambda f: built(RepVGG, SMALL, 1, 3, 32, 32),
    "rep_plugin.bilinear.BilinearHead": lambda f: built(
        BilinearHead, dict(in_channels=4, num_classes=2, dim=16), 2, 4, 5, 5, pack=lambda image: (image, image)
    ),
    "rep_plugin.bilinear.BilinearPooling": lambda f: built(
        BilinearPooling, dict(in_channels=4, dim=16), 2, 4, 5, 5, pack=lambda image: (image, image)
    ),
    "rep_plugin.bilinear.fold_bilinear_head": lambda f: Call(
        fold_bilinear_head, dict(model=timm.create_model("bcnn_rep_mobilenetv2_100", projection=8, num_classes=2))
    ),
    **{
        f"rep_plugin.blocks.{cls}": block(cls)
        for cls in (
            "ACBConv2d",
            "ACBlock",
            "DBBConv2d",
            "DiverseBranchBlock",
            "LargeKernelBlock",
            "MobileOneBlock",
            "MobileOneConv2d",
            "RepConv2d",
            "RepVGGBlock",
        )
    },
    "rep_plugin.blocks.Chain": lambda f: built(Chain, dict(ops={"conv": nn.Conv2d(4, 4, 1), "bn": BN}), 2, 4, 9, 9),
    "rep_plugin.blocks.DilatedAvgPool2d": lambda f: built(DilatedAvgPool2d, dict(kernel_size=3), 2, 4, 9, 9),
    "rep_plugin.blocks.RepBlock": lambda f: built(
        RepBlock,
        dict(
            in_channels=4,
            out_channels=4,
            kernel_size=3,
            branches={"conv": Chain({"conv": nn.Conv2d(4, 4, 3, bias=False)})},
        ),
        2,
        4,
        9,
        9,
    ),
    "rep_plugin.blocks.RepInvertedResidual": lambda f: built(
        RepInvertedResidual, dict(in_channels=4, out_channels=4), 2, 4, 9, 9
    ),
    "rep_plugin.blocks.Scale": lambda f: Call(
        Scale, dict(channels=4), lambda m: m(torch.ones(1, m.weight.numel(), 1, 1))
    ),
    "rep_plugin.blocks.merge_chain": lambda f: Call(rep_plugin.blocks.merge_chain, dict(ops=[nn.Conv2d(3, 4, 1), BN])),
    # files
    "rep_plugin.checkpoints.load_checkpoint_file": lambda f: Call(load_checkpoint_file, dict(path=checkpoint(f))),
    "rep_plugin.checkpoints.save_checkpoint_file": lambda f: Call(
        save_checkpoint_file, dict(obj={}, path=f / "new.pth")
    ),
    "rep_plugin.conversion.convert_file": lambda f: Call(
        convert_file, dict(source=repvgg(f), target=f / "to.pth", to="official")
    ),
    "rep_plugin.conversion.convert_state_dict": lambda f: Call(
        convert_state_dict, dict(tensors=RepVGG("A0").state_dict(), to="official", arch="A0")
    ),
    "rep_plugin.export.read_metadata": lambda f: Call(read_metadata, dict(path=exported(f))),
    "rep_plugin.timm.load_timm": lambda f: Call(
        load_timm, dict(name="rep_mobilenetv2_035", model_args=dict(num_classes=2))
    ),
    "rep_plugin.timm.save_timm": lambda f: Call(
        save_timm, dict(model=timm.create_model("rep_mobilenetv2_035", num_classes=2).eval(), folder=f / "new")
    ),
    # formulas
    "rep_plugin.functional.ConvParams": lambda f: Call(
        ConvParams, dict(kernel=torch.ones(4, 4, 1, 1), bias=torch.ones(4)), use_conv
    ),
    "rep_plugin.functional.PaddedConv": lambda f: Call(
        PaddedConv,
        dict(params=conv(), padding=(0, 0)),
        lambda p: functional.add_padded([functional.scale_padded(p, 2.0)]),
    ),
    "rep_plugin.functional.add_padded": on_tensors("add_padded", convs=[PaddedConv(conv())]),
    "rep_plugin.functional.attention_distance": on_tensors("attention_distance", student=x(), teacher=x()),
    "rep_plugin.functional.attention_map": on_tensors("attention_map", x=x(), size=(2, 2)),
    "rep_plugin.functional.avgpool_kernel": on_tensors("avgpool_kernel", channels=4, kernel_size=(2, 2)),
    "rep_plugin.functional.bn_scale_shift": on_tensors("bn_scale_shift", bn=BN),
    "rep_plugin.functional.compose": on_tensors("compose", first=conv(), second=conv()),
    "rep_plugin.functional.compose_all": on_tensors("compose_all", convolutions=[conv()]),
    "rep_plugin.functional.compose_padded": on_tensors(
        "compose_padded", first=PaddedConv(conv()), second=PaddedConv(conv())
    ),
    "rep_plugin.functional.covariance": on_tensors("covariance", x=MAPS),
    "rep_plugin.functional.dilate_kernel": on_tensors("dilate_kernel", kernel=torch.ones(4, 4, 3, 3), dilation=(2, 2)),
    "rep_plugin.functional.fold_bn": on_tensors("fold_bn", kernel=torch.ones(4, 4, 1, 1), bn=BN, bias=torch.ones(4)),
    "rep_plugin.functional.fold_to_triangle": on_tensors("fold_to_triangle", weight=torch.ones(2, 9), channels=3),
    "rep_plugin.functional.full_columns": on_tensors(
        "full_columns", keep1=torch.arange(2), keep2=torch.arange(2), channels2=3
    ),
    "rep_plugin.functional.gram": on_tensors("gram", x=MAPS, y=MAPS),
    "rep_plugin.functional.identity_kernel": on_tensors("identity_kernel", channels=4, groups=2),
    "rep_plugin.functional.is_constant": on_tensors("is_constant", kernel=torch.ones(4, 4, 3, 3)),
    "rep_plugin.functional.isqrt_cov": on_tensors("isqrt_cov", x=MAPS, index=INDEX, iterations=2),
    "rep_plugin.functional.low_rank": on_tensors(
        "low_rank", x=MAPS, y=None, factor1=torch.ones(3, 2), factor2=torch.ones(3, 2)
    ),
    "rep_plugin.functional.merge_sum": on_tensors("merge_sum", kernels=[(torch.ones(4, 4, 1, 1), None)]),
    "rep_plugin.functional.newton_schulz_sqrt": on_tensors(
        "newton_schulz_sqrt", matrix=torch.eye(3)[None], iterations=2
    ),
    "rep_plugin.functional.pad_kernel": on_tensors("pad_kernel", kernel=torch.ones(4, 4, 1, 1), size=(3, 3)),
    "rep_plugin.functional.pair": on_tensors("pair", value=(1, 2)),
    "rep_plugin.functional.random_maclaurin": on_tensors(
        "random_maclaurin", x=MAPS, y=None, signs1=torch.ones(4, 3), signs2=torch.ones(4, 3)
    ),
    "rep_plugin.functional.regroup_kernel": on_tensors(
        "regroup_kernel", kernel=torch.ones(4, 2, 1, 1), groups=2, new_groups=1
    ),
    "rep_plugin.functional.scale_kernel_inputs": on_tensors(
        "scale_kernel_inputs", kernel=torch.ones(4, 4, 1, 1), groups=1, scale=torch.ones(4)
    ),
    "rep_plugin.functional.scale_padded": on_tensors("scale_padded", conv=PaddedConv(conv()), factor=2.0),
    "rep_plugin.functional.signed_sqrt": on_tensors("signed_sqrt", z=MAPS, eps=1e-5),
    "rep_plugin.functional.signed_sqrt_l2": on_tensors("signed_sqrt_l2", z=torch.ones(2, 4), weight=torch.ones(4)),
    "rep_plugin.functional.soft_divergence": on_tensors(
        "soft_divergence", student=torch.ones(2, 3), teacher=torch.ones(2, 3), temperature=2.0
    ),
    "rep_plugin.functional.sum_kernel_taps": on_tensors(
        "sum_kernel_taps", kernel=torch.ones(4, 4, 1, 1), groups=1, value=torch.ones(4)
    ),
    "rep_plugin.functional.take_triangle": on_tensors("take_triangle", matrix=torch.ones(1, 3, 3), index=INDEX),
    "rep_plugin.functional.tensor_sketch": on_tensors(
        "tensor_sketch",
        matrix=torch.ones(1, 3, 3),
        hash1=torch.arange(3),
        hash2=torch.arange(3),
        sign1=torch.ones(3),
        sign2=torch.ones(3),
        dim=4,
    ),
    "rep_plugin.functional.triangle_columns": on_tensors("triangle_columns", keep=torch.arange(2), channels=3),
    "rep_plugin.functional.triangle_index": on_tensors("triangle_index", channels=3, device="cpu"),
    "rep_plugin.functional.triangle_multiplicity": on_tensors("triangle_multiplicity", channels=3, device="cpu"),
    "rep_plugin.functional.triangle_offset": on_tensors("triangle_offset", i=0, j=1, channels=3),
    "rep_plugin.functional.triangle_size": on_tensors("triangle_size", channels=3),
    # measuring
    "rep_plugin.measure.Forward": lambda f: Call(Forward, {}),
    "rep_plugin.measure.count_macs": lambda f: Call(count_macs, dict(model=net(), example_input=x())),
    "rep_plugin.measure.count_params": lambda f: Call(count_params, dict(model=net())),
    "rep_plugin.measure.register_forward": lambda f: Call(register_forward, dict(forward=Forward())),
    "rep_plugin.measure.verify_equivalence": lambda f: Call(
        verify_equivalence, dict(reference=net(), candidate=net(), inputs=[x()], block_names=["0"])
    ),
    # OpenMMLab
    "rep_plugin.openmmlab.build_model": lambda f: Call(build_model, dict(cfg=mm_config())),
    "rep_plugin.openmmlab.load_model": lambda f: Call(load_model, dict(cfg=mm_config(), checkpoint=mm_checkpoint(f))),
    "rep_plugin.openmmlab.write_deployed": lambda f: Call(
        write_deployed, dict(model=mm_model(), cfg=mm_config(), out_dir=f / "new", inputs=torch.ones(2, 3, 16, 16))
    ),
    "rep_plugin.openmmlab.write_pruned": lambda f: Call(
        write_pruned,
        dict(model=mm_model(), cfg=mm_config(), plan=mm_plan(), out_dir=f / "new", inputs=torch.ones(2, 3, 16, 16)),
    ),
    "rep_plugin.openmmlab.hooks.Schedule": lambda f: Call(
        Schedule, dict(begin=1, end=5, interval=2), lambda s: s.count(3)
    ),
    "rep_plugin.openmmlab.hooks.AccuracyLrHook": training("AccuracyLrHook", thresholds=[50.0]),
    "rep_plugin.openmmlab.hooks.CentripetalHook": training("CentripetalHook", prune_fraction=0.3, min_channels=1),
    "rep_plugin.openmmlab.hooks.DistillHook": training(
        "DistillHook", feature_weight=0.1, teacher=tiny.config("/nowhere").model.to_dict(), checkpoint="teacher.pth"
    ),
    "rep_plugin.openmmlab.hooks.LinearizeHook": training("LinearizeHook", end=1),
    "rep_plugin.openmmlab.hooks.PruneHook": training("PruneHook", macs=0.7, begin=1, overrides={"*.conv2": 0.5}),
    "rep_plugin.openmmlab.hooks.QATHook": training("QATHook", layers=False, min_agreement=0.0),
    "rep_plugin.openmmlab.hooks.ReparamHook": training("ReparamHook"),
    "rep_plugin.openmmlab.hooks.ResRepHook": training("ResRepHook", macs=0.7, interval=2),
    "rep_plugin.openmmlab.hooks.SoftPruneHook": training("SoftPruneHook", macs=0.7),
    "rep_plugin.openmmlab.hooks.SparsityHook": training("SparsityHook", overrides={"*.bn2": 0.1}),
    # pruning
    "rep_plugin.pruning.EagerTimer": lambda f: Call(
        EagerTimer, dict(threads=1, rounds=(1, 2)), lambda timer: timer({"net": (net(), (x(),))}, 1e-4)
    ),
    "rep_plugin.pruning.trace_channels": lambda f: Call(trace_channels, dict(model=net(), example_input=x())),
    "rep_plugin.pruning.methods.Centripetal": lambda f: Call(Centripetal, dict(model=net(), clusters=clusters())),
    "rep_plugin.pruning.methods.ResRep": lambda f: Call(
        ResRep, dict(model=net(), shape=(1, 3, 8, 8), budget=Budget(macs=0.7), options=PruneOptions(min_channels=1))
    ),
    "rep_plugin.pruning.methods.Sparsity": lambda f: Call(Sparsity, dict(gammas={nn.Parameter(torch.ones(2)): 0.1})),
    "rep_plugin.pruning.methods.merge_clusters_": lambda f: merging(merge_clusters_, example_input=x()),
    "rep_plugin.pruning.methods.plan_clusters": lambda f: Call(
        plan_clusters, dict(model=net(), example_input=x(), budget={"0": 4}, clusters="even")
    ),
    "rep_plugin.pruning.methods.snap_clusters_": lambda f: merging(snap_clusters_),
    "rep_plugin.pruning.methods.zero_channels_": lambda f: Call(zero_channels_, dict(model=net(), plan=plan())),
    "rep_plugin.pruning.planning.Budget": lambda f: Call(Budget, dict(macs=0.5), lambda b: (str(b), b.limit(100))),
    "rep_plugin.pruning.planning.PruneOptions": lambda f: Call(PruneOptions, dict(scores="l1"), str),
    "rep_plugin.pruning.planning.plan_to_budget": lambda f: Call(
        plan_to_budget, dict(model=net(), example_input=x(), budget=Budget(0.5), options=PruneOptions("l1"))
    ),
    "rep_plugin.pruning.surgery.mask_channels_": lambda f: surgery(mask_channels_),
    "rep_plugin.pruning.surgery.remove_channels_": lambda f: surgery(remove_channels_),
    "rep_plugin.pruning.tracing.KeptChannels": lambda f: Call(KeptChannels, dict(trace=trace(), removed=[3])),
    "rep_plugin.pruning.tracing.count_costs": lambda f: Call(count_costs, dict(trace=trace())),
    "rep_plugin.pruning.tracing.rules.find_module_rule": lambda f: Call(find_module_rule, dict(module=nn.ReLU())),
    "rep_plugin.reparam.Adapter": lambda f: Call(
        Adapter, dict(name="ours", matches=lambda m: False, merge=lambda m: m)
    ),
    "rep_plugin.reparam.register_adapter": lambda f: Call(
        register_adapter, dict(adapter=Adapter("ours", lambda m: False, lambda m: m))
    ),
    # types of configs, and timm's names
    "registry.ACBConv2d": registered("ACBConv2d", (2, 4, 9, 9), in_channels=4, out_channels=4, kernel_size=3),
    "registry.DBBConv2d": registered("DBBConv2d", (2, 4, 9, 9), in_channels=4, out_channels=4, kernel_size=3),
    "registry.MobileOneConv2d": registered(
        "MobileOneConv2d", (2, 4, 9, 9), in_channels=4, out_channels=4, kernel_size=3
    ),
    "registry.RepConv2d": registered("RepConv2d", (2, 4, 9, 9), in_channels=4, out_channels=4, kernel_size=3),
    "registry.BilinearClsHead": registered(
        "BilinearClsHead", (2, 4, 5, 5), lambda image: (image, image), in_channels=4, num_classes=2, dim=16
    ),
    "registry.BilinearPooling": registered(
        "BilinearPooling", (2, 4, 5, 5), lambda image: (image, image), in_channels=4, dim=16
    ),
    "registry.MobileNetV2_CIFAR": registered("MobileNetV2_CIFAR", widen_factor=0.1),
    "registry.MobileNetV3_CIFAR": registered("MobileNetV3_CIFAR"),
    "registry.MobileOne": registered(
        "MobileOne",
        arch=dict(widths=(0.1, 0.1), depths=(1, 1), se_blocks=(0, 0)),
        out_indices=(1,),
        strides=(2, 2, 2),
        frozen_stages=0,
        norm_eval=False,
        channels_last=False,
    ),
    "registry.OnnxClassifier": lambda f: registered(
        "OnnxClassifier", None, path=str(logits_file(f)), model=mm_config().model.to_dict()
    )(f),
    "registry.RepLKNet": registered(
        "RepLKNet", arch=dict(channels=(8, 8), kernels=(5, 5), depths=(1, 1), small_kernel=3), out_indices=(1,)
    ),
    "registry.RepMobileNetV2": registered(
        "RepMobileNetV2", widen_factor=0.1, act_cfg=dict(type="ReLU"), branches=("bottleneck",)
    ),
    "registry.RepVGG": registered("RepVGG", **SMALL, frozen_stages=0),
    "registry.TwoStreamBackbone": registered(
        "TwoStreamBackbone",
        first=dict(type="rep_plugin.RepVGG", **SMALL),
        second=dict(type="rep_plugin.RepVGG", **SMALL),
    ),
    "registry.CpuAmpOptimWrapper": lambda f: Call(
        registries.OPTIM_WRAPPERS.get("CpuAmpOptimWrapper"),
        dict(optimizer=torch.optim.SGD(net().parameters(), lr=0.1), accumulative_counts=1),
    ),
    "registry.Expanded": registered("Expanded", None, model=STOCK, block="acb"),
    "registry.Merged": registered("Merged", None, model=mm_config().model.to_dict()),
    "registry.Linearized": registered("Linearized", None, model=STOCK, segments=[]),
    "registry.Pruned": lambda f: registered(
        "Pruned", None, model=mm_config().model.to_dict(), plan=mm_plan().to_json()
    )(f),
    "timm.rep_mobilenetv2": timm_name(
        "rep_mobilenetv2_035",
        32,
        num_classes=2,
        in_chans=3,
        global_pool="avg",
        drop_rate=0.1,
        branches=["bottleneck"],
        act="relu",
        strides=(2, 1, 2, 2, 2, 1, 2, 1),
        deploy=False,
        online=False,
        anneal=False,
        output_stride=32,
        avg_shortcut=False,
        last_kernel=1,
    ),
    "timm.rep_repvgg": timm_name(
        "rep_repvgg_a0", 32, num_classes=2, in_chans=3, global_pool="avg", drop_rate=0.1, post_bn=False, deploy=True
    ),
    "timm.rep_mobileone": timm_name("rep_mobileone_s0", 32, num_classes=2, strides=(2, 2, 2, 2, 2)),
    "timm.rep_replknet": timm_name(
        "rep_replknet_31b",
        32,
        num_classes=2,
        small_kernel=3,
        ffn_ratio=1.0,
        drop_path_rate=0.1,
        norm_maps=True,
        deploy=True,
        keep_bn=False,
    ),
    "timm.bcnn": timm_name(
        "bcnn_rep_mobilenetv2_100",
        32,
        num_classes=2,
        in_chans=3,
        drop_rate=0.1,
        global_pool="bilinear",
        method="full",
        projection=16,
        dim=16,
        rank=4,
        iterations=2,
        pretrained_backbone=False,
    ),
    **{
        f"timm.{block}": timm_name(
            f"{block}_resnet18", 32, num_classes=2, in_chans=3, drop_rate=0.1, deploy=False, online=False
        )
        for block in ("dbb", "acb")
    },
    "timm.rep_plugin_rebuilt": rebuilt,
    "timm.rep_rebuilt": lambda f: rebuilt(f, "rep_rebuilt"),
}


UNITS = [*sorted(CALLS), *_commands.VALID]
SHORT, LONG, LIMIT_S = 20, len(UNITS), 1200


def merging(function: Callable, **options: Any) -> Call:
    model, found = net(), clusters()
    snap_clusters_(model, found)
    return Call(function, dict(model=model, clusters=found, **options))


def surgery(function: Callable) -> Call:
    model = net()
    traced = trace_channels(model, (1, 3, 8, 8))
    return Call(
        function, dict(model=model, trace=traced, kept=KeptChannels(traced, [int(traced.layers["0"].labels[0])]))
    )


def public_names() -> set[str]:
    """All callables in an ``__all__`` of the package and its rooms, each by its first name, and all registered types."""
    seen, names = set(), set()
    rooms = [room.name for room in pkgutil.walk_packages(rep_plugin.__path__, "rep_plugin.") if room.ispkg]
    for room in ("rep_plugin", *rooms):
        for name in getattr(module := importlib.import_module(room), "__all__", ()):
            one = getattr(module, name)
            is_error = isinstance(one, type) and issubclass(one, BaseException)
            if callable(one) and not is_error and not isinstance(one, types.ModuleType) and id(one) not in seen:
                seen.add(id(one))
                names.add(f"{room}.{name}")
    for registry in (registries.MODELS, registries.HOOKS, registries.OPTIM_WRAPPERS):
        registry.import_from_location()
        names |= {f"registry.{name}" for name, one in registry.module_dict.items() if id(one) not in seen}
    return names


def timm_names() -> list[str]:
    """All names that are ours in timm."""
    return [
        name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("rep_plugin.")
    ]


def fingerprint(values: Mapping[str, Any]) -> dict[str, list]:
    """What may not change where a call is refused: the weights of modules, and tensors."""
    kept = {}
    for name, value in values.items():
        if isinstance(value, nn.Module):
            kept[name] = [value.training, *(t.clone() for t in value.state_dict().values())]
        elif isinstance(value, Tensor):
            kept[name] = [value.clone()]
    return kept


def same(before: dict[str, list], after: dict[str, list]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    return all(len(a) == len(after[n]) and all(map(equal, a, after[n])) for n, a in before.items())


def arguments_of(call: Call) -> list[str]:
    """Names that can be given: those of the signature, and of the valid call, which may be a parent's."""
    try:
        parameters = inspect.signature(call.function).parameters.values()
    except ValueError:
        parameters = ()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return list(dict.fromkeys([*(one.name for one in parameters if one.kind not in kinds), *call.arguments]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with mock.patch.object(forwards, "_FORWARDS", list(forwards._FORWARDS)), mock.patch.dict(vars(adapters)):
            yield


def given_names(call: Call) -> Iterator[str]:
    """What a message may call the arguments: their names (where two do not go together, either)."""
    yield from (name.replace("_", " ") for name in arguments_of(call))


def words_of(value: Any) -> Iterator[str]:
    """What a message may call a value: what it contains, its class or its shape; of nothing, that there is none."""
    if isinstance(value, nn.Module):
        yield type(value).__name__
    elif isinstance(value, Tensor):
        yield from (str(tuple(value.shape)), str(value.dtype))
    elif isinstance(value, Path):
        yield str(value.parent)
    elif isinstance(value, Mapping) and value:
        yield from (word for pair in value.items() for one in pair for word in words_of(one))
    elif isinstance(value, (list, tuple)) and value:
        yield from (str(tuple(value)), *(word for one in value for word in words_of(one)))
    elif isinstance(value, (list, tuple, dict)):
        yield from ("none", "of 0 ")
    else:
        yield from (repr(value), str(value))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Files of names without a folder land there."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def attempt(call: Call, name: str, value: Any) -> str:
    """One argument replaced: ``refused`` or ``accepted``. Raises AssertionError for anything else."""
    given = dict(call.arguments)
    before = fingerprint(given)
    given[name] = value
    try:
        result = call.function(**given)
        call.after(result)
    except (RepPluginError, OSError) as error:
        text = str(error)
        assert "\n" not in text and text, f"more than a line: {text!r}"
        words = (*given_names(call), *(word.replace("_", " ") for word in words_of(value)))
        named = any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text.replace("_", " ")) for word in words if word)
        assert named or isinstance(error, EquivalenceError), (
            f"{type(error).__name__} names neither the argument nor its value: {text}"
        )
        given.pop(name)
        rest = {one: kept for one, kept in before.items() if one != name}
        assert same(rest, fingerprint(given)), f"refused ({text}), but something has changed"
        return "refused"
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return "accepted"


def attack(seed: int, folder: Path) -> Counter:
    """Try all wrong values of all arguments of one callable, or all wrong words of a command line."""
    name = UNITS[seed % len(UNITS)]
    if name in _commands.VALID:
        return _commands.attack(name, folder)
    counts, faults = Counter(callables=1), []
    with quiet(), inside(folder):
        call = CALLS[name](folder)
        call.after(call.function(**copied(call.arguments)))  # the valid call is one
        for argument in arguments_of(call):
            takes_functions = "Callable" in str(inspect.signature(call.function).parameters.get(argument))
            valid = call.arguments.get(argument)
            for what, value in (*WRONG.items(), *near(valid)):
                if takes_functions and callable(value):
                    continue  # what a function of the user raises is his
                fresh = call._replace(arguments=copied(call.arguments))
                try:
                    counts[
                        attempt(fresh, argument, copy.deepcopy(value) if not inspect.isfunction(value) else value)
                    ] += 1
                except AssertionError as fault:
                    faults.append(f"{argument}={what}: {fault}")
    assert not faults, f"{name} (seed {seed}): {len(faults)} faults, first: " + " | ".join(faults[:60])
    return counts


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a call for a call of their own: what is traced stays with its trace."""
    return copy.deepcopy(dict(arguments))
