"""``rep-plugin expand`` and ``rep-plugin save``: what they write trains on, merges back, and loads in timm."""

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint

import rep_plugin
from rep_plugin.__main__ import main
from rep_plugin.checkpoints.files import save_checkpoint_file
from rep_plugin.openmmlab.load import build_model, load_model
from rep_plugin.testing import calibrate_random_bn_

CONFIG = """
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet", depth=18, stem_channels=4, base_channels=4),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=32),
)
custom_hooks = [dict(type="rep_plugin.ReparamHook")]
"""


def test_a_config_becomes_one_that_loads_its_expanded_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    cfg, x = Config.fromfile("config.py"), torch.randn(2, 3, 64, 64)
    model = build_model(cfg)
    calibrate_random_bn_(model, x)
    model.eval()
    save_checkpoint_file({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "epoch_1.pth")
    main(["expand", "config.py", "epoch_1.pth", "--block", "acb", "--where", "*layer4*"])
    assert capsys.readouterr().out.endswith(
        f"written: {tmp_path}/expanded.pth, {tmp_path}/expanded.py, {tmp_path}/expanded.json\n"
    )
    (tmp_path / "moved").mkdir()
    for name in ("expanded.pth", "expanded.py"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    written = Config.fromfile("moved/expanded.py")
    assert written.load_from == f"{tmp_path}/moved/expanded.pth" or written.load_from == "moved/expanded.pth"
    assert written.custom_hooks == cfg.custom_hooks
    expanded, _ = load_model(written, written.load_from)
    assert sum(type(m).__name__ == "ACBConv2d" for m in expanded.modules()) == 4
    assert torch.allclose(expanded(x), model(x), rtol=1e-4, atol=1e-5)
    fresh = build_model(written)
    load_checkpoint(fresh, written.load_from)  # as a Runner does
    assert torch.equal(fresh(x), expanded(x))

    with pytest.raises(SystemExit, match=r"^error: .*expanded.pth is read and would be replaced"):
        main(["expand", "moved/expanded.py", "moved/expanded.pth"])
    for words, message in (
        (["config.py"], "the config config.py needs a CHECKPOINT after it"),
        (["resnet18"], "resnet18 needs --out-dir"),
        (["resnet18", "--out-dir", "x", "--block", "dbbb"], "invalid choice: 'dbbb', did you mean 'dbb'?"),
    ):
        with pytest.raises(SystemExit):
            main(["expand", *words])
        assert message in capsys.readouterr().err


def test_a_timm_training_is_saved_in_both_forms_with_its_ema_weights(tmp_path, capsys):
    x = torch.randn(8, 3, 64, 64)
    trained, average = (
        calibrate_random_bn_(timm.create_model("rep_mobilenetv2_035", num_classes=3), x).eval() for _ in range(2)
    )
    state = {"state_dict": trained.state_dict(), "state_dict_ema": average.state_dict(), "epoch": 1, "arch": "x"}
    torch.save(state, tmp_path / "model_best.pth.tar")
    options = ["--checkpoint", str(tmp_path / "model_best.pth.tar"), "--model-args", "num_classes=3"]
    for folder, flags in (("trained", []), ("merged", ["--merge"])):
        main(["save", "rep_mobilenetv2_035", str(tmp_path / folder), *options, *flags])
        assert (
            f"written: {tmp_path / folder}/config.json, {tmp_path / folder}/model.safetensors\n"
            in capsys.readouterr().out
        )
    forms = {name: timm.create_model(f"local-dir:{tmp_path / name}").eval() for name in ("trained", "merged")}
    assert torch.equal(forms["trained"](x), average(x)) and forms["merged"].num_classes == 3
    assert torch.allclose(forms["merged"](x), average(x), rtol=1e-3, atol=1e-4)
    merged = rep_plugin.reparameterize(average)[0]
    assert sum(p.numel() for p in forms["merged"].parameters()) == sum(p.numel() for p in merged.parameters())
    with pytest.raises(SystemExit, match=r"^error: .*model_best.pth.tar does not fit"):
        main(["save", "rep_mobilenetv2_050", str(tmp_path / "wrong"), *options])
    assert not (tmp_path / "wrong").exists()


def test_an_expanded_timm_network_comes_back_key_by_key(tmp_path):
    main(["expand", "test_resnet", "--block", "acb", "--out-dir", str(tmp_path / "expanded")])
    expanded = timm.create_model(f"local-dir:{tmp_path / 'expanded'}")
    torch.save({"state_dict": expanded.state_dict()}, tmp_path / "last.pth.tar")
    words = [
        f"local-dir:{tmp_path / 'expanded'}",
        str(tmp_path / "back"),
        "--checkpoint",
        str(tmp_path / "last.pth.tar"),
    ]
    main(["save", *words, "--merge", "--keep-bn"])
    back, stock = timm.create_model(f"local-dir:{tmp_path / 'back'}"), timm.create_model("test_resnet")
    assert back.state_dict().keys() == stock.state_dict().keys()
