"""Malicious and broken files for every reader: nothing of them runs, no reader hangs, and the error is one line."""

import builtins
import copy
import io
import json
import os
import pickle
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from mmpretrain.apis import init_model
from torch import nn

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.checkpoints import load_checkpoint_file
from rep_plugin.conversion.convert import convert_file, read_tensors
from rep_plugin.errors import RepPluginError
from rep_plugin.openmmlab import load_model
from rep_plugin.openmmlab.compare import read_stock_record
from rep_plugin.openmmlab.load import read_state_dict
from rep_plugin.timm.export import load_timm
from tests.attack.writers import in_child
from tests.test_openmmlab.test_hooks import tiny

SHORT, LONG, FEW, LIMIT_S = 40, 300, 3, 120
SECONDS, MEMORY = 60, 6 << 30
RUNNING = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "urllib.Request", "ftplib.connect",
}  # fmt: skip
ENVIRONMENT = ("gcc --version", "'git', 'rev-parse'")  # mmengine's, for its log
HOOKS = [dict(type="rep_plugin.PruneHook", prune_fraction=0.5, begin=1)]


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# What there is to spoil.


@cache
def _trained() -> tuple[Path, dict]:
    """A folder with a config and the checkpoint of one epoch, made in another process, and its content."""
    folder = Path(tempfile.mkdtemp(prefix="attack_files_"))

    def train() -> None:
        cfg = tiny.config(folder / "work", *HOOKS)
        cfg.train_cfg.update(max_epochs=2)
        tiny.run(cfg)

    _, found = in_child(train)
    assert found is None, found
    cfg = tiny.config(folder / "resumed", *HOOKS)
    cfg.train_cfg.update(max_epochs=2)
    cfg.update(test_dataloader=cfg.val_dataloader, test_cfg={}, test_evaluator=cfg.val_evaluator)
    cfg.dump(folder / "config.py")
    return folder, torch.load(folder / "work/epoch_1.pth", weights_only=False)


@cache
def _plan() -> dict:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    return json.loads(rep_plugin.plan_pruning(net, (1, 3, 8, 8), "l1", 0.5).to_json())


@cache
def _folder() -> dict[str, bytes]:
    """The files of a saved model of timm."""
    with tempfile.TemporaryDirectory() as place:
        model = timm.create_model("test_byobnet", num_classes=2).eval()
        rep_plugin.save(rep_plugin.reparameterize(model)[0], place)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def _payload(rng: random.Random, canary: Path) -> Any:
    """Something that touches the canary when it is unpickled."""
    text = f"open({str(canary)!r}, 'w')"
    return rng.choice(
        [
            Call(os.system, f"touch {canary}"),
            Call(builtins.eval, text),
            Call(builtins.exec, text),
            Call(builtins.open, str(canary), "w"),
            Call(subprocess.Popen, ["touch", str(canary)]),
            Call(os.mkdir, str(canary)),
            Call(builtins.getattr, Call(builtins.__import__, "os"), "system"),
            Call(builtins.__import__, "os"),
            Call(torch.load, str(canary)),
            Call(torch.hub.load, "a/b", "c"),
            Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))),
        ]
    )


JUNK = [
    None, True, -1, 0, 2**70, 10**5000, 1e400, float("nan"), "", "x\ny", "os.system", "\0", [], {}, [[]],
    {"type": "os.system"}, {"a": {"b": []}}, [1, "2", None], {"type": "rep_plugin.Pruned", "model": 3}, "/etc/passwd",
    "{{ fileDirname }}/x", "9" * 9999,
    "https://example.invalid/x.pth", {"_base_": "/etc/passwd"}, {"custom_imports": {"imports": ["os"]}},
]  # fmt: skip


