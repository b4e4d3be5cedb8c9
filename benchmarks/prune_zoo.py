#!/usr/bin/env python
"""Prune 30 % of the channels, chosen at random, of every network of the zoo, and prove that removed equals masked.

    python benchmarks/prune_zoo.py                      # about two minutes on one core, 6 GB for VGG16
    python benchmarks/prune_zoo.py --only resnet50

For each network: groups of coupled layers that can be pruned, channels before and after over all layers, parameters,
relative error of the removed against the masked network in float64, seconds of tracing and planning, and of applying (the
proof included). Every plan goes through JSON, every pruned network runs a training step in which its weights change, and
comes back from disk bit-exact ("reload"): those of timm from a folder (``timm.create_model('local-dir:FOLDER')``), those of
mmpretrain from a config (``rep_plugin.Pruned``) and a checkpoint, those of torchvision from their history and a state dict.
Exits with 1 where an error is over 1e-9, a network cannot be pruned, a step trains nothing, what comes back differs, or
ResNet-50 takes over 3 s.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision
from common import make_table, print_failures
from mmengine.config import Config
from mmpretrain.apis import init_model
from mmpretrain.models import build_classifier
from rich.console import Console
from torch import Tensor, nn

from rep_plugin import PrunePlan, apply_plan, plan_pruning, reparameterize
from rep_plugin.errors import RepPluginError
from rep_plugin.history import history_of, rebuild_
from rep_plugin.testing import calibrate_random_bn_
from rep_plugin.timm import save_timm

TOLERANCE, SECONDS_RESNET50, SIDE, CLASSES = 1e-9, 3.0, 64, 10


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES)


SHUFFLENET_V1 = dict(
    type="ImageClassifier",
    backbone=dict(type="ShuffleNetV1"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=CLASSES, in_channels=960),
)


def _shufflenet_v1() -> nn.Module:
    return build_classifier(copy.deepcopy(SHUFFLENET_V1))


ZOO = {
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=CLASSES),
    "mobilenet_v1": _timm("mobilenetv1_100"),
    "mobilenet_v2": _timm("mobilenetv2_100"),
    "mobilenet_v3_small": _timm("mobilenetv3_small_100"),
    "mobilenet_v3_large": _timm("mobilenetv3_large_100"),
    "shufflenet_v1": _shufflenet_v1,
    "shufflenet_v2": lambda: torchvision.models.shufflenet_v2_x1_0(num_classes=CLASSES),
    "ghostnet": _timm("ghostnet_100"),
    "efficientnet_lite0": _timm("efficientnet_lite0"),
    "resnet18": _timm("resnet18"),
    "resnet50": _timm("resnet50"),
    "vgg16_bn": _timm("vgg16_bn"),
    "repvgg_a0": _timm("repvgg_a0"),
    "repvgg_a0 merged": _timm("repvgg_a0"),
    "mobileone_s0": _timm("mobileone_s0"),
    "rep_mobilenetv2": _timm("rep_mobilenetv2_100"),
    "bcnn_vgg16_bn": _timm("bcnn_vgg16_bn"),
}


def step_trains(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> bool:
    """Run a training step; True where every kernel moved (a bias between two BNs of a block has no gradient)."""
    before = {p: p.detach().clone() for p in model.parameters()}
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.eval()
    return all(not torch.equal(p, old) for p, old in before.items() if p.dim() > 1)


def reload(model: nn.Module, build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """Return what comes back from disk, in eval mode."""
    if build is _shufflenet_v1:
        plan = history_of(model)[0]["plan"]
        pruned = dict(type="rep_plugin.Pruned", model=SHUFFLENET_V1, plan=plan)
        Config(dict(default_scope="mmpretrain", model=pruned)).dump(folder / "model.py")
        torch.save({"state_dict": model.state_dict()}, folder / "model.pth")
        back = init_model(str(folder / "model.py"), str(folder / "model.pth"), device="cpu")
    elif hasattr(model, "pretrained_cfg"):
        save_timm(model, folder)
        back = timm.create_model(f"local-dir:{folder}")
    else:
        torch.save((history_of(model), model.state_dict()), folder / "model.pth")
        history, state = torch.load(folder / "model.pth")
        back = rebuild_(build(), history)
        back.load_state_dict(state)
    back.eval()
    return back


@torch.no_grad()
def same(model: nn.Module, back: nn.Module, x: Tensor) -> bool:
    """True where the state dicts and the outputs are equal bit for bit."""
    model.eval()
    ours, theirs = model.state_dict(), back.state_dict()
    states = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    return states and torch.equal(model(x), back(x))


def measure(build: Callable[[], nn.Module], fraction: float, merge: bool) -> dict:
    """Prune one network, ``merge``: in its merged form; return the row of the table."""
    torch.manual_seed(0)
    model = build()
    x, y = torch.randn(4, 3, SIDE, SIDE), torch.arange(4)
    model.eval()
    calibrate_random_bn_(model, x)
    if merge:
        model, _ = reparameterize(model, x, fold_bn=False, verify=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    step_trains(model, optimizer, x, y)
    started = time.perf_counter()
    plan = plan_pruning(model, x[:2], "random", fraction)
    planned = time.perf_counter()
    report = apply_plan(model, plan, optimizer, example_input=x[:2])
    applied = time.perf_counter()
    trains = step_trains(model, optimizer, x, y)
    with tempfile.TemporaryDirectory() as folder:
        reloaded = same(model, reload(model, build, Path(folder)), x)
    return {
        "groups": sum(layers[0] not in plan.frozen for layers in plan.groups),
        "frozen": len(plan.frozen),
        "channels": tuple(sum(width[i] for width in plan.widths.values()) for i in (0, 1)),
        "params": (report.params_before, report.params_after),
        "error": report.max_rel_error,
        "sensitivity": report.sensitivity,
        "plan": planned - started,
        "apply": applied - planned,
        "json": PrunePlan.from_json(plan.to_json()) == plan,
        "trains": trains,
        "reload": reloaded,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ZOO, help="one network")
    parser.add_argument("--fraction", type=float, default=0.3, help="share of the prunable channels to remove")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = (
        "network", "groups", "frozen", "channels", "params (M)", "error", "sens.", "plan s", "apply s", "reload", "",
    )  # fmt: skip
    title = f"{args.fraction:.0%} of the channels removed at random, input {SIDE} x {SIDE}"
    table = make_table(title, columns, ["network", ""], no_wrap=True)
    table.columns[-1].no_wrap = False
    failures = []
    for name in [args.only] if args.only else ZOO:
        try:
            row = measure(ZOO[name], args.fraction, name.endswith("merged"))
        except RepPluginError as error:
            failures.append(f"{name}: {error}")
            table.add_row(name, *[""] * 9, "missing")
            continue
        seconds = row["plan"] + row["apply"]
        wrong = [
            text
            for text, bad in {
                "error": not row["error"] <= TOLERANCE,
                "nothing removed": row["channels"][0] == row["channels"][1],
                "plan changed by JSON": not row["json"],
                "trains nothing": not row["trains"],
                "another model comes back": not row["reload"],
                f"over {SECONDS_RESNET50} s": name == "resnet50" and seconds > SECONDS_RESNET50,
            }.items()
            if bad
        ]
        failures += [f"{name}: {text}" for text in wrong]
        before, after = row["params"]
        table.add_row(
            name,
            str(row["groups"]),
            str(row["frozen"]),
            "{} -> {}".format(*row["channels"]),
            f"{before / 1e6:.2f} -> {after / 1e6:.2f}",
            f"{row['error']:.1e}",
            f"{row['sensitivity']:.0e}",
            f"{row['plan']:.2f}",
            f"{row['apply']:.2f}",
            "exact" if row["reload"] else "differs",
            ", ".join(wrong) or "ok",
        )
    console = Console(width=140)
    console.print(table)
    return print_failures(console, failures)


if __name__ == "__main__":
    sys.exit(main())
