"""The pages in docs/ and configs/: examples run, plots and links exist, every config has a row of results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FOLDERS = sorted((ROOT / "configs").rglob("README.md"))


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.stem)
def test_a_page_is_one_program_that_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for index, code in enumerate(code_of(page)):
        exec(compile(code, f"{page.name}, example {index}", "exec"), scope)
    assert scope["report"].params_after > 0


@pytest.mark.parametrize("page", [*PAGES, *FOLDERS], ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_links_and_files_of_a_page_exist(page):
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    for target in links:
        assert (page.parent / target).is_file(), target
    for name in re.findall(r"(?:configs|tools|benchmarks)/[\w/]+\.(?:py|sh)", text):
        assert (ROOT / name).is_file(), name


def test_every_config_has_a_row_in_the_readme_of_its_folder():
    configs = [path for path in (ROOT / "configs").rglob("*.py") if path.parent.name != "_base_"]
    assert {path.parent for path in configs} == {page.parent for page in FOLDERS}
    missing = [path.stem for path in configs if f"\n| `{path.stem}`" not in (path.parent / "README.md").read_text()]
    assert not missing


def test_every_page_can_be_reached_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(f"docs/{page.name}" in text for page in PAGES)


def test_plots_of_blocks_are_those_the_script_draws(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "docs/draw_blocks.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.glob("*.png")}
    text = "".join(page.read_text() for page in PAGES)
    assert drawn and all((ROOT / "docs/plots" / name).is_file() and f"plots/{name}" in text for name in drawn)
