"""The commands of README and Makefile exist."""

import re
import subprocess

import pytest

from tests.helpers import ROOT


def test_every_make_target_and_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", text))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "lint"} <= targets <= known
    for path in re.findall(r"(?:tools|configs|rep_plugin|benchmarks|tests)/[\w/]+\.(?:py|sh)", text):
        assert (ROOT / path).is_file(), path


EXAMPLES = re.findall(r"```python\n(import (?:timm|seg).*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.filterwarnings("error::rep_plugin.InconclusiveWarning")
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_the_python_examples_of_the_readme_run(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(EXAMPLES[index], f"README.md, example {index}", "exec"), scope)
    assert scope["report"].max_rel_error < 1e-9


def test_what_the_examples_of_the_readme_say():
    first, *_ = EXAMPLES
    scope: dict = {}
    exec(compile(first, "README.md", "exec"), scope)
    assert len(EXAMPLES) >= 4 and scope["merged"](scope["x"]).shape == (8, 10)
    assert "2,238,266" in first and scope["report"].params_before == 2238266


def test_dry_run_of_the_two_commands_names_the_real_tools():
    for target, tool in (("demo", "tools/train.py configs/rep_mbv2_mini_cub.py"), ("test", "-m pytest")):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and tool in done.stdout
