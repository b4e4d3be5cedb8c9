"""tools/prune.py on a trained checkpoint, and what stock code does with its files, in processes of their own."""

import json
import shutil

import pytest
import torch
from mmengine.config import Config

from rep_plugin.history import history_of
from rep_plugin.openmmlab.load import load_model
from rep_plugin.pruning import PrunePlan
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.conftest import ROOT, run
from tests.test_openmmlab.test_hooks.test_reparam_hook import STOCK_TEST

TOOL = ROOT / "tools/prune.py"
FILES = ["pruned.html", "pruned.json", "pruned.plan.json", "pruned.png", "pruned.pth", "pruned.py"]


@pytest.fixture(scope="session")
def pruned(trained):
    done = run(TOOL, "config.py", "work/epoch_2.pth", "--fraction", 0.3, "--out-dir", "pruned", cwd=trained)
    assert done.returncode == 0, done.stderr[-2000:]
    (trained / "prune.log").write_text(done.stdout)
    return trained


def load(folder, config, checkpoint):
    return load_model(Config.fromfile(folder / config), folder / checkpoint)[0]


def test_it_prints_and_writes_what_was_done(pruned):
    log = " ".join((pruned / "prune.log").read_text().split())
    assert "removed" in log and "makes the model output" in log and "max relative error (float64)" in log
    assert sorted(path.name for path in (pruned / "pruned").iterdir()) == FILES
    plan = PrunePlan.from_json(pruned / "pruned/pruned.plan.json")
    assert plan.units[1] == round(0.3 * plan.units[0]) > 0 and plan.input_shape == (1, 3, 96, 96)
    report = json.loads((pruned / "pruned/pruned.json").read_text())
    assert report["max_rel_error"] < 1e-9 and report["params_after"] < report["params_before"]
    assert report["input_shape"] == [1, 3, 96, 96]
    assert report["metrics"].keys() == {"before", "after", "after_bn"} and "accuracy/top1" in log
    assert all(0 <= metrics["accuracy/top1"] <= 100 for metrics in report["metrics"].values())
    assert "statistics of batch norms were measured anew on 48 training images" in log
    cfg = Config.fromfile(pruned / "pruned/pruned.py")
    assert cfg.load_from == str(pruned / "pruned/pruned.pth") and cfg.train_cfg.max_epochs == 1
    assert cfg.optim_wrapper.optimizer.lr == 0.01 and cfg.param_scheduler.type == "CosineAnnealingLR"
    assert cfg.classes == list("abcd") and "birds" not in cfg and "missing_data_hint" not in cfg


def test_stock_test_tool_gives_the_same_predictions_from_the_pruned_files(pruned):
    done = run(STOCK_TEST, "pruned/pruned.py", "pruned/pruned.pth", "--out", "c.pkl", cwd=pruned)
    assert done.returncode == 0 and "do not match exactly" not in done.stdout + done.stderr, done.stderr[-2000:]
    code = """
import mmengine, torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from rep_plugin.openmmlab.load import load_model
cfg = Config.fromfile("pruned/pruned.py")
model = load_model(cfg, "pruned/pruned.pth")[0]
with DefaultScope.overwrite_default_scope("mmpretrain"), torch.no_grad():
    ours = [p for batch in Runner.build_dataloader(cfg.test_dataloader) for p in model.test_step(batch)]
theirs = mmengine.load("c.pkl")
print(len(ours), all(torch.equal(a.pred_score, b["pred_score"]) for a, b in zip(ours, theirs, strict=True)))
"""
    done = run("-c", code, cwd=pruned)
    assert done.stdout.split()[-2:] == ["24", "True"], done.stderr[-2000:]


