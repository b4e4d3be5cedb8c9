"""Every option of every command and of every script with wrong words, here: one line, nothing written, or it runs.

The options are those of the parsers. A word takes the place of an option's valid one, or comes after it.
"""

import argparse
import contextlib
import functools
import io
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import mmengine.config.config
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from PIL import Image

from rep_plugin.__main__ import build_parser, main
from rep_plugin.backbones import RepVGG
from rep_plugin.checkpoints import save_checkpoint_file
from rep_plugin.commands import COMMANDS
from rep_plugin.openmmlab import build_model
from tests.helpers import ROOT
from tests.test_openmmlab.test_hooks import tiny
from tests.test_tools.test_export_tool import CONFIG

# What may be typed. Files and folders are those of `prepare`.
WORDS = (
    "", " ", "glbal", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", str(2**40), "x=1", "=", "x=", "a=b=c", "[1,", "é",
    "missing.pth", "no/such/folder/file.json", "folder", "notes.txt", "torn.pth", "list.json", "/dev/null", "/proc/x",
    "x" * 300, "%s", "$HOME", "*", "local-dir:", "local-dir:folder", "http://",
)  # fmt: skip


class Valid(NamedTuple):
    """A command line that works: its positional words, and the words of its options."""

    command: str
    words: tuple[str, ...] = ()
    options: dict[str, tuple[str, ...]] = {}


@functools.cache
def pristine() -> tempfile.TemporaryDirectory:
    """A folder with all files, for every command line of this process."""
    made, here = tempfile.TemporaryDirectory(prefix="commands_"), Path.cwd()
    os.chdir(made.name)
    try:
        prepare(Path(made.name))
    finally:
        os.chdir(here)
    return made


def prepare(folder: Path) -> None:
    """Files that commands read, and files that are none of theirs."""
    (folder / "folder").mkdir()
    (folder / "notes.py").write_text("print(1)\n")
    (folder / "notes.txt").write_text("no data\n")
    (folder / "list.json").write_text("[1]")
    (folder / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    for kind in ("crow", "owl"):
        (folder / "images" / kind).mkdir(parents=True)
        Image.fromarray(np.full((40, 48, 3), 90, np.uint8)).save(folder / "images" / kind / "0.png")
    (folder / "config.py").write_text(CONFIG)
    trained(folder, "config.py", "epoch_1.pth")
    torch.save(RepVGG("A0").state_dict(), folder / "repvgg.pth")
    short = dict(train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1))
    cfg = tiny.config(folder / "tiny", **short)
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=cfg.val_evaluator, test_cfg=dict())
    cfg.dump(folder / "tiny.py")
    trained(folder, "tiny.py", "tiny.pth")
    tiny.config(folder / "tiny", dict(type="rep_plugin.SparsityHook", strength=0.5), **short).dump(folder / "sparse.py")
    prune = dict(type="rep_plugin.PruneHook", prune_fraction=0.5, begin=0, scores="l1")
    tiny.config(folder / "tiny", prune, load_from="tiny.pth", **short).dump(folder / "prune.py")
    (folder / "set.py").write_text(
        f"title = 'Tiny'\nseeds = 1\nrows = {{'dense': dict(config={str(folder / 'tiny.py')!r})}}\n"
    )
    with quiet():
        main(["reparameterize", "config.py", "epoch_1.pth", "--out-dir", "run"])
        main(["export", "tiny.py", "tiny.pth", "tiny.onnx", "--rounds", "0", "--runtimes", "onnxruntime"])
    shutil.copy(folder / "epoch_1.pth", folder / "run")


def trained(folder: Path, config: str, checkpoint: str) -> None:
    torch.manual_seed(0)
    state = build_model(Config.fromfile(folder / config)).state_dict()
    save_checkpoint_file({"state_dict": state, "meta": {}}, folder / checkpoint)


