"""Sets of experiments: real trainings of a tiny network, cut off and gone on with, and what is made of their records."""

import json
import subprocess
import threading
from pathlib import Path

import pytest

from rep_plugin.__main__ import main
from rep_plugin.errors import ArgumentError, TrainingError
from rep_plugin.openmmlab import results
from rep_plugin.openmmlab.experiments import (
    ExperimentSet,
    Row,
    config_of,
    list_sets,
    read_set,
    run_experiments,
    runs_of,
    time_rows,
    train_all,
)
from tests.helpers import ROOT
from tests.test_openmmlab.test_hooks.tiny import config


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The path of a set of three rows: a network, the same pruned, its widths from scratch."""
    monkeypatch.chdir(ROOT)
    short = dict(train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=1))
    hook = dict(type="rep_plugin.PruneHook", prune_fraction=0.5, begin=0)
    config(tmp_path, dict(type="rep_plugin.SparsityHook", strength=0.5), **short).dump(tmp_path / "tiny.py")
    (tmp_path / "tiny_set.py").write_text(
        f"title = 'Tiny'\nseeds = 2\nbaseline = 'scratch'\noptions = {{'train_cfg.max_epochs': 2}}\nrows = {{\n"
        f" 'dense': dict(config={str(tmp_path / 'tiny.py')!r}, hidden=True),\n"
        f" 'pruned': dict(config={str(tmp_path / 'tiny.py')!r}, options={{'custom_hooks': [{hook!r}]}}, start='dense'),\n"
        " 'scratch': dict(widths_of='pruned'),\n}\n"
        "claims = [dict(says='pruning helps', source='nobody', better='pruned', than='scratch')]\n"
    )
    return str(tmp_path / "tiny_set.py")


def test_a_set_is_trained_in_several_goes_and_recorded(tiny, tmp_path, capsys):
    work, lines = tmp_path / "work", []
    left = run_experiments(tiny, work, tmp_path / "records", minutes=1e-3, log=lines.append)
    assert len(left) == 6 and "out of time: 6 runs go on another time" in lines
    words = ["experiments", tiny, "--work-dir", str(work), "--records", str(tmp_path / "records")]
    main([*words, "--seeds", "1", "--cfg-options", "train_cfg.max_epochs=2"])
    text = capsys.readouterr().out
    assert "2 left" in text and "pruned, seed 0: accuracy/top1" in text and "Not complete" in text
    goes = json.loads((work / "dense_seed0/seconds.json").read_text())
    assert len(goes) == 2  # begun, cut off, and gone on with

    records = results.read_records(tmp_path / "records", "tiny_set")
    assert set(records) == {"pruned", "scratch"}  # a hidden row is only started from
    (pruned,), (scratch,) = records["pruned"], records["scratch"]
    assert pruned["start"] == "dense" and scratch["widths_of"] == "pruned"
    assert pruned["costs"]["pruned"] == scratch["costs"]["trained"]
    assert pruned["costs"]["pruned"]["macs"] < pruned["costs"]["trained"]["macs"]
    assert [step for step, _ in pruned["history"]] == [1, 2] and pruned["rounds"][0]["after"] is not None
    assert pruned["metrics"]["accuracy/top1"] == pytest.approx(pruned["history"][-1][1], abs=1e-4)
    assert pruned["options"]["train_cfg.max_epochs"] == 2 and pruned["versions"]["torch"] and pruned["commit"]

    before = {path: path.read_bytes() for path in (tmp_path / "records").rglob("*.json")}
    main([*words, "--seeds", "1", "--cfg-options", "train_cfg.max_epochs=2"])
    assert "training:" not in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "records").rglob("*.json")}
    with pytest.raises(ArgumentError, match="nowhere holds no finished run of tiny_set, expected one at least"):
        time_rows(read_set(tiny), tmp_path / "nowhere", tmp_path)
    main([*words, "--show", "--time"])
    assert "ms, openvino" in capsys.readouterr().out
    latency = results.read_columns(tmp_path / "records", "tiny_set")
    assert latency.keys() == {"ms, onnxruntime", "ms, openvino"}
    assert all(rows.keys() == {"pruned", "scratch"} for rows in latency.values())
    assert all(float(text) > 0 for rows in latency.values() for text in rows.values())
    main([*words, "--show", "--int8"])
    assert "pruned, seed 0: float " in capsys.readouterr().out
    found = json.loads((tmp_path / "records/tiny_set_int8.json").read_text())
    one = found["rows"]["scratch"]["0"]
    assert one["size_bytes"] != one["size_float"] and 0 <= one["naive"] <= 100 and one["file"] == "calibrated.onnx"
    assert one["float"] == pytest.approx(scratch["metrics"]["accuracy/top1"], abs=1e-3)
    assert found["milliseconds"]["openvino"]["int8"].keys() == {"pruned", "scratch"}
    main([*words, "--show", "--int8"])
    assert "pruned, seed 0: float " not in capsys.readouterr().out  # what is in the records is not done again
    assert "int8 - float" in results.read_columns(tmp_path / "records", "tiny_set")
    main([*words, "--show"])
    assert "scratch (1 of 2 seeds)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="holds a run of another config"):
        main([*words, "--rows", "dense", "--cfg-options", "optim_wrapper.optimizer.lr=0.5"])


def test_a_row_trains_what_another_has_deployed(tiny, tmp_path):
    rows = {
        "whole": Row("whole", tiny),
        "tuned": Row("tuned", "", {"optim_wrapper.optimizer.lr": 0.5}, deployed_of="whole"),
    }
    *_, run = runs_of(ExperimentSet("set", "title", rows), tmp_path / "work", seeds=1)
    run.before.mkdir(parents=True)
    (run.before / "deploy.py").write_text("model = dict(type='A')\noptim_wrapper = dict(optimizer=dict(lr=0.1))\n")
    cfg = config_of(run)
    assert cfg.model.type == "A" and cfg.load_from == str(run.before / "deploy.pth")
    assert cfg.optim_wrapper.optimizer.lr == 0.5 and not run.ready


def test_a_training_that_was_killed_goes_on_from_its_checkpoint(tiny, tmp_path):
    (run,) = runs_of(read_set(tiny, {"train_cfg.max_epochs": 40}), tmp_path / "work", seeds=1, rows=["dense"])
    ended = threading.Event()

    def kill():
        while not ended.wait(0.02):
            if (run.folder / "last_checkpoint").is_file():
                subprocess.run(["pkill", "-KILL", "-f", str(run.folder / "config.py")], check=True)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingError, match="1 trainings failed"):
        train_all([run], 1)
    ended.set(), killer.join()
    assert train_all([run], 1) == [] and run.done
    log = (run.folder / "log.txt").read_text()
    assert "resumed epoch: " in log and len(json.loads((run.folder / "seconds.json").read_text())) == 2


def test_two_processes_do_not_train_the_same_run(tiny, tmp_path):
    runs, lines = runs_of(read_set(tiny), tmp_path / "work", seeds=2, rows=["dense"]), []
    threads = [threading.Thread(target=train_all, args=(runs, 2), kwargs=dict(log=lines.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(run.done for run in runs)
    assert [len(json.loads((run.folder / "seconds.json").read_text())) for run in runs] == [1, 1]
    assert sum(line.startswith("training:") for line in lines) == 2


def test_a_training_that_fails_is_named_and_the_others_go_on(tiny, tmp_path):
    experiments = read_set(tiny)
    rows = dict(experiments.rows)
    rows["pruned"] = Row("pruned", rows["dense"].config, {"custom_hooks": [dict(type="NoHook")]}, start="dense")
    runs = runs_of(ExperimentSet("tiny", "Tiny", rows), tmp_path, seeds=1)
    with pytest.raises(TrainingError, match=r"^1 trainings failed, see .*pruned_seed0/log.txt"):
        train_all(runs, 1)
    assert [run.done for run in runs] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 'x'", "is no set of experiments: it has no 'rows'"),
        ("title, rows = 'x', dict(a=dict(config='b', confg='c'))", "unexpected keyword argument 'confg'"),
        (
            "title, rows = 'x', dict(a=dict(options={}))",
            "row 'a' of .* needs a config, or widths_of or deployed_of another row",
        ),
        ("title, rows = 'x', dict(ab=dict(config='b', start='abc'))", "has no row 'abc', did you mean 'ab'"),
    ],
)
def test_a_malformed_set_is_refused(text, message, tmp_path):
    (tmp_path / "one.py").write_text(text)
    with pytest.raises(ArgumentError, match=message):
        read_set(str(tmp_path / "one.py"))


def test_an_unknown_set_and_row_are_named():
    with pytest.raises(ArgumentError, match="no experiment 'warm_strat', expected one of .*did you mean 'warm_start'"):
        read_set("warm_strat")
    with pytest.raises(ArgumentError, match="set 'warm_start' has no row 'stock MobileNet', did you mean 'stock M"):
        runs_of(read_set("warm_start"), Path("nowhere"), rows=["stock MobileNet"])


def test_rows_have_seeds_of_their_own_and_those_they_start_from_have_as_many():
    rows = {
        "dense": Row("dense", "config", hidden=True),
        "sparse": Row("sparse", "config", seeds=1),
        "one": Row("one", "config", start="dense", seeds=1),
        "two": Row("two", "config", start="sparse", seeds=2),
        "three": Row("three", "", widths_of="two"),
        "unused": Row("unused", "config", hidden=True),
    }
    experiments = ExperimentSet("set", "A title", rows)
    assert {name: experiments.seeds_of(name) for name in rows} == dict(
        dense=1, sparse=3, one=1, two=3, three=3, unused=0
    )
    runs = runs_of(experiments, Path("nowhere"))
    assert [str(run) for run in runs if run.seed == 1] == ["sparse, seed 1", "two, seed 1", "three, seed 1"]
    assert len(runs_of(experiments, Path("nowhere"), seeds=2)) == 12
    found = records(one=[1.0], three=[1.0, 2.0])
    assert "Not complete: sparse (0 of 3 seeds), two (0 of 3 seeds), three (2 of 3 seeds)." in results.page_of(
        experiments, found
    )


def test_a_table_has_what_is_left_after_the_removal():
    found = records(a=[3.0, 4.0], b=[1.0, 1.0])
    for run, after in zip(found["a"], (2.0, 3.0)):
        run["rounds"] = [{"before": 3.0, "after": 0.5, "tuned": 2.5}, {"before": 2.5, "after": after, "tuned": None}]
    page = results.page_of(ExperimentSet("set", "A title", {name: Row(name, "config") for name in found}), found)
    assert "| trained as | after removal | mean |" in page and "| a | 2.50 ± 0.71 | 3.50 ± 0.71 |" in page
    assert "| b |  | 1.00 ± 0.00 |" in page


OTHERS = sorted(map(str, (ROOT / "benchmarks/experiments").glob("*.py")))


@pytest.mark.parametrize("name", [*list_sets(), *OTHERS], ids=lambda name: Path(name).stem)
def test_every_shipped_set_has_configs_that_are_there(name):
    experiments = read_set(name)
    assert experiments.baseline in experiments.rows and experiments.claims
    assert not Path(experiments.called).is_absolute()
    for claim in experiments.claims:
        assert {claim["better"], claim["than"]} <= experiments.rows.keys()
    runs = runs_of(experiments, Path("nowhere"), seeds=1)
    assert len({run.folder for run in runs}) == len(runs) == len(experiments.rows)
    for run in runs:
        if run.before is None:
            cfg = config_of(run)
            assert cfg.train_cfg.max_epochs % cfg.train_cfg.get("val_interval", 1) == 0  # the last epoch is validated


def records(**rows):
    costs = {"trained": {"params": 1000, "macs": 2_000_000}}
    common = dict(
        main_metric="top1",
        costs=costs,
        seconds=[{"wall": 90, "cpu": 60}],
        commit="abc",
        processor="p",
        versions={"torch": "2"},
    )
    return {
        name: [dict(common, row=name, seed=seed, metrics={"top1": value}) for seed, value in enumerate(values)]
        for name, values in rows.items()
    }


def test_differences_are_paired_by_seed():
    found = records(a=[3.0, 4.0, 5.0], b=[1.0, 2.5, 2.0], c=[7.0])
    mean, half = results.paired(found["a"], found["b"])
    assert mean == pytest.approx((2 + 1.5 + 3) / 3)
    assert half == pytest.approx(4.3027 * 0.7638 / 3**0.5, rel=1e-3)  # t of 2 degrees of freedom, deviation of the gaps
    assert results.paired(found["c"], found["b"]) == (6.0, None)
    assert results.paired(found["c"], []) is None


@pytest.mark.parametrize(
    ("b", "by", "word"),
    [
        ([1.0, 1.1, 0.9], 0.5, "**holds**"),
        ([1.0, 1.1, 0.9], 3.0, "**does not hold**"),
        ([1.0, 3.9, 0.2], 0.5, "**not decided by these seeds**"),
        ([1.0], 0.5, "one seed only"),
        ([], 0.5, "not measured yet"),
    ],
)
def test_a_claim_holds_or_does_not(b, by, word):
    found = records(a=[3.0, 3.1, 2.9], b=b)
    rows = {name: Row(name, "config") for name in found}
    claim = dict(says="a is better", source="the paper", better="a", than="b", by=by)
    page = results.page_of(ExperimentSet("set", "A title", rows, 3, "b", [claim]), found)
    assert f"a is better (the paper): {'' if not b else 'measured '}" in page and word in page
    assert "| a | 3.00 ± 0.10 | 3.00 3.10 2.90 |" in page and "| 1,000 | 2.00 M | 1.0 |" in page


@pytest.mark.parametrize("kind", ["latency", "int8"])
@pytest.mark.parametrize("text", ["", "[]", '{"milliseconds": 3}'])
def test_a_file_that_is_no_record_of_its_kind_is_named(kind, text, tmp_path):
    (tmp_path / f"set_{kind}.json").write_text(text)
    with pytest.raises(ArgumentError, match=f"set_{kind}.json is no record of {kind}"):
        results.read_columns(tmp_path, "set")


def test_a_table_has_milliseconds_where_they_were_measured():
    found = records(a=[3.0], b=[1.0])
    experiments = ExperimentSet("set", "A title", {name: Row(name, "config") for name in found})
    page = results.page_of(experiments, found, {"ms, openvino": {"a": "0.13"}})
    figure = results.latency_figure_of(
        experiments, found, {"ms, openvino": {"a": "0.13", "b": "0.2"}, "MB": {"a": "1"}}
    )
    (axes,) = figure.axes
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == [(0.13, 3.0), (0.2, 1.0)]
    assert results.latency_figure_of(experiments, found, {"MB": {"a": "1"}}) is None
    assert "| ms, openvino |" in page and "| 1.0 | 0.13 |" in page and "Milliseconds are for one image" in page


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a_seed0.json").write_text('{"row": "a"}')
    with pytest.raises(ArgumentError, match="a_seed0.json is no record of a run"):
        results.read_records(tmp_path, "set")
