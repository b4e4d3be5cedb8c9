"""LinearizeHook in real runs of mmengine's Runner on a tiny data set, warm-started from stock MobileNetV2."""

import copy
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

from rep_plugin.blocks.annealed import annealed_modules
from rep_plugin.errors import AnnealError
from rep_plugin.openmmlab.checkpoint import enable_safe_loading
from rep_plugin.openmmlab.hooks import LinearizeHook, Schedule
from rep_plugin.openmmlab.load import load_model
from rep_plugin.testing import calibrate_random_bn_
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks import tiny

STEPS = 3  # iterations an epoch


@DATASETS.register_module()
class TinyImages(Dataset):
    """Twelve random images of two classes."""

    metainfo = {"classes": ("dark", "bright")}

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 128, (3, 32, 32), generator=generator) + 128 * (index % 2)
        return {"inputs": image.byte(), "data_samples": DataSample().set_gt_label(index % 2)}


def config(work_dir, *hooks, backbone=None, **changes) -> Config:
    """The tiny training with our backbone, larger images and a lower rate."""
    model = dict(
        type="ImageClassifier",
        backbone=dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.35, anneal=True) | (backbone or {}),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=2, in_channels=1280, topk=(1,)),
    )
    own = dict(model=model, optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9)))
    cfg = tiny.config(work_dir, *hooks, **(own | changes))
    for loader in {"train_dataloader", "val_dataloader"} - set(changes):
        cfg[loader].dataset.type = "TinyImages"
    return cfg


def anneal(**arguments) -> dict:
    return dict(type="rep_plugin.LinearizeHook", **arguments)


def logged(runner: Runner) -> list[float]:
    """The alphas of all iterations, as the message hub has them."""
    return list(runner.message_hub.get_scalar("train/linear_alpha").data[0])


def run(cfg: Config) -> Runner:
    enable_safe_loading()
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A whole mmpretrain classifier with stock MobileNetV2, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stock")
    cfg = config(folder)
    cfg.model.backbone = dict(type="MobileNetV2", widen_factor=0.35)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build({**cfg.model, "data_preprocessor": cfg.data_preprocessor})
    calibrate_random_bn_(model, torch.randn(8, 3, 32, 32))
    torch.save({"state_dict": model.state_dict()}, folder / "stock.pth")
    return folder / "stock.pth", model


HOOKS = (
    dict(type="EMAHook", momentum=0.2, update_buffers=True),
    anneal(begin=1, end=3),
    dict(type="rep_plugin.ReparamHook"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stock):
    """A run of four epochs, annealed in the second and third, with EMA, deployed at its end."""
    folder = tmp_path_factory.mktemp("annealed")
    torch.manual_seed(0)
    return folder, run(config(folder, *HOOKS, load_from=str(stock[0])))


EXPECTED = [0, 0, 0, *(i / 6 for i in range(1, 6)), 1, 1, 1, 1]


def test_alpha_goes_from_0_to_exactly_1_in_model_ema_and_log(finished):
    folder, runner = finished
    assert logged(runner) == EXPECTED
    (ema,) = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    for model in (runner.model, ema):
        modules = list(annealed_modules(model))
        assert len(modules) == 34 and all(m.alpha == 1 and m.linear for m in modules)
    for epoch, alpha in ((1, 0), (2, EXPECTED[5]), (3, 1), (4, 1)):
        content = torch.load(folder / f"epoch_{epoch}.pth", weights_only=False)
        for state in (content["state_dict"], content["ema_state_dict"]):
            alphas = {float(v) for k, v in state.items() if k.endswith("anneal_alpha")}
            assert alphas == {float(torch.tensor(alpha))}, epoch
    lines = (next(folder.glob("*/vis_data/scalars.json"))).read_text().splitlines()
    shown = [line["linear_alpha"] for line in map(json.loads, lines) if "linear_alpha" in line]
    assert shown == pytest.approx(EXPECTED, abs=1e-4)


def test_run_ends_in_a_proven_artefact(finished):
    folder, _ = finished
    report = json.loads((folder / "deploy.json").read_text())
    assert report["max_rel_error"] < 1e-9 and report["sensitivity"] > 1e-3 and len(report["blocks"]) == 19
    model, _ = load_model(Config.fromfile(folder / "deploy.py"), folder / "deploy.pth")
    trained, _ = load_model(config(folder, *HOOKS), folder / "epoch_4.pth")
    x = torch.randn(2, 3, 33, 32)
    assert {type(m).__name__ for m in model.backbone.modules() if not list(m.children())} == {"Conv2d", "ReLU6"}
    assert relative_error(trained(x), model(x)) < 1e-4
    # An ordinary backbone takes the finished checkpoint, and the deployed config trains on without the hook.
    plain, _ = load_model(config(folder, backbone=dict(anneal=False)), folder / "epoch_4.pth")
    assert torch.equal(plain(x), trained(x))
    assert Config.fromfile(folder / "deploy.py").custom_hooks == [HOOKS[0]]


def test_resumed_run_goes_on_exactly(finished, tmp_path, stock):
    folder, whole = finished
    again = run(config(tmp_path, *HOOKS, load_from=str(folder / "epoch_2.pth"), resume=True))
    assert logged(again)[-6:] == EXPECTED[6:]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    worst = max(relative_error(theirs[k], v) for k, v in ours.items() if v.is_floating_point() and theirs[k].any())
    assert worst < 1e-5


def test_an_unfinished_checkpoint_keeps_its_alpha_where_it_is_tested(finished):
    folder, _ = finished
    model, _ = load_model(config(folder, *HOOKS), folder / "epoch_2.pth")
    assert {m.alpha for m in annealed_modules(model)} == {float(torch.tensor(EXPECTED[5]))}
    with pytest.raises(RuntimeError, match="not over|annealed"):
        load_model(config(folder, backbone=dict(anneal=False)), folder / "epoch_2.pth")


@pytest.mark.parametrize("measure", [0, 1])
def test_first_step_is_stock_in_train_mode(stock, tmp_path, measure):
    """The first loss, in train mode, with all images in one batch: stock's, once the statistics are measured."""
    path, model = stock
    cfg = config(tmp_path, anneal(begin=1, end=2, measure_batches=measure), load_from=str(path))
    cfg.train_dataloader.batch_size = 4 * STEPS
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=9)
    runner = run(cfg)
    model = copy.deepcopy(model)
    model.train()
    images = TinyImages()
    batch = model.data_preprocessor(runner.train_dataloader.collate_fn([images[i] for i in range(4 * STEPS)]), True)
    expected = model.loss(**batch)["loss"].item()
    found = runner.message_hub.get_scalar("train/loss").data[0][0]
    assert logged(runner)[0] == 0 and logged(runner)[-1] == 1
    assert (abs(found - expected) < 1e-4 * expected) == bool(measure), (found, expected)


