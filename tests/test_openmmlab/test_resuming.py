"""A checkpoint that training cannot go on from is refused in one line that names it, before the work folder is touched."""

import copy
import re

import pytest
import torch

from rep_plugin.__main__ import main
from rep_plugin.errors import RepPluginError
from rep_plugin.openmmlab.resuming import require_resumable
from tests.test_openmmlab.test_hooks import tiny

SPARSITY = dict(type="rep_plugin.SparsityHook", strength=0.01)


def nested(levels: int) -> list:
    node: list = []
    for _ in range(levels):
        node = [node, node]
    return node


def without(key):
    return lambda content: content.pop(key)


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def wider(content):
    state = content["state_dict"]
    state["backbone.conv4.weight"] = torch.cat([state["backbone.conv4.weight"]] * 2)


def other_momentum(content):
    state = content["optimizer"]["state"]
    state[0] = {"momentum_buffer": torch.zeros(3)}


WRONG = {
    "meta is missing": lambda content: content.pop("meta"),
    "meta.epoch is 'three'": put("three", "meta", "epoch"),
    "meta.iter is -4": put(-4, "meta", "iter"),
    "meta is .1.": put([1], "meta"),
    "meta.seed is 'a'": put("a", "meta", "seed"),
    "meta.dataset_meta is 'x'": put("x", "meta", "dataset_meta"),
    "message_hub is missing": without("message_hub"),
    "message_hub.log_scalars is missing": put({}, "message_hub"),
    "message_hub.log_scalars is ..": put([], "message_hub", "log_scalars"),
    "optimizer is 3": put(3, "optimizer"),
    "optimizer holds no state": put({"state": {}}, "optimizer"),
    "param_schedulers is 'x'": put("x", "param_schedulers"),
    "1 of another shape": wider,
    "holds the state of another optimizer: loaded state": lambda content: content["optimizer"]["param_groups"][0][
        "params"
    ].pop(),
    r"another optimizer: momentum_buffer of a parameter of shape \(8, 3, 3, 3\) is \(3,\)": other_momentum,
    "holds more than 10,000,000 values": put(nested(40), "meta", "dataset_meta"),
    "more than 100 levels": put(nested(150), "meta", "dataset_meta"),
    "an integer of 33,220 bits": put(10**10_000, "meta", "iter"),
    "cannot be resumed from: meta.iter is 36893488147419103232": put(2**65, "meta", "iter"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    cfg = tiny.config(folder / "work", SPARSITY)
    cfg.train_cfg.update(max_epochs=1)
    tiny.run(cfg)
    cfg.train_cfg.update(max_epochs=2)
    cfg.work_dir = "untouched"
    cfg.dump(folder / "config.py")
    return folder, torch.load(folder / "work/epoch_1.pth", weights_only=False)


def refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *words])
    text = str(caught.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_checkpoint_of_this_training_is_refused(message, trained, tmp_path, monkeypatch, capsys):
    folder, content = trained
    content = copy.deepcopy(content)
    WRONG[message](content)
    torch.save(content, tmp_path / "bad.pth")
    monkeypatch.chdir(tmp_path)
    text = refused([str(folder / "config.py"), "--resume", "bad.pth"], capsys)
    assert "bad.pth" in text
    assert re.search(message, text), text
    assert not (tmp_path / "untouched").exists()


def test_bare_and_torn_files_are_refused(trained, tmp_path, monkeypatch, capsys):
    folder, content = trained
    monkeypatch.chdir(tmp_path)
    torch.save(content["state_dict"], "bare.pth")
    whole = (folder / "work/epoch_1.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[: len(whole) // 2])
    for name, message in {"bare.pth": "state_dict is missing", "torn.pth": "is not readable"}.items():
        text = refused([str(folder / "config.py"), "--resume", name], capsys)
        assert name in text and message in text
    assert not (tmp_path / "untouched").exists()


def test_a_good_checkpoint_passes(trained):
    folder, _ = trained
    for work_dir, load_from in (("work", None), ("elsewhere", "work/epoch_1.pth"), ("elsewhere", None)):
        cfg = tiny.config(folder / work_dir, SPARSITY)
        cfg.update(resume=True, load_from=load_from and str(folder / load_from))
        require_resumable(cfg)
    cfg.model.backbone.width = 16
    cfg.update(work_dir=str(folder / "work"))
    with pytest.raises(RepPluginError, match=r"epoch_1.pth does not fit ImageClassifier: .* of another shape"):
        require_resumable(cfg)
    cfg.custom_hooks = [dict(type="PlainHook")]  # a hook of the user's may change the network before it is loaded
    require_resumable(cfg)
