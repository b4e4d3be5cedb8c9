"""What a hook cannot do is said in one line before the first step, not after the training."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, OPTIMIZERS
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import nn

from rep_plugin.errors import RepPluginError
from tests.test_openmmlab.test_hooks.tiny import config, one_process, run

OURS = [f"rep_plugin.{name}Hook" for name in ("Prune", "SoftPrune", "ResRep", "Centripetal")]
BLOCKS = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(2,))


@OPTIMIZERS.register_module()
class OneVector(torch.optim.SGD):
    """Keeps a vector of all parameters, beside its state."""

    def step(self, closure=None):
        flat = torch.cat([p.detach().flatten() for group in self.param_groups for p in group["params"]])
        self.mean = 0.9 * getattr(self, "mean", torch.zeros_like(flat)) + flat
        return super().step(closure)


@MODELS.register_module()
class ArithmeticNet(nn.Module):
    """Every channel meets another by a product that no rule knows."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return (torch.einsum("nchw,ndhw->nchw", x, x),)


@HOOKS.register_module()
class StepCount(Hook):
    """Counts the steps of all trainings."""

    steps = 0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        StepCount.steps += 1


# What is wrong: (hook, changes to the config, the message).
JOBS: dict[str, tuple[dict, dict, str]] = {
    "nothing to merge": (dict(type="rep_plugin.ReparamHook"), {}, "ReparamHook: .*no rep_plugin part"),
    "no fit": (
        dict(type="rep_plugin.PruneHook", macs=0.5, begin=2, rounds=2, interval=2),
        {},
        "PruneHook's last round comes after 4 epochs, expected fewer than the training's 4",
    ),
    "optimizer": (
        dict(type="rep_plugin.PruneHook", macs=0.5, begin=1),
        dict(optim_wrapper=dict(optimizer=dict(type="OneVector", lr=0.01))),
        "PruneHook: the state of OneVector does not fit a network that becomes narrower .*: take SGD or AdamW",
    ),
    "soft late": (
        dict(type="rep_plugin.SoftPruneHook", macs=0.5, begin=5),
        {},
        r"begin \(=5\) must be <= the training's 4",
    ),
    "resrep late": (
        dict(type="rep_plugin.ResRepHook", macs=0.5, begin=5),
        {},
        "expected within the training's 4 epochs",
    ),
    "resrep optimizer": (
        dict(type="rep_plugin.ResRepHook", macs=0.5),
        dict(optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01))),
        "ResRepHook needs an optimizer with momentum, as SGD has, got AdamW",
    ),
    "resrep blocks": (
        dict(type="rep_plugin.ResRepHook", macs=0.5),
        dict(backbone=BLOCKS, in_channels=8),
        r"ResRepHook: ImageClassifier has 19 blocks of several branches .*take another way of pruning \(docs",
    ),
    "centripetal late": (
        dict(type="rep_plugin.CentripetalHook", macs=0.5, begin=4),
        {},
        "must be < the training's 4 epochs",
    ),
    "no teacher": (dict(type="rep_plugin.DistillHook"), {}, "no PruneHook with begin is there"),
    "sparsity pattern": (
        dict(type="rep_plugin.SparsityHook", overrides={"*.nothing": 0.1}),
        {},
        "SparsityHook: .*nothing",
    ),
    "sparsity late": (
        dict(type="rep_plugin.SparsityHook", warmup=4),
        {},
        r"warmup \(=4\) must be < the training's 4 epochs",
    ),
    "linearize stock": (dict(type="rep_plugin.LinearizeHook", end=2), {}, "the model has no annealed block"),
    "linearize late": (
        dict(type="rep_plugin.LinearizeHook", end=9),
        {},
        r"end \(=9\) must be <= the training's 4 epochs",
    ),
    "metric": (
        dict(type="rep_plugin.AccuracyLrHook", thresholds=[50], monitor="accuracy/top5"),
        {},
        r"AccuracyLrHook: validation gives \['accuracy/top1'\], expected 'accuracy/top5'",
    ),
}
for kind in OURS:
    amount = dict(type=kind, macs=0.5)
    JOBS |= {
        f"{kind} pattern": (amount | dict(ignore=["*.nothing"]), {}, r"no layer is named like '\*.nothing'"),
        f"{kind} budget": (dict(type=kind, macs=10), {}, r"macs \(=10\) cannot be met: the least that remains is"),
        f"{kind} width": (amount | dict(min_channels=1000), {}, "cannot be met"),
        f"{kind} folder": (amount | dict(out_dir="file/out"), {}, "cannot write into file/out: Not a directory"),
        f"{kind} model": (
            amount,
            dict(backbone=dict(type="ArithmeticNet"), in_channels=16),
            "nothing in ImageClassifier can",
        ),
    }
