#!/usr/bin/env python
"""Prune 30 % of the channels of many networks, by us and by Torch-Pruning, each in a process with a time limit.

    python benchmarks/prune_coverage.py                                    # all suites, both tools: hours on two cores
    python benchmarks/prune_coverage.py --suites timm --only ours --limit 120
    python benchmarks/prune_coverage.py --names 'timm:vit*' 'torchvision:*'
    python benchmarks/prune_coverage.py --report                           # the table of what is there, nothing is run

Suites: one small network (by parameters) of each family module of timm; torchvision's classification and segmentation;
mmpretrain's backbones. Verdicts: *effective* (at least 15 % of the multiply-adds are gone, and the removal is proven), *less*
(proven, but fewer are gone), *refused* (one line of reason), *wrong* (another function, or it no longer runs), *crash*
(anything else, a time-out included), *unbuilt* (the network itself does not run here; not counted).

Ours is proven by its own proof, in float64. Torch-Pruning has none: its pruned network must run and give outputs of the
same shape, and where no norm over channels became narrower they must equal those of a copy with the same channels set to
zero. Results are kept line by line in ``coverage.jsonl``; what is there is not run again. Exits with 1 where ours is wrong or
crashes.
"""

import argparse
import copy
import fnmatch
import json
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import timm
import torch
import torchvision
from common import make_table, print_failures
from rich.console import Console
from torch import nn

from rep_plugin.errors import RepPluginError
from rep_plugin.measure.costs import count_macs, count_params
from rep_plugin.measure.forward import run_model
from rep_plugin.measure.verify import flatten_outputs
from rep_plugin.pruning import apply_plan, plan_pruning
from rep_plugin.testing import calibrate_random_bn_

FRACTION, EFFECTIVE, TOLERANCE, CLASSES = 0.3, 0.15, 1e-6, 10
VERDICTS = ("effective", "less", "refused", "wrong", "crash", "unbuilt")
SMALL = (
    "test_",
    "nano",
    "atto",
    "femto",
    "pico",
    "xxs",
    "xx_small",
    "mini",
    "tiny",
    "_xs",
    "_s",
    "small",
    "18",
    "b0",
    "050",
)
MMPRETRAIN = {  # what stock arguments do not say, for a small network of each
    "BEiTViT": dict(arch="base"), "DaViT": dict(arch="tiny"), "DeiT3": dict(arch="s"), "DenseNet": dict(arch="121"),
    "EdgeNeXt": dict(arch="xxsmall"), "EfficientFormer": dict(arch="l1"), "EfficientNet": dict(arch="b0"),
    "EfficientNetV2": dict(arch="b0"), "HRNet": dict(arch="w18"), "LeViT": dict(arch="128s"), "MViT": dict(arch="tiny"),
    "MixMIMTransformer": dict(arch="base"), "MlpMixer": dict(arch="s"), "MobileOne": dict(arch="s0"),
    "MobileViT": dict(arch="xx_small"), "PoolFormer": dict(arch="s12"), "RegNet": dict(arch="regnetx_400mf"),
    "RepMLPNet": dict(arch="B"), "RepVGG": dict(arch="A0"), "RevVisionTransformer": dict(arch="deit-small"),
    "Res2Net": dict(depth=50), "ResNeSt": dict(depth=50), "ResNeXt": dict(depth=50), "ResNet": dict(depth=18),
    "ResNetV1c": dict(depth=50), "ResNetV1d": dict(depth=50), "ResNet_CIFAR": dict(depth=18), "SEResNeXt": dict(depth=50),
    "SEResNet": dict(depth=50), "SwinTransformer": dict(arch="tiny"), "SwinTransformerV2": dict(arch="tiny"),
    "T2T_ViT": {}, "TinyViT": dict(arch="5m"), "TNT": dict(arch="s"), "VAN": dict(arch="tiny"), "VGG": dict(depth=11),
    "VisionTransformer": dict(arch="deit-tiny"), "XCiT": {}, "ConvNeXt": dict(arch="atto"), "Conformer": dict(arch="tiny"),
    "CSPDarkNet": dict(depth=53), "CSPResNet": dict(depth=50), "CSPResNeXt": dict(depth=50), "HorNet": dict(arch="tiny"),
    "InceptionV3": dict(), "MobileNetV2": {}, "MobileNetV3": dict(arch="small"), "ShuffleNetV1": {}, "ShuffleNetV2": {},
    "AlexNet": {}, "LeNet5": {}, "RIFormer": dict(arch="s12"), "PCPVT": dict(arch="small"), "SVT": dict(arch="small"),
    "ViTEVA02": dict(arch="t"), "HiViT": dict(arch="tiny"), "SparseResNet": dict(depth=50), "RepLKNet": dict(arch="31B"),
}  # fmt: skip