OUT, TIMM = {"--out-dir": ("out",), "--overwrite": ()}, "rep_mobilenetv2_035"
RANDOM = {"--no-real-data": (), "--shape": ("3", "32", "36"), "--no-accuracy": (), "--bn-images": ("0",)}
VALID = {
    "train": Valid("train", ("tiny.py",), {"--work-dir": ("work",)}),
    "test": Valid("test", ("tiny.py", "tiny.pth"), {"--work-dir": ("work",), "--out": ("out.pkl",)}),
    "test, onnx": Valid(
        "test", ("tiny.onnx",),
        {"--config": ("tiny.py",), "--runtime": ("onnxruntime",), "--work-dir": ("work",), "--out": ("out.pkl",)},
    ),
    "experiments": Valid("experiments", ("set.py",), {"--work-dir": ("work",), "--budget-minutes": ("1e-4",)}),
    "sweep": Valid("sweep", ("prune.py",), {"--rates": ("0.5",), "--work-dir": ("work",)}),
    "sweep, sparse": Valid(
        "sweep", ("prune.py",),
        {"--rates": ("0.5",), "--sparse": ("sparse.py",), "--strengths": ("0.1",), "--work-dir": ("work",)},
    ),
    "prune": Valid("prune", ("tiny.py", "tiny.pth"), {"--fraction": ("0.3",), "--scores": ("l1",), **RANDOM, **OUT}),
    "depth": Valid("depth", ("tiny.py", "tiny.pth"), {"--macs": ("1.0",), "--shape": ("3", "16", "16"), **OUT}),
    "depth, table": Valid("depth", ("tiny.py",), {"--write-table": ("table.json",), "--shape": ("3", "16", "16")}),
    "expand": Valid("expand", ("tiny.py", "tiny.pth"), OUT),
    "expand, timm": Valid(
        "expand", ("resnet18",), {"--where": ("layer4.1.conv2",), "--model-args": ("num_classes=2",), **OUT}
    ),
    "reparameterize": Valid("reparameterize", ("config.py", "epoch_1.pth"), {"--no-real-data": (), **OUT}),
    "compare": Valid("compare", ("config.py", "run"), {"--rounds": ("1",)}),
    "export": Valid(
        "export", ("config.py", "epoch_1.pth", "net.onnx"),
        {"--no-real-data": (), "--size": ("32",), "--rounds": ("0",), "--runtimes": ("onnxruntime",)},
    ),
    "export, timm": Valid(
        "export", (TIMM, "net.onnx"),
        {"--size": ("32",), "--rounds": ("0",), "--runtimes": ("onnxruntime",), "--model-args": ("num_classes=2",)},
    ),
    "save": Valid("save", (TIMM, "out"), {"--overwrite": (), "--merge": (), "--model-args": ("num_classes=2",)}),
    "convert": Valid("convert", ("repvgg.pth", "out.pth"), {"--to": ("official",)}),
    "summary": Valid("summary", ("config.py", "epoch_1.pth"), {"--size": ("32",)}),
    "summary, timm": Valid("summary", (TIMM,), {"--size": ("32",), "--model-args": ("num_classes=2",)}),
    "configs": Valid("configs", ("rep_mbv2*",)),
    "doctor": Valid("doctor"),
    "script": Valid("script", ("notes.py",)),
    "make_mini_fgvc.py": Valid(
        "script", ("make_mini_fgvc.py",),
        {"--out": ("made",), "--classes": ("2",), "--train-per-class": ("1",), "--test-per-class": ("1",), "--size": ("32",),
         "--workers": ("1",), "--overwrite": ()},
    ),
    "make_mini_scenes.py": Valid(
        "script", ("make_mini_scenes.py",), {"--out": ("made",), "--train": ("1",), "--val": ("1",), "--size": ("32",)}
    ),
}  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is printed; what a command changes of the process is undone."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["rep-plugin"]),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)),
        mock.patch.object(mmengine.config.config, "FormatCode", lambda text, **_: (text, True), create=True),
        mock.patch("rep_plugin.openmmlab.sweep.subprocess", SimpleNamespace(run=train, STDOUT=subprocess.STDOUT)),
    ):
        yield out, err


def train(words: Sequence[str], stdout, stderr) -> subprocess.CompletedProcess:
    """A sweep's training, in this process."""
    assert words[3:5] == ["-m", "rep_plugin"], words
    main(list(words[5:]))
    return subprocess.CompletedProcess(words, 0)


class Found(Exception):
    """The parser of a script."""


