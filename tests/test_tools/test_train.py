"""The command line tools really train, resume, test, and tell what is wrong in one line."""

import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from rep_plugin.checkpoints.safe_load import load_checkpoint_file
from rep_plugin.errors import DataError
from rep_plugin.openmmlab.console import LONG_TEXTS
from rep_plugin.openmmlab.data import guard_dataloaders
from tests.helpers import ROOT

TRAIN, TEST = str(ROOT / "tools" / "train.py"), str(ROOT / "tools" / "test.py")

# One process imports the libraries, and forks for every run: a run is a process of its own, without the waiting.
FORKER = """
    import json, os, runpy, sys, traceback
    import mmengine.runner, mmpretrain.datasets, mmpretrain.evaluation, mmpretrain.models, mmpretrain.visualization
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2), os.chdir(job["folder"])
            sys.argv, sys.path[0] = job["argv"], os.path.dirname(job["argv"][0])
            code = 0
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
                if stop.code != code:
                    print(stop.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush(), os._exit(code)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

CONFIG = """
    default_scope = "mmpretrain"
    missing_data_hint = "make it first"
    pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
    data = dict(type="CustomDataset", data_root="{folder}", data_prefix="images", pipeline=pipeline)
    sampler = dict(type="DefaultSampler", shuffle=True)
    train_dataloader = dict(batch_size=4, num_workers=0, dataset=data, sampler=sampler)
    val_dataloader = dict(train_dataloader, sampler=dict(type="DefaultSampler", shuffle=False))
    test_dataloader = val_dataloader
    val_evaluator = test_evaluator = dict(type="Accuracy", topk=(1,))
    train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
    val_cfg = test_cfg = dict()
    model = dict(
        type="ImageClassifier",
        data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3, num_classes=2),
        backbone=dict(type="ResNet", depth=18, stem_channels=4, base_channels=4),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=2, in_channels=32, loss=dict(type="CrossEntropyLoss"), topk=(1,)),
    )
    optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9))
    # Without an end of its own, a scheduler keeps the end of the run which it was saved in.
    param_scheduler = dict(type="MultiStepLR", by_epoch=True, end=4, milestones=[3], gamma=0.1)
    default_hooks = dict(
        checkpoint=dict(type="CheckpointHook", interval=1),
        logger=dict(type="LoggerHook", interval=1),
        visualization=dict(type="VisualizationHook"),
    )
    visualizer = dict(type="UniversalVisualizer", vis_backends=[])
    randomness = dict(seed=0, deterministic=True)
    env_cfg = dict(mp_cfg=dict(mp_start_method="fork"), dist_cfg=dict(backend="nccl"))
