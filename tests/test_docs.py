"""README and pages: examples run, links and anchors lead somewhere, plots are those that are drawn, configs have rows."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from rep_plugin.__main__ import build_parser
from rep_plugin.openmmlab.artefacts import write_deployed
from rep_plugin.openmmlab.base_configs import read_config
from rep_plugin.openmmlab.experiments import list_sets
from rep_plugin.openmmlab.load import build_model
from rep_plugin.registry import HOOKS, MODELS
from rep_plugin.shipped import find_config
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = sorted((ROOT / "configs").rglob("README.md"))
TEXTS = [*PAGES, *FOLDERS, *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))]


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


def with_fences(language: str):
    pages = [page for page in PAGES if fences(page, language)]
    return pytest.mark.parametrize("page", pages, ids=[page.stem for page in pages])


@pytest.fixture
def birds(tmp_path):
    """What the demo leaves behind, from random weights, and an image."""
    cfg = Config.fromfile(ROOT / "configs/rep_mbv2_mini_cub.py")
    model = calibrate_random_bn_(build_model(cfg), torch.randn(2, 3, 64, 64))
    write_deployed(model, cfg, tmp_path / "work_dirs/rep_mbv2_mini_cub", dataset_meta={"classes": cfg.classes})


@pytest.mark.filterwarnings("error::rep_plugin.InconclusiveWarning")
@with_fences("python")
def test_a_page_is_one_program_that_runs(page, tmp_path, monkeypatch, request):
    if "work_dirs/rep_mbv2_mini_cub" in "".join(fences(page, "python")):
        request.getfixturevalue("birds")
    Image.new("RGB", (120, 100), (90, 140, 60)).save(tmp_path / "image.jpg")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for index, code in enumerate(fences(page, "python")):
        exec(compile(code, f"{page.name}, example {index}", "exec"), scope)
        if report := scope.get("report"):
            assert report.max_rel_error < (1e-4 if report.action == "export_onnx" else 1e-9)
    assert "model" in scope or "report" in scope
    written = {path.name for path in tmp_path.iterdir()} - before
    assert written <= {"work_dirs"}, "examples write below work_dirs"


def test_what_the_example_of_the_readme_says():
    (code,) = fences(README, "python")
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["merged"](scope["x"]).shape == (8, 10)
    assert f"{scope['report'].params_before:,} parameters become {scope['report'].params_after:,}" in code


@with_fences("py")
def test_parts_of_configs_name_types_that_exist(page, tmp_path):
    for code in fences(page, "py"):
        (tmp_path / "part.py").write_text(code)
        read_config(str(tmp_path / "part.py"))
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            names = re.findall(r"rep_plugin\.\w+", code)
            assert all(MODELS.get(name) or HOOKS.get(name) for name in names), names


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of headings, as the usual hosts of repositories make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_links_anchors_and_files_of_a_page_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target
    if page.name != "CHANGELOG.md":
        for name in re.findall(r"(?:configs|tools|benchmarks|tests)/[\w/]+\.(?:py|sh)", text):
            assert (ROOT / name).is_file(), name


def commands(page: Path) -> list[str]:
    """The lines of a page's fences, or of a config's first comment, that call our command."""
    text = page.read_text()
    if page.suffix == ".py":
        code = re.sub(r"^#(?=   )", "", re.match(r"(#.*\n)*", text)[0], flags=re.M)
    else:
        code = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.S | re.M))
    return re.findall(r"^ *(rep-plugin .*)$", code.replace("\\\n", " "), re.M)


WITH_COMMANDS = [page for page in [*TEXTS, *sorted((ROOT / "configs").rglob("*.py"))] if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_commands_of_a_page_have_these_arguments(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "script" and words[1].startswith("timm/"):
            continue
        args = build_parser().parse_args(words)
        if check := getattr(args.module, "check_arguments", None):
            check(args)
        for path in (getattr(args, "config", None), getattr(args, "sparse", None)):
            assert not path or re.match(r"work_dirs/|mine\.py|CONFIG", path) or find_config(path), line


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_targets_of_make_exist(page):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = page.read_text()
    assert set(re.findall(r"(?:`|&& |^)make ([a-z-]+)", text, re.M)) <= known


def test_the_readme_has_a_screen_and_a_half():
    assert len(README.read_text().splitlines()) <= 95


def test_every_config_has_a_row_in_the_readme_of_its_folder():
    configs = [path for path in (ROOT / "configs").rglob("*.py") if path.parent.name not in ("_base_", "experiments")]
    assert {path.parent for path in configs} == {page.parent for page in FOLDERS}
    missing = [path.stem for path in configs if f"\n| `{path.stem}`" not in (path.parent / "README.md").read_text()]
    assert not missing
    assert not [page for page in FOLDERS if not re.search(r"^\| config \|.* experiments \|$", page.read_text(), re.M)]


def test_every_set_of_experiments_has_its_question():
    page = (ROOT / "docs/benchmarks.md").read_text()
    others = [path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks/experiments").glob("*.py")]
    assert not [name for name in [*list_sets(), *others] if f"\n| `{name}` |" not in page]


def test_every_table_and_page_of_results_is_that_of_its_records():
    done = subprocess.run(
        [sys.executable, ROOT / "docs/results.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


MEASURED = re.compile(r"[+-]?\d+\.\d+(e-?\d+)?( ?(±.*|%|ms|s|x|MB))?|\d+ ?(%|ms|s|x|MB)")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_table_of_measurements_has_a_record(page):
    """Outside of what docs/results.py fills no cell is a time, a share or an error."""
    text = re.sub(r"<!-- results: .*?<!-- end of results -->", "", page.read_text(), flags=re.S)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert not [row for row in rows if any(MEASURED.fullmatch(cell) for cell in row)]


@pytest.mark.parametrize(("place", "name"), [("README.md", "docs/{}"), ("mkdocs.yml", " {}")])
def test_every_page_can_be_reached_from_the_readme_and_in_the_site(place, name):
    text = (ROOT / place).read_text()
    missing = [page.name for page in PAGES[1:] if name.format(page.name) not in text]
    assert not missing


@pytest.mark.parametrize("script", ["draw_blocks", "draw_measured"])
def test_plots_are_those_the_script_draws(script, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"docs/{script}.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.glob("*.png")}
    text = "".join(page.read_text() for page in PAGES)
    assert drawn and all((ROOT / "docs/plots" / name).is_file() and f"plots/{name}" in text for name in drawn)
