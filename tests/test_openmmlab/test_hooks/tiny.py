"""A residual network and a data set that train in milliseconds; configs name them by ``custom_imports``."""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import Dataset

from rep_plugin.history import history_of
from rep_plugin.openmmlab.checkpoint import enable_safe_loading

STEPS = 4  # iterations an epoch


@DATASETS.register_module()
class PlainImages(Dataset):
    """Sixteen random images of two classes, dark and bright."""

    metainfo = {"classes": ("dark", "bright")}

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 128, (3, 16, 16), generator=generator) + 128 * (index % 2)
        return {"inputs": image.byte(), "data_samples": DataSample().set_gt_label(index % 2)}


@MODELS.register_module()
class TinyResidual(nn.Module):
    """A stem, a block with a shortcut, and a last convolution."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv4, self.bn4 = nn.Conv2d(width, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(x)).relu()
        x = (self.bn3(self.conv3(y)) + x).relu()
        return (self.bn4(self.conv4(x)).relu(),)


@contextlib.contextmanager
def one_process(folder: Path, broadcast_buffers: bool = False) -> Iterator[dict]:
    """A process group of one; gives the changes to a config that wrap its model in DDP."""
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=broadcast_buffers)
            yield dict(launcher="pytorch", model_wrapper_cfg=wrapper)
        finally:
            dist.destroy_process_group()


@HOOKS.register_module()
class KillAt(Hook):
    """Ends the process, as kill -9 does, before the iteration that the environment names."""

    priority = "VERY_LOW"

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)


def append(runner, name: str, line: str) -> None:
    """Add a line to a file in the work directory, whole or not at all."""
    file = os.open(os.path.join(runner.work_dir, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


@HOOKS.register_module()
class LossLog(Hook):
    """Appends process, iteration and loss (every bit of it) to ``losses.txt``."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        append(runner, "losses.txt", f"{os.getpid()} {runner.iter} {float(outputs['loss']).hex()}")


@HOOKS.register_module()
class HashLog(Hook):
    """Appends rank, epoch and a hash of plans, parameters and their momentum to ``hashes.txt`` after each epoch."""

    priority = "LOWEST"

    def after_train_epoch(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        digest = hashlib.sha256(json.dumps([step["plan"]["kept"] for step in history_of(model)]).encode())
        for parameter in model.parameters():
            state = runner.optim_wrapper.optimizer.state[parameter]
            for tensor in (parameter.detach(), state["momentum_buffer"]):
                digest.update(tensor.numpy().tobytes())
        append(runner, "hashes.txt", f"{get_rank()} {runner.epoch + 1} {digest.hexdigest()}")


def config(work_dir, *hooks, **changes) -> Config:
    """Four epochs of four iterations; validation after each second."""
    loader = dict(
        batch_size=4,
        num_workers=0,
        dataset=dict(type="PlainImages"),
        sampler=dict(type="DefaultSampler", shuffle=True),
        collate_fn=dict(type="default_collate"),
    )
    cfg = dict(
        default_scope="mmpretrain",
        custom_imports=dict(imports=["tests.test_openmmlab.test_hooks.tiny"], allow_failed_imports=False),
        experiment_name=str(work_dir).replace("/", "_"),  # Runners of one name share their message hub
        work_dir=str(work_dir),
        model=dict(
            type="ImageClassifier",
            backbone=dict(type="TinyResidual"),
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=2, in_channels=16, topk=(1,)),
        ),
        data_preprocessor=dict(type="ClsDataPreprocessor", mean=[127.0] * 3, std=[64.0] * 3, num_classes=2),
        train_dataloader=loader,
        val_dataloader=loader | dict(sampler=dict(type="DefaultSampler", shuffle=False)),
        val_evaluator=dict(type="Accuracy"),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9)),
        train_cfg=dict(by_epoch=True, max_epochs=4, val_interval=2),
        val_cfg=dict(),
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1)
        ),
        custom_hooks=list(hooks),
        randomness=dict(seed=0),
    )
    return Config(cfg | changes)


def run(cfg: Config) -> Runner:
    enable_safe_loading()
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner
