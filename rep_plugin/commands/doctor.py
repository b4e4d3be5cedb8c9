"""Show what is installed, what works here and what is missing, with the command that installs it.

rep-plugin doctor            # at once: nothing is imported
rep-plugin doctor --check    # imports all, and merges, prunes and exports a small network
"""

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

HELP = "show versions, what works here, and what is missing"
# Import name -> (distributions that bring it, our extra, what it is for).
PACKAGES = {
    "torch": (("torch",), "", "everything"),
    "timm": (("timm",), "timm", "timm names, folders and scripts"),
    "mmengine": (("mmengine", "onedl-mmengine"), "openmmlab", "configs"),
    "mmcv": (("mmcv-lite", "mmcv", "onedl-mmcv"), "openmmlab", "configs"),
    "mmpretrain": (("mmpretrain", "onedl-mmpretrain"), "openmmlab", "classifiers in configs"),
    "torchvision": (("torchvision",), "openmmlab", "timm's data, detectors"),
    "mmdet": (("mmdet", "onedl-mmdetection"), "downstream", "detectors in configs"),
    "mmseg": (("mmsegmentation", "onedl-mmsegmentation"), "downstream", "segmentors in configs"),
    "onnx": (("onnx",), "export", "export"),
    "onnxscript": (("onnxscript",), "export", "export"),
    "onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "export", "export, compared there"),
    "openvino": (("openvino",), "export", "export, compared there"),
    "matplotlib": (("matplotlib",), "openmmlab", "plots"),
}
OPTIONAL = ("mmdet", "mmseg")  # missing ones are no trouble for most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --check."""
    parser.add_argument("--check", action="store_true", help="import all, and merge, prune and export a small network")


def run(args: argparse.Namespace) -> None:
    """Print what is found; end with 1 where something is wrong."""
    found = {name: _installed(distributions) for name, (distributions, _, _) in PACKAGES.items()}
    print(f"Python {platform.python_version()}, {platform.platform()}")
    for name, (_, extra, purpose) in PACKAGES.items():
        distributions = found[name]
        text = ", ".join(f"{one} {number}" for one, number in distributions.items())
        if not text:
            text = f"missing, for {purpose}: pip install {f'{chr(39)}rep-plugin[{extra}]{chr(39)}' if extra else name}"
        print(f"  {name:<12} {text}")
    print(f"stack: {_stack(found)}")
    print(f"cores: {os.cpu_count()}, {_threads()}")
    print(f"GPU: {_gpu(found)}")
    runtimes = [name for name in ("onnxruntime", "openvino") if found[name]]
    exports = "yes, compared in " + " and ".join(runtimes) if runtimes and found["onnx"] else "no"
    print(f"export: {exports}")
    troubles = list(_troubles(found))
    if args.check:
        troubles += _check(found)
    for trouble in troubles:
        print(f"trouble: {trouble}")
    if troubles:
        sys.exit(1)
    print("no trouble found" + ("" if args.check else "; --check runs a small network"))