"""


def environment() -> dict:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class Lab:
    """A folder with a config and images, and a way to run tools in it."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, str(folder / "tiny.py")
        Path(self.config).write_text(textwrap.dedent(CONFIG.format(folder=folder)))
        self.make_images("images")
        self.parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=folder,
        )

    def make_images(self, name: str) -> Path:
        rng = np.random.default_rng(0)
        for label in "ab":
            (self.folder / name / label).mkdir(parents=True)
            for i in range(4):
                image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(str(self.folder / name / label / f"{i}.png"), image)
        return self.folder / name

    def run(self, *argv: str, code: int = 0) -> str:
        """Run a tool and return what it printed; its exit code has to be ``code``."""
        log = self.folder / "log.txt"
        job = dict(argv=[str(part) for part in argv], log=str(log), folder=str(self.folder))
        print(json.dumps(job), file=self.parent.stdin, flush=True)
        # Importing the libraries may print something too.
        text = next(line for line in self.parent.stdout if line.startswith("exit "))
        assert text == f"exit {code}\n", text + log.read_text()
        return log.read_text()

    def error(self, *argv: str) -> str:
        """The one error line of a run which fails without a traceback."""
        text = self.run(*argv, code=1)
        assert "Traceback" not in text, text
        lines = text.rstrip("\n").splitlines()
        assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, text
        return lines[-1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.parent.stdin.close()
    made.parent.wait(timeout=20)


@pytest.fixture(scope="module")
def whole(lab):
    """Four epochs without interruption."""
    lab.run(TRAIN, lab.config, "--work-dir", "whole")
    return load_checkpoint_file(lab.folder / "whole" / "epoch_4.pth")


def assert_same_training(one: dict, other: dict) -> None:
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    momenta = [[state["momentum_buffer"] for state in run["optimizer"]["state"].values()] for run in (one, other)]
    assert momenta[0] and all(torch.equal(*pair) for pair in zip(*momenta))
    assert one["optimizer"]["param_groups"][0]["lr"] == other["optimizer"]["param_groups"][0]["lr"] != 0.05
    losses = [run["message_hub"]["log_scalars"]["train/loss"].data[0].tolist() for run in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert one["meta"]["iter"] == other["meta"]["iter"] == 8


def test_resumed_training_equals_uninterrupted(lab, whole):
    lab.run(TRAIN, lab.config, "--work-dir", "half", "--cfg-options", "train_cfg.max_epochs=2")
    half = load_checkpoint_file(lab.folder / "half" / "epoch_2.pth")
    assert not torch.equal(half["state_dict"]["head.fc.weight"], whole["state_dict"]["head.fc.weight"])
    text = lab.run(TRAIN, lab.config, "--work-dir", "half", "--resume")
    assert "resumed epoch: 2, iter: 4" in text
    assert_same_training(whole, load_checkpoint_file(lab.folder / "half" / "epoch_4.pth"))


def test_checkpoint_of_the_stock_tool_resumes(lab, whole):
    import mmpretrain

    stock = Path(mmpretrain.__file__).parent / ".mim" / "tools" / "train.py"
    flags = ("--no-persistent-workers", "--work-dir", "stock")
    lab.run(stock, lab.config, *flags, "--cfg-options", "train_cfg.max_epochs=2")
    record = lab.folder / "stock" / "last_checkpoint"
    record.write_text(record.read_text()[:-5])
    text = lab.run(TRAIN, lab.config, "--work-dir", "stock", "--resume")
    assert "names" in text and "resumed epoch: 2, iter: 4" in text
    assert_same_training(whole, load_checkpoint_file(lab.folder / "stock" / "epoch_4.pth"))


def test_resume_from_a_path_and_other_flags(lab, whole):
    flags = ("--resume", lab.folder / "whole" / "epoch_3.pth", "--no-validate", "--no-pin-memory")
    text = lab.run(TRAIN, lab.config, "--work-dir", "path", *flags, "--no-persistent-workers")
    assert "resumed epoch: 3, iter: 6" in text and "Epoch(val)" not in text
    assert_same_training(whole, load_checkpoint_file(lab.folder / "path" / "epoch_4.pth"))
    assert "base_batch_size" in lab.error(TRAIN, lab.config, "--auto-scale-lr")
    # --cfg-options come last, as in the stock tool, so that the flag needs the value in the config.
    scaled = lab.folder / "scaled.py"
    scaled.write_text("_base_ = './tiny.py'\nauto_scale_lr = dict(base_batch_size=8)\n")
    text = lab.run(TRAIN, scaled, "--auto-scale-lr", "--work-dir", "scaled", "--cfg-options", "train_cfg.max_epochs=1")
    assert "lr: 2.5000e-02" in text


def test_amp_trains_on_the_cpu(lab, whole):
    lab.run(TRAIN, lab.config, "--amp", "--work-dir", "amp", "--cfg-options", "train_cfg.max_epochs=1")
    assert "CpuAmpOptimWrapper" in (lab.folder / "amp" / "tiny.py").read_text()
    name = "head.fc.weight"
    weights = [load_checkpoint_file(lab.folder / run / "epoch_1.pth")["state_dict"][name] for run in ("amp", "whole")]
    assert weights[0].dtype is torch.float32 and not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0.1, atol=0.02)
    wrong = ("--cfg-options", "train_cfg.max_epochs=1")
    narrow = lab.folder / "narrow.py"
    narrow.write_text("_base_ = './tiny.py'\noptim_wrapper = dict(dtype='float16')\n")
    assert "expected bfloat16" in lab.error(TRAIN, narrow, "--amp", *wrong)


def test_long_texts_go_into_the_log_file_alone(lab, whole):
    noisy = lab.folder / "noisy.py"
    noisy.write_text(
        "_base_ = './tiny.py'\nrunner_type = 'Runner'\ntrain_cfg = dict(max_epochs=1)\n"
        "optim_wrapper = dict(optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))\n"
    )
    for argv, texts in (((TRAIN, noisy), LONG_TEXTS), ((TEST, noisy, "noisy/epoch_1.pth"), LONG_TEXTS[:-1])):
        text = lab.run(*argv, "--work-dir", "noisy")
        head = text[: text.index("Epoch(")]
        named = re.findall(r"environment, config, hooks and parameter options: (\S+\.log)", head)
        assert head.count("\n") < 30 and len(named) == 1, head
        log = (lab.folder / named[0]).read_text()
        assert all(begin in log and begin not in text for begin in texts)
        assert "norm_decay_mult" in log and "Epoch(" in log
    noisy.write_text("_base_ = './tiny.py'\nrunner_type = 'Rummer'\n")
    assert "'Rummer', expected the name of a registered runner" in lab.error(TRAIN, noisy)


def test_testing(lab, whole):
    best = lab.folder / "whole" / "epoch_4.pth"
    lab.run(TEST, lab.config, best, "--work-dir", "tested", "--out", "out.json", "--out-item", "metrics", "--amp")
    assert 0 <= json.loads((lab.folder / "out.json").read_text())["accuracy/top1"] <= 100
    lab.run(TEST, lab.config, best, "--work-dir", "tested", "--out", "out.pkl", "--tta")
    assert len(pickle.loads((lab.folder / "out.pkl").read_bytes())) == 8
    lab.run(TEST, lab.config, best, "--work-dir", "tested", "--show-dir", lab.folder / "shown", "--interval", "4")
    assert list((lab.folder / "shown").iterdir())
    assert "expected a name ending in .pkl" in lab.run(TEST, lab.config, best, "--out", "out.json", code=2)
    assert "needs --out" in lab.run(TEST, lab.config, best, "--out-item", "pred", code=2)


def test_user_errors_are_one_line(lab, whole):
    expected = "error: config none.py does not exist, expected a file or the name of a shipped config; as "
    assert lab.error(TRAIN, "none.py").startswith(expected)
    expected = "error: checkpoint none.pth does not exist, expected a file"
    assert lab.error(TRAIN, lab.config, "--resume", "none.pth") == expected
    assert lab.error(TEST, lab.config, "none.pth") == expected
    few = lab.error(TRAIN, lab.config, "--work-dir", "few", "--cfg-options", "model.head.num_classes=1")
    assert few == "error: model.head.num_classes (=1) must be > 1, the largest label of CustomDataset"
    torn = lab.folder / "torn.pth"
    torn.write_bytes((lab.folder / "whole" / "epoch_4.pth").read_bytes()[:-500])
    assert "torn.pth is not readable" in lab.error(TEST, lab.config, torn, "--work-dir", "tested")


def test_malicious_checkpoint_is_refused(lab):
    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {lab.folder / 'executed'}",)

    bad = lab.folder / "bad.pth"
    hub = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info=dict(x=Touch()))
    torch.save(dict(meta=dict(epoch=1, iter=2), state_dict={}, message_hub=hub), bad)
    for argv in ((TRAIN, lab.config, "--resume", bad), (TEST, lab.config, bad)):
        message = lab.error(*argv, "--work-dir", "attacked")
        assert str(bad) in message and "system" in message
    assert not (lab.folder / "executed").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_errors_are_one_line(lab, workers):
    def error(*options):
        prefix = "train_dataloader."
        extra = [f"{prefix}num_workers={workers}", *(prefix + option for option in options)]
        return lab.error(TRAIN, lab.config, "--work-dir", f"broken{workers}", "--cfg-options", *extra)

    message = error("dataset.data_root=/none")
    assert message.endswith("data_root '/none' of CustomDataset does not exist, expected a folder; make it first")
    broken = lab.make_images(f"broken{workers}_images") / "b" / "2.png"
    for content, reason in ((b"", "the file is empty"), (b"hello", "failed to load image")):
        broken.write_bytes(content)
        message = error(f"dataset.data_prefix={broken.parents[1].name}")
        assert message.startswith(f"error: cannot read image '{broken}': {reason}")
    if workers:
        return
    (lab.folder / "list.txt").write_text("a/0.png 0\n")
    for serialize in (True, False):
        options = ("dataset.ann_file=list.txt", "dataset.indices=0", f"dataset.serialize_data={serialize}")
        assert "holds 0 images after loading" in error(*options)


