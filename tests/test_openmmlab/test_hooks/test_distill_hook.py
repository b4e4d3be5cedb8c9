"""DistillHook in real runs, against the losses written by hand, and against a run by hand."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

from rep_plugin.errors import HookError
from rep_plugin.functional.distillation import attention_distance, soft_divergence
from rep_plugin.openmmlab.hooks import DistillHook
from rep_plugin.openmmlab.hooks.runner_utils import plain_model
from rep_plugin.openmmlab.load import load_model
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.tiny import STEPS, config, one_process, run

TYPE = "rep_plugin.DistillHook"
ROUNDS = dict(type="rep_plugin.PruneHook", prune_fraction=0.5, rounds=2, begin=1, interval=2)
EMA = dict(type="EMAHook", momentum=0.2, update_buffers=True)
T, WEIGHT, FEATURE = 3.0, 0.7, 5.0
SETTINGS = dict(temperature=T, weight=WEIGHT, feature_weight=FEATURE)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    """A wider network, trained: arguments of the hook."""
    folder = tmp_path_factory.mktemp("teacher")
    cfg = config(folder)
    cfg.model.backbone.width = 12
    run(cfg)
    cfg.dump(folder / "teacher.py")
    return dict(teacher=str(folder / "teacher.py"), checkpoint=str(folder / "epoch_4.pth"))


def scalars(folder) -> list[dict]:
    lines = next(folder.glob("*/vis_data/scalars.json")).read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    ours, theirs = a.state_dict(), b.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    return max(relative_error(v, theirs[k]) for k, v in ours.items() if v.is_floating_point() and v.any())


def by_hand(student: torch.nn.Module, teacher: torch.nn.Module, inputs, labels) -> dict[str, torch.Tensor]:
    """The three terms, written out."""
    ours, theirs = student.backbone(inputs)[0], teacher.backbone(inputs)[0].detach()
    mine, taught = (model.head.fc(maps.mean((2, 3))) for model, maps in ((student, ours), (teacher, theirs)))
    p, q = (torch.exp(z / T) / torch.exp(z / T).sum(1, keepdim=True) for z in (taught.detach(), mine))
    looks = [(m**2).sum(1).flatten(1) for m in (ours, theirs)]
    looks = [a / (a**2).sum(1, keepdim=True).sqrt() for a in looks]
    return {
        "loss_label": (1 - WEIGHT) * -torch.log_softmax(mine, 1)[range(len(labels)), labels].mean(),
        "loss_distill": WEIGHT * T**2 * (p * (p / q).log()).sum(1).mean(),
        "loss_feature": FEATURE * ((looks[0] - looks[1]) ** 2).sum(1).mean(),
    }


def test_terms_and_gradients_are_those_written_by_hand(teacher, tmp_path):
    """A training by hand, beside the real one: the same logged terms in every step, and the same weights at the end."""
    every_step = dict(log_processor=dict(type="LogProcessor", window_size=1))
    cfg = config(tmp_path, dict(type=TYPE, **teacher, **SETTINGS), **every_step)
    cfg.train_dataloader.sampler.shuffle = False
    runner = run(cfg)
    wide = load_model(Config.fromfile(teacher["teacher"]), teacher["checkpoint"])[0]
    torch.manual_seed(0)
    fresh = copy.deepcopy(cfg)
    fresh.custom_hooks, fresh.work_dir = [], str(tmp_path / "start")
    fresh.optim_wrapper.optimizer.lr = 0.0
    fresh.experiment_name += "_start"
    student = run(fresh).model  # at learning rate 0 only its statistics have moved
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    data = cfg.train_dataloader.batch_size
    lines = scalars(tmp_path)
    assert len(lines) == 4 * STEPS
    images = runner.train_dataloader.dataset
    for step, line in enumerate(lines):
        batch = [images[(step % STEPS) * data + i] for i in range(data)]
        inputs = (torch.stack([one["inputs"] for one in batch]).float() - 127) / 64
        terms = by_hand(student, wide, inputs, [int(one["data_samples"].gt_label) for one in batch])
        for name, value in terms.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), (step, name)
        assert line["loss"] == pytest.approx(sum(terms.values()).item(), rel=1e-3)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert distance(runner.model, student) < 1e-4
    assert lines[0]["loss_distill"] > 1e-3 and lines[0]["loss_feature"] > 1e-3


def test_teacher_stays_as_it_is_and_outside(teacher, tmp_path):
    runner = run(config(tmp_path, EMA, dict(type=TYPE, **teacher, **SETTINGS)))
    hook = next(hook for hook in runner.hooks if isinstance(hook, DistillHook))
    whole = load_model(Config.fromfile(teacher["teacher"]), teacher["checkpoint"])[0]
    assert distance(hook.teacher, whole) == 0 and not any(m.training for m in hook.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in hook.teacher.parameters())
    assert len(runner.optim_wrapper.optimizer.param_groups[0]["params"]) == len(list(runner.model.parameters()))
    file = torch.load(tmp_path / "epoch_4.pth", weights_only=False)
    plain = run(config(tmp_path / "plain"))
    assert list(file["state_dict"]) == list(plain.model.state_dict()) and "rep_teacher" not in file["meta"]
    assert not plain_model(runner)._forward_hooks and not plain_model(runner)._forward_pre_hooks
    assert not runner.model.head._forward_hooks and not runner.model.backbone._forward_hooks


def one_epoch(folder, hook: dict, lr: float, **wrapper):
    """Four batches with plain SGD; nothing is validated."""
    changes = dict(train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg=None, val_dataloader=None, val_evaluator=None)
    return run(config(folder, hook, optim_wrapper=dict(optimizer=dict(type="SGD", lr=lr), **wrapper), **changes))


def test_mixed_precision_has_the_same_terms(teacher, tmp_path):
    hook = dict(type=TYPE, **teacher, **SETTINGS)
    runner = one_epoch(tmp_path / "half", hook, 0.05, type="rep_plugin.CpuAmpOptimWrapper")
    one_epoch(tmp_path / "plain", hook, 0.05)
    ours, theirs = scalars(tmp_path / "half")[0], scalars(tmp_path / "plain")[0]
    for name in ("loss_label", "loss_distill", "loss_feature"):
        assert ours[name] == pytest.approx(theirs[name], rel=5e-2) and ours[name] != theirs[name], name
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())


def test_accumulated_step_is_the_mean_of_its_batches(teacher, tmp_path):
    """At a rate so small that nothing moves meanwhile, one step of four batches is four steps at a quarter of the rate."""
    hook, lr = dict(type=TYPE, **teacher, **SETTINGS), 1e-4
    start, whole, parts = (
        dict(one_epoch(tmp_path / name, hook, rate, **wrapper).model.named_parameters())
        for name, rate, wrapper in (
            ("start", 0.0, {}),
            ("whole", lr, dict(accumulative_counts=STEPS)),
            ("parts", lr / STEPS, {}),
        )
    )
    for name in ("backbone.bn4.weight", "head.fc.weight"):
        ours, theirs = ((found[name] - start[name]).detach() for found in (whole, parts))
        assert ours.abs().max() > 1e-6 and relative_error(ours, theirs) < 2e-2, name


def test_wrapped_model(tmp_path):
    """Before its channels go, and after, when it is wrapped anew."""
    hooks = (ROUNDS, dict(type=TYPE, **SETTINGS))
    plain = run(config(tmp_path / "plain", *hooks))
    with one_process(tmp_path) as ddp:
        wrapped = run(config(tmp_path / "ddp", *hooks, **ddp))
    assert distance(plain_model(wrapped), plain.model) < 1e-5
    assert all("loss_distill" in line for line in scalars(tmp_path / "ddp")[STEPS:])


@pytest.fixture(scope="module")
def slimmed(tmp_path_factory):
    """Four epochs with EMA, channels removed after the first and the third; the dense copy teaches from the first on."""
    folder = tmp_path_factory.mktemp("slimmed")
    return folder, run(config(folder, EMA, ROUNDS, dict(type=TYPE, **SETTINGS)))


def test_copy_before_the_first_removal_teaches(slimmed):
    folder, runner = slimmed
    hook = next(hook for hook in runner.hooks if isinstance(hook, DistillHook))
    file = torch.load(folder / "epoch_1.pth", weights_only=False)
    # With an EMAHook ``state_dict`` holds the averages.
    assert all(torch.equal(value, hook.teacher.state_dict()[name]) for name, value in file["state_dict"].items())
    lines = scalars(folder)
    assert all(("loss_distill" in line) == (step >= STEPS) for step, line in enumerate(lines))
    assert all(line["loss"] > line["loss_label"] for line in lines[STEPS:])
    assert "DistillHook" not in (folder / "pruned.py").read_text()
    student = torch.load(folder / "epoch_4.pth", weights_only=False)
    assert list(student["state_dict"]) == list(file["state_dict"])


def test_resumed_runs_go_on_exactly_with_the_same_teacher(slimmed, tmp_path):
    folder, whole = slimmed
    hooks = (EMA, ROUNDS, dict(type=TYPE, **SETTINGS))
    for epoch in (1, 2):  # the last checkpoint before the first removal, from which the copy is made anew; the next one
        resume = dict(load_from=str(folder / f"epoch_{epoch}.pth"), resume=True)
        again = run(config(tmp_path / f"again{epoch}", *hooks, **resume))
        assert distance(whole.model, again.model) < 1e-5
        assert (tmp_path / f"again{epoch}/teacher.pth").is_file() == (epoch == 1)
    file = torch.load(folder / "teacher.pth", weights_only=False)
    file["meta"]["rep_teacher"] = "another"
    (tmp_path / "other").mkdir()
    torch.save(file, tmp_path / "other/teacher.pth")
    with pytest.raises(HookError, match=r"teacher.pth is not the teacher that the checkpoint was trained with"):
        run(config(tmp_path / "other", *hooks, **resume))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/epoch_2.pth").write_bytes((folder / "epoch_2.pth").read_bytes())
    with pytest.raises(HookError, match=r"resumes after a removal and needs .*teacher.pth, which is not there"):
        resume = dict(load_from=str(tmp_path / "alone/epoch_2.pth"), resume=True)
        run(config(tmp_path / "gone", *hooks, **resume))


def test_divergence_of_equal_logits_is_zero_and_its_gradient_that_of_soft_labels():
    torch.manual_seed(0)
    ours, theirs = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    ours.requires_grad_()
    assert soft_divergence(theirs, theirs, 2.0).abs() < 1e-15
    soft_divergence(ours, theirs, 2.0).backward()
    expected = 2.0 * ((ours / 2).softmax(1) - (theirs / 2).softmax(1)) / 5
    assert relative_error(expected.detach(), ours.grad) < 1e-12
    half = soft_divergence(ours.detach().half(), theirs.half(), 2.0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(soft_divergence(ours, theirs, 2.0).item(), 1e-2)
    with pytest.raises(ValueError, match=r"logits must both be .* got \(5, 7\) of the student and \(5, 6\)"):
        soft_divergence(ours, theirs[:, :6], 2.0)


def test_attention_needs_no_equal_channels_or_sizes():
    torch.manual_seed(0)
    wide, narrow = torch.randn(3, 12, 5, 7).double(), torch.randn(3, 4, 5, 7).double()
    assert attention_distance(wide, wide[:, torch.randperm(12)] * 3).abs() < 1e-12
    assert 1e-3 < attention_distance(narrow, wide) < 2
    fine = wide.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert attention_distance(wide, fine).abs() < 1e-12
    energy = F.normalize(wide.square().sum(1).flatten(1)) - F.normalize(narrow.square().sum(1).flatten(1))
    assert attention_distance(narrow, wide).item() == pytest.approx(energy.square().sum(1).mean().item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"expected maps \(N, C, H, W\), got \(3, 12\)"):
        attention_distance(wide[:, :, 0, 0], wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(teacher="a.py"), "teacher and checkpoint, or neither, got 'a.py' and None"),
        (dict(teacher=dict(type=torch.nn.ReLU), checkpoint="a.pth"), "teacher must be .* a config with a model"),
        (dict(temperature=0), "temperature must be a number > 0, got 0"),
        (dict(weight=1.5), "weight must be a number in .0, 1., got 1.5"),
        (dict(weight=0), "weight or feature_weight above 0, got 0 for both"),
        (dict(features="backbone"), "features must be a list of .*, got 'backbone'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillHook(**arguments)


def other(teacher: dict, **changes) -> dict:
    """The teacher's config, changed, as data."""
    cfg = Config.fromfile(teacher["teacher"])
    cfg.merge_from_dict(changes)
    return dict(teacher=dict(model=cfg.model.to_dict(), data_preprocessor=cfg.data_preprocessor.to_dict()))


