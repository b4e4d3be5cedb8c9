"""Files are written whole, only over regular files, and several of them together or not at all."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rep_plugin.checkpoints import files
from rep_plugin.checkpoints.files import write_atomic, write_together
from tests.attack.steps import die_at
from tests.helpers import ROOT

NAMES = ("deploy.pth", "deploy.py", "deploy.json")


def writers(text: str) -> dict:
    return {name: lambda path, name=name: path.write_text(f"{name} {text}") for name in NAMES}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_set_replaces_a_set_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "new" / "folder"
    for text in ("old", "new"):
        write_together(folder, writers(text))
        assert contents(folder) == {name: f"{name} {text}" for name in NAMES}


@pytest.mark.parametrize("failing", NAMES)
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_writer_replaces_nothing(tmp_path, failing, before):
    if before:
        write_together(tmp_path, writers("old"))
    old = contents(tmp_path)

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"cannot write .*{failing}: No space left") as caught:
        write_together(tmp_path, {**writers("new"), failing: fail})
    assert ".tmp" not in str(caught.value) and contents(tmp_path) == old


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [(), NAMES, NAMES[:1], NAMES[1:]])
@pytest.mark.parametrize("number", range(3))
def test_a_failed_rename_takes_back_those_before_it(tmp_path, before, number, links, monkeypatch):
    for name in before:
        (tmp_path / name).write_text("old")
    old = contents(tmp_path)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == number + 1:
            raise OSError(5, "Input/output error")
        replace(source, target)

    def refused(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "replace", failing)
    if not links:
        monkeypatch.setattr(files.os, "symlink", refused)
    with pytest.raises(OSError, match=r"cannot put deploy.pth, deploy.py, deploy.json into .*: Input/output error"):
        write_together(tmp_path, writers("new"))
    assert contents(tmp_path) == old


def test_one_of_two_writers_of_a_folder_wins_whole(tmp_path):
    code = f"""
        import sys
        from pathlib import Path
        from rep_plugin.checkpoints.files import write_together

        def write(path):
            if path.name == "deploy.pth":
                print("inside", flush=True)
                sys.stdin.readline()
            path.write_text(f"{{path.name}} first")

        write_together(Path({str(tmp_path)!r}), dict.fromkeys({NAMES!r}, write))
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    first = subprocess.Popen(run, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "inside\n"
    for _ in range(2):
        with pytest.raises(BlockingIOError, match=f"another process is writing its files into {tmp_path}"):
            write_together(tmp_path, writers("second"))
    first.communicate("go\n", timeout=20)
    assert contents(tmp_path) == {name: f"{name} first" for name in NAMES}
    write_together(tmp_path, writers("third"))
    assert contents(tmp_path) == {name: f"{name} third" for name in NAMES}


def in_threads(work, count: int = 8) -> list[BaseException]:
    """What ``work(number)`` raised in as many threads at once."""
    errors: list[BaseException] = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_on_one_folder_take_turns(tmp_path):
    finished = []

    def write(number):
        for _ in range(3):
            write_together(tmp_path, writers(str(number)))
            finished.append(number)

    assert not in_threads(write) and len(finished) == 24
    found = contents(tmp_path)
    assert set(found) == set(NAMES) and len({text.split()[1] for text in found.values()}) == 1


@pytest.mark.parametrize("before", [(), NAMES, NAMES[1:]])
def test_a_kill_at_any_step_leaves_one_whole_set(tmp_path, before):
    for number in range(10**6):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in before:
            (folder / name).write_text(f"{name} old")
        old, new = contents(folder), {name: f"{name} new" for name in NAMES}
        child = os.fork()
        if child == 0:
            die_at(number)
            try:
                write_together(folder, writers("new"))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        shown = {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}
        assert shown in (old, new), f"killed at step {number}: {shown}"
        (folder / "other.json").touch()
        write_atomic(
            folder / "other.json", lambda file: file.write(b"{}")
        )  # another file's writer removes nothing of it
        assert shown == {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}
        write_together(folder, writers("last"))
        assert contents(folder) == {name: f"{name} last" for name in NAMES} | {"other.json": "{}"}
        assert not any(path.is_symlink() for path in folder.iterdir())
        if status == 0:
            break
    assert 20 < number < 100


@pytest.mark.parametrize(
    "target", ["/etc", "../elsewhere/old", ".files.1-0123abcd.tmp/other", ".files.1-0123abcd.tmp/old"]
)
def test_links_that_no_writer_made_are_refused(tmp_path, target):
    (tmp_path / "elsewhere" / "old").mkdir(parents=True)
    (tmp_path / "elsewhere" / "kept").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".files.1-0123abcd.tmp").symlink_to(tmp_path / "elsewhere")
    (folder / files.POINTER).symlink_to(target)
    with pytest.raises(OSError, match="was not made by rep_plugin"):
        write_together(folder, writers("new"))
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_without_links_a_set_is_renamed(tmp_path, monkeypatch):
    write_together(tmp_path, writers("old"))

    def refused(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "symlink", refused)
    monkeypatch.setattr(files.os, "link", refused)
    write_together(tmp_path, writers("new"))
    assert contents(tmp_path) == {name: f"{name} new" for name in NAMES}