def _spoil(rng: random.Random, node: Any, times: int = 1) -> Any:
    """Replace, drop or add values at random places of plain data."""
    for _ in range(times):
        place, path = node, []
        while isinstance(place, (dict, list)) and len(place) and (not path or rng.random() < 0.7):
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            path.append((place, key))
            place = place[key]
        if path:
            holder, key = path[-1]
            turn = rng.random()
            if turn < 0.7:
                holder[key] = copy.deepcopy(rng.choice(JUNK))
            elif turn < 0.85:
                del holder[key]
            elif isinstance(holder, dict):
                holder[rng.choice(["odd", "x\ny", "checkpoint_path", "pretrained"])] = copy.deepcopy(rng.choice(JUNK))
    return node


def _nested(levels: int, kind: Callable = list) -> Any:
    node: Any = 0
    for _ in range(levels):
        node = [node, node] if kind is list else {"a": node, "b": node} if kind is dict else (node, node)
    return node


def _deep(levels: int) -> Any:
    node: Any = 0
    for _ in range(levels):
        node = [node]
    return node


class Shadowing(OrderedDict):
    """Pickles as an OrderedDict whose methods are values."""

    def __reduce__(self):
        return OrderedDict, (), {"items": 3, "keys": "x"}, None, iter(dict(self).items())


# Kinds of files: each writes one, and returns the readers' path.


def _save(content: Any, path: Path, rng: random.Random) -> Path:
    torch.save(
        content, path, pickle_protocol=rng.choice([2, 3, 4, 5]), _use_new_zipfile_serialization=rng.random() < 0.7
    )
    return path


def _unsafe(rng: random.Random, folder: Path, canary: Path) -> Path:
    content = copy.deepcopy(_trained()[1])
    part = rng.choice(["meta", "message_hub", "state_dict", "optimizer"])
    content[part]["payload" if part != "meta" else rng.choice(["config", "cfg", "dataset_meta", "x"])] = _payload(
        rng, canary
    )
    return _save(content, folder / "bad.pth", rng)


def _opcodes(rng: random.Random, folder: Path, canary: Path) -> Path:
    path = folder / "bad.pth"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    command = f"touch {canary}".encode()
    bodies = [
        b"(S'" + command + b"'\nios\nsystem\n.",
        b"(cos\nsystem\nS'" + command + b"'\no.",
        b"cos\nsystem\n(S'" + command + b"'\ntR.",
        b"\x82\x01.",
        b"cbuiltins\nset\n}X\x01\x00\x00\x00aK\x01sb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00nameK\x01sb.",
        b"(X\x06\x00\x00\x00moduleK\x01tQ.",
        b"Pabc\n.",
        b"ccollections\nOrderedDict\n)R(X\x05\x00\x00\x00itemsK\x01d\x94b.",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200))) + b".",
    ]
    path.write_bytes(path.read_bytes().replace(pickle.dumps({}, protocol=2), rng.choice(bodies)))
    return path


def _plain_pickle(rng: random.Random, folder: Path, canary: Path) -> Path:
    path = folder / rng.choice(["bad.pth", "bad.pkl", "bad.bin"])
    path.write_bytes(pickle.dumps({"state_dict": _payload(rng, canary)}, protocol=rng.randrange(6)))
    return path


def _damaged(rng: random.Random, folder: Path, canary: Path) -> Path:
    path = _save(copy.deepcopy(_trained()[1]), folder / "bad.pth", rng)
    data = bytearray(path.read_bytes())
    turn = rng.randrange(4)
    if turn == 0:
        data = data[: rng.randrange(len(data))]
    elif turn == 1:
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif turn == 2:
        start = rng.randrange(len(data))
        data[start : start + 4096] = b"\0" * 4096
    else:
        data = data[rng.randrange(1, 100) :] if rng.random() < 0.5 else data + os.urandom(1000)
    path.write_bytes(data)
    return path