def test_a_download_that_fails_is_told_with_the_hint():
    def refuse(dataloader):
        raise URLError("no way there")

    runner = SimpleNamespace(cfg=dict(missing_data_hint="fetch\n  it"), build_dataloader=refuse)
    guard_dataloaders(runner)
    with pytest.raises(DataError, match=r"^FashionMNIST cannot be downloaded: no way there; fetch it$"):
        runner.build_dataloader(dict(dataset=dict(type="FashionMNIST", data_root="x")))


def test_launch_scripts(lab, whole):
    env = {**environment(), "PYTHON": sys.executable, "PORT": str(20000 + os.getpid() % 20000)}
    for script in ("dist_train.sh", "dist_test.sh"):
        result = subprocess.run(["bash", str(ROOT / "tools" / script)], capture_output=True, text=True, env=env)
        assert result.returncode == 2 and result.stderr.startswith("usage:")
    options = ("--cfg-options", "env_cfg.dist_cfg.backend=gloo", "train_cfg.max_epochs=1")
    command = ["bash", str(ROOT / "tools" / "dist_train.sh"), lab.config, "2", "--work-dir", "spread", "--no-validate"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=env, cwd=lab.folder)
    assert result.returncode == 0, result.stdout + result.stderr
    # Two processes share the eight images.
    assert "GPU" not in result.stderr and "Epoch(train) [1][1/1]" in result.stdout
    assert load_checkpoint_file(lab.folder / "spread" / "epoch_1.pth")["meta"]["iter"] == 1


