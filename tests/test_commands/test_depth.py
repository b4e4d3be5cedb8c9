"""``rep-plugin depth``: a plan by the config's own validation, a table of times, and what is refused before it writes."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.blocks.activations import FUNCTIONS
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.commands import depth
from rep_plugin.depth import read_latency_table, timing
from rep_plugin.openmmlab.accuracy import judge_of, validation_metrics
from rep_plugin.openmmlab.load import build_model, load_model
from rep_plugin.testing import calibrate_random_bn_
from tests.test_openmmlab.test_hooks import test_linearize_hook
from tests.test_openmmlab.test_hooks.test_linearize_hook_plans import config

TINY = ["config.py", "epoch_1.pth"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config with a stock MobileNetV2 on twelve images, and a checkpoint of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "SECONDS", 0.3)
    cfg = config(tmp_path / "work")
    cfg.custom_imports.imports = [test_linearize_hook.__name__]
    cfg.dump("config.py")
    torch.manual_seed(0)
    model = build_model(cfg)
    calibrate_random_bn_(model, torch.randn(8, 3, 32, 32))
    save_checkpoint_file({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "epoch_1.pth")
    return tmp_path


def refused(capsys, *words) -> str:
    """The line that a command line ends with; the folder stays as it was."""
    with pytest.raises(SystemExit) as stop:
        main(["depth", *map(str, words)])
    line = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in line and line.count("error: ") == 1
    return line


def test_choices_are_those_of_the_package():
    """They are written down again: ``--help`` imports no torch."""
    assert depth.RUNTIMES == timing.ALL_RUNTIMES and tuple(FUNCTIONS) == depth.ACTIVATIONS


def test_validation_judges_and_the_plan_trains(folder, capsys):
    main(["depth", *TINY, "--macs", "0.6", "--act-after", "relu6", "--out-dir", "out", "--judge-batches", "2"])
    out = capsys.readouterr().out
    assert out.endswith("written: out/depth_plan.json, out/depth_plan.png\n")
    assert (folder / "out/depth_plan.png").read_bytes().startswith(b"\x89PNG")
    plan = rep_plugin.DepthPlan.from_json(folder / "out/depth_plan.json")
    assert plan.importance == "evaluate" and plan.act_after == "relu6" and plan.input_shape == (1, 3, 32, 32)
    assert plan.chosen and plan.macs_after <= 0.6 * plan.macs_before
    assert f"{len(plan.chosen)} of {len(plan.segments)} segments merged" in " ".join(out.split())
    assert 0 <= plan.score_before <= 100 and not plan.notes
    # What it says to write is a part of a config, and its hook takes the plan.
    part = out.partition("after end):\n")[2].partition("written:")[0]
    (folder / "part.py").write_text(part)
    hook = Config.fromfile("part.py").custom_hooks[0]
    assert hook.plan == "out/depth_plan.json" and hook.end <= 4
    assert Config.fromfile("part.py").load_from == "epoch_1.pth"
    runner = test_linearize_hook.run(
        config(folder / "again", hook, load_from="epoch_1.pth", train_cfg=dict(by_epoch=True, max_epochs=2))
    )
    assert test_linearize_hook.logged(runner)[-1] == 1


def test_a_record_keeps_the_scores_and_blocks_may_go_whole(folder, monkeypatch):
    words = [
        "depth",
        *TINY,
        "--macs",
        "0.6",
        "--judge-batches",
        "1",
        "--record",
        "scores.json",
        "--skip",
        "--overwrite",
    ]
    main(words)
    plan, scores = (folder / name for name in ("depth_plan.json", "scores.json"))
    assert any(segment.skip for segment in rep_plugin.DepthPlan.from_json(plan).segments)
    before = scores.read_text(), plan.read_text()
    monkeypatch.setattr("rep_plugin.depth.planner.score_of", None)  # all that it would be called for is known
    main(words)
    assert (scores.read_text(), plan.read_text()) == before


def test_a_judge_sees_batches_spread_over_the_set_and_leaves_the_evaluator_empty(folder, monkeypatch):
    model, cfg = load_model(Config.fromfile("config.py"), "epoch_1.pth")[0], Config.fromfile("config.py")
    loader = Runner.build_dataloader(cfg.val_dataloader)
    read = []
    loader.dataset.__class__, plain = type("Seen", (loader.dataset.__class__,), {
        "__getitem__": lambda self, index: (read.append(index), plain.__getitem__(self, index))[1]
    }), loader.dataset.__class__  # fmt: skip
    runner = Runner.from_cfg(config(folder / "judged"))
    evaluator = runner.build_evaluator(cfg.val_evaluator)
    monkeypatch.setattr(evaluator, "evaluate", None)  # it waits for all processes, and one alone judges
    judge = judge_of(loader, evaluator, 2)
    assert read == [0, 1, 3, 4, 6, 7, 9, 10] and not evaluator.metrics[0].results
    assert judge(model) == judge(model) and len(read) == 8 and not evaluator.metrics[0].results
    whole = judge_of(loader, evaluator, 99)
    assert whole(model) == pytest.approx(validation_metrics(model, cfg, loader)["accuracy/top1"])


def test_other_ways_to_judge(folder):
    cases = {
        "calibration": ["--no-accuracy"],
        "batch norms": ["--no-real-data", "--shape", "3", "32", "32"],
    }
    for kind, words in cases.items():
        main(["depth", *TINY, "--macs", "0.6", "--overwrite", *words])
        plan = rep_plugin.DepthPlan.from_json(folder / "depth_plan.json")
        assert (plan.importance, plan.score_before) == (kind, None) and plan.chosen
    main(["depth", *TINY, "--macs", "0.6", "--overwrite", "--shape", "3", "64", "48"])
    assert rep_plugin.DepthPlan.from_json(folder / "depth_plan.json").input_shape == (1, 3, 64, 48)


def test_without_training_images_those_of_validation_are_taken(folder):
    options = ["--cfg-options", "train_dataloader=None", "--no-accuracy"]
    main(["depth", *TINY, "--macs", "0.6", *options])
    plan = rep_plugin.DepthPlan.from_json(folder / "depth_plan.json")
    (note,) = plan.notes
    assert plan.importance == "calibration" and "the config has no train_dataloader" in note


def test_a_table_of_times_is_written_without_weights_and_planned_with(folder, capsys):
    """On another machine there is no data set: with --shape none is read. The plan's own machine has no runtime."""
    words = ["config.py", "--write-table", "times/table.json", "--runtime", "onnxruntime", "--shape", "3", "32", "32"]
    main(["depth", *words, "--cfg-options", "val_dataloader.dataset.type=Missing"])
    assert capsys.readouterr().out.endswith("written: times/table.json\n")
    table = read_latency_table("times/table.json")
    assert (table.runtime, table.input_shape, table.threads) == ("onnxruntime", (1, 3, 32, 32), 1) and table.macs > 0
    data = json.loads((folder / "times/table.json").read_text())
    data["segments"] = {key: [2.0, 1.0] for key in data["segments"]}  # as if all paid
    data["whole"] = 100.0
    (folder / "table.json").write_text(json.dumps(data))
    main(["depth", *TINY, "--latency-ms", "99", "--table", "table.json", "--no-accuracy"])
    plan = rep_plugin.DepthPlan.from_json(folder / "depth_plan.json")
    assert (plan.runtime, plan.latency_before, plan.why) == ("onnxruntime", 100.0, "latency_ms=99") and plan.chosen
    before = sorted(folder.iterdir())
    other = ["--cfg-options", "model.backbone.widen_factor=0.2", "model.head.in_channels=24"]
    state = build_model(_with(Config.fromfile("config.py"), 0.2, 24)).state_dict()
    save_checkpoint_file({"state_dict": state, "meta": {}}, folder / "epoch_1.pth")
    line = refused(
        capsys, *TINY, "--latency", 0.9, "--table", "table.json", "--out-dir", "new", "--no-accuracy", *other
    )
    assert "latency_table table.json is of another model" in line and sorted(folder.iterdir()) == before
    line = refused(
        capsys, *TINY, "--latency", 0.9, "--table", "table.json", "--out-dir", "new", "--shape", 3, 64, 64, *other
    )
    assert "was measured on (1, 3, 32, 32), example_input is (1, 3, 64, 64)" in line


