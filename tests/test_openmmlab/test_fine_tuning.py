"""The schedule of a pruned network's config, its data's own names, and statistics of batch norms measured anew."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from rep_plugin.openmmlab.accuracy import reestimate_norms_
from rep_plugin.openmmlab.configs import fine_tune_, own_data_

SGD = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
COSINE = dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)


def config(**changes) -> Config:
    net = dict(type="rep_plugin.Pruned", model=dict(type="ImageClassifier"), plan="{}")
    return Config(dict(model=net, custom_hooks=[], optim_wrapper=SGD, train_cfg=dict(max_epochs=100)) | changes)


@pytest.mark.parametrize(
    ("changes", "length", "rate"),
    [
        (dict(param_scheduler=dict(type="MultiStepLR", milestones=[30, 60])), dict(max_epochs=34), 0.01),
        (
            dict(param_scheduler=[dict(type="LinearLR"), dict(type="OneCycleLR", eta_max=0.5)]),
            dict(max_epochs=34),
            0.05,
        ),
        (
            dict(train_cfg=dict(max_epochs=2, val_interval=5, val_begin=2, dynamic_intervals=[(1, 2)])),
            dict(max_epochs=1, val_interval=1, val_begin=1),
            0.01,
        ),
        (
            dict(train_cfg=dict(type="IterBasedTrainLoop", max_iters=1000)),
            dict(type="IterBasedTrainLoop", max_iters=334),
            0.01,
        ),
        (dict(optim_wrapper=dict(backbone=SGD, head=SGD)), dict(max_epochs=34), 0.01),
    ],
)
def test_a_third_of_the_epochs_at_a_tenth_of_the_highest_rate(changes, length, rate):
    cfg = config(**changes)
    text = fine_tune_(cfg, "pruned.pth")
    assert cfg.train_cfg == length and cfg.load_from == "{{ fileDirname }}/pruned.pth"
    wrapper = cfg.optim_wrapper.get("head", cfg.optim_wrapper)
    assert wrapper.optimizer == dict(type="SGD", lr=rate, momentum=0.9)
    by_epoch = "max_epochs" in length
    assert cfg.param_scheduler == (COSINE if by_epoch else dict(type="CosineAnnealingLR", by_epoch=False))
    assert text.startswith(
        f"{length.get('max_epochs', length.get('max_iters'))} {'epochs' if by_epoch else 'iters'}, a third"
    )


def test_a_schedule_that_fine_tunes_already_stays():
    again = config(model=dict(type="rep_plugin.Pruned", model=config().model, plan="{}"))
    annealed = config(custom_hooks=[dict(type="rep_plugin.LinearizeHook", end=50)])
    for cfg in (again, annealed, config(train_cfg=None), config(optim_wrapper=None, train_cfg=None)):
        before = cfg.to_dict()
        assert fine_tune_(cfg, "pruned.pth") == "The schedule is that of the config before."
        assert cfg.to_dict() == before | dict(load_from="{{ fileDirname }}/pruned.pth")


def test_the_folder_may_move(tmp_path):
    cfg = config()
    fine_tune_(cfg, "pruned.pth")
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pruned.py").write_text(cfg.pretty_text)
        (tmp_path / folder / "child.py").write_text('_base_ = ["./pruned.py"]\n')
        for name in ("pruned.py", "child.py"):
            assert Config.fromfile(tmp_path / folder / name).load_from == str(tmp_path / folder / "pruned.pth")


def test_names_and_hints_of_other_data_go():
    data = dict(type="CustomDataset", data_root="images")
    birds = dict(data_root="data/birds", classes=["wren", "finch"])
    hints = {"data/birds": "render it"}
    loader = dict(train_dataloader=dict(dataset=data), missing_data_hint=hints, birds=birds, classes=["wren", "finch"])
    cfg = config(**loader)
    own_data_(cfg, ("circle", "cross"))
    assert cfg.classes == ["circle", "cross"] and "birds" not in cfg and "missing_data_hint" not in cfg
    assert cfg.train_dataloader.dataset == data
    cfg = config(**loader | dict(train_dataloader=dict(dataset=dict(type="CUB", **birds))))
    own_data_(cfg, ["wren", "finch"])
    assert cfg.missing_data_hint == hints and cfg.birds == birds


class Preprocessed(nn.Sequential):
    """What mmengine's models have that matters here."""

    def data_preprocessor(self, batch: dict, training: bool) -> dict:
        return batch


def test_statistics_are_those_of_the_images_and_weights_stay():
    model = Preprocessed(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.9),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    model.eval()
    weights = [p.clone() for p in model.parameters()]
    batches = [dict(inputs=torch.randn(8, 3, 5, 5)) for _ in range(5)]
    assert reestimate_norms_(model, batches, 20) == 24
    x = torch.cat([batch["inputs"] for batch in batches[:3]])
    y = model[0](x)
    assert torch.allclose(model[1].running_mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model[1].running_var, y.var((0, 2, 3)), rtol=1e-1)
    assert model[3].running_var.max() < 1.1, "dropout is off"
    assert not model.training and model[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_norms_that_a_model_keeps_stay():
    class Kept(Preprocessed):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()  # as norm_eval does
            return self

    model = Kept(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_mean.fill_(3.0)
    reestimate_norms_(model, [dict(inputs=torch.randn(8, 3, 5, 5))], 8)
    assert torch.equal(model[1].running_mean, torch.full((4,), 3.0))
