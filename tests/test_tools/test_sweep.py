"""``rep-plugin sweep``: strengths and rates of a network that trains in milliseconds, cut off and gone on with."""

import json
import subprocess
from types import SimpleNamespace

import mmengine.config.config
import pytest

from rep_plugin.__main__ import build_parser, main
from rep_plugin.openmmlab.checkpoint import enable_safe_loading
from rep_plugin.openmmlab.cli import build_runner, load_config
from rep_plugin.openmmlab.runs import merge_train_args
from rep_plugin.openmmlab.sweep import curves_of
from tests.test_openmmlab.test_hooks.tiny import config


@pytest.fixture
def tool(monkeypatch):
    """Runs the command; its trainings run in this process, ``tool.ran`` has their command lines."""
    sweep = SimpleNamespace(ran=[], fail_at=None, main=lambda words: main(["sweep", *words]))

    def run(words, stdout, stderr):
        sweep.ran.append(words)
        if len(sweep.ran) == sweep.fail_at:
            return subprocess.CompletedProcess(words, 1)
        assert words[3:5] == ["-m", "rep_plugin"]
        args = build_parser().parse_args(words[5:])
        cfg = merge_train_args(load_config(args), args)
        cfg.experiment_name = cfg.work_dir.replace("/", "_")
        build_runner(cfg).train()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("rep_plugin.openmmlab.sweep.subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(
        mmengine.config.config, "FormatCode", lambda text, **_: (text, True), raising=False
    )  # yapf takes its time
    enable_safe_loading()
    return sweep


@pytest.fixture
def files(tmp_path):
    """A sparse and a pruning config; arguments of the tool."""
    short = dict(train_cfg=dict(by_epoch=True, max_epochs=1))
    configs = {
        "sparse.py": config(tmp_path, dict(type="rep_plugin.SparsityHook", strength=0.5), **short),
        "prune.py": config(tmp_path, dict(type="rep_plugin.PruneHook", prune_fraction=0.5, begin=0), **short),
    }
    for name, cfg in configs.items():
        cfg.dump(tmp_path / name)
    return [str(tmp_path / "prune.py"), "--sparse", str(tmp_path / "sparse.py"), "--work-dir", str(tmp_path / "out")]


def test_rates_and_strengths_in_one_table_and_nothing_twice(tool, files, tmp_path, capsys):
    arguments = [*files, "--strengths", "0.001", "0.01", "--rates", "0.5", "0.25"]
    tool.fail_at = 4  # both sparse trainings and one rate are done
    with pytest.raises(SystemExit, match=r"^error: the training in .*rate_0.5 failed, see .*log.txt"):
        tool.main(arguments)
    tool.main(arguments)
    assert len(tool.ran) == 4 + 3
    tool.main(arguments)
    assert len(tool.ran) == 4 + 3
    rows = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [(row["start"], row["rate"]) for row in rows] == [
        (f"L1 {strength}", rate) for strength in (0.001, 0.01) for rate in (0.25, 0.5)
    ]
    for row in rows:
        found = json.loads((tmp_path / "out" / row["folder"] / "pruned.rounds.json").read_text())[0]
        assert row["params_after"] == found["params_after"] < row["params_before"]
        assert row["before"] == found["before"]["accuracy/top1"] and row["tuned"] == found["tuned"]["accuracy/top1"]
        assert found["channels_after"] == pytest.approx((1 - row["rate"]) * found["channels_before"], abs=1)
        assert row["ms"] > 0 and row["ms_before"] == rows[0]["ms_before"]
    table = capsys.readouterr().out
    assert (
        "fine-tuned" in table and f"{rows[-1]['params_after']:,}" in table and f"{rows[0]['params_before']:,}" in table
    )
    assert (tmp_path / "out/sweep.png").stat().st_size > 5000
    assert set(curves_of(rows)) == {"L1 0.001", "L1 0.01"}
    assert set(curves_of(rows[:2])) == {"pruned", "fine-tuned"}
    with pytest.raises(SystemExit, match="holds a run with other options"):
        tool.main([*arguments, "--cfg-options", "optim_wrapper.optimizer.lr=0.1"])


def test_what_does_not_fit_is_refused(tool, files, tmp_path):
    with pytest.raises(
        SystemExit, match=r"sparse.py has no PruneHook or SoftPruneHook in custom_hooks, got \['rep_plugin.Sp"
    ):
        tool.main([files[2]])
    with pytest.raises(SystemExit, match="checkpoint None does not exist: give --checkpoint, or --sparse"):
        tool.main(files[:1])
    config(tmp_path, dict(type="rep_plugin.PruneHook", macs=0.5)).dump(tmp_path / "macs.py")
    with pytest.raises(SystemExit, match=r"PruneHook of .*macs.py has no 'prune_fraction', got \['macs', 'type'\]"):
        tool.main([str(tmp_path / "macs.py")])
    for arguments in (["--rates", "1.5"], ["--strengths", "1"], [*files[1:3], "--checkpoint", "a.pth"]):
        with pytest.raises(SystemExit):
            tool.main([files[0], *arguments])
    (tmp_path / "torn.pth").write_bytes(b"PK torn")
    for arguments in (["--sparse", "no.py"], ["--checkpoint", str(tmp_path / "torn.pth")]):
        with pytest.raises(SystemExit, match="no.py does not exist|torn.pth: refused"):
            tool.main([files[0], *arguments, "--work-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