def _with(cfg: Config, width: float, channels: int) -> Config:
    cfg.model.backbone.widen_factor, cfg.model.head.in_channels = width, channels
    return cfg


WRONG = {
    "one of the arguments --latency --latency-ms --macs --write-table is required": [],
    "argument --macs: not allowed with argument --latency": ["--latency", 0.5, "--macs", 0.5],
    "argument --write-table: not allowed with argument --macs": ["--macs", 0.5, "--write-table", "t.json"],
    "--table does not go with --macs": ["--macs", 0.5, "--table", "table.json"],
    "--runtime does not go with --macs": ["--macs", 0.5, "--runtime", "eager"],
    "--threads does not go with --table": ["--latency", 0.5, "--table", "t.json", "--threads", 2],
    "--skip does not go with --write-table": ["--write-table", "t.json", "--skip"],
    "--record does not go with --no-accuracy": ["--macs", 0.5, "--no-accuracy", "--record", "r.json"],
    "error: list.json: missing or unknown list": ["--macs", 0.5, "--record", "list.json"],
    "--act-after does not go with --write-table": ["--write-table", "t.json", "--act-after", "relu"],
    "--judge-batches does not go with --no-accuracy": ["--macs", 0.5, "--no-accuracy", "--judge-batches", 2],
    "invalid choice: 'onnxruntme', did you mean 'onnxruntime'": ["--latency", 0.5, "--runtime", "onnxruntme"],
    "--no-real-data needs the input size: --shape C H W": ["--macs", 0.5, "--no-real-data"],
    "--shape takes three numbers, C H W, got [3, 32]": ["--macs", 0.5, "--shape", 3, 32],
    "argument --latency: expected a number in (0, 1], got '2.0'": ["--latency", 2.0],
    "argument --macs: expected a share (0.5) or a whole number, got 'nan'": ["--macs", "nan"],
    "macs=0.01 cannot be met": ["--macs", 0.01],
    "none.json does not exist": ["--latency", 0.5, "--table", "none.json"],
    "list.json: missing or unknown list": ["--latency", 0.5, "--table", "list.json"],
    "config.py is read and would be replaced": ["--write-table", "config.py"],
    "work is a folder, expected a file or nothing": ["--write-table", "work"],
}