def test_wrapped_model_is_annealed(stock, tmp_path):
    with tiny.one_process(tmp_path, broadcast_buffers=True) as ddp:
        changes = dict(ddp, train_cfg=dict(by_epoch=True, max_epochs=1))
        runner = run(config(tmp_path, anneal(end=3, by_epoch=False), load_from=str(stock[0]), **changes))
    assert type(runner.model).__name__ == "MMDistributedDataParallel"
    assert {m.alpha for m in annealed_modules(runner.model)} == {1.0} and logged(runner) == [1 / 3, 2 / 3, 1]


def test_schedules():
    for schedule, half in (("linear", 0.5), ("cosine", 0.5)):
        hook = LinearizeHook(end=1, schedule=schedule)
        hook._due = Schedule(2, 102, by_epoch=False)
        path = [hook.alpha_at(i) for i in range(110)]
        assert path == sorted(path) and path[:2] == [0, 0] and path[100] < 1 and set(path[101:]) == {1.0}
        assert path[51] == pytest.approx(half)
    assert path[26] == pytest.approx((1 - 0.5**0.5) / 2, abs=1e-9)  # cosine, a quarter of the way


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "needs 0 <= begin < end, got begin=0, end=None"),
        (dict(begin=3, end=3), "begin=3, end=3"),
        (dict(begin=-1, end=3), "begin must be a number >= 0, got -1"),
        (dict(end=2, schedule="step"), r"schedule must be one of cosine, linear, got 'step'"),
        (dict(end=2, measure_batches=1.5), "measure_batches must be a whole number >= 0, got 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearizeHook(**arguments)


BAD_RUNS = {
    "too long": (anneal(end=5), {}, {}, r"LinearizeHook.end \(=5\) must be <= the training's 4 epochs"),
    "too many": (anneal(end=13, by_epoch=False), {}, {}, r"end \(=13\) must be <= the training's 12 iterations"),
    "too short": (anneal(begin=1, end=1.1), {}, {}, "between begin=1 and end=1.1 epochs lies no iteration"),
    "plain": (anneal(end=3), dict(anneal=False), {}, "no annealed block, expected a backbone with anneal=True"),
    "no epochs": (
        anneal(end=3),
        {},
        dict(train_cfg=dict(by_epoch=False, max_iters=12, val_interval=20)),
        "IterBasedTrainLoop has none: by_epoch=False",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_RUNS))
def test_what_cannot_be_annealed_is_refused_before_the_first_step(case, tmp_path):
    hook, backbone, changes, message = BAD_RUNS[case]
    with pytest.raises(AnnealError, match=message) as caught:
        run(config(tmp_path, hook, backbone=backbone, **changes))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.pth"))


def test_deploying_what_nobody_anneals_is_refused_before_training(tmp_path):
    with pytest.raises(AnnealError, match=r"ends at alpha 0 .*add dict\(type='rep_plugin.LinearizeHook'"):
        run(config(tmp_path, dict(type="rep_plugin.ReparamHook")))


def test_a_finished_checkpoint_is_not_annealed_again(finished, tmp_path):
    with pytest.raises(AnnealError, match="starts at alpha 1, expected 0: it is annealed already, drop LinearizeHook"):
        run(config(tmp_path, anneal(end=3), load_from=str(finished[0] / "epoch_4.pth")))