def parser_of(valid: Valid) -> argparse.ArgumentParser:
    """Return the parser whose options a command line has."""
    if not valid.words[:1] or not valid.words[0].startswith("make_"):
        commands = next(one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
        return commands.choices[valid.command]

    def found(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Found(parser)

    script = ROOT / "tools" / "dataset_converters" / valid.words[0]
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", found),
        mock.patch.object(sys, "path", list(sys.path)),
    ):
        sys.path.insert(0, str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Found as stop:
            return stop.args[0]
    raise AssertionError(f"{script} parses no arguments")


def command_lines(valid: Valid) -> Iterator[tuple[argparse.Action | None, str, list[str]]]:
    """Yield an option, a wrong word, and the command line that has it."""
    parser = parser_of(valid)
    fixed = 1 if valid.words[:1] and valid.words[0].startswith("make_") else 0
    for place in range(fixed, len(valid.words)):
        for word in WORDS:
            yield None, word, line(valid, {}, (*valid.words[:place], word, *valid.words[place + 1 :]))
    yield None, "one more", line(valid, {}, (*valid.words, "more")) if valid.command not in ("script", "export") else []
    yield None, "--no-such-option", line(valid, {"--no-such-option": ()})
    rivals = [group._group_actions for group in parser._mutually_exclusive_groups]
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        name, given = action.option_strings[0], set(action.option_strings)
        others = {o for group in rivals if action in group for one in group for o in one.option_strings}
        kept = valid._replace(options={o: words for o, words in valid.options.items() if o not in given | others})
        if action.nargs == 0:
            yield action, "x", line(kept, {f"{name}=x": ()})
            continue
        yield action, "no word", line(kept, {name: ()}) if action.nargs != "?" else []
        usual = next((valid.options[o] for o in action.option_strings if o in valid.options), ())
        for word in (*WORDS, *map(str, action.choices or ())):
            yield action, word, line(kept, {name: (word,)})
            if action.nargs == "+":
                yield action, word, line(kept, {name: (*usual, word)})


def line(valid: Valid, more: dict[str, tuple[str, ...]], words: tuple[str, ...] | None = None) -> list[str]:
    options = valid.options | more
    flat = [word for name, given in options.items() for word in (name, *given)]
    return [valid.command, *(valid.words if words is None else words), *flat]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file; of a folder only that it is there."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (state.st_size, state.st_mtime_ns)
    return found


def restore(folder: Path, source: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(source, folder)


def attempt(words: list[str], action: argparse.Action | None, word: str, folder: Path, must_run: bool = False) -> str:
    """Run a command line: ``refused`` or ``accepted``. Raises AssertionError for anything else."""
    for cls in (Visualizer, MessageHub, MMLogger):  # a command is a process of its own
        cls._instance_dict.clear()
    before, here = snapshot(folder), Path.cwd()
    with quiet() as (_, err):
        try:
            main(words)
            return "accepted"
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        finally:
            os.chdir(here)
    if code in (None, 0):
        return "accepted"
    text = code if isinstance(code, str) else err.getvalue().strip().split("\n")[-1]
    assert isinstance(code, str) or code in (1, 2), f"ends with {code!r}"
    assert not must_run, f"a valid command line is refused: {text}"
    assert text and "\n" not in text and "error: " in text and len(text) < 1000, f"no line of its own: {text!r}"
    assert "Traceback" not in err.getvalue(), "a traceback is printed"
    names = [
        *(action.option_strings if action else ()),
        *([action.dest, action.metavar] if action else ()),
        word,
        repr(word),
    ]
    names += [repr(word)[1:-1], str(Path(word)) if word else "''"]
    if action is not None and word not in (action.choices or ()):
        assert any(name and str(name) in text for name in names), f"names neither the option nor its word: {text}"
    after = snapshot(folder)
    assert after == before, f"refused ({text}), but written: {sorted(set(after.items()) ^ set(before.items()))[:3]}"
    return "refused"


def attack(name: str, folder: Path) -> Counter:
    """Try all wrong words of all options of one command line."""
    valid, here, faults, counts = VALID[name], folder / "here", [], Counter(commands=1)
    shutil.copytree(pristine().name, here)
    os.chdir(here)
    attempt(line(valid, {}), None, "", here, must_run=True)
    os.chdir(folder)
    restore(here, Path(pristine().name))
    os.chdir(here)
    for action, word, words in command_lines(valid):
        if not words or (name == "script" and word in ("notes.txt", "list.json", "torn.pth")):
            continue  # a script's errors are its own
        try:
            what = attempt(words, action, word, here)
        except AssertionError as fault:
            what = "faulty"
            faults.append(f"{' '.join(words)[:300]!r}: {fault}")
        counts[what] += 1
        if what != "refused":
            os.chdir(folder)
            restore(here, Path(pristine().name))
            os.chdir(here)
    os.chdir(folder)
    assert not faults, f"{name}: {len(faults)} faults, first: " + " | ".join(faults[:60])
    return counts


def missing() -> set[str]:
    """Commands and scripts without a valid command line."""
    scripts = {path.name for path in (ROOT / "tools" / "dataset_converters").glob("[!_]*.py")}
    return ({*COMMANDS} | scripts) - {name.partition(",")[0] for name in VALID}
