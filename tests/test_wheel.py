"""What pip installs is whole: a wheel in a folder of its own, and all that the README promises of it, without a checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import rep_plugin
from rep_plugin.commands import COMMANDS
from rep_plugin.version import __version__
from tests.helpers import ROOT

# All that building needs.
SOURCES = (
    "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "model-index.yml",
    "rep_plugin", "configs", "tools",
)  # fmt: skip
# One process trains twenty images a class of two classes for an epoch.
FEW = ["--classes", "2", "--train-per-class", "20", "--test-per-class", "4"]
SHORT = [
    "train_cfg.max_epochs=2", "train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1",
    "train_dataloader.batch_size=4", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0",
    "test_dataloader.num_workers=0",
]  # fmt: skip
CONFIG, WORK = "rep_mbv2_mini_cub", "work_dirs/rep_mbv2_mini_cub"


def call(words: list, folder: Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, capture_output=True, text=True, env=os.environ | env, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def pip_wheel(source: Path, folder: Path) -> Path:
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, source]
    call(words, folder.parent)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    call([sys.executable, "-c", build], source)
    return pip_wheel(source, folder / "from_tree")


@pytest.fixture(scope="module")
def site(request, tmp_path_factory):
    """The folder that the wheel is installed into: a new one, whose processes see it first and no checkout."""
    if os.environ.get("INSTALLED"):  # `make test-wheel`: it is installed whole, and these tests lie in no checkout
        return Path(rep_plugin.__file__).parents[1]
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--quiet", "--target", folder]
    call([*words, request.getfixturevalue("wheel")], folder)
    assert "rep-plugin" in os.listdir(folder / "bin")
    return folder


@pytest.fixture(scope="module")
def rep(site, tmp_path_factory):
    """Call a command of the wheel in a fresh process, in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")

    def run(*words) -> str:
        return call([sys.executable, "-m", "rep_plugin", *words], folder, PYTHONPATH=str(site), PYTHONWARNINGS="ignore")

    run.folder, run.site = folder, site
    return run


def files_in(folder: str, endings: tuple[str, ...]) -> set[str]:
    return {f"{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.*") if path.suffix in endings}


def test_the_wheel_holds_what_the_checkout_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        modes = {name: archive.getinfo(name).external_attr >> 16 for name in names}
        meta = Parser().parsestr(archive.read(f"rep_plugin-{__version__}.dist-info/METADATA").decode())
    shipped = files_in("configs", (".py", ".md", ".yml")) | files_in("tools", (".py", ".sh")) | {"model-index.yml"}
    assert {f"rep_plugin/.mim/{name}" for name in shipped} == {name for name in names if ".mim/" in name}
    assert files_in("rep_plugin", (".py", ".typed")) | {f"rep_plugin/.mim/{name}" for name in shipped} == {
        name for name in names if name.startswith("rep_plugin/")
    }
    assert all(mode & 0o111 for name, mode in modes.items() if name.endswith(".sh"))
    assert not any((mode & 0o170000) == 0o120000 for mode in modes.values()), "a link points out of the wheel"
    assert (meta["Version"], meta["Author"], meta["License"]) == (__version__, "The rep_plugin authors", "Apache-2.0")


def test_the_sdist_makes_the_same_wheel(wheel, tmp_path):
    (sdist,) = wheel.parents[1].glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        assert not [name for name in archive.getnames() if "/tests/" in name]
    again = pip_wheel(sdist, tmp_path / "from_sdist")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(rep, command):
    text = rep(command, "--help")
    assert text.startswith(f"usage: rep-plugin {command}")


@pytest.mark.parametrize("tool", ["train", "test"])
def test_mim_has_help_for_the_tools_that_it_runs(rep, tool):
    front = rep.site / f"rep_plugin/.mim/tools/{tool}.py"
    text = call([sys.executable, front, "--help"], rep.folder, PYTHONPATH=str(rep.site), PYTHONWARNINGS="ignore")
    assert text.startswith(f"usage: rep-plugin {tool}")


@pytest.fixture(scope="module")
def trained(rep):
    """The first hour: render, train, resume."""
    rep("script", "make_mini_fgvc.py", "--out", "data/mini_cub", *FEW)
    rep("train", CONFIG, "--cfg-options", *SHORT)
    work = rep.folder / WORK
    for name in ("epoch_2.pth", "deploy.pth", "deploy.py", "deploy.json"):
        (work / name).unlink()  # as if it had been stopped in the second epoch
    (work / "last_checkpoint").write_text(str(work / "epoch_1.pth"))
    assert "resumed epoch: 1" in rep("train", CONFIG, "--resume", "--cfg-options", *SHORT)
    return work / "epoch_2.pth"


def test_a_training_is_tested_pruned_merged_and_exported(rep, trained):
    assert (trained.parent / "deploy.pth").is_file()
    workers = ["--cfg-options", *SHORT]
    (rep.folder / "mine.py").write_text(f'_base_ = "rep_plugin::{CONFIG}.py"\n')
    assert "accuracy/top1" in rep("test", "mine.py", trained, *workers)
    rep("prune", CONFIG, trained, "--macs", "0.5", "--scores", "l1", "--out-dir", "pruned", *workers)
    rep("reparameterize", "pruned/pruned.py", "pruned/pruned.pth", "--out-dir", "merged", *workers)
    rep("export", "merged/deploy.py", "merged/deploy.pth", "bird.onnx")
    assert (rep.folder / "bird.onnx").stat().st_size > 100_000


PROGRAM = f"""
import sys
import rep_plugin
from pathlib import Path
site = Path(sys.argv[1])
assert Path(rep_plugin.__file__) == site / "rep_plugin/__init__.py"
assert "mmengine" not in sys.modules
assert len(rep_plugin.list_configs()) > 30
cfg = rep_plugin.get_config("{CONFIG}")
assert Path(cfg.filename) == site / "rep_plugin/.mim/configs/{CONFIG}.py"

from mmengine.config import Config
from mmpretrain.apis import ModelHub, init_model
mine = Config.fromfile("mine.py")
assert mine.model.backbone == rep_plugin.get_config("{CONFIG}").model.backbone and mine.model.head.num_classes == 3
for name in ("pruning/slim_bcnn_vgg16bn_cub_oneshot", "rep_plugin::bcnn/bcnn_vgg16bn_cub.py"):  # ../_base_, mmpretrain::
    assert rep_plugin.get_config(name.removeprefix("rep_plugin::")).model.type
ModelHub.register_model_index(str(site / "rep_plugin/.mim/model-index.yml"))
assert ModelHub.get("{CONFIG}").config.filename == cfg.filename
model = init_model("{WORK}/deploy.py", "{WORK}/deploy.pth", device="cpu")
print(sum(p.numel() for p in model.parameters()))
"""


def test_python_finds_configs_and_stock_code_the_files(rep, trained):
    (rep.folder / "mine.py").write_text(f'_base_ = "rep_plugin::{CONFIG}.py"\nmodel = dict(head=dict(num_classes=3))\n')
    out = call([sys.executable, "-c", PROGRAM, rep.site], rep.folder, PYTHONPATH=str(rep.site), PYTHONWARNINGS="ignore")
    assert out.split()[-1] == "596940"
