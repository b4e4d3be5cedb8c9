"""CentripetalHook in real runs: filters drawn together, merged without loss, killed and resumed, under EMA and DDP."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from rep_plugin.errors import HookError
from rep_plugin.openmmlab.hooks import CentripetalHook
from rep_plugin.openmmlab.hooks.runner_utils import evaluate, merge_loss_warning, plain_model
from rep_plugin.openmmlab.load import load_model
from rep_plugin.pruning.methods.centripetal import cluster_distances, snap_clusters_
from rep_plugin.pruning.methods.clusters import Clusters
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.conftest import ROOT
from tests.test_openmmlab.test_hooks.conftest import run as run_tool
from tests.test_openmmlab.test_hooks.tiny import STEPS, config, one_process, run

X = torch.randn(2, 3, 17, 16)
DRAW = dict(type="rep_plugin.CentripetalHook", macs=0.5, strength=1.0, begin=1)
SLOW = dict(
    optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.5))
)  # without momentum half of a distance goes in a step


@HOOKS.register_module()
class FreezeFirst(Hook):
    def before_run(self, runner) -> None:
        runner.model.backbone.conv1.requires_grad_(False)


def artefact(folder) -> torch.nn.Module:
    return load_model(Config.fromfile(folder / "pruned.py"), folder / "pruned.pth")[0]


def clusters_in(path) -> Clusters:
    return Clusters.from_json(torch.load(path, weights_only=False)["meta"][CentripetalHook.meta_key])


def entry_of(folder) -> dict:
    (entry,) = json.loads((folder / "pruned.rounds.json").read_text())
    return entry


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four epochs, the last three under the pull."""
    folder = tmp_path_factory.mktemp("centripetal")
    return folder, run(config(folder, DRAW, **SLOW)), next(folder.glob("*/*.log")).read_text()


def test_filters_become_equal_and_are_merged_without_loss(finished):
    folder, runner, log = finished
    clusters = clusters_in(folder / "epoch_4.pth")
    assert CentripetalHook.meta_key not in torch.load(folder / "epoch_1.pth", weights_only=False)["meta"]
    assert clusters == clusters_in(folder / "epoch_2.pth")
    far, near = (
        max(
            b for _, b in cluster_distances(load_model(config(folder), folder / f"epoch_{n}.pth")[0], clusters).values()
        )
        for n in (1, 4)
    )
    assert far > 0.3 and near < 2e-3, (far, near)
    entry, report = entry_of(folder), json.loads((folder / "pruned.json").read_text())
    assert max(group["relative"] for group in entry["distances"].values()) == pytest.approx(near)
    assert all(set(group) == {"max", "relative"} for group in entry["distances"].values())
    assert report["macs_after"] <= 0.5 * report["macs_before"] and report["max_rel_error"] < 1e-9
    assert entry["before"] == evaluate(runner, runner.model) and entry["after"] == entry["before"]
    pruned = artefact(folder)
    snapped = copy.deepcopy(runner.model)
    snapped.eval()
    assert relative_error(snapped(X), pruned(X)) < 0.05  # statistics of the first epochs have not faded yet
    snap_clusters_(snapped, clusters)
    assert relative_error(snapped(X), pruned(X)) < 1e-5
    assert pruned.backbone.conv1.out_channels < 8 == runner.model.backbone.conv1.out_channels
    assert "CentripetalHook" not in (folder / "pruned.py").read_text()
    distances = list(runner.message_hub.get_scalar("train/centripetal_distance").data[0])
    assert len(distances) == 3 and distances == sorted(distances, reverse=True)
    assert "CentripetalHook draws 40 channels into" in log and "WARNING - CentripetalHook" not in log