def timm_networks() -> list[str]:
    """One name of each family module: the smallest of a few whose names promise it, built without weights."""
    families = defaultdict(list)
    for name in timm.list_models():
        families[timm.models.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    chosen = []
    for names in families.values():
        if names[0].startswith(("rep_", "dbb_", "acb_", "bcnn_")):
            continue

        def rank(name: str) -> tuple[int, int]:
            return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)

        sizes = {}
        for name in sorted(names, key=rank)[:4]:
            try:
                with torch.device("meta"):
                    sizes[name] = count_params(timm.create_model(name))
            except Exception:  # some compute values when they are built
                sizes.setdefault(name, 10**12)
        chosen.append(min(sizes, key=sizes.__getitem__))
    return chosen


def networks(suite: str) -> list[str]:
    """Names of a suite."""
    if suite == "timm":
        return timm_networks()
    if suite == "torchvision":
        names = torchvision.models.list_models(torchvision.models)
        families = {}
        for name in sorted(names, key=len):
            families.setdefault(name.split("_")[0].rstrip("0123456789"), name)
        return [*families.values(), *torchvision.models.list_models(torchvision.models.segmentation)]
    return list(MMPRETRAIN)


def build(suite: str, name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network in eval mode and two images of the size that it takes."""
    torch.manual_seed(0)
    shape = (3, 224, 224)
    if suite == "timm":
        model = timm.create_model(name, num_classes=CLASSES)
        shape = model.pretrained_cfg.get("input_size", shape)
        if not model.pretrained_cfg.get("fixed_input_size") and shape[-1] > 128 and "vit" not in name:
            shape = (shape[0], 128, 128)
    elif suite == "torchvision":
        segments = name in torchvision.models.list_models(torchvision.models.segmentation)
        options = dict(weights_backbone=None) if segments else dict(init_weights=True) if "inception" in name else {}
        model = torchvision.models.get_model(name, weights=None, **options)
        shape = (3, 299, 299) if "inception" in name else (3, 128, 128) if segments else shape
    else:
        from mmpretrain.registry import MODELS
        from mmpretrain.utils import register_all_modules

        register_all_modules()
        model = MODELS.build(dict(type=name) | MMPRETRAIN[name])
        shape = {"LeNet5": (1, 32, 32), "RepMLPNet": (3, 256, 256), "InceptionV3": (3, 299, 299)}.get(name, shape)
    model.eval()
    x = torch.randn(2, *shape)
    with torch.no_grad():
        run_model(model, x[:1])
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        calibrate_random_bn_(model, x)
    model.eval()
    return model, x


def prune_ours(model: nn.Module, x: torch.Tensor) -> dict:
    """Plan, prove, remove; train a step."""
    bare = all(t.dim() == 4 for t in flatten_outputs(run_model(model, x)))
    plan = plan_pruning(model, x, "l1", FRACTION, prune_outputs=bare)
    report = apply_plan(model, plan, example_input=x)
    model.train()
    loss = sum(t.float().square().mean() for t in flatten_outputs(run_model(model, x)) if t.is_floating_point())
    loss.backward()
    left = report.macs_after / report.macs_before
    reasons = Counter(reason.split(": ")[0][-160:] for reason in plan.frozen.values())
    return dict(left=left, error=report.max_rel_error, why=[f"{n}x {reason}" for reason, n in reasons.most_common(3)])


def prune_theirs(model: nn.Module, x: torch.Tensor) -> dict:
    """Torch-Pruning's MagnitudePruner, its groups set to zero in a copy before they are removed."""
    import torch_pruning as tp

    outs = (
        tp.prune_conv_out_channels,
        tp.prune_depthwise_conv_out_channels,
        tp.prune_linear_out_channels,
        tp.prune_batchnorm_out_channels,
    )
    names = {id(module): name for name, module in model.named_modules()}
    masked, before = copy.deepcopy(model).double(), count_macs(model, x[:1])
    shapes = [t.shape for t in flatten_outputs(run_model(model, x))]
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in (CLASSES, 1000)]
    pruner = tp.pruner.MagnitudePruner(
        model, x[:1], tp.importance.MagnitudeImportance(p=1), pruning_ratio=FRACTION, global_pruning=True,
        ignored_layers=outputs,
    )  # fmt: skip
    exact = True
    for group in pruner.step(interactive=True):
        for dep, indices in group:
            layer, prune = dep.target.module, dep.handler
            if prune in (tp.prune_layernorm_out_channels, tp.prune_groupnorm_out_channels):
                exact = False
            elif prune in outs:
                own = masked.get_submodule(names[id(layer)])
                for tensor in (own.weight, own.bias):
                    if tensor is not None:
                        tensor.data[list(indices)] = 0
        group.prune()
    outputs_now = flatten_outputs(run_model(model, x))
    if [t.shape for t in outputs_now] != shapes:
        return dict(
            left=1.0, wrong=f"outputs {[tuple(t.shape) for t in outputs_now]} instead of {[*map(tuple, shapes)]}"
        )
    error = 0.0
    if exact:
        ours, theirs = (flatten_outputs(run_model(m.double(), x.double())) for m in (masked, model))
        error = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(ours, theirs))
        if error > TOLERANCE:
            return dict(left=1.0, wrong=f"another function than with these channels set to zero, by {error:.1e}")
    return dict(left=count_macs(model.float(), x[:1]) / before, error=error)