def test_a_models_own_config_is_a_teacher(teacher, tmp_path):
    model = Config.fromfile(teacher["teacher"]).model.to_dict()
    hook = dict(type=TYPE, **teacher | dict(teacher=model))
    run(config(tmp_path, hook))
    assert "loss_distill" in scalars(tmp_path)[-1]


BAD_RUNS = {
    "no config": (
        lambda t: t | dict(teacher="rep_mbv2_mini_cup"),
        "^DistillHook: the teacher cannot be loaded: config rep_mbv2_mini_cup does not exist, .*: rep_mbv2_mini_cub, ",
    ),
    "no teacher": (
        lambda t: t | dict(checkpoint="none.pth"),
        "^DistillHook: the teacher cannot be loaded: checkpoint none.pth is missing",
    ),
    "nothing to copy": (lambda _: dict(), "no PruneHook with begin is there: give teacher"),
    "no module": (
        lambda t: t | dict(feature_weight=1.0, features=["backbone.bn9"]),
        "the teacher, ImageClassifier, has no module 'backbone.bn9'",
    ),
    "no map": (
        lambda t: t | dict(feature_weight=1.0, features=["neck"]),
        r"expected maps \(N, C, H, W\), got \(2, 16\) and \(2, 16\)",
    ),
    "normalised otherwise": (
        lambda t: t | other(t, **{"data_preprocessor.std": [60.0] * 3}),
        r"sees images with mean .127.0.* std .60.0.* expected the student's mean .* std .64.0",
    ),
}


@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_what_does_not_fit_is_refused(case, teacher, tmp_path):
    arguments, message = BAD_RUNS[case]
    with pytest.raises(HookError, match=message) as caught:
        run(config(tmp_path, dict(type=TYPE, **arguments(teacher))))
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused(teacher, tmp_path):
    cfg = config(tmp_path, dict(type=TYPE, **teacher))
    cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = 3
    with pytest.raises(HookError, match=r"got \(2, 3\) of the student and \(2, 2\) of the teacher"):
        run(cfg)