for kind in (OURS[0], OURS[1], OURS[3]):
    JOBS[f"{kind} override"] = (
        dict(type=kind, macs=0.5, overrides={"*.nothing": 0.1}), {}, r"no layer is named like '\*.nothing'",
    )  # fmt: skip
JOBS["ReparamHook folder"] = (
    dict(type="rep_plugin.ReparamHook", out_dir="file/out"),
    dict(backbone=BLOCKS, in_channels=8),
    "cannot write into file/out",
)


@pytest.mark.parametrize("case", list(JOBS))
def test_a_wrong_job_is_refused_before_the_first_step(case, tmp_path, monkeypatch):
    hook, changes, message = JOBS[case]
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    changes = dict(changes)
    backbone, in_channels = changes.pop("backbone", None), changes.pop("in_channels", 16)
    cfg = config(tmp_path / "work", hook, dict(type="StepCount"), **changes)
    if backbone:
        cfg.model.backbone, cfg.model.head.in_channels = backbone, in_channels
    StepCount.steps = 0
    with pytest.raises((RepPluginError, OSError), match=message) as caught:
        run(cfg)
    assert StepCount.steps == 0 and "\n" not in str(caught.value)
    assert not list((tmp_path / "work").glob("*.pth"))


def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(tmp_path):
    teacher = config(tmp_path / "teacher")
    teacher.model.head.num_classes = teacher.data_preprocessor.num_classes = 5
    for name in ("val_dataloader", "val_cfg", "val_evaluator"):
        teacher[name] = None
    model = Runner.from_cfg(teacher).model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "teacher.pth")
    teacher.dump(tmp_path / "teacher.py")
    hook = dict(
        type="rep_plugin.DistillHook", teacher=str(tmp_path / "teacher.py"), checkpoint=str(tmp_path / "teacher.pth")
    )
    StepCount.steps = 0
    with pytest.raises(RepPluginError, match=r"^DistillHook: .*2.* 5") as caught:
        run(config(tmp_path / "work", hook, dict(type="StepCount")))
    assert StepCount.steps == 0 and "\n" not in str(caught.value)


@pytest.mark.parametrize("hook", [dict(type=kind, macs=0.6) for kind in OURS] + [dict(type="rep_plugin.DistillHook")])
def test_a_rehearsal_changes_nothing_of_the_training(hook, tmp_path):
    """The first step sees the weights and the images that it sees without the hook, under DDP too."""
    hooks = [hook]
    if hook["type"] == "rep_plugin.DistillHook":
        hooks = [dict(type=OURS[0], macs=0.6, begin=3), hook]

    def first(folder, *hooks, **changes) -> list[str]:
        cfg = config(folder, *hooks, dict(type="LossLog"), **changes)
        cfg.train_cfg.max_epochs = 4
        run(cfg)
        return (folder / "losses.txt").read_text().split()[2::3][:1]

    plain = first(tmp_path / "plain")
    assert first(tmp_path / "hooked", *hooks) == plain
    with one_process(tmp_path) as ddp:
        assert first(tmp_path / "ddp", *hooks, **ddp) == plain