def test_fine_tuning_goes_on_and_what_comes_out_can_be_merged_and_pruned_again(pruned):
    """pruned.py loads the weights beside it, wherever the folder is, also where ``--resume`` finds nothing yet."""
    shutil.copytree(pruned / "pruned", pruned / "moved")
    options = ["moved/pruned.py", "--work-dir", "tuned_pruned", "--resume"]
    done = run(ROOT / "tools/train.py", *options, "--cfg-options", "optim_wrapper.optimizer.lr=0.001", cwd=pruned)
    assert done.returncode == 0, done.stderr[-2000:]
    before = torch.load(pruned / "pruned/pruned.pth")["state_dict"]
    tuned = load(pruned, "pruned/pruned.py", "tuned_pruned/epoch_1.pth")
    kernels = {name: p for name, p in tuned.named_parameters() if p.dim() > 1}
    assert kernels and not [name for name, p in kernels.items() if torch.equal(p, before[name])]
    assert all(relative_error(before[name], p) < 0.5 for name, p in kernels.items())
    # The config's ReparamHook merges at the end of training.
    x = torch.randn(2, 3, 96, 96)
    merged = load(pruned, "tuned_pruned/deploy.py", "tuned_pruned/deploy.pth")
    assert relative_error(tuned(x), merged(x)) < 1e-4
    assert [step["step"] for step in history_of(merged)] == ["prune", "reparameterize"]

    by_hand = ["pruned/pruned.py", "tuned_pruned/epoch_1.pth", "--out-dir", "merged_pruned"]
    done = run(ROOT / "tools/reparameterize.py", *by_hand, cwd=pruned)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (torch.load(pruned / d / "deploy.pth")["state_dict"] for d in ("merged_pruned", "tuned_pruned"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    again = ["merged_pruned/deploy.py", "merged_pruned/deploy.pth", "--fraction", 0.2, "--scores", "l1"]
    done = run(TOOL, *again, "--out-dir", "again", cwd=pruned)
    assert done.returncode == 0, done.stderr[-2000:]
    final = load(pruned, "again/pruned.py", "again/pruned.pth")
    assert [step["step"] for step in history_of(final)] == ["prune", "reparameterize", "prune"]
    numbers = [sum(p.numel() for p in model.parameters()) for model in (merged, final)]
    assert numbers[1] < numbers[0] and final(x).shape == merged(x).shape


DRIVER = """
import json, sys, torch
from rep_plugin.__main__ import main
torch.set_num_threads(1)
for words in json.load(open("cases.json")):
    try:
        main(["prune", *map(str, words)])
        print("@@ done")
    except SystemExit as error:
        print("@@", str(error).replace(chr(10), "@newline@"))
"""


def tried(folder, cases):
    """One process that runs the tool with each list of words; what each ended with."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run("-c", DRIVER, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line[3:] for line in done.stdout.splitlines() if line.startswith("@@")], done


def test_options(pruned):
    """Each changes the plan as it says. The images of validation give the size unless --shape does."""
    plan = PrunePlan.from_json(pruned / "pruned/pruned.plan.json")
    wide = max(plan.kept, key=lambda name: plan.widths[name][0])
    (pruned / "widths.json").write_text(json.dumps({wide: 64}))
    start = ["config.py", "work/epoch_2.pth", "--no-real-data", "--shape", 3, 64, 64]
    cases = [
        [*start, "--params", 0.9, "--scope", "layer", "--scores", "l2", "--out-dir", "o0"],
        [
            *start,
            "--macs",
            0.8,
            "--min-channels",
            6,
            "--round-to",
            4,
            "--override",
            f"{wide}=frozen",
            "--out-dir",
            "o1",
        ],
        [*start, "--widths", "widths.json", "--cfg-options", "randomness.seed=3", "--out-dir", "o2"],
        [*start, "--plan", "o2/pruned.plan.json", "--out-dir", "o3"],
        [*start, "--macs", 7_000_000, "--ignore", wide, "--override", "backbone.stem*=0.1", "--out-dir", "o4"],
    ]
    ends, _ = tried(pruned, cases)
    assert ends == ["done"] * len(cases)
    plans = [PrunePlan.from_json(pruned / f"o{i}/pruned.plan.json") for i in range(len(cases))]
    assert all(one.input_shape == (1, 3, 64, 64) for one in plans)
    assert plans[0].params_after <= 0.9 * plans[0].params_before and "by l2, scope layer" in plans[0].why
    assert plans[1].macs_after <= 0.8 * plans[1].macs_before and wide in plans[1].frozen
    narrower = [after for before, after in plans[1].widths.values() if after < before]
    assert narrower and min(narrower) >= 6 and all(width % 4 == 0 for width in narrower)
    assert plans[2].widths[wide][1] == 64 and plans[3].kept == plans[2].kept
    assert "ignored" in plans[4].frozen[wide] and plans[4].macs_after <= 7_000_000
    assert Config.fromfile(pruned / "o2/pruned.py").randomness.seed == 3


def test_errors_are_one_line_and_write_nothing(pruned):
    (pruned / "list.json").write_text("[1, 2]")
    (pruned / "broken.json").write_text("{")
    (pruned / "file").write_text("")
    (pruned / "nowhere.json").write_text('{"nowhere": 3}')
    start = ["config.py", "work/epoch_2.pth", "--out-dir", "refused", "--no-real-data", "--shape", 3, 64, 64]
    cases = {
        "params must be a share (a float <= 1.0)": [*start, "--params", 1.5],
        "cannot be met": [*start, "--params", 10],
        "no layer is named like 'nothing'": [*start, "--fraction", 0.3, "--ignore", "nothing"],
        "no layer is named like 'none'": [*start, "--fraction", 0.3, "--override", "none=0.1"],
        "no layer 'nowhere' that makes channels, expected one as backbone.": [*start, "--widths", "nowhere.json"],
        "list.json must hold {layer name: channels kept}, got a list": [*start, "--widths", "list.json"],
        "pruned.json must hold {layer name: channels kept}, got 'action': 'apply_plan'": [
            *start, "--widths", "pruned/pruned.json",
        ],
        "cannot write into file/out: Not a directory": [
            "config.py", "work/epoch_2.pth", "--fraction", 0.3, "--out-dir", "file/out",
        ],
        "broken.json is not JSON: Expecting": [*start, "--widths", "broken.json"],
        "broken.json is not JSON": [*start, "--plan", "broken.json"],
        "plan is for another model": [
            "pruned/pruned.py", "pruned/pruned.pth", *start[2:], "--plan", "pruned/pruned.plan.json",
        ],
        "none.pth does not exist": ["config.py", "none.pth", "--fraction", 0.3, "--out-dir", "refused"],
        "none.py does not exist": ["none.py", "work/epoch_2.pth", "--fraction", 0.3, "--out-dir", "refused"],
        "none.json does not exist": [*start, "--plan", "none.json"],
        "does not fit ImageClassifier": ["config.py", "work/deploy.pth", "--fraction", 0.3, "--out-dir", "refused"],
        "--shape C H W": [*start[:5], "--fraction", 0.3],
        "--shape": [*start[:-1], "--fraction", 0.3],
        "cannot trace ImageClassifier on an input (1, 5, 64, 64) at": [*start[:5], "--shape", 5, 64, 64, "--fraction", 0.3],
    }  # fmt: skip
    ends, done = tried(pruned, list(cases.values()))
    for message, end in zip(cases, ends, strict=True):
        assert message in end and end.startswith("error: ") and "@newline@" not in end, (message, end)
    assert "Traceback" not in done.stderr and not (pruned / "refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--override", "stem"], "expected PATTERN=FRACTION or PATTERN=frozen, got 'stem'"),
        (["--fraction", 1.5], "argument --fraction/--prune-fraction: expected a number in [0, 1), got '1.5'"),
        (["--fraction=-0.1"], "argument --fraction/--prune-fraction: expected a number in [0, 1), got '-0.1'"),
        (["--fraction", "nan"], "argument --fraction/--prune-fraction: expected a number in [0, 1), got 'nan'"),
        (["--macs", 0], "argument --macs: expected a share (0.5) or a whole number, got '0'"),
        (["--bn-images", -1], "argument --bn-images: expected a whole number >= 0, got '-1'"),
        (["--round-to", 0], "argument --round-to: expected a whole number >= 1, got '0'"),
    ],
)
def test_wrong_words_are_refused_by_name(pruned, words, message):
    done = run(TOOL, "config.py", "work/epoch_2.pth", "--fraction", 0.3, *words, cwd=pruned)
    assert done.returncode == 2 and message in done.stderr


def test_it_replaces_neither_what_it_reads_nor_what_nobody_named(pruned):
    """Its names are fixed, and without --out-dir it writes beside the checkpoint."""
    before = {path: path.read_bytes() for path in (pruned / "pruned").glob("pruned.p*")}
    read = ["pruned/pruned.py", "pruned/pruned.pth", "--prune-fraction", 0.1]
    answers, _ = tried(pruned, [[*read], [*read, "--out-dir", "pruned"], ["config.py", "pruned/pruned.pth", *read[2:]]])
    assert all("pruned.pth is read and would be replaced: give another --out-dir" in answer for answer in answers)
    (pruned / "work/pruned.py").write_text("")
    answers, _ = tried(pruned, [["config.py", "work/epoch_2.pth", *read[2:]]])
    (pruned / "work/pruned.py").unlink()
    assert "work/pruned.py exists already: give another folder, or --overwrite to replace it" in answers[0]
    widths = ["config.py", "work/epoch_2.pth", "--widths", "pruned/pruned.json", "--out-dir", "pruned"]
    answers, _ = tried(pruned, [widths])
    assert "pruned/pruned.json is read and would be replaced" in answers[0]
    assert before == {path: path.read_bytes() for path in (pruned / "pruned").glob("pruned.p*")}