def _archive(rng: random.Random, folder: Path, canary: Path) -> Path:
    path = folder / "bad.pth"
    evil = pickle.dumps(_payload(rng, canary), protocol=2)
    kind = rng.choice(["names", "bomb", "size", "nested", "tar", "script", "double", "npz"])
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for name in ("storages", "tensors", "pickle", "../../outside"):
                info = tarfile.TarInfo(name)
                info.size = len(evil)
                tar.addfile(info, io.BytesIO(evil))
    elif kind == "script":
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    elif kind == "nested":
        torch.save({"a": 1}, folder / "inner.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(folder / "inner.pth", "archive/data.pkl")
            archive.writestr("archive/version", "3\n")
    else:
        how = zipfile.ZIP_DEFLATED if kind in ("bomb", "npz") else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", how) as archive:
            archive.writestr("archive/data.pkl", evil if kind != "bomb" else b"\0" * (1 << 28))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
            if kind == "names":
                for name in ("../../outside", "/etc/passwd2", "archive/../data.pkl", "a" * 3000, "\n"):
                    archive.writestr(name, evil)
            if kind == "double":
                archive.writestr(zipfile.ZipInfo("archive/data.pkl"), evil)
        if kind == "size":
            data = bytearray(path.read_bytes())
            at = data.index(b"PK\x01\x02")
            data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
            path.write_bytes(data)
    return path


def _content(rng: random.Random, folder: Path, canary: Path) -> Path:
    """A checkpoint whose data is odd, not its pickle."""
    content = copy.deepcopy(_trained()[1])
    state, meta, hub = content["state_dict"], content["meta"], content["message_hub"]
    code = f"__import__('os').system('touch {canary}')"
    name = rng.choice(list(state))
    odd = [
        lambda: meta.update(config=f"a = {code}\ngpu_ids = [{code}]"),
        lambda: meta.update(cfg=f"model = dict(type={code})"),
        lambda: meta.update(rep_prune=rng.choice([code, "{", "[]", 3, json.dumps({"history": 3, "rounds": []})])),
        lambda: meta.update(rep_prune=json.dumps({"history": [{"step": "prune", "plan": str(canary)}], "rounds": [1]})),
        lambda: meta.update(rep_prune=json.dumps({"history": [{"step": code, "plan": {}}], "rounds": []})),
        lambda: hub["runtime_info"].update(best_ckpt=str(canary), keep_ckpt_ids=[str(canary)]),
        lambda: meta.update(dataset_meta=_nested(40, rng.choice([list, dict, tuple]))),
        lambda: hub["runtime_info"].update(x=_nested(60, rng.choice([list, dict, tuple]))),
        lambda: meta.update(dataset_meta={"classes": _deep(150)}),
        lambda: meta.update(epoch=10**5000),
        lambda: content.update(state_dict=Shadowing(state)),
        lambda: content.update(meta=Shadowing(meta)),
        lambda: state.update({name: torch.zeros(1).expand(2**40)}),
        lambda: state.update({name: torch.empty(state[name].shape, device="meta")}),
        lambda: state.update({name: state[name].to(torch.complex64)}),
        lambda: state.update({name: torch.zeros(state[name].shape).to_sparse()}),
        lambda: state.update({name: rng.choice([None, 3, "x", [1], {"a": torch.zeros(1)}])}),
        lambda: state.update({rng.choice([3, "a\nb", "", "a" * 9999, ("x",)]): torch.zeros(1)}),
        lambda: state.update({name: torch.zeros(7, 7)}),
        lambda: content.update(state_dict=rng.choice([[], None, 3, {}, "x", torch.zeros(2)])),
        lambda: content.pop(rng.choice(["meta", "message_hub", "optimizer"])),
        lambda: content.update(param_schedulers=rng.choice([3, [3], "x", [{"last_step": "x"}]])),
        lambda: content.update({rng.choice(["meta", "message_hub", "optimizer"]): copy.deepcopy(rng.choice(JUNK))}),
        lambda: _spoil(rng, content["optimizer"], 3),
        lambda: _spoil(rng, meta, 3),
        lambda: _spoil(rng, hub, 3),
    ]  # fmt: skip
    rng.choice(odd)()
    if rng.random() < 0.1:
        content = rng.choice([[], None, 3, state, {"state_dict": {"state_dict": state}}, torch.zeros(3), "x"])
    return _save(content, folder / "bad.pth", rng)


def _special(rng: random.Random, folder: Path, canary: Path) -> Path:
    path = folder / rng.choice(["bad.pth", "bad.json", "bad.safetensors"])
    kind = rng.choice(["pipe", "folder", "dangling", "loop", "zero", "socket", "empty", "device"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
        os.chdir(here)
    elif kind == "device":
        try:
            os.mknod(path, 0o20666, os.makedev(1, 5))
        except OSError:  # only root may
            path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "zero": "/dev/zero"}[kind])
    return path


def _json_text(rng: random.Random, data: Any) -> bytes:
    turn = rng.randrange(10)
    if turn == 0:
        return rng.choice([b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000])
    if turn == 1:
        return rng.choice([b"", b"\xff\xfe{}", b"\x80abc", b"null", b"NaN", b"3", b'"x"', b"[]", b"{}", b"9" * 10_000])
    if turn == 2:
        text = json.dumps(data).encode()
        return text[: rng.randrange(len(text))]
    return json.dumps(_spoil(rng, copy.deepcopy(data), rng.choice([1, 1, 2, 5])), default=str).encode()


def _dumps_safely(make: Callable[[], bytes]) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return make()
    finally:
        sys.set_int_max_str_digits(limit)


def _json(rng: random.Random, folder: Path, canary: Path) -> Path:
    (folder / "bad.json").write_bytes(_dumps_safely(lambda: _json_text(rng, _plan())))
    return folder / "bad.json"


def _saved(rng: random.Random, folder: Path, canary: Path) -> Path:
    """A folder whose config.json is odd."""
    place = folder / "bad"
    place.mkdir()
    for name, data in _folder().items():
        (place / name).write_bytes(data)
    config = json.loads(_folder()["config.json"])
    arguments = config["model_args"]
    url = {"url": "http://example.invalid/x.pth", "file": str(canary), "custom_load": True, "hf_hub_id": "a/b"}
    linear = {"kind": "Linear", "in_features": 10**15, "out_features": 2, "bias": True}

    def add(**step: Any) -> None:
        arguments["history"].append(step)

    odd: list[Callable] = [
        lambda: arguments.update(base=rng.choice(BASES)),
        lambda: arguments["base_args"].update(checkpoint_path=str(canary)),
        lambda: arguments["base_args"].update(pretrained_cfg=url),
        lambda: arguments["base_args"].update(pretrained=True, cache_dir=str(canary)),
        lambda: arguments["base_args"].update(pretrained_cfg_overlay=url),
        lambda: arguments["base_args"].update(act_layer="os.system", norm_layer="eval"),
        lambda: add(step="features", options={"pretrained": True, "checkpoint_path": "x"}),
        lambda: add(step="prune", plan=str(canary)),
        lambda: add(step="replace", layer="head.fc", by=linear),
        lambda: add(step="classifier", layer="head.fc", num_classes=rng.choice([10**15, -1, "x"])),
        lambda: add(step="expand", block="os.system", pairs=[["a", "b"]], online=False),
        lambda: config.update(architecture=rng.choice(["os.system", "resnet18", "../x"])),
        lambda: config["pretrained_cfg"].update(url),
    ]  # fmt: skip
    if rng.random() < 0.6:
        rng.choice(odd)()
        (place / "config.json").write_text(json.dumps(config))
    else:
        (place / "config.json").write_bytes(_dumps_safely(lambda: _json_text(rng, config)))
    return place


def _safetensors(rng: random.Random, folder: Path, canary: Path) -> Path:
    place = folder / "bad"
    place.mkdir()
    for name, data in _folder().items():
        (place / name).write_bytes(data)
    data = _folder()["model.safetensors"]
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    one = header[rng.choice(names)]
    turn = rng.randrange(9)
    if turn == 0:
        one["data_offsets"] = rng.choice([[0, 2**62], [5, 1], [-1, 4], [0], "x", [0, 10**30]])
    elif turn == 1:
        one["shape"] = rng.choice([[2**40, 2**40], [-1], [1.5], "x", [0], []])
    elif turn == 2:
        one["dtype"] = rng.choice(["object", "F8", "C128", 3, "", "F64", "I8"])
    elif turn == 3:
        header[rng.choice(["x\ny", "", "__class__"])] = one
    text = json.dumps(header).encode()
    if turn == 4:
        text = text.replace(b"{", b'{"' + names[0].encode() + b'":' + json.dumps(one).encode() + b",", 1)
    if turn == 5:
        text = text[: rng.randrange(len(text))]
    whole = struct.pack("<Q", len(text)) + text + body
    if turn == 6:
        whole = struct.pack("<Q", rng.choice([2**63, 2**40, 0, 3])) + whole[8:]
    elif turn == 7:
        whole = whole[: rng.randrange(len(whole))]
    elif turn == 8:
        whole = rng.choice([b"", b"x", os.urandom(500), _folder()["config.json"]])
    (place / "model.safetensors").write_bytes(whole)
    return place


BASES = ["hf-hub:a/b", "local-dir:.", "local-dir:bad", "rep_plugin_rebuilt", "rep_rebuilt", "../x", "os", "", "a\nb"]

# Readers, by what they read. None returns what must be an error: a file may turn out to be harmless.


def _resume(path: Path) -> None:
    main(["train", str(_trained()[0] / "config.py"), "--resume", str(path), "--work-dir", tempfile.mkdtemp(dir=".")])


def _command(*words: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        there = _trained()[0]
        words_of = {"CONFIG": str(there / "config.py"), "GOOD": str(there / "work/epoch_1.pth")}
        words_of |= {"FILE": str(path), "OUT": tempfile.mkdtemp(dir=".")}
        main([words_of.get(word, word).replace("=FILE", f"={path}") for word in words])

    return run


def _config():
    return tiny.config("nowhere", *HOOKS)


PLAIN = ("--out-dir", "OUT", "--no-real-data", "--shape", "3", "16", "16")
CHECKPOINT: dict[str, Callable[[Path], Any]] = {
    "load_checkpoint_file": load_checkpoint_file,
    "read_state_dict": read_state_dict,
    "load_model": lambda path: load_model(_config(), str(path)),
    "init_model": lambda path: init_model(_config(), str(path), device="cpu"),
    "convert": lambda path: convert_file(path, path.parent / "out.pth"),
    "read_tensors": read_tensors,
    "load_timm": lambda path: load_timm("test_byobnet", path),
    "train --resume": _resume,
    "train load_from": _command("train", "CONFIG", "--work-dir", "OUT", "--cfg-options", "load_from=FILE"),
    "test": _command("test", "CONFIG", "FILE", "--work-dir", "OUT"),
    "prune": _command("prune", "CONFIG", "FILE", "--fraction", "0.5", *PLAIN),
    "reparameterize": _command("reparameterize", "CONFIG", "FILE", "--out-dir", "OUT", "--no-real-data"),
}  # fmt: skip
JSON: dict[str, Callable[[Path], Any]] = {
    "PrunePlan.from_json": lambda path: rep_plugin.PrunePlan.from_json(path),
    "read_stock_record": read_stock_record,
    "prune --plan": _command("prune", "CONFIG", "GOOD", "--plan", "FILE", *PLAIN),
    "prune --widths": _command("prune", "CONFIG", "GOOD", "--widths", "FILE", *PLAIN),
}
FOLDER: dict[str, Callable[[Path], Any]] = {
    "rep_plugin.load": rep_plugin.load,
    "load with a model": lambda path: rep_plugin.load(path, model=timm.create_model("test_byobnet", num_classes=2)),
    "timm.create_model": lambda path: timm.create_model(f"local-dir:{path}"),
}  # fmt: skip
KINDS: list[tuple[Callable, dict]] = [
    (_unsafe, CHECKPOINT), (_opcodes, CHECKPOINT), (_plain_pickle, CHECKPOINT), (_damaged, CHECKPOINT),
    (_archive, CHECKPOINT), (_content, CHECKPOINT), (_content, CHECKPOINT), (_content, CHECKPOINT),
    (_special, CHECKPOINT | JSON), (_json, JSON), (_saved, FOLDER), (_safetensors, FOLDER),
]  # fmt: skip


def attack(seed: int, folder: Path) -> Counter:
    """Make one file, and give it to every reader of its kind in a process that watches."""
    rng = random.Random(seed)
    make, readers = KINDS[seed % len(KINDS)]
    _trained(), _folder(), _plan()
    work, canary = folder / "work", folder / "executed"
    work.mkdir()
    path = make(rng, work, canary)
    canary.unlink(missing_ok=True)  # torch.hub.load and their like are no more than names here
    chosen = list(readers) if len(readers) < 5 else rng.sample(list(readers), 4)
    counts = Counter({"files": 1})
    died, found = in_child(lambda: _watched({name: readers[name] for name in chosen}, path, folder))
    how = f"{make.__name__[1:]} {path.name}"
    assert not died, f"{how}: the reader died of signal {died}, of {chosen}"
    assert isinstance(found, dict), f"{how}: {found}"
    assert not canary.exists(), f"{how}: executed"
    assert not (Path("/etc/passwd2").exists() or (folder / "outside").exists()), f"{how}: written outside"
    for name, (outcome, text) in found.items():
        assert outcome != "fault", f"{how}, {name}: {text}"
        counts[outcome] += 1
    return counts


def _watched(readers: dict[str, Callable[[Path], Any]], path: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """In a child process: what each reader did. Whatever would run code, connect, or write elsewhere is a fault."""
    events: list[str] = []
    allowed = (str(folder), str(_trained()[0]), tempfile.gettempdir(), "/dev/null")

    def watch(event: str, arguments: tuple) -> None:
        if event in RUNNING and not any(word in repr(arguments) for word in ENVIRONMENT):
            events.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            name = os.path.abspath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else "/dev/null"
            if not name.startswith(allowed) and "__pycache__" not in name:
                events.append(f"written: {name}")

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (_size_of_process() + MEMORY,) * 2)
    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    outcomes = {}
    for name, read in readers.items():
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            read(path)
            outcomes[name] = "harmless", ""
        except Slow:
            outcomes[name] = "fault", f"still running after {SECONDS} s"
        except (RepPluginError, OSError) as error:
            outcomes[name] = _judge(str(error), path)
        except SystemExit as error:
            text = str(error.code)
            ours = error.code in (None, 0) or text.startswith("error: ")
            outcomes[name] = (
                ("harmless", "") if error.code in (None, 0) else _judge(text, path) if ours else ("fault", text)
            )
        except Exception as error:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            ours = [frame for frame in frames[1:] if "/rep_plugin/" in frame and "/site-packages/" not in frame]
            stock = name in ("timm.create_model", "init_model") and not (ours and "/rep_plugin/" in frames[-1])
            text = "".join(traceback.format_exception(error)[-3:]).replace("\n", " | ")
            outcomes[name] = ("refused by stock code", "") if stock else ("fault", text[-500:])
        finally:
            signal.alarm(0)
        if events:
            outcomes[name] = "fault", events[0]
            break
    return outcomes


class Slow(BaseException):
    """The time is over."""


def _too_long(*_: object) -> None:
    raise Slow


def _size_of_process() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _judge(text: str, path: Path) -> tuple[str, str]:
    """An error of ours is one line that names the file."""
    if "\n" in text.strip():
        return "fault", f"several lines: {text[:300]!r}"
    if len(text) > 3000:
        return "fault", f"{len(text)} letters: {text[:200]!r}"
    if "plan is for another model" in text or "holds no rep_plugin part" in text:  # a file that is good
        return "refused", text
    if not any(part in text for part in (path.name, str(path), path.parent.name + "/" + path.name)):
        return "fault", f"names no file: {text[:300]}"
    return "refused", text
