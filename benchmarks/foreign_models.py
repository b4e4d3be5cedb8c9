#!/usr/bin/env python
"""Merge every model of timm and mmpretrain that holds re-parameterizable blocks, and prove each: one table.

    python benchmarks/foreign_models.py                        # all of them, 20 minutes on one core
    python benchmarks/foreign_models.py --names repvgg_a0 fastvit_t8 mmpretrain:RepVGG:D2se
    python benchmarks/foreign_models.py --names 'levit*' 'shvit*' 'nextvit*'

Every BN gets random gammas (a quarter negative), betas and calibrated statistics, every layer scale a random value: an
untrained network would hide a wrong merge. A verdict is *merged* (proven in float64 within 1e-9, block by block and end to
end), *refused* with the reason, or *wrong*; the exit status is the number of wrong ones. Then merging RepVGG-A0 is timed
against timm's own ``reparameterize_model``, without proof on either side.
"""

import argparse
import fnmatch
import gc
import statistics
import time

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import rep_plugin
from rep_plugin.measure.verify import MIN_SENSITIVITY

PATTERNS = ["*rep*", "mobileone*", "fastvit*", "ghostnetv3*"]
REPVGG = (
    "A0", "A1", "A2", "B0", "B1", "B1g2", "B1g4", "B2", "B2g2", "B2g4", "B3", "B3g2", "B3g4", "D2se", "yolox-pai-small",
)  # fmt: skip
MMPRETRAIN = [  # type, arch, the size it needs (None: any)
    *(("RepVGG", arch, None) for arch in REPVGG),
    *(("MobileOne", arch, None) for arch in ("s0", "s1", "s2", "s3", "s4")),
    *(("RepLKNet", arch, None) for arch in ("31B", "31L", "XL")),
    *(("LeViT", arch, 224) for arch in ("128s", "128", "192", "256", "384")),
    *(("RIFormer", arch, None) for arch in ("s12", "s24", "s36", "m36", "m48")),
    ("RepMLPNet", "base", 224),
    *(("TinyViT", arch, 224) for arch in ("5m", "11m", "21m")),
]


def randomise_(model: nn.Module, x: torch.Tensor) -> None:
    """Random BNs with the statistics of ``x``, and random layer scales; the rest of the network stays in eval mode.

    As rep_plugin.testing.calibrate_random_bn_, but for one distribution: statistics that do not quite fit let attention
    networks of random weights grow block by block, until they turn a rounding error of 1e-16 into 1e-8.
    """
    generator = torch.Generator().manual_seed(0)
    model.eval()
    bns = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in {"gamma", "alpha", "layer_scale", "layer_scale_1", "layer_scale_2"}:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.25)
            elif name.endswith("token_mixer.affine.bias"):  # RIFormer: a large constant would drown the image
                parameter.mul_(0.05)
        for bn in bns:
            sign = torch.where(torch.rand(bn.num_features, generator=generator) < 0.25, -1.0, 1.0)
            bn.weight.copy_((torch.rand(bn.num_features, generator=generator) * 0.5 + 0.25) * sign)
            bn.bias.copy_(torch.randn(bn.num_features, generator=generator) * 0.25)
            bn.momentum = None
            bn.reset_running_stats()
            bn.train()
        model(x)
        for bn in bns:
            bn.momentum = 0.1
            bn.running_var.clamp_(min=0.1 * bn.running_var.mean().item())  # dead in x, it must not explode elsewhere
    model.eval()


def images(number: int, size: int) -> torch.Tensor:
    """Random images (N, 3, size, size) with detail at every scale, every second one white noise."""
    scales = [s for s in (1, 4, 16, size) if s <= size]
    parts = [nn.functional.interpolate(torch.randn(number, 3, s, s), size, mode="bilinear") for s in scales]
    structured = torch.stack(parts).sum(0) / len(parts) ** 0.5
    return torch.where(torch.arange(number).view(-1, 1, 1, 1) % 2 == 0, structured, parts[-1])


