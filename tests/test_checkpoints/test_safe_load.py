"""Checkpoints: nothing runs when a file is read, and no file is ever half-written."""

import builtins
import collections
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR

import rep_plugin.checkpoints.safe_load as checkpoint
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.errors import UnreadableCheckpointError, UnsafeCheckpointError
from tests.helpers import ROOT


class Call:
    """Pickles as a call of ``function``; with ``state``, the result is given that state."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return (self.function, self.arguments) + (() if self.state is None else (self.state,))


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*torch.jit", "ignore:.*TorchScript")


def history() -> HistoryBuffer:
    return HistoryBuffer([1.0, 3.0], [1, 1])


def training_checkpoint(**extra) -> dict:
    return {
        "meta": {"epoch": 1, "classes": ["a", "b"]},
        "state_dict": collections.OrderedDict(weight=torch.arange(6.0).view(2, 3)),
        "message_hub": {"log_scalars": {"loss": history()}, "score": np.float64(0.5), "array": np.arange(3), **extra},
    }


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_training_checkpoint_is_read_whole(tmp_path, options):
    path = tmp_path / "a.pth"
    torch.save(training_checkpoint(), path, **options)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = load_checkpoint_file(path)
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(6.0).view(2, 3))
    buffer = loaded["message_hub"]["log_scalars"]["loss"]
    assert type(buffer) is HistoryBuffer and buffer.mean() == 2.0 and buffer.statistics("max") == 3.0
    assert loaded["message_hub"]["score"] == 0.5 and type(loaded["message_hub"]["score"]) is np.float64
    assert loaded["message_hub"]["array"].tolist() == [0, 1, 2]
    with open(path, "rb") as file:
        assert load_checkpoint_file(file)["meta"] == {"epoch": 1, "classes": ["a", "b"]}


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}])
def test_state_of_a_one_cycle_scheduler_is_read(tmp_path, strategy, options):
    def scheduler() -> OneCycleLR:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return OneCycleLR(optimizer, eta_max=0.1, total_steps=10, anneal_strategy=strategy)

    trained, resumed = scheduler(), scheduler()
    for _ in range(3):
        trained.step()
    torch.save({"param_schedulers": [trained.state_dict()]}, tmp_path / "a.pth", **options)
    resumed.load_state_dict(load_checkpoint_file(tmp_path / "a.pth")["param_schedulers"][0])
    trained.step(), resumed.step()
    assert resumed.get_last_value() == trained.get_last_value() and resumed.last_step == 4
    owner = OneCycleLR.__mro__[2]
    assert owner.__name__ == "OneCycleParamScheduler"
    for call in (Call(builtins.getattr, owner, "__init__"), Call(owner, None, "lr")):
        torch.save({"x": call}, tmp_path / "bad.pth")
        with pytest.raises(UnsafeCheckpointError, match="refused"):
            load_checkpoint_file(tmp_path / "bad.pth")


@pytest.mark.parametrize("core", ["core", "_core"])
def test_both_numpy_module_paths_are_read(tmp_path, core):
    path = tmp_path / "a.pth"
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for old in (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"):
        data = data.replace(old, f"cnumpy.{core}.multiarray\n".encode())
    path.write_bytes(data)
    assert load_checkpoint_file(path)["message_hub"]["array"].tolist() == [0, 1, 2]


def attacks(mark: str) -> dict:
    getter = checkpoint_getattr = builtins.getattr
    method_state = {"statistics_methods": {"mean": torch._utils._rebuild_tensor_v2}}
    return {
        "system": Call(os.system, f"touch {mark}"),
        "eval": Call(builtins.eval, f"open({mark!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({mark!r}, 'w')"),
        "open": Call(builtins.open, mark, "w"),
        "popen": Call(subprocess.Popen, ["touch", mark]),
        "globals": Call(getter, Call(getter, HistoryBuffer, "__init__"), "__globals__"),
        "init": Call(getter, HistoryBuffer, "__init__"),
        "update": Call(getter, HistoryBuffer, "update"),
        "dict": Call(getter, HistoryBuffer, "__dict__"),
        "instance": Call(getter, history(), "__class__"),
        "method_of_torch": Call(checkpoint_getattr, torch.Tensor, "mean"),
        "call_of_method": Call(HistoryBuffer.mean, history()),
        "torch_load": Call(torch.load, mark),
        "pickle_loads": Call(pickle.loads, b"N."),
        "object_array": np.array([Call(os.system, f"touch {mark}")], dtype=object),
        "object_dtype": np.dtype(object),
        "structured_dtype": np.dtype([("a", "f8")]),
        "statistics": Call(HistoryBuffer, state=method_state),
        "buffer_attribute": Call(HistoryBuffer, state={"update": 1}),
        "setstate_by_torch": Call(
            torch._tensor._rebuild_from_type_v2, HistoryBuffer, HistoryBuffer, (), {"statistics_methods": {"x": 1}}
        ),
        "call_by_torch": Call(torch._tensor._rebuild_from_type_v2, HistoryBuffer.mean, torch.Tensor, (history(),), {}),
        "defaultdict": collections.defaultdict(list),
        "callable_class": random.Random(0),
    }


@pytest.mark.parametrize("name", sorted(attacks("")))
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_attacks_are_refused_and_run_nothing(tmp_path, name, options):
    mark = tmp_path / "executed"
    methods = dict(HistoryBuffer._statistics_methods)
    path = tmp_path / "bad.pth"
    # The real buffer before it makes the first reading give up, so that the second one meets the attack.
    torch.save(training_checkpoint(zz=attacks(str(mark))[name]), path, **options)
    assert not mark.exists()
    with pytest.raises(UnsafeCheckpointError) as caught:
        load_checkpoint_file(path)
    assert str(path) in str(caught.value) and "refused" in str(caught.value) and "\n" not in str(caught.value)
    assert not mark.exists()
    assert HistoryBuffer._statistics_methods == methods


def test_attack_files_are_dangerous_to_the_normal_unpickler(tmp_path):
    mark = tmp_path / "executed"
    torch.save(training_checkpoint(zz=attacks(str(mark))["system"]), tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert mark.exists()


def raw(path: Path, body: bytes) -> Path:
    """A legacy file whose main pickle is ``body``, for instructions which Python's pickler does not write."""
    torch.save({}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    main = pickle.dumps({}, protocol=2)
    assert data.count(main) == 1
    path.write_bytes(data.replace(main, body))
    return path


BUFFER = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "instruction"),
        (b"(cos\nsystem\nS'touch x'\no.", "os.system"),
        (b"\x82\x01.", "instruction"),
        # Attributes of functions and classes, set through BUILD.
        (BUFFER + b"}X\x04\x00\x00\x00meanK\x01sb.", "state"),
        (BUFFER + b"0ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00nameK\x01s\x86b.", "state"),
        (BUFFER + b"0cbuiltins\nset\n}X\x01\x00\x00\x00aK\x01sb.", "state"),
        (BUFFER + b"0ccollections\nOrderedDict\n)RK\x01a.", "filling"),
        (BUFFER + b"0X\x03\x00\x00\x00abc)R.", "call"),
        (BUFFER + b"0cnumpy\nndarray\n)\x81.", "new object"),
        (BUFFER + b"0(X\x06\x00\x00\x00moduleK\x01tQ.", "persistent"),
        (BUFFER + b")\x81}X\x06\x00\x00\x00updateK\x01sb.", "HistoryBuffer state"),
        (
            BUFFER + b")\x81}X\x12\x00\x00\x00statistics_methods}X\x04\x00\x00\x00mean"
            b"ctorch._utils\n_rebuild_tensor_v2\nssb.",
            "statistics method 'mean'",
        ),
        (b"c__builtin__\neval\n(S'1'\ntR.", "builtins.eval"),
    ],
)
def test_raw_instructions_are_refused(tmp_path, body, word):
    torch.save({}, tmp_path / "good.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeCheckpointError, match=word):
        load_checkpoint_file(raw(tmp_path / "bad.pth", body))
    assert torch._utils._rebuild_tensor_v2.__name__ == "_rebuild_tensor_v2"
    assert HistoryBuffer().statistics.__self__._statistics_methods["mean"] is HistoryBuffer.mean


def test_torchscript_and_tar_archives_are_refused(tmp_path):
    script = tmp_path / "script.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    archive = tmp_path / "tar.pth"
    with tarfile.open(archive, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Call(os.system, f"touch {tmp_path / 'executed'}"))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for path in (script, archive):
        with pytest.raises(UnsafeCheckpointError, match="archive"):
            load_checkpoint_file(path)
    assert not (tmp_path / "executed").exists()


def test_torn_and_missing_files_are_named(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint_file(training_checkpoint(), path)
    whole = path.read_bytes()
    cuts = [whole[: len(whole) * part // 40] for part in range(40)]
    for content in (*cuts, b"hello", whole[:-1000] + b"\0" * 1000):
        path.write_bytes(content)
        with pytest.raises(UnreadableCheckpointError, match=r"a\.pth is not readable") as caught:
            load_checkpoint_file(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_checkpoint_file(tmp_path / "none.pth")


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.pth"
    save_checkpoint_file({"a": 1}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint_file({"a": lambda: 0}, path)
    monkeypatch.setattr(checkpoint.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"cannot write .*a\.pth: No space left"):
        save_checkpoint_file({"a": 2}, path)
    assert load_checkpoint_file(path) == {"a": 1} and os.listdir(path.parent) == ["a.pth"]


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    code = f"""
        import resource, sys, torch
        from rep_plugin.checkpoints.files import save_checkpoint_file
        assert not {{"mmengine", "mmcv"}} & set(sys.modules), "the module has to work without mmengine"
        save_checkpoint_file({{"a": torch.ones(3)}}, {str(path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint_file({{"a": torch.ones(100_000)}}, {str(path)!r})
        except OSError as error:
            print("refused:", error)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("refused:") and str(path) in result.stdout and result.stdout.count("\n") == 1
    assert load_checkpoint_file(path)["a"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["a.pth"]


def test_killed_writer_leaves_a_complete_file(tmp_path):
    path = tmp_path / "a.pth"
    # Forks of one process, so that torch is imported only once.
    code = f"""
        import os, sys, torch
        from rep_plugin.checkpoints.files import save_checkpoint_file
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                for step in range(10**9):
                    save_checkpoint_file({{"step": step, "a": torch.full((200_000,), float(step))}}, {str(path)!r})
            print(child, flush=True)
            os.waitpid(child, 0)
            print("gone", flush=True)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    rng = random.Random(0)
    torn, last = 0, -1
    save_checkpoint_file({"step": -1, "a": torch.full((200_000,), -1.0)}, path)
    for _ in range(12):
        print("go", file=parent.stdin, flush=True)
        child = int(parent.stdout.readline())
        time.sleep(rng.uniform(0.03, 0.15))
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == "gone\n"
        torn += len(list(tmp_path.glob(".a.pth.*.tmp")))
        loaded = load_checkpoint_file(path)
        assert (loaded["a"] == loaded["step"]).all()
        last = max(last, loaded["step"])
    parent.stdin.close()
    assert parent.wait(timeout=20) == 0
    # Otherwise the kills would have proved nothing: some hit a write, and writes came through.
    assert torn >= 1 and last >= 0
    save_checkpoint_file({"step": 0}, path)
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"w": torch.arange(1000.0)}}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableCheckpointError, match="wrong checksum"):
        load_checkpoint_file(path)