def test_two_processes_on_one_folder_never_mix(tmp_path):
    code = f"""
        import random, sys, time
        from pathlib import Path
        from rep_plugin.checkpoints.files import write_together
        names, written = {NAMES!r}, 0
        while written < 15:
            time.sleep(random.uniform(0, 0.01))
            text = f"{{sys.argv[1]}} {{written}}"
            try:
                write_together(Path({str(tmp_path)!r}), {{n: lambda p: p.write_text(text) for n in names}})
            except BlockingIOError as error:
                assert "another process" in str(error)
            else:
                written += 1
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [subprocess.Popen([*run, name], cwd=ROOT) for name in ("a", "b")]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert set(contents(tmp_path)) == set(NAMES)
    assert len(set(contents(tmp_path).values())) == 1


def test_threads_on_one_path_all_write_whole(tmp_path):
    path = tmp_path / "a.json"

    def write(number):
        for _ in range(20):
            write_atomic(path, lambda file: file.write(str(number).encode() * 10_000))

    assert not in_threads(write) and os.listdir(tmp_path) == ["a.json"]
    text = path.read_text()
    assert len(text) == 10_000 and len(set(text)) == 1


WRITE = {
    "atomic": lambda path: write_atomic(path, lambda file: file.write(b"x")),
    "together": lambda path: write_together(path.parent, {path.name: lambda file: file.write_text("x")}),
}


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/null"])
def test_only_regular_files_are_replaced(tmp_path, name, write):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    mode = path.stat().st_mode
    with pytest.raises(OSError, match=f"{name} is a (folder|device, pipe or socket), expected a"):
        write(path)
    assert path.stat().st_mode == mode


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "a.json")
    write_atomic(tmp_path / "link.json", lambda file: file.write(b"1"))
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real" / "a.json").read_text() == "1"


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for owner in (process.pid, os.getpid()):
        (tmp_path / f".a.json.{owner}-0123abcd.tmp").write_text("half")
        (tmp_path / f".files.{owner}-0123abcd.tmp").mkdir()
    (tmp_path / ".mine.tmp").write_text("a user's")
    write_atomic(tmp_path / "a.json", lambda file: file.write(b"1"))
    left = {path.name for path in tmp_path.iterdir()}
    living = {f".{name}.{os.getpid()}-0123abcd.tmp" for name in ("a.json", "files")}
    assert left == {"a.json", ".mine.tmp", *living}


@pytest.mark.parametrize("kind", ["Report", "PrunePlan"])
def test_a_full_disk_leaves_the_old_json(tmp_path, kind):
    path = tmp_path / "a.json"
    path.write_text("old")
    code = f"""
        import resource, signal
        from rep_plugin.measure.report import Report
        from rep_plugin.pruning.planning.plan import PrunePlan
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        long = ["a note"] * 100_000
        written = {{
            "Report": lambda: Report("prune", 1, 1, notes=long),
            "PrunePlan": lambda: PrunePlan("Net", (1, 3, 8, 8), {{}}, {{}}, why="".join(long)),
        }}[{kind!r}]()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            written.to_json({str(path)!r})
        except OSError as error:
            print("refused:", error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.startswith("refused:") and str(path) in result.stdout and result.stdout.count("\n") == 1
    assert contents(tmp_path) == {"a.json": "old"}
