"""mmengine reads and writes checkpoints through our functions, and resumes from a file that is there."""

import os
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import pytest
import torch
from mmengine.fileio import HardDiskBackend, LocalBackend, get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, save_checkpoint

from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.errors import DataError, UnsafeCheckpointError, first_line
from rep_plugin.openmmlab.checkpoint import enable_safe_loading, find_latest_checkpoint
from rep_plugin.openmmlab.data import check_data
from tests.helpers import ROOT


class Touch:
    """Pickles as a shell command which makes the file ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(autouse=True)
def _safe():
    enable_safe_loading()


def checkpoint(**extra) -> dict:
    hub = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}, **extra}
    return {"meta": {"epoch": 1}, "state_dict": {"a": torch.ones(2)}, "message_hub": hub}


def test_training_checkpoint_loads_through_mmengine(tmp_path):
    path = str(tmp_path / "epoch_1.pth")
    save_checkpoint(checkpoint(), path)
    loaded = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    assert loaded["message_hub"]["log_scalars"]["loss"].current() == 1.0
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2))
    mmengine.runner.load_checkpoint(model, path)
    assert model.a.tolist() == [1, 1]


def test_attack_is_refused_through_mmengine(tmp_path):
    mark = tmp_path / "executed"
    path = str(tmp_path / "bad.pth")
    save_checkpoint(checkpoint(bad=Touch(mark)), path)
    for load in (CheckpointLoader.load_checkpoint, mmengine.runner.checkpoint.load_from_local):
        with pytest.raises(UnsafeCheckpointError, match="system"):
            load(path, "cpu")
    # The fork's own loader gives up safety when the allow-list does not suffice.
    if hasattr(mmengine.runner.checkpoint, "_safe_torch_load"):
        with pytest.raises(UnsafeCheckpointError, match="system"):
            mmengine.runner.checkpoint._safe_torch_load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "config",
    [
        "a = __import__('os').system('touch {mark}')",
        "gpu_ids = [__import__('os').system('touch {mark}')]",
        "_base_ = '{mark}.py'",
        "custom_imports = dict(imports=['code_in_a_module'])",
        "gpu_ids = (",
        "[" * 5000,
        3,
        None,
    ],
)
def test_the_config_in_a_checkpoint_is_never_executed(tmp_path, config, monkeypatch):
    """Runner.resume reads one list from this text, and executes all of it."""
    mark = tmp_path / "executed"
    for name in ("executed.py", "code_in_a_module.py"):
        (tmp_path / name).write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = config.replace("{mark}", str(mark)) if isinstance(config, str) else config
    save_checkpoint({**checkpoint(), "meta": {"epoch": 1, "config": text}}, str(tmp_path / "bad.pth"))
    content = mmengine.runner.checkpoint._load_checkpoint(str(tmp_path / "bad.pth"), "cpu")
    assert content["meta"]["config"] == ""
    mmengine.Config.fromstring(content["meta"]["config"], file_format=".py")
    assert not mark.exists()


def test_gpu_ids_of_the_config_in_a_checkpoint_stay(tmp_path):
    config = mmengine.Config(dict(gpu_ids=[0, 1], model=dict(type="A")))
    save_checkpoint({**checkpoint(), "meta": {"config": config.pretty_text}}, str(tmp_path / "a.pth"))
    content = CheckpointLoader.load_checkpoint(str(tmp_path / "a.pth"), "cpu")
    assert mmengine.Config.fromstring(content["meta"]["config"], ".py").to_dict() == {"gpu_ids": [0, 1]}


def test_a_checkpoint_does_not_name_the_files_that_resuming_deletes(tmp_path):
    own = dict(best_ckpt="/w/best_accuracy_top1_epoch_3.pth", keep_ckpt_ids=[1, 2], iter=5)
    foreign = dict(best_ckpt=str(tmp_path), best_ckpt_top5="/home/me/thesis.tex", keep_ckpt_ids=["../../x"], iter=5)
    for info, rest in ((own, own), (foreign, dict(iter=5))):
        save_checkpoint({"message_hub": {"runtime_info": dict(info)}, "state_dict": {}}, str(tmp_path / "a.pth"))
        assert CheckpointLoader.load_checkpoint(str(tmp_path / "a.pth"))["message_hub"]["runtime_info"] == rest


def test_enabling_twice_changes_nothing_and_keeps_other_schemes():
    def state():
        modules = (mmengine.runner, mmengine.runner.runner, mmengine.runner.checkpoint)
        return dict(CheckpointLoader._schemes), LocalBackend.put, [module.find_latest_checkpoint for module in modules]

    before = state()
    enable_safe_loading()
    assert state() == before
    assert before[0][""].__module__ == "rep_plugin.openmmlab.checkpoint"
    assert before[0]["https://"].__module__ == "mmengine.runner.checkpoint"
    assert all(function is find_latest_checkpoint for function in before[2])


@pytest.mark.parametrize("backend", [HardDiskBackend, LocalBackend, lambda: get_file_backend("/x")])
def test_failed_write_leaves_the_old_file(tmp_path, backend):
    path = tmp_path / "sub" / "epoch_1.pth"
    backend().put(b"old", path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="cannot write"):
            backend().put(b"x" * 5000, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["epoch_1.pth"]


def save(path: Path, when: int) -> str:
    torch.save({"when": when}, path)
    os.utime(path, (when, when))
    return str(path)


def test_latest_checkpoint_is_the_named_one(tmp_path):
    assert find_latest_checkpoint(str(tmp_path)) is None
    first = save(tmp_path / "epoch_1.pth", 100)
    save(tmp_path / "epoch_2.pth", 200)
    (tmp_path / "last_checkpoint").write_text(first + "\n")
    assert find_latest_checkpoint(str(tmp_path)) == first


@pytest.mark.parametrize(
    "content", ["", "{folder}", "{folder}/epoch_1", "{folder}/epoch_99.pth", "\0\0", "epoch_2.pth"]
)
def test_latest_checkpoint_where_the_record_is_torn_or_stale(tmp_path, content, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "last_checkpoint").write_text(content.format(folder=tmp_path))
    assert find_latest_checkpoint(str(tmp_path)) is None
    # By time and not by name: epoch_10 sorts before epoch_9.
    save(tmp_path / "epoch_9.pth", 100)
    latest = save(tmp_path / "epoch_10.pth", 200)
    save(tmp_path / "best_accuracy_epoch_11.pth", 300)
    save(tmp_path / ".epoch_12.pth.1.tmp", 400)
    assert find_latest_checkpoint(str(tmp_path)) == latest


def test_latest_checkpoint_passes_over_a_torn_file(tmp_path):
    whole = save(tmp_path / "epoch_1.pth", 100)
    torn = tmp_path / "epoch_2.pth"
    torn.write_bytes(Path(whole).read_bytes()[:-300])
    (tmp_path / "last_checkpoint").write_text(str(torn))
    assert find_latest_checkpoint(str(tmp_path)) == whole
    with pytest.raises(RuntimeError):
        load_checkpoint_file(torn)


def test_without_enabling_mmengine_is_not_safe(tmp_path):
    """Pins why the adapter exists: official mmengine cannot read the file, and the fork runs the attack in it."""
    mark, good, bad = (tmp_path / name for name in ("executed", "good.pth", "bad.pth"))
    save_checkpoint(checkpoint(), str(good))
    save_checkpoint(checkpoint(bad=Touch(mark)), str(bad))
    code = f"""
        from mmengine.runner import CheckpointLoader
        for path in ({str(good)!r}, {str(bad)!r}):
            try:
                CheckpointLoader.load_checkpoint(path, "cpu")
                print("loaded")
            except Exception as error:
                print(type(error).__name__)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    outcome = [line for line in result.stdout.splitlines() if line in ("loaded", pickle.UnpicklingError.__name__)]
    if hasattr(mmengine.runner.checkpoint, "_safe_torch_load"):
        assert outcome == ["loaded", "loaded"] and mark.exists()
    else:
        assert outcome == [pickle.UnpicklingError.__name__] * 2 and not mark.exists()