def test_refusals_are_one_line_and_write_nothing(folder, capsys):
    (folder / "list.json").write_text("[1]")
    (folder / "work").mkdir()
    (folder / "other.pth").write_bytes((folder / "epoch_1.pth").read_bytes())
    state = build_model(_with(Config.fromfile("config.py"), 0.2, 24)).state_dict()
    save_checkpoint_file({"state_dict": state, "meta": {}}, folder / "other.pth")
    before = sorted(folder.rglob("*"))
    for message, words in WRONG.items():
        assert message in refused(capsys, *TINY, *words), message
    assert "--macs needs a CHECKPOINT after config.py" in refused(capsys, "config.py", "--macs", 0.5)
    assert "nowhere.pth does not exist" in refused(capsys, "config.py", "nowhere.pth", "--macs", 0.5)
    assert "other.pth does not fit" in refused(capsys, "config.py", "other.pth", "--macs", 0.5)
    assert sorted(folder.rglob("*")) == before


def test_a_runtime_that_is_not_installed_is_told_before_anything_is_read(folder, capsys, monkeypatch):
    monkeypatch.setattr("rep_plugin.optional.find_spec", lambda name: None if name == "openvino" else object())
    line = refused(capsys, *TINY, "--latency", 0.8, "--runtime", "openvino")
    assert "runtime='openvino' needs openvino, which is not installed: pip install" in line
    assert not (folder / "depth_plan.json").exists()


def test_where_nothing_goes_there_is_no_next_step(folder, capsys):
    main(["depth", *TINY, "--macs", "1.0", "--no-real-data", "--shape", "3", "32", "32"])
    out = capsys.readouterr().out
    assert "LinearizeHook" not in out and not rep_plugin.DepthPlan.from_json(folder / "depth_plan.json").chosen
