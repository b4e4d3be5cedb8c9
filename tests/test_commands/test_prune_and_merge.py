"""``rep-plugin prune --scores taylor`` and ``rep-plugin reparameterize --fold-bn``, on a classifier of three folders."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.openmmlab.load import build_model, labelled_batches, load_model
from rep_plugin.testing import calibrate_random_bn_
from tests.test_tools.test_export_tool import CONFIG


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of two classes, a config with a stock network, expanded, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for kind in ("crow", "owl"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for index in range(5):
            pixels = generator.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{index}.png")
    stock = 'type="ResNet", depth=18, stem_channels=8, base_channels=8, conv_cfg=dict(type="rep_plugin.ACBConv2d")'
    text = CONFIG.replace('type="rep_plugin.RepMobileNetV2", widen_factor=0.1, channels_last=True', stock)
    (tmp_path / "config.py").write_text(text.replace("in_channels=1280", "in_channels=64"))
    model = build_model(Config.fromfile("config.py"))
    calibrate_random_bn_(model, torch.randn(4, 3, 32, 36))
    save_checkpoint_file({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "epoch_1.pth")
    return tmp_path


def test_scores_from_gradients_on_validation_images(folder, capsys):
    main(["prune", "config.py", "epoch_1.pth", "--fraction", "0.3", "--scores", "taylor", "--min-channels", "2"])
    model, _ = load_model(Config.fromfile("config.py"), "epoch_1.pth")
    batches = labelled_batches(model, Config.fromfile("config.py"), 256, batch_size=4)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5
    one = [(torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]))]
    wanted = rep_plugin.plan_pruning(
        model, (1, 3, 32, 36), "taylor", 0.3, min_channels=2, loader=one, loss=cross_entropy
    )
    found = rep_plugin.PrunePlan.from_json((folder / "pruned.plan.json").read_text())
    assert found.kept == wanted.kept and "taylor" in found.why
    assert labelled_batches(model, Config.fromfile("config.py"), 3)[0][1].tolist() == [0, 0, 1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["prune", "config.py", "epoch_1.pth", "--macs", "0.5", "--scores", "taylor", "--no-real-data"])
    assert "--scores taylor does not go with --no-real-data" in capsys.readouterr().err


def test_folding_the_networks_own_batch_norms(folder, capsys):
    trained, _ = load_model(Config.fromfile("config.py"), "epoch_1.pth")
    x = torch.randn(2, 3, 32, 36)
    for flags, norms in (([], 20), (["--fold-bn"], 0)):
        main(["reparameterize", "config.py", "epoch_1.pth", "--out-dir", "out", "--overwrite", *flags])
        assert capsys.readouterr().out.endswith(
            "written: out/deploy.pth, out/deploy.py, out/deploy.json, out/deploy.html\n"
        )
        cfg = Config.fromfile("out/deploy.py")
        deployed, _ = load_model(cfg, "out/deploy.pth")
        assert sum(isinstance(module, nn.BatchNorm2d) for module in deployed.modules()) == norms
        with torch.no_grad():
            assert torch.allclose(deployed(x), trained(x), rtol=1e-3, atol=1e-4)
        assert json.loads((folder / "out/deploy.json").read_text())["max_rel_error"] < 1e-9
