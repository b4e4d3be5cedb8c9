"""``rep-plugin doctor``: what it says of environments that lack something, and of this one."""

import subprocess
import sys

import pytest

from rep_plugin.__main__ import main
from rep_plugin.commands import doctor

OFFICIAL = {"torch": "2.14.1+cpu", "mmengine": "0.10.7", "mmcv-lite": "2.2.0", "mmpretrain": "1.2.0"}


@pytest.fixture
def told(monkeypatch, capsys):
    """What it says of an environment, given as {distribution: version} and names that cannot be found."""

    def ask(installed, missing=(), wanted=("torch>=2.13",)):
        monkeypatch.setattr(doctor, "_installed", lambda names: {n: installed[n] for n in names if n in installed})
        monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in missing else doctor)
        monkeypatch.setattr(doctor, "requires", lambda name: wanted)
        try:
            main(["doctor"])
            code = 0
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr().out
        assert code == ("trouble: " in text)
        return text

    return ask


def test_it_names_the_stack_and_what_installs_the_rest(told):
    text = told(OFFICIAL)
    assert "stack: official\n" in text and "mmcv         mmcv-lite 2.2.0" in text and "no trouble found" in text
    assert "timm         missing, for timm names, folders and scripts: pip install 'rep-plugin[timm]'" in text
    assert "export: no" in text
    forked = {"torch": "2.14.1", "onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6", "onedl-mmpretrain": "1.3.6"}
    assert "stack: onedl, the maintained fork" in told(forked)
    assert "stack: none: configs need pip install 'rep-plugin[openmmlab]'" in told({"torch": "2.14.1"})


def test_it_names_troubles(told):
    assert "pip install 'setuptools<81'" in told(OFFICIAL, missing=["pkg_resources"])
    assert "trouble: two stacks write the same files (mmengine 0.10.7, onedl-mmengine 0.10.12," in told(
        OFFICIAL | {"onedl-mmengine": "0.10.12"}
    )
    assert "trouble: torch is 2.9.0, expected 2.13 or newer: pip install 'torch>=2.13'" in told({"torch": "2.9.0"})
    assert "trouble: torch is missing: pip install torch" in told({})
    assert "pip install 'rep-plugin[export]'" in told(OFFICIAL | {"onnx": "1.20"})


def test_this_environment_works():
    command = [sys.executable, "-W", "ignore", "-m", "rep_plugin", "doctor", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merge        19 blocks, error" in done.stdout and "parameters, error" in done.stdout
    assert "onnxruntime and openvino, error" in done.stdout and done.stdout.endswith("no trouble found\n")