def loader(**dataset) -> dict:
    return {"train_dataloader": {"dataset": dataset}}


def make_image_folder(root: Path) -> Path:
    (root / "train" / "a").mkdir(parents=True)
    (root / "train" / "a" / "1.PNG").write_bytes(b"x")
    return root


def test_a_hint_is_given_for_the_data_it_was_written_for_alone():
    cfg = loader(type="CUB", data_root="data/mini_cub/") | dict(missing_data_hint={"data/mini_cub": "render it"})
    with pytest.raises(DataError, match=r"does not exist, expected a folder; render it$"):
        check_data(cfg)
    cfg["train_dataloader"]["dataset"] = dict(type="CustomDataset", data_root="images/of/mine", data_prefix="train")
    with pytest.raises(DataError) as caught:
        check_data(cfg)
    assert str(caught.value) == (
        "train_dataloader: data_root 'images/of/mine' of CustomDataset does not exist, expected a folder; expected "
        "images/of/mine/train/CLASS/IMAGE.jpg (data_root, data_prefix and ann_file of the config)"
    )
    cfg["train_dataloader"]["dataset"] = dict(type="CUB", data_root="elsewhere")
    with pytest.raises(DataError, match=r"; expected elsewhere/images.txt, .*, elsewhere/images \(data_root"):
        check_data(cfg)


