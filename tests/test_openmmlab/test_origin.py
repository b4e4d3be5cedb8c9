"""A checkpoint with another network's config is refused with what was done to it, and the config that builds it."""

import pytest
import torch
from mmengine.config import Config

from rep_plugin.errors import CheckpointMismatchError
from rep_plugin.openmmlab.artefacts import write_deployed, write_expanded, write_pruned
from rep_plugin.openmmlab.cli import build_runner, is_another_network, require_whole_checkpoint
from rep_plugin.openmmlab.load import build_model, load_model
from rep_plugin.openmmlab.origin import MADE, explain_misfit, kind_of_checkpoint, kind_of_config
from rep_plugin.pruning import plan_pruning
from rep_plugin.testing import calibrate_random_bn_

X = torch.randn(2, 3, 32, 32)
STOCK = dict(type="ResNet", depth=18, stem_channels=4, base_channels=4)
REP = dict(type="rep_plugin.RepMobileNetV2", widen_factor=0.1, out_indices=(2,))


def config(backbone: dict, channels: int) -> Config:
    net = dict(
        type="ImageClassifier",
        backbone=backbone,
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=2, in_channels=channels),
    )
    return Config(dict(default_scope="mmpretrain", model=net, launcher="none"))


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """{kind: (config before, config, checkpoint)}, each in a folder of its own."""
    made = {}
    for kind, cfg in (("pruned", config(REP, 8)), ("deployed", config(REP, 8)), ("expanded", config(STOCK, 32))):
        folder = tmp_path_factory.mktemp(kind)
        model = calibrate_random_bn_(build_model(cfg), X)
        if kind == "pruned":
            write_pruned(model, cfg, plan_pruning(model, X, "l1", 0.4), folder, X)
        elif kind == "deployed":
            write_deployed(model, cfg, folder, X)
        else:
            write_expanded(model, cfg, "acb", None, folder)
        name = "deploy" if kind == "deployed" else kind
        made[kind] = cfg, folder / f"{name}.py", folder / f"{name}.pth"
    return made


@pytest.mark.parametrize("kind", ["pruned", "deployed", "expanded"])
def test_the_checkpoint_names_its_own_config(artefacts, kind, tmp_path):
    before, own, checkpoint = artefacts[kind]
    meta = torch.load(checkpoint, weights_only=True)["meta"]
    assert kind_of_checkpoint(meta) == kind_of_config(Config.fromfile(own)) == kind
    assert kind_of_config(before) == "plain"
    load_model(Config.fromfile(own), checkpoint)
    end = f"; the checkpoint's network was {kind}: give its own config, {own}"
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(before, checkpoint)
    assert str(caught.value).endswith(end) and "\n" not in str(caught.value)
    # As training and testing load it.
    before = Config(before.to_dict() | dict(work_dir=str(tmp_path), load_from=str(checkpoint)))
    assert is_another_network(before)
    runner = build_runner(before)
    require_whole_checkpoint(runner)
    with pytest.raises(CheckpointMismatchError) as caught:
        runner.load_or_resume()
    assert str(caught.value).endswith(end) and "nothing was loaded" in str(caught.value)


def test_weights_of_the_same_network_with_another_head_are_fine_tuned(artefacts):
    _, own, checkpoint = artefacts["pruned"]
    cfg = Config.fromfile(own)
    assert cfg.load_from == str(checkpoint) and not is_another_network(cfg)
    cfg.model.model.head.num_classes = 5
    assert not is_another_network(cfg)


def test_a_checkpoint_that_was_not_changed(artefacts, tmp_path):
    before, own, _ = artefacts["pruned"]
    path = tmp_path / "epoch_1.pth"
    torch.save({"meta": {"cfg": before.pretty_text}, "state_dict": build_model(before).state_dict()}, path)
    with pytest.raises(
        CheckpointMismatchError, match="was not pruned, the config's is: give the config it was trained"
    ):
        load_model(Config.fromfile(own), path)


def test_the_texts_of_configs_are_read_and_not_run(artefacts, tmp_path):
    """A checkpoint of fine-tuning has no mark, but its config."""
    _, own, _ = artefacts["pruned"]
    meta = {"cfg": f"raise SystemExit\n{own.read_text()}"}
    assert kind_of_checkpoint(meta) == "pruned" and MADE not in meta
    assert kind_of_checkpoint({"cfg": "model = ("}) is kind_of_checkpoint({}) is None
    plain = Config(dict(model=dict(type="ImageClassifier")))
    text = explain_misfit(tmp_path / "epoch_2.pth", meta, plain)
    assert text == "; the checkpoint's network was pruned: give its own config, pruned.py"
    (tmp_path / "mine.py").write_text(own.read_text())
    assert explain_misfit(tmp_path / "epoch_2.pth", meta, plain).endswith(f", {tmp_path / 'mine.py'}")


def test_checkpoints_of_hooks_that_prune_name_what_training_ends_with(tmp_path):
    meta = {"rep_prune": "{}", "cfg": "model = dict(type='ImageClassifier')"}
    plain = Config(dict(model=dict(type="ImageClassifier")))
    text = explain_misfit(tmp_path / "epoch_2.pth", meta, plain)
    assert text == "; the checkpoint was pruned in training: give pruned.py and pruned.pth, written at its end"
    for name in ("pruned.py", "pruned.pth"):
        (tmp_path / name).write_text("")
    assert explain_misfit(tmp_path / "epoch_2.pth", meta, plain).endswith(
        f"give {tmp_path / 'pruned.py'} and pruned.pth"
    )