def judge(suite: str, name: str, tool: str) -> dict:
    """Return the verdict on one network."""
    try:
        model, x = build(suite, name)
    except Exception as error:  # whatever the network's own code raises
        return dict(verdict="unbuilt", why=[f"{type(error).__name__}: {error}"[:300]])
    try:
        found = prune_ours(model, x) if tool == "ours" else prune_theirs(model, x)
    except RepPluginError as error:
        wrong = type(error).__name__ == "EquivalenceError"
        return dict(verdict="wrong" if wrong else "refused", why=[f"{error}"[:400]])
    except Exception as error:  # of a network that prunes badly
        return dict(verdict="crash", why=[f"{type(error).__name__}: {error}"[:400]])
    if "wrong" in found:
        return dict(verdict="wrong", why=[found["wrong"]])
    return dict(verdict="effective" if found["left"] <= 1 - EFFECTIVE else "less") | found


def run_one(suite: str, name: str, tool: str, limit: int) -> dict:
    """The same in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", suite, name, tool]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return dict(verdict="crash", why=[f"over {limit} s"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return dict(
            verdict="crash", why=[(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]]
        )
    return json.loads(lines[-1])


def print_tables(console: Console, rows: dict[tuple[str, str, str], dict]) -> int:
    """Print the counts, and what of ours is not effective."""
    table = make_table(f"{FRACTION:.0%} of the channels asked", ["suite", "tool", *VERDICTS], ["suite", "tool"])
    for suite, tool in dict.fromkeys((suite, tool) for suite, _, tool in rows):
        counts = Counter(row["verdict"] for (s, _, t), row in rows.items() if (s, t) == (suite, tool))
        table.add_row(suite, tool, *(str(counts[verdict]) for verdict in VERDICTS))
    console.print(table)
    failures = []
    for (suite, name, tool), row in rows.items():
        if tool != "ours" or row["verdict"] in ("effective", "unbuilt"):
            continue
        left = f" {row['left']:.0%} left" if "left" in row else ""
        line = f"{suite}:{name} {row['verdict']}{left}: {'; '.join(row.get('why', []))}"
        if row["verdict"] in ("wrong", "crash"):
            failures.append(line)
        else:
            console.print(line, markup=False, soft_wrap=True)
    behind = [
        f"{suite}:{name}"
        for (suite, name, tool), row in rows.items()
        if tool == "theirs"
        and row["verdict"] == "effective"
        and rows.get((suite, name, "ours"), row)["verdict"] != "effective"
    ]
    if behind:
        console.print(f"effective with Torch-Pruning alone: {', '.join(behind)}", markup=False, soft_wrap=True)
    return print_failures(console, failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["timm", "torchvision", "mmpretrain"], metavar="SUITE")
    parser.add_argument("--only", choices=("ours", "theirs"), help="one of the tools")
    parser.add_argument("--names", nargs="+", default=["*"], metavar="PATTERN", help="of suite:name")
    parser.add_argument("--limit", type=int, default=300, help="seconds for one network")
    parser.add_argument("--out", default="work_dirs/prune_coverage", help="folder of coverage.jsonl")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(judge(*args.one)))
        return 0
    folder, console = Path(args.out), Console(width=150)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "coverage.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    rows = {(line["suite"], line["name"], line["tool"]): line for line in lines}
    for suite in [] if args.report else args.suites:
        chosen = folder / f"{suite}.json"
        if not chosen.is_file():
            chosen.write_text(json.dumps(networks(suite)))
        for name in json.loads(chosen.read_text()):
            for tool in [args.only] if args.only else ["ours", "theirs"]:
                key = (suite, name, tool)
                if key in rows or not any(fnmatch.fnmatchcase(f"{suite}:{name}", pattern) for pattern in args.names):
                    continue
                rows[key] = dict(suite=suite, name=name, tool=tool) | run_one(suite, name, tool, args.limit)
                with file.open("a") as out:
                    out.write(json.dumps(rows[key]) + "\n")
                console.print(f"{suite}:{name} {tool}: {rows[key]['verdict']}", markup=False)
    return print_tables(console, rows)


if __name__ == "__main__":
    sys.exit(main())
