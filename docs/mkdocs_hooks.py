"""What the site has beside docs/: README and the like, a table of all configs, the API of every room, every command.

Links are written for the repository. A page's links are turned into those of the site here, and mkdocs checks them.
"""

import ast
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import griffe
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rep_plugin"
# Page of the site -> file of the repository.
SOURCES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "configs/index.md": "configs/README.md",
} | {f"configs/{name}.md": f"configs/{name}/README.md" for name in ("bcnn", "pruning", "depth", "downstream")}
PAGES = {source: page for page, source in SOURCES.items()}
HELP = """
import json, sys
sys.argv = ["rep-plugin"]
from rep_plugin.__main__ import build_parser
parser = build_parser()
(commands,) = (action for action in parser._actions if action.dest == "command")
print(json.dumps({"": parser.format_help()} | {name: own.format_help() for name, own in commands.choices.items()}))
"""


class Examples(griffe.Extension):
    """Lets griffe read an ``Example:`` of a docstring as the section that it calls ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rename the heading."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)


def rooms() -> dict[str, Path]:
    """Return the rooms that export names: dotted name -> its file."""
    files = [PACKAGE / "face.py", *(path for path in sorted(PACKAGE.glob("*/**/__init__.py")) if exported(path))]
    return {".".join(path.parent.relative_to(ROOT).parts): path for path in files}


def exported(path: Path) -> list[str]:
    """Return the functions and classes in a file's ``__all__``, not the modules."""
    names = [
        name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    ]
    modules = {child.stem for child in path.parent.iterdir()}
    return [name for name in names if name not in modules and not name.startswith("__")]


def home_of(name: str, path: Path) -> str:
    """Return the full name of what a face exports: where it is defined, through all faces that hand it on."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    modules = [node.module for node in imports if name in [alias.name for alias in node.names]]
    if modules:
        below = ROOT.joinpath(*modules[0].split("."))
        return home_of(name, below / "__init__.py" if below.is_dir() else below.with_suffix(".py"))
    if path.name == "__init__.py":  # imported on first use
        (path,) = (
            file for file in path.parent.glob("*.py") if re.search(rf"^(def|class) {name}\b", file.read_text(), re.M)
        )
    return ".".join((*path.relative_to(ROOT).with_suffix("").parts, name))


def room_pages() -> dict[str, str]:
    """Return the pages of all rooms: what a room is for, and its names. What several rooms export stands on one page."""
    pages, seen = {}, set()
    for room, path in rooms().items():
        homes = {name: home_of(name, path) for name in exported(path)}
        names = [f"`{name}`: see [{home}][]" if home in seen else f"::: {home}" for name, home in homes.items()]
        seen |= set(homes.values())
        text = [f"# {room}", ast.get_docstring(ast.parse(path.read_text())), *names]
        pages[f"reference/{room}.md"] = "\n\n".join(text) + "\n"
    return pages


def commands_page() -> str:
    """Return the help of all commands, as the commands print it."""
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    texts = json.loads(done.stdout)
    parts = ["# Commands", "`python -m rep_plugin COMMAND` is the same as `rep-plugin COMMAND`."]
    for name, text in texts.items():
        parts += [f"## {name}"] * bool(name) + [f"```\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def results() -> dict[str, dict[str, str]]:
    """Return the rows of the result tables in configs/: config -> header -> cell."""
    found = {}
    for page in (ROOT / "configs").rglob("README.md"):
        for header, rows in re.findall(r"^\| (config \|.*)\n\|[- |]+\n((?:\|.*\n?)+)", page.read_text(), re.M):
            names = [name.strip() for name in header.strip("| ").split("|")]
            for row in rows.splitlines():
                cells = [cell.strip() for cell in row[1:].rstrip().removesuffix("|").split("|")]
                found[cells[0].strip("`")] = dict(zip(names, cells))
    return found


def configs_page() -> str:
    """Return one table a folder of all configs, from model-index.yml and the results in configs/."""
    lines = [
        "# All configs",
        "",
        "The name is what commands and `rep_plugin.get_config` take. Parameters are those of the network that trains.",
        "Results are those of the [experiments](docs/benchmarks.md#experiments) named.",
    ]
    rows, folder = results(), None
    models = yaml.safe_load((ROOT / "model-index.yml").read_text())["Models"]
    for model in sorted(models, key=lambda model: model["Config"].rpartition("/")):
        if folder != (folder := model["Config"].rpartition("/")[0]):
            title = (ROOT / folder / "README.md").read_text().partition("\n")[0].removeprefix("# ")
            header = "| config | network or method | data | parameters | experiments |"
            lines += ["", f"## {title}", "", f"[How to run them]({folder}/README.md).", "", header, "| --- " * 5 + "|"]
        meta = model["Metadata"]
        cells = (
            f"`{model['Name']}`",
            model["In Collection"],
            re.sub(r" \(tools/.*\)", "", meta["Training Data"]),
            f"{meta['Parameters']:,}",
            rows[model["Name"]]["experiments"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def types_page() -> str:
    """Return the page of what configs name, hooks apart."""
    text = [
        "# Types for configs",
        'A config writes `type="rep_plugin.NAME"`. Hooks have [a page of their own](rep_plugin.openmmlab.hooks.md).',
    ]
    for path in sorted((PACKAGE / "openmmlab").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if any("register_module" in ast.unparse(mark) for mark in getattr(node, "decorator_list", ())):
                text.append(f"::: rep_plugin.openmmlab.{path.stem}.{node.name}")
    return "\n\n".join(text) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API and the results to the navigation."""
    (reference,) = (entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"API": [{name: f"reference/{name}.md"} for name in rooms()]})
    (measured,) = (entry["Results"] for entry in config.nav if "Results" in entry)
    measured += [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs/results").glob("*.md"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    texts = {page: (ROOT / source).read_text() for page, source in SOURCES.items()}
    texts |= room_pages() | {"reference/types.md": types_page()}
    texts |= {"commands.md": commands_page(), "configs/all.md": configs_page()}
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of the repository into those of the site, outside of code."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(SOURCES.get(here, "" if here == "configs/all.md" else f"docs/{here}"))

    def link(match: re.Match) -> str:
        path, separator, anchor = match[1].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        source = posixpath.normpath(posixpath.join(folder, path))
        target = PAGES.get(source, source.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{separator}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else re.sub(r"\]\(([^)\s]+)\)", link, part) for part in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drop the roles in docstrings: names stay, as code."""
    return re.sub(r":(?:func|class|mod|meth):(?=<code>)", "", html)
