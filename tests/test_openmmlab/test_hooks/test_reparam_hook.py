"""What ReparamHook leaves behind, read by stock code in processes of its own."""

import json
from pathlib import Path

import mmpretrain
import torch
from mmengine.config import Config

from rep_plugin.openmmlab.load import load_model
from tests.helpers import relative_error
from tests.test_openmmlab.test_hooks.conftest import ROOT, run

STOCK_TEST = Path(mmpretrain.__file__).parent / ".mim" / "tools" / "test.py"


def test_run_writes_artefact_and_logs_the_report(trained):
    log = (trained / "train.log").read_text()
    assert "deployed model written to" in log and "max relative error (float64)" in log
    report = json.loads((trained / "work/deploy.json").read_text())
    assert report["max_rel_error"] < 1e-10 and report["border_rel_error"] < 1e-10 and report["sensitivity"] > 1e-3
    assert report["input_shape"] == [8, 3, 96, 96] and len(report["blocks"]) == 19
    content = torch.load(trained / "work/deploy.pth", weights_only=True)
    assert set(content) == {"meta", "state_dict"} and content["meta"]["dataset_meta"]["classes"] == list("abcd")
    assert not list((trained / "work").glob("*.new"))


def test_stock_init_model_loads_it_unchanged_and_it_predicts_the_same(trained):
    code = """
import sys, torch
from mmpretrain.apis import init_model
model = init_model(sys.argv[1], sys.argv[2])
model.eval()
names = {type(m).__name__ for m in model.backbone.modules() if not list(m.children())}
torch.save({"names": sorted(names), "logits": model(torch.load(sys.argv[3]))}, sys.argv[4])
"""
    x = torch.randn(4, 3, 97, 96)
    torch.save(x, trained / "x.pt")
    done = run("-c", code, "work/deploy.py", "work/deploy.pth", "x.pt", "out.pt", cwd=trained)
    assert done.returncode == 0 and "do not match exactly" not in done.stdout + done.stderr, done.stderr
    found = torch.load(trained / "out.pt")
    assert found["names"] == ["Conv2d", "ReLU6"]
    # A checkpoint's state dict holds the EMA weights: what validation measured is what is deployed.
    model, _ = load_model(Config.fromfile(trained / "config.py"), trained / "work/epoch_2.pth")
    assert relative_error(model(x), found["logits"]) < 1e-5


def test_stock_test_tool_gives_the_same_predictions(trained):
    trained_run = run(ROOT / "tools/test.py", "config.py", "work/epoch_2.pth", "--out", "a.pkl", cwd=trained)
    deployed = run(STOCK_TEST, "work/deploy.py", "work/deploy.pth", "--out", "b.pkl", cwd=trained)
    assert trained_run.returncode == 0, trained_run.stderr[-2000:]
    assert deployed.returncode == 0, deployed.stderr[-2000:]
    compare = (
        "import mmengine; a, b = mmengine.load('a.pkl'), mmengine.load('b.pkl'); "
        "print(len(a), [int(p['pred_label']) for p in a] == [int(p['pred_label']) for p in b])"
    )
    assert run("-c", compare, cwd=trained).stdout.split() == ["24", "True"]


def test_tool_writes_the_same_artefact_by_hand(trained):
    done = run(ROOT / "tools/reparameterize.py", "config.py", "work/epoch_2.pth", "--out-dir", "by_hand", cwd=trained)
    assert done.returncode == 0 and "max relative error" in done.stdout, done.stderr
    ours, theirs = (torch.load(trained / d / "deploy.pth")["state_dict"] for d in ("by_hand", "work"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (Config.fromfile(trained / d / "deploy.py") for d in ("by_hand", "work"))
    assert ours.model == theirs.model and ours.data_preprocessor == theirs.data_preprocessor


def test_tool_refuses_in_one_line(trained):
    tool = ROOT / "tools/reparameterize.py"
    cases = {
        ("config.py", "none.pth"): "none.pth does not exist",
        ("work/deploy.py", "work/epoch_2.pth"): "does not fit ImageClassifier: 38 missing",
        ("config.py", "work/deploy.pth"): "220 missing",
        ("config.py", "config.py"): "config.py",
    }
    for (config, checkpoint), message in cases.items():
        done = run(tool, config, checkpoint, "--out-dir", "refused", cwd=trained)
        assert done.returncode == 1 and message in done.stderr, (config, checkpoint, done.stderr)
        assert done.stderr.strip().splitlines()[-1].startswith("error:") and "Traceback" not in done.stderr
    assert not (trained / "refused").exists()
    before = (trained / "work/deploy.pth").read_bytes()
    done = run(tool, "config.py", "work/deploy.pth", cwd=trained)  # by default beside the checkpoint, which it is
    assert done.returncode == 1 and "deploy.pth is read and would be replaced: give another" in done.stderr
    done = run(tool, "config.py", "work/epoch_2.pth", cwd=trained)
    assert done.returncode == 1 and "deploy.pth exists already: give another folder, or --overwrite" in done.stderr
    assert (trained / "work/deploy.pth").read_bytes() == before


def test_deployed_model_can_be_fine_tuned(trained):
    options = ["load_from=work/deploy.pth", "train_cfg.max_epochs=1", "optim_wrapper.optimizer.lr=0.001"]
    done = run(ROOT / "tools/train.py", "work/deploy.py", "--work-dir", "tuned", "--cfg-options", *options, cwd=trained)
    assert done.returncode == 0, done.stderr[-2000:]
    before = torch.load(trained / "work/deploy.pth")["state_dict"]
    model, _ = load_model(Config.fromfile(trained / "work/deploy.py"), trained / "tuned/epoch_1.pth")
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == len(before), "every weight trains on"


def test_test_tool_refuses_a_checkpoint_without_its_head(trained):
    content = torch.load(trained / "work/deploy.pth")
    del content["state_dict"]["head.fc.weight"]
    torch.save(content, trained / "headless.pth")
    done = run(ROOT / "tools/test.py", "work/deploy.py", "headless.pth", cwd=trained)
    assert done.returncode == 1 and "1 missing (first: head.fc.weight)" in done.stderr, done.stderr[-500:]
    assert "Traceback" not in done.stderr