def build(name: str, size: int) -> tuple[nn.Module, int]:
    """Return a randomised model in eval mode and the image size that suits it."""
    torch.manual_seed(0)
    if name.startswith("mmpretrain:"):
        import mmpretrain.models  # noqa: F401
        from mmpretrain.registry import MODELS

        _, kind, arch = name.split(":")
        fixed = next(fixed for k, a, fixed in MMPRETRAIN if (k, a) == (kind, arch))
        config = {"type": kind, "arch": arch}
        if kind in {"RepMLPNet", "TinyViT"}:
            config["img_size"] = fixed if kind == "RepMLPNet" else (fixed, fixed)
        model, size = MODELS.build(config), fixed or size
    else:
        model = timm.create_model(name, pretrained=False, num_classes=10)
        size = _own_size(model) or size
    randomise_(model, images(16, size))
    return model, size


def _own_size(model: nn.Module) -> int | None:
    """The model's own size where it takes no other, None where it takes any."""
    own = model.pretrained_cfg["input_size"][-1]
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
    except Exception:  # models refuse in many ways
        return own
    return None


def all_names(patterns: list[str]) -> list[str]:
    """Names of timm's own models (ours are left out) and of mmpretrain's backbones that match."""
    known = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith("timm.")]
    known += [f"mmpretrain:{kind}:{arch}" for kind, arch, _ in MMPRETRAIN]
    matching = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    unmatched = [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in known)]
    if unmatched:
        raise SystemExit(f"no model is called {unmatched[0]!r}")
    return matching


def try_one(name: str, size: int) -> tuple[str, str]:
    """Return the verdict and the rest of the row."""
    try:
        model, size = build(name, size)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    try:
        _, report = rep_plugin.reparameterize(model, images(2, size), inplace=True)
    except rep_plugin.EquivalenceError as error:
        return "wrong", str(error)
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"
    folded = sum(block.kind.startswith(("Conv-BN", "BN-Conv")) for block in report.blocks)
    row = f"{len(report.blocks) - folded} + {folded} | {report.max_rel_error:.1e} | {report.sensitivity:.1e}"
    unknown = [note for note in report.notes if note.startswith("not merged")]
    verdict = "merged" if report.sensitivity >= MIN_SENSITIVITY else "inconclusive"
    return verdict, f"{row} | {size} | {'; '.join(unknown)}"


def time_against_timm(repeats: int = 7) -> None:
    """Print the median time of merging RepVGG-A0 without proof, ours and timm's in turns."""
    model = timm.create_model("repvgg_a0")
    model.eval()
    ours, theirs = [], []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        rep_plugin.reparameterize(model, verify=False)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        timm.utils.reparameterize_model(model)
        theirs.append(time.perf_counter() - started)
    a, b = statistics.median(ours[1:]), statistics.median(theirs[1:])
    print(f"merging RepVGG-A0, median of {repeats}: {a * 1e3:.0f} ms, timm {b * 1e3:.0f} ms, ratio {a / b:.2f}")


def main() -> int:
    """Print the table; return the number of wrong models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [*PATTERNS, "mmpretrain:*"]
    parser.add_argument("--names", nargs="*", default=default, help=f"names or patterns (default: {' '.join(default)})")
    parser.add_argument("--size", type=int, default=64, help="image side where the model takes any (default: 64)")
    args = parser.parse_args()
    counts: dict[str, int] = {}
    started = time.perf_counter()
    if args.names:
        print("| model | verdict | blocks + folded BNs | relative error | sensitivity | size | notes | seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in all_names(args.names):
        began = time.perf_counter()
        verdict, rest = try_one(name, args.size)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"| {name} | {verdict} | {rest} | {time.perf_counter() - began:.0f} |", flush=True)
        gc.collect()
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()), end="; ")
    print(f"{time.perf_counter() - started:.0f} s")
    time_against_timm()
    return counts.get("wrong", 0)


if __name__ == "__main__":
    raise SystemExit(main())
