"""All that writes files: what it writes differs in every file with the generation, and is read back by stock code."""

import atexit
import json
import logging
import os
import pickle
import select
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from mmengine.config import Config
from mmpretrain.apis import init_model
from torch import nn

import rep_plugin
from rep_plugin.checkpoints import load_checkpoint_file, save_checkpoint_file
from rep_plugin.checkpoints.files import write_text, write_together
from rep_plugin.conversion.convert import convert_file, read_tensors
from rep_plugin.measure.report import Report
from rep_plugin.openmmlab import build_model, write_deployed, write_pruned
from rep_plugin.openmmlab.artefacts import write_expanded
from rep_plugin.openmmlab.checkpoint import enable_safe_loading


class Writer(NamedTuple):
    """``write(folder, generation)`` writes a set of files, and ``read(folder)`` reads it: it raises where they do not fit.

    Args:
        write: the writer.
        read: the reader.
        same: names of files that may be the same in two generations.
    """

    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any]
    same: tuple[str, ...] = ()


def _net(generation: int) -> nn.Module:
    torch.manual_seed(generation)
    width = 8 + generation
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)).eval()


@cache
def _config(generation: int, own: bool = True) -> Config:
    kinds = (
        dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1) if own else dict(type="MobileNetV2", widen_factor=0.1)
    )
    net = dict(
        type="ImageClassifier",
        backbone=kinds,
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=2 + generation, in_channels=1280),
    )
    return Config(dict(default_scope="mmpretrain", model=net))


@cache
def _model(generation: int, own: bool = True) -> nn.Module:
    torch.manual_seed(generation)
    return build_model(_config(generation, own))


def _meta(generation: int) -> dict:
    return {"classes": [f"class {number}" for number in range(2 + generation)]}


@cache
def _plan(generation: int):
    return rep_plugin.plan_pruning(_model(generation), (1, 3, 32, 32), "l1", 0.2 + generation / 20)


def _stock(name: str) -> Callable[[Path], None]:
    """Stock ``init_model`` of a config and the checkpoint beside it; a set of two generations has another head."""

    def read(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = init_model(str(folder / f"{name}.py"), str(folder / f"{name}.pth"), device="cpu")
        state = load_checkpoint_file(folder / f"{name}.pth")["state_dict"]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            assert torch.isfinite(model(torch.zeros(1, 3, 32, 32))).all()

    return read


def _texts(folder: Path, generation: int) -> None:
    names = ("deploy.pth", "deploy.py", "deploy.json")
    write_together(folder, {name: lambda path: path.write_text(f"{generation} " * 9999) for name in names})


def _same_words(folder: Path) -> None:
    assert len({word for data in contents(folder).values() for word in data.split()}) == 1


def _saved(folder: Path, generation: int) -> None:
    net, _ = rep_plugin.expand(_net(generation), "acb")
    rep_plugin.save(net, folder)


def _load(folder: Path) -> None:
    for generation in range(4):
        try:
            return rep_plugin.load(folder, model=_net(generation))
        except rep_plugin.errors.CheckpointMismatchError:
            continue
    raise AssertionError(f"{folder} is no generation's")


def _timm(folder: Path, generation: int) -> None:
    torch.manual_seed(generation)
    model = timm.create_model("test_byobnet", num_classes=2 + generation).eval()
    rep_plugin.save(rep_plugin.reparameterize(model)[0], folder)


@cache
def _sources() -> str:
    """A folder with a checkpoint of each generation, made before there are limits and kills."""
    folder = tempfile.mkdtemp(prefix="attack_sources_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for generation in range(3):
        torch.manual_seed(generation)
        torch.save(rep_plugin.backbones.RepVGG("A0").state_dict(), f"{folder}/{generation}.pth")
    return folder


def _converted(folder: Path, generation: int) -> None:
    convert_file(f"{_sources()}/{generation}.pth", folder / "official.safetensors", to="official")


def _exported(folder: Path, generation: int) -> None:
    images = torch.zeros(2, 3, 8, 8) + generation
    rep_plugin.export_onnx(
        _net(generation), folder / "net.onnx", images, runtimes=["onnxruntime"], rounds=0, with_report=True
    )


def _run_onnx(folder: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[1] == _channels(folder / "net.onnx.json")


def _channels(path: Path) -> int:
    return next(iter(json.loads(path.read_text())["outputs"].values()))[1]


def _read_pickle(folder: Path) -> None:
    content = load_checkpoint_file(folder / "a.pth")
    assert (content["weight"] == content["generation"]).all()


WRITERS: dict[str, Writer] = {
    "texts": Writer(_texts, _same_words),
    "checkpoint": Writer(
        lambda folder, generation: save_checkpoint_file(
            {"generation": generation, "weight": torch.full((50_000,), float(generation))}, folder / "a.pth"
        ),
        _read_pickle,
    ),
    "json": Writer(
        lambda folder, generation: write_text(folder / "a.json", f"{generation} " * 50_000),
        _same_words,
    ),
    "plan": Writer(
        lambda folder, generation: _plan(generation).to_json(folder / "plan.json"),
        lambda folder: rep_plugin.PrunePlan.from_json(folder / "plan.json"),
    ),
    "report": Writer(
        lambda folder, generation: Report("prune", generation, 1, notes=["a note"] * 5000).to_json(
            folder / "report.json"
        ),
        lambda folder: None,
    ),
    "save": Writer(_saved, _load),
    "timm": Writer(_timm, lambda folder: timm.create_model(f"local-dir:{folder}")),
    "convert": Writer(_converted, lambda folder: read_tensors(folder / "official.safetensors")),
    "onnx": Writer(_exported, _run_onnx),
    "deploy": Writer(
        lambda folder, generation: write_deployed(
            _model(generation), _config(generation), folder, dataset_meta=_meta(generation)
        ),
        _stock("deploy"),
    ),
    "prune": Writer(
        lambda folder, generation: write_pruned(
            _model(generation), _config(generation), _plan(generation), folder, dataset_meta=_meta(generation)
        ),
        _stock("pruned"),
    ),
    "expand": Writer(
        lambda folder, generation: write_expanded(
            _model(generation, False), _config(generation, False), "acb", None, folder
        ),
        _stock("expanded"),
    ),
}
HEAVY = ("onnx", "timm", "convert", "deploy", "prune", "expand")
LIGHT = tuple(name for name in WRITERS if name not in HEAVY)


def contents(folder: Path) -> dict[str, bytes]:
    """What a reader finds: of links what they show, and nothing of the hidden files of a writer that was killed."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0] != "." and path.exists()}


def in_child(work: Callable[[], Any], kill_after: float | None = None) -> tuple[int, Any]:
    """Call a function in a forked process; return the signal that ended it, or 0, and what it returned or raised."""
    _sources()
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        os.close(reading)
        logging.disable(logging.WARNING)  # mmengine tells of each layer
        try:
            try:
                found: Any = work()
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pickle.dumps(found))
        finally:
            os._exit(0)
    os.close(writing)
    if kill_after is not None and not select.select([reading], [], [], kill_after)[0]:
        os.kill(process, 9)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(process, 0)
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), pickle.loads(data) if data else None


enable_safe_loading()