def test_resumed_run_goes_on_exactly(finished, tmp_path):
    """From a checkpoint before the clusters, and from one with them."""
    folder, whole, _ = finished
    for epoch in (1, 2):
        state = dict(load_from=str(folder / f"epoch_{epoch}.pth"), resume=True)
        again = run(config(tmp_path / str(epoch), DRAW, **SLOW, **state))
        assert clusters_in(tmp_path / str(epoch) / "epoch_4.pth") == clusters_in(folder / "epoch_4.pth")
        for name, value in whole.model.state_dict().items():
            if value.is_floating_point() and value.any():
                assert relative_error(value, again.model.state_dict()[name]) < 1e-5, name
        assert relative_error(artefact(folder)(X), artefact(tmp_path / str(epoch))(X)) < 1e-5
    state = dict(load_from=str(folder / "epoch_4.pth"), resume=True)
    run(config(tmp_path / "over", DRAW, **SLOW, **state))
    assert relative_error(artefact(folder)(X), artefact(tmp_path / "over")(X)) < 1e-6
    with pytest.raises(
        HookError, match=r"the checkpoint's clusters were made for 'macs=0.5, .*', the config asks for 'mac"
    ):
        run(config(tmp_path / "other", DRAW | dict(macs=0.6), **SLOW, **state))