def _installed(distributions: tuple[str, ...]) -> dict[str, str]:
    """The {distribution: version} of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _stack(found: dict[str, dict[str, str]]) -> str:
    names = [name for package in ("mmengine", "mmcv", "mmpretrain") for name in found[package]]
    forked = [name for name in names if name.startswith("onedl-")]
    if not names:
        return "none: configs need pip install 'rep-plugin[openmmlab]'"
    if not forked:
        return "official"
    return "onedl, the maintained fork" if len(forked) == len(names) else "official and onedl, mixed"


def _threads() -> str:
    number = os.environ.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={number}" if number else "OMP_NUM_THREADS is not set: torch takes all"


def _gpu(found: dict[str, dict[str, str]]) -> str:
    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if platform.system() == "Darwin":
        return "see --check"
    if not devices:
        return "none: --amp is bfloat16 and slow, --launcher needs env_cfg.dist_cfg.backend=gloo"
    build = next(iter(found["torch"].values()), "")
    return f"{len(devices)} ({', '.join(devices)})" + (", but torch is built for the CPU" if "+cpu" in build else "")


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version: 2.14.1+cu130 is (2, 14, 1)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", text).group().strip(".").split(".") if part)


def _troubles(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """What is installed and does not go together."""
    if not found["torch"]:
        yield "torch is missing: pip install torch"
    try:
        wanted = requires("rep-plugin") or []
    except PackageNotFoundError:
        yield "rep-plugin is not installed, it runs from a folder: pip install -e '.[openmmlab]' there"
        wanted = []
    for name, least in re.findall(r"^([\w.-]+) *>= *([\d.]+)", "\n".join(wanted), re.M):
        for present, number in _installed((name,)).items():
            if _numbers(number) < _numbers(least):
                yield f"{present} is {number}, expected {least} or newer: pip install '{present}>={least}'"
    if found["mmengine"] and find_spec("pkg_resources") is None:
        yield "mmengine imports pkg_resources, which setuptools 81 dropped: pip install 'setuptools<81'"
    if "mixed" in _stack(found):
        names = [
            f"{name} {number}" for one in ("mmengine", "mmcv", "mmpretrain") for name, number in found[one].items()
        ]
        yield f"two stacks write the same files ({', '.join(names)}): uninstall one, then install the other anew"
    if (found["mmdet"] or found["mmseg"]) and (spec := find_spec("mmcv")):
        folders = spec.submodule_search_locations or []
        if not any(next(Path(folder).glob("_ext*"), None) for folder in folders):
            yield "mmdet and mmseg need mmcv's compiled operators, which are not here: make test-downstream builds them"
    if found["onnx"] and not found["onnxruntime"] and not found["openvino"]:
        yield "export compares in a runtime, and there is none: pip install 'rep-plugin[export]'"


def _check(found: dict[str, dict[str, str]]) -> list[str]:
    """Import what is installed, and use it; return what failed."""
    troubles: list[str] = []

    def step(name: str, work: Callable[[], str]) -> None:
        started = time.perf_counter()
        try:
            text = work()
        except Exception as error:  # whatever a broken installation raises is what is looked for
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            troubles.append(f"{name}: {type(error).__name__}: {lines[0] if lines else ''}")
            text = "failed"
        print(f"  {name:<12} {text} ({time.perf_counter() - started:.1f} s)")

    print("check:")
    for name in [name for name, distributions in found.items() if distributions]:
        step(name, lambda name=name: __import__(name) and "imported")
    if not any(trouble.startswith("torch:") for trouble in troubles):
        _use(step, found)
    return troubles


def _use(step: Callable[[str, Callable[[], str]], None], found: dict[str, dict[str, str]]) -> None:
    import tempfile

    import torch

    from rep_plugin.backbones.rep_mobilenet_v2 import RepMobileNetV2
    from rep_plugin.export import export_onnx
    from rep_plugin.pruning import apply_plan, plan_pruning
    from rep_plugin.reparam import reparameterize
    from rep_plugin.testing import calibrate_random_bn_

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = calibrate_random_bn_(RepMobileNetV2(widen_factor=0.1), x).eval()

    def prune() -> str:
        report = apply_plan(model, plan_pruning(model, x, "l1", 0.3, min_channels=1))
        return f"{report.params_before:,} -> {report.params_after:,} parameters, error {report.max_rel_error:.0e}"

    def merge() -> str:
        report = reparameterize(model, x)[1]
        return f"{len(report.blocks)} blocks, error {report.max_rel_error:.0e}"

    def export() -> str:
        runtimes = [name for name in ("onnxruntime", "openvino") if found[name]]
        with tempfile.TemporaryDirectory() as folder:
            report = export_onnx(model, Path(folder, "net.onnx"), x, runtimes=runtimes, rounds=0)
        return f"{' and '.join(runtimes)}, error {report.max_rel_error:.0e}"

    step("GPU", lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use")
    step("prune", prune)
    step("merge", merge)
    if found["onnx"] and (found["onnxruntime"] or found["openvino"]):
        step("export", export)