def test_a_bug_ends_in_a_traceback(lab, whole, monkeypatch):
    """A TypeError of library code is no mistake of the user's."""

    def broken(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("rep_plugin.pruning.plan_pruning", broken)
    monkeypatch.setattr(sys, "argv", ["prune.py", lab.config, str(lab.folder / "whole/epoch_4.pth"), "--macs", "0.5"])
    with pytest.raises(TypeError, match="a bug"):
        runpy.run_path(str(ROOT / "tools/prune.py"), run_name="__main__")


def test_a_value_that_a_type_refuses_is_one_line_with_its_name(lab):
    own = "; a class of your own is found once custom_imports names its module$"
    short = ["train_cfg.max_epochs=1", "train_dataloader.batch_size=2"]
    for option, message in {
        "model.backbone.depth=7": "ResNet: .*invalid depth 7",
        "model.backbone.type=QqQqQ": f"ImageClassifier: type 'QqQqQ' is no model that is known{own}",
        "model.backbone.type=ResNett": "ImageClassifier: type 'ResNett' is no model that is known, did you mean 'ResNet'",
        "model.backbone.type=rep_plugin.RepMobilNetV2": ".*did you mean 'rep_plugin.RepMobileNetV2'",
        "model.backbone.depht=18": "ResNet: .*unexpected keyword argument 'depht', did you mean 'depth'",
        "default_hooks.more.type=rep_plugin.PrunHook": ".*did you mean 'rep_plugin.PruneHook'",
        # What a Runner builds once it trains.
        "optim_wrapper.optimizer.type=SDG": "optim_wrapper.optimizer: type 'SDG' is no optimizer .*did you mean 'SGD'",
        "optim_wrapper.optimizer.momentun=0.9": "SGD: .*'momentun', did you mean 'momentum'",
        "optim_wrapper.optimizer.lr=-1": "SGD: Invalid learning rate: -1",
        "param_scheduler.milestones=5": "MultiStepLR: 'int' object is not iterable",
        "param_scheduler.type=MultiStpLR": ".*type 'MultiStpLR' is no parameter scheduler .*did you mean 'MultiStepLR'",
        "train_cfg.max_epochs=x": ".*invalid literal for int",
        "val_evaluator.type=Acuracy": ".*type 'Acuracy' is no metric that is known, did you mean 'Accuracy'",
        "train_dataloader.sampler.type=Sampler": ".*did you mean '.*Sampler'",
    }.items():
        text = lab.error(TRAIN, lab.config, "--work-dir", "refused", "--cfg-options", option)
        assert re.search(f"^error: the config cannot be built: {message}", text), text
    values = dict(_delete_=True, type="OneCycleLR", eta_max=0.1, pct_start=0.25, convert_to_iter_based=True)
    scheduler = [f"param_scheduler.{key}={value}" for key, value in values.items()]
    text = lab.error(TRAIN, lab.config, "--work-dir", "refused", "--cfg-options", *short, *scheduler)
    assert "OneCycleLR: float division by zero: the training is too short for it" in text