def test_data_that_is_there_passes(tmp_path):
    root = str(make_image_folder(tmp_path))
    check_data(loader(type="CustomDataset", data_root=root, data_prefix="train"))
    check_data(loader(type="mmpretrain.CustomDataset", data_prefix=dict(img_path=f"{root}/train")))
    check_data(loader(type="ImageNet", data_root=root, split="train"))
    check_data(loader(type="FashionMNIST", data_root="/none"))
    check_data(loader(type="CustomDataset", data_root="s3://bucket/none"))
    check_data({"train_dataloader": None}, ("train_dataloader", "val_dataloader"))
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        (tmp_path / name).write_text("1 1\n")
    (tmp_path / "images").mkdir()
    check_data(loader(type="CUB", data_root=root))


@pytest.mark.parametrize(
    ("dataset", "word"),
    [
        (dict(type="CustomDataset", data_root="{0}/none"), "data_root '{0}/none' of CustomDataset does not exist"),
        (dict(type="CustomDataset", data_root="{0}", data_prefix="val"), "image folder '{0}/val'"),
        (dict(type="CustomDataset", data_root="{0}", data_prefix="empty"), "holds 0 images"),
        (dict(type="CustomDataset", data_root="{0}", ann_file="none.txt"), "annotation file '{0}/none.txt'"),
        (
            dict(type="CustomDataset", data_root="{0}", ann_file="blank.txt"),
            "'{0}/blank.txt' of CustomDataset is empty",
        ),
        (dict(type="CUB", data_root="{0}"), "annotation file '{0}/images.txt' of CUB"),
        (dict(type="FGVCAircraft", data_root="{0}", split="test"), "images_variant_test.txt"),
        (dict(type="StanfordCars", data_root="{0}", split="test"), "cars_test_annos_withlabels.mat"),
        (dict(type="ImageNet", data_root="{0}", split="val"), "image folder '{0}/val'"),
        (dict(type="FashionMNIST", data_root="{0}/none", download=False), "data_root '{0}/none' of FashionMNIST"),
    ],
)
def test_missing_data_is_named(tmp_path, dataset, word):
    make_image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n\n")
    dataset = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in dataset.items()}
    for wrapped in (
        dataset,
        dict(type="RepeatDataset", times=2, dataset=dataset),
        dict(type="ConcatDataset", datasets=[dict(type="FashionMNIST"), dataset]),
    ):
        with pytest.raises(DataError) as caught:
            check_data({**loader(**wrapped), "missing_data_hint": "run\n this"})
        message = str(caught.value)
        assert message.startswith("train_dataloader: ") and word.format(tmp_path) in message
        assert message.endswith("; run this") and "\n" not in message


def test_error_of_a_worker_is_one_line():
    text = (
        'Caught DataError in worker.\nOriginal Traceback (most recent call last):\n  File "x"\na.DataError: broken p\n'
    )
    assert first_line(DataError(text)) == "broken p"
    assert first_line(ValueError("a\nb")) == "a"
