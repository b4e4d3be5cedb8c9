"""The hooks as users of mmdet and mmseg have them: in a real process in which mmpretrain cannot be imported."""

from tests.test_layering import without

BUILD = """
from mmengine.registry import HOOKS
ARGUMENTS = dict(
    AccuracyLrHook=dict(thresholds=[80]), CentripetalHook=dict(macs=0.5), DistillHook=dict(), LinearizeHook=dict(end=2),
    PruneHook=dict(macs=0.5), QATHook=dict(), ReparamHook=dict(), ResRepHook=dict(macs=0.5),
    SoftPruneHook=dict(prune_fraction=0.5), SparsityHook=dict(),
)
built = [type(HOOKS.build(dict(type=f"rep_plugin.{name}", **rest))).__name__ for name, rest in ARGUMENTS.items()]
import rep_plugin.openmmlab.hooks as room
print(sorted(built) == sorted(name for name in room.__all__ if name.endswith("Hook")), built == list(ARGUMENTS))
"""

TRAIN = """
import tempfile
from pathlib import Path
import torch
from mmcv.cnn import build_conv_layer
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn

@MODELS.register_module()
class Net(BaseModel):
    def __init__(self, conv_cfg, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.conv = build_conv_layer(conv_cfg, 3, 8, 3)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        logits = self.fc(self.bn(self.conv(inputs)).relu().mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, torch.stack(data_samples))) if mode == "loss" else logits

@DATASETS.register_module()
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 9, 9), 20 * index).byte(), data_samples=torch.tensor(index % 2))

folder = tempfile.mkdtemp()
Runner.from_cfg(Config(dict(
    model=dict(type="Net", conv_cfg=dict(type="rep_plugin.DBBConv2d"),
               data_preprocessor=dict(type="ImgDataPreprocessor", mean=[127] * 3, std=[64] * 3)),
    train_dataloader=dict(batch_size=4, dataset=dict(type="Images"), sampler=dict(type="DefaultSampler"),
                          collate_fn=dict(type="pseudo_collate")),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
    custom_hooks=[dict(type="rep_plugin.SparsityHook"), dict(type="rep_plugin.PruneHook", prune_fraction=0.5),
                  dict(type="rep_plugin.ReparamHook")],
    work_dir=folder, default_scope="mmengine",
))).train()
print(sorted(path.name for path in Path(folder).glob("*.pth")))
"""


def test_every_hook_is_built_by_its_name():
    assert without({"mmpretrain"}, BUILD)[-1] == "True True"


def test_a_training_runs_to_its_end():
    assert without({"mmpretrain"}, TRAIN)[-1] == "['deploy.pth', 'epoch_1.pth', 'pruned.pth']"