def test_killed_and_resumed(finished, tmp_path):
    """In processes of their own, with the command line tool; the first is killed as by kill -9."""
    folder, whole, _ = finished
    config(tmp_path, DRAW, dict(type="KillAt"), **SLOW).dump(tmp_path / "config.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", ROOT / "tools/train.py", "config.py", "--work-dir", "work"]
    for kill_at, resume in ((2 * STEPS + 1, []), (-1, ["--resume"])):
        done = subprocess.run(
            [*command, *resume],
            cwd=tmp_path,
            env={**environment, "KILL_AT": str(kill_at)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if kill_at < 0 else -signal.SIGKILL), done.stdout[-1500:] + done.stderr[-1500:]
    found = torch.load(tmp_path / "work/epoch_4.pth", weights_only=False)["state_dict"]
    for name, value in whole.model.state_dict().items():
        if value.is_floating_point() and value.any():
            assert relative_error(value, found[name]) < 1e-5, name
    assert entry_of(tmp_path / "work")["before"] == entry_of(folder)["before"]
    assert relative_error(artefact(folder)(X), artefact(tmp_path / "work")(X)) < 1e-5


def test_wrapped_model_is_drawn_as_a_plain_one(finished, tmp_path):
    _, whole, _ = finished
    with one_process(tmp_path) as ddp:
        wrapped = run(config(tmp_path / "ddp", DRAW, **SLOW, **ddp))
    theirs = plain_model(wrapped).state_dict()
    for name, value in whole.model.state_dict().items():
        if value.is_floating_point() and value.any():
            assert relative_error(value, theirs[name]) < 1e-5, name


def test_what_is_not_equal_is_merged_with_a_warning_and_the_averaged_weights_count(tmp_path, monkeypatch):
    metrics = iter([{"accuracy/top1": 90.0}, {"accuracy/top1": 89.8}])
    monkeypatch.setattr("rep_plugin.openmmlab.hooks.centripetal_hook.evaluate", lambda *_: next(metrics))
    ema = dict(type="EMAHook", momentum=0.2, update_buffers=True)
    runner = run(config(tmp_path, ema, DRAW | dict(strength=1e-3, clusters="even", by_epoch=False)))
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert (
        "WARNING - CentripetalHook: merging lost 0.20 points: accuracy/top1 fell from 90 to 89.8, filters were" in log
    )
    average = next(hook.ema_model.module for hook in runner.hooks if hasattr(hook, "ema_model"))
    (_, relative), *_ = cluster_distances(average, clusters_in(tmp_path / "epoch_4.pth")).values()
    (logged, *_) = entry_of(tmp_path)["distances"].values()
    assert logged["relative"] == pytest.approx(relative) and relative > 0.1


def test_loss_is_in_points():
    assert merge_loss_warning({"loss": 1.0, "accuracy/top1": 90.0}, {"loss": 9.0, "accuracy/top1": 89.95}) is None
    assert merge_loss_warning({"coco/bbox_mAP": 0.4}, {"coco/bbox_mAP": 0.3995}) is merge_loss_warning({}, {}) is None
    warning = merge_loss_warning({"coco/bbox_mAP": 0.4}, {"coco/bbox_mAP": 0.35})
    assert warning.startswith("merging lost 5.00 points: coco/bbox_mAP fell")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "exactly one of prune_fraction, params, macs, widths, got none"),
        (dict(macs=0.5, prune_fraction=0.5), r"got \['prune_fraction', 'macs'\]"),
        (dict(prune_fraction=1.5), r"prune_fraction must be a number in \(0, 1\) or None, got 1.5"),
        (dict(macs=0.5, clusters="ward"), r"clusters must be one of even, kmeans, got 'ward'"),
        (dict(macs=0.5, strength=0), r"strength must be a number in \(0, 1000\], got 0"),
        (dict(macs=0.5, strength=-1), r"strength must be a number in \(0, 1000\], got -1"),
        (dict(macs=0.5, begin=-1), "begin must be a number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CentripetalHook(**arguments)


BAD_RUNS = {
    "late": ([DRAW | dict(begin=4)], {}, r"CentripetalHook.begin \(=4\) must be < the training's 4 epochs"),
    "pattern": ([DRAW | dict(ignore=["*.nothing"])], {}, r"CentripetalHook: no layer is named like '\*.nothing'"),
    "budget": ([DRAW | dict(macs=2)], {}, r"CentripetalHook: macs \(=2\) cannot be met"),
    "two": ([DRAW, dict(type="rep_plugin.PruneHook", macs=0.5)], {}, "CentripetalHook and PruneHook cannot both prune"),
    "frozen": (
        [DRAW | dict(begin=0), dict(type="FreezeFirst")],
        {},
        r"CentripetalHook: 'backbone.conv1.weight' \(1 of \d+ such tensors\) is not trained",
    ),
}


@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_what_does_not_fit_is_refused_before_the_first_step(case, tmp_path):
    hooks, changes, message = BAD_RUNS[case]
    with pytest.raises(HookError, match=message) as caught:
        run(config(tmp_path, *hooks, **changes))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.pth"))


def test_a_merge_that_fails_is_known_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("rep_plugin.pruning.methods.centripetal._sum_columns_", lambda *_: None)
    with pytest.raises(HookError, match="CentripetalHook: the whole model differs by") as caught:
        run(config(tmp_path, DRAW))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.pth"))


def test_config_halves_the_multiply_adds_without_loss(tmp_path):
    """The config on real images, in short: 96 steps bring filters together at less momentum and a larger strength."""
    options = [
        "train_dataloader.dataset.indices=384",
        "train_dataloader.batch_size=16",
        "val_dataloader.dataset.indices=200",
        "train_dataloader.num_workers=0",
        "val_dataloader.num_workers=0",
        "model.backbone.stem_channels=8",
        "model.backbone.base_channels=8",
        "model.head.in_channels=64",
        "train_cfg.max_epochs=4",
        "train_cfg.val_interval=4",
        "optim_wrapper.optimizer.momentum=0.5",
        "custom_hooks.0.strength=1.0",
        "custom_hooks.0.min_channels=2",
        "custom_hooks.0.round_to=2",
    ]
    config = ROOT / "configs/pruning/csgd_resnet18_fashion_mnist.py"
    done = run_tool(ROOT / "tools/train.py", config, "--work-dir", tmp_path, "--cfg-options", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report, entry = json.loads((tmp_path / "pruned.json").read_text()), entry_of(tmp_path)
    assert report["max_rel_error"] < 1e-9 and report["macs_after"] <= 0.5 * report["macs_before"]
    assert max(group["relative"] for group in entry["distances"].values()) < 1e-5
    assert abs(entry["before"]["accuracy/top1"] - entry["after"]["accuracy/top1"]) <= 0.5  # a image of 200
