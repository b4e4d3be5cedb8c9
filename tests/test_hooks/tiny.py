"""A residual network and a data set that train in milliseconds; configs name them by ``custom_imports``."""

import os
import signal

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import Dataset

from rep_plugin.mm_checkpoint import enable_safe_loading

STEPS = 4  # iterations an epoch


@DATASETS.register_module()
class PlainPictures(Dataset):
    """Sixteen random pictures of two classes, dark and bright."""

    metainfo = {"classes": ("dark", "bright")}

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        picture = torch.randint(0, 128, (3, 16, 16), generator=generator) + 128 * (index % 2)
        return {"inputs": picture.byte(), "data_samples": DataSample().set_gt_label(index % 2)}


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


@HOOKS.register_module()
class KillAt(Hook):
    """Ends the process, as kill -9 does, before the iteration that the environment names."""

    priority = "VERY_LOW"

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class LossLog(Hook):
    """Appends process, iteration and loss (every bit of it) to ``losses.txt``, one line at a time, whole or not at all."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        line = f"{os.getpid()} {runner.iter} {float(outputs['loss']).hex()}\n"
        file = os.open(os.path.join(runner.work_dir, "losses.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)


def config(work_dir, *hooks, **changes) -> Config:
    """Four epochs of four iterations; validation after each second."""
    loader = dict(
        batch_size=4,
        num_workers=0,
        dataset=dict(type="PlainPictures"),
        sampler=dict(type="DefaultSampler", shuffle=True),
        collate_fn=dict(type="default_collate"),
    )
    cfg = dict(
        default_scope="mmpretrain",
        custom_imports=dict(imports=["tests.test_hooks.tiny"], allow_failed_imports=False),
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
