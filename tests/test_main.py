"""The console command: fast answers, "did you mean", scripts, and the package's names, lazy where it is started so."""

import argparse
import os
import re
import subprocess
import sys

import pytest

import rep_plugin
from rep_plugin.__main__ import build_parser, main
from rep_plugin.commands import COMMANDS
from tests.helpers import ROOT

HEAVY = ("torch", "timm", "mmengine", "mmcv", "numpy", "rich")


def python(*words: object, code: int = 0, **options) -> str:
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def imported_by(*words: object, code: int = 0) -> tuple[set[str], str]:
    """The heavy packages that a process imports, and what it prints."""
    text = python("-X", "importtime", *words, code=code)
    packages = {found.split(".")[0] for found in re.findall(r"^import time:.*\| +([\w.]+)$", text, re.M)}
    return packages & {*HEAVY}, re.sub(r"(?m)^import time:.*\n", "", text)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_and_a_mistyped_option_need_no_torch(command):
    words = [command] if command else []
    heavy, text = imported_by("-m", "rep_plugin", *words, "--help")
    assert not heavy and text.startswith(f"usage: {' '.join(['rep-plugin', *words])}")
    heavy, text = imported_by("-m", "rep_plugin", *words, "--nonsens", code=2)
    assert not heavy and "error: " in text and "Traceback" not in text


def test_the_fronts_in_tools_are_the_commands():
    names = {"compare_deployed": "compare", "convert_checkpoint": "convert"}
    fronts = sorted(path for path in (ROOT / "tools").glob("*.py"))
    assert {names.get(path.stem, path.stem) for path in fronts} == {
        "train", "test", "experiments", "sweep", "prune", "depth", "reparameterize", "compare", "export", "convert",
    }  # fmt: skip
    for path in fronts:
        heavy, text = imported_by(path, "--help")
        assert not heavy and text.startswith(f"usage: rep-plugin {names.get(path.stem, path.stem)} ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian config.py", "invalid choice: 'trian', did you mean 'train'?"),
        ("train config.py --reusme", "unrecognized arguments: --reusme, did you mean '--resume'?"),
        ("prune a.py b.pth --mac=0.5 --min-chanels=4", "--min-chanels=4, did you mean '--min-channels'?"),
        ("convert a b --to offical", "invalid choice: 'offical', did you mean 'official'?"),
        ("export a b.onnx --runtimes onnxruntme", "invalid choice: 'onnxruntme', did you mean 'onnxruntime'?"),
        ("train.py IMAGES --model x", "train.py is no command: to run a script write 'rep-plugin script train.py ...'"),
        ("script nowhere.py --model x", "script nowhere.py does not exist, expected a file"),
        (f"script {'x' * 300}", "xxx does not exist, expected a file"),
    ],
)
def test_did_you_mean(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_script_finds_our_names_its_arguments_and_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("word = 'found'")
    (tmp_path / "train.py").write_text(
        "import sys, timm, neighbour\n"
        "if __name__ == '__main__':\n"
        "    print(timm.is_model('rep_mobilenetv2_050'), neighbour.word, sys.argv[1:])\n"
        "    open('nowhere')\n"
    )
    words = ["--model", "rep_repvgg_a0", "--", "--help"]
    text = python("-m", "rep_plugin", "script", tmp_path / "train.py", *words, code=1)
    assert f"True found {words}" in text
    assert "Traceback" in text and "FileNotFoundError" in text  # a script's errors are its own


def test_a_script_in_processes_that_torchrun_connects(tmp_path):
    (tmp_path / "train.py").write_text(
        "import os, timm; print('rank', os.environ['RANK'], timm.is_model('acb_resnet18'))"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rep_plugin", "script"]
    text = python(*launch, tmp_path / "train.py")
    assert "rank 0 True" in text and "rank 1 True" in text


def test_the_installed_package_is_found_beside_a_folder_of_its_name(tmp_path):
    """As in the folder that a clone lies in."""
    (tmp_path / "rep_plugin").mkdir()
    code = "import rep_plugin; print(rep_plugin.reparameterize.__name__)"
    assert python("-c", code, cwd=tmp_path) == "reparameterize\n"


def test_names_are_the_same_however_the_package_is_started():
    code = """
import sys
sys.argv = [sys.argv[1]]
import rep_plugin
print("torch" in sys.modules)
try: rep_plugin.nonsense
except AttributeError as error: print(error)
from rep_plugin import reparameterize, timm
print(timm.__name__, reparameterize.__module__, rep_plugin.timm is timm)
names = {}
exec("from rep_plugin import *", names)
print(sorted(set(dir(rep_plugin)) & set(rep_plugin.__all__)) == sorted(rep_plugin.__all__), {*rep_plugin.__all__} <= {*names})
"""
    for name, heavy in (("rep-plugin", False), ("train.py", True)):
        assert python("-c", code, name).splitlines() == [
            str(heavy),
            "module 'rep_plugin' has no attribute 'nonsense'",
            "rep_plugin.timm rep_plugin.reparam.reparameterize True",
            "True True",
        ]
    assert {*rep_plugin.__all__} <= {*dir(rep_plugin)}


def test_importing_takes_little_more_than_torch_and_timm():
    """Nothing but our own files, beside what torch and timm import themselves."""
    code = """
import sys, torch, timm
before = set(sys.modules)
import rep_plugin
ours = {name for name in set(sys.modules) - before if name.split(".")[0] not in {"rep_plugin", *sys.stdlib_module_names}}
print(sorted(ours))
"""
    # These two take 20 ms.
    assert python("-c", code) == "['torch.utils.flop_counter', 'torch.utils.module_tracker']\n"


def test_a_start_warns_of_nothing_that_a_user_cannot_change(tmp_path):
    run = [sys.executable, "-m", "rep_plugin", "summary", "rep_mbv2_mini_cub"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | {
        "PYTHONPATH": str(ROOT)
    }
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "RepInvertedResidual" in result.stdout and not result.stderr


def test_a_default_is_one_of_its_choices():
    """argparse does not check it."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    wrong = [
        (name, action.dest, action.default)
        for name, parser in commands.choices.items()
        for action in parser._actions
        if action.choices
        and action.default is not None
        and not {*(action.default if action.nargs else [action.default])} <= {*action.choices}
    ]
    assert not wrong
